"""CLIPScore and PAC-S, with references or without, and self-retrieval: by a CLIP of transformers'."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm  # type: ignore[import-untyped]

from config import UserError
from data.pictures import PictureSource, decode, reason
from decoding.foreign import load_theirs, refused
from utils import hub_folder, in_one_line


class ClipScores(NamedTuple):
    """clip_score, clip_retrieval and, with references, ref_clip_score of N pictures; or pac_score and so on."""

    corpus: dict[str, float]  # the means
    per_picture: dict[str, NDArray[np.float64]]  # (N,) each


FACTORS = {"clip": 2.5, "pac": 2.0}
CLIP_PREFIX = "A photo depicts "


def clip_scores(
    candidates: Sequence[str],
    pictures: Sequence[PictureSource],
    references: Sequence[Sequence[str]] | None = None,
    model: str | Path = "openai/clip-vit-base-patch32",
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    progress: bool = True,
    metric: Literal["clip", "pac"] = "clip",
) -> ClipScores:
    """CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv:2104.08718); or, with a CLIP that learned from captions and
    pictures made by models, PAC-S and RefPAC-S (Sarto et al. 2023, arXiv:2303.12112).

    With CLIP's embeddings c of the caption, r of a reference and v of the picture, CLIPScore is 2.5 max(cos(c, v), 0),
    PAC-S 2 max(cos(c, v), 0), and with references the harmonic mean of it and max(0, the largest cos(c, r)). The
    retrieval is 1 where, of all N pictures, the caption's is nearest to it, else 0; its mean is R@1. Captions and
    references start with "A photo depicts ", and what is longer than CLIP's text is cut. model names a CLIP on the Hub or a
    folder with its weights (safetensors) and processor; the papers' are ViT-B/32, and numbers of another one do not
    compare with theirs. The arithmetic is fp32.

    Raises UserError where the weights cannot be had, a picture cannot be read, or the lists do not fit together.
    """
    if not candidates or len(candidates) != len(pictures) or len(candidates) != len(references or candidates):
        raise UserError("CLIPScore needs a caption, and where there are references some of them, for every picture")
    if references is not None and not all(references):
        raise UserError(f"picture {[bool(captions) for captions in references].index(False)} has no reference")
    clip = Clip(model, torch.device(device), batch_size, progress)
    image = clip.pictures(pictures)  # (N, D)
    text = clip.captions(candidates)  # (N, D)
    score = similarity(text, image, metric)  # (N,)
    nearest_picture = torch.cat([(part @ image.T).argmax(-1) for part in text.split(1024)])
    found = (nearest_picture == torch.arange(len(text))).double()
    scores = {f"{metric}_score": score, f"{metric}_retrieval": found}
    if references is not None:
        different = list(dict.fromkeys(itertools.chain.from_iterable(references)))
        index = {caption: i for i, caption in enumerate(different)}
        known = clip.captions(different)
        rows = [[index[caption] for caption in captions] for captions in references]
        best = [(known[row] @ caption).max() for caption, row in zip(text, rows, strict=True)]
        nearest = torch.stack(best).clamp(min=0)
        total = score + nearest
        scores[f"ref_{metric}_score"] = torch.where(total > 0, 2 * score * nearest / total, torch.zeros(()))
    each = {name: values.numpy() for name, values in scores.items()}
    return ClipScores({name: float(values.mean()) for name, values in each.items()}, each)


def similarity(text: Tensor, image: Tensor, metric: Literal["clip", "pac"]) -> Tensor:
    """CLIPScore or PAC-S (N,) of captions' and pictures' embeddings, (N, D) each, of length 1."""
    return FACTORS[metric] * (text * image).sum(-1).clamp(min=0)


class Clip:
    """A CLIP of transformers' that gives embeddings of length 1, float64 (N, D), on the CPU."""

    def __init__(self, name: str | Path, device: torch.device, batch_size: int = 64, progress: bool = False) -> None:
        from transformers import AutoModel, CLIPProcessor

        with refused(f"CLIP {str(name)!r} cannot be loaded: name a folder with its weights"):
            local = Path(name).is_dir()
            folder = name if local else hub_folder(str(name), ["*.json", "model*.safetensors", "merges.txt"])
            self.model = load_theirs(AutoModel, Path(folder), ("clip",))[0].to(device).eval()
            self.processor: Any = CLIPProcessor.from_pretrained(folder, trust_remote_code=False)
        self.device, self.batch_size, self.progress = device, batch_size, progress

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions, the prefix put before each."""
        longest = self.model.config.text_config.max_position_embeddings

        def embed(batch: Sequence[str]) -> Tensor:
            words = [CLIP_PREFIX + text for text in batch]
            inputs = self.processor.tokenizer(
                words, padding=True, truncation=True, max_length=longest, split_special_tokens=True, return_tensors="pt"
            ).to(self.device)
            return self.model.text_projection(self.model.text_model(**inputs).pooler_output)

        return self._in_batches(texts, embed, "CLIP reads")

    def pictures(self, sources: Sequence[PictureSource]) -> Tensor:
        """Embeddings of pictures."""

        def embed(batch: Sequence[PictureSource]) -> Tensor:
            inputs = self.processor.image_processor([_pixels(source) for source in batch], return_tensors="pt")
            pixel_values = inputs["pixel_values"].to(self.device)
            return self.model.visual_projection(self.model.vision_model(pixel_values).pooler_output)

        return self._in_batches(sources, embed, "CLIP looks")

    @torch.no_grad()
    def _in_batches(self, items: Sequence[Any], embed: Any, what: str) -> Tensor:
        starts = tqdm(range(0, len(items), self.batch_size), what, unit="batch", disable=not self.progress)
        parts = [embed(items[start : start + self.batch_size]).cpu().double() for start in starts]
        return normalize(torch.cat(parts), dim=-1)


def _pixels(source: PictureSource) -> NDArray[np.uint8]:
    """A picture as uint8 (H, W, 3) at its full size, as CLIP's own preprocessing wants it."""
    try:
        return decode(source, 1 << 15)
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        name = "picture" if isinstance(source, bytes) or not isinstance(source, str | os.PathLike) else str(source)
        raise UserError(in_one_line(f"{name}: not a picture that can be read ({reason(error)})")) from error
