"""CLIPScore and PAC-S, with or without references, and self-retrieval, by a CLIP in transformers' format."""

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
    """Scores of N pictures: clip_score, clip_retrieval and, with references, ref_clip_score; or pac_score and so on."""

    corpus: dict[str, float]  # means over the pictures
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
    """CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv:2104.08718); or, with a CLIP that was also trained on
    generated captions and pictures, PAC-S and RefPAC-S (Sarto et al. 2023, arXiv:2303.12112).

    c, r and v are CLIP's embeddings of the caption, a reference and the picture. CLIPScore is 2.5 max(cos(c, v), 0),
    PAC-S is 2 max(cos(c, v), 0). With references, the score is the harmonic mean of that and max(0, the largest
    cos(c, r)). The retrieval is 1 where the caption's picture is the nearest to it of all N, else 0; its mean is R@1.
    Captions and references start with "A photo depicts ", and are cut at CLIP's longest text. model is a CLIP on the
    Hub, or a folder with its weights (safetensors) and processor. The papers use ViT-B/32; numbers of other models do
    not compare with theirs. CLIP runs in fp32.

    Raises UserError where the weights are not available, a picture cannot be read, or the lists do not match.
    """
    if not candidates or len(candidates) != len(pictures) or len(candidates) != len(references or candidates):
        raise UserError("CLIPScore needs one caption, and with references at least one of them, for every picture")
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
    """CLIPScore or PAC-S (N,) from embeddings of captions and pictures, (N, D) each, of length 1."""
    return FACTORS[metric] * (text * image).sum(-1).clamp(min=0)


class Clip:
    """A CLIP in transformers' format. Its embeddings have length 1 and are float64 (N, D), on the CPU."""

    def __init__(self, name: str | Path, device: torch.device, batch_size: int = 64, progress: bool = False) -> None:
        from transformers import AutoModel, CLIPProcessor

        with refused(f"CLIP {str(name)!r} cannot be loaded: name a folder with its weights"):
            local = Path(name).is_dir()
            folder = name if local else hub_folder(str(name), ["*.json", "model*.safetensors", "merges.txt"])
            self.model = load_theirs(AutoModel, Path(folder), ("clip",))[0].to(device).eval()
            self.processor: Any = CLIPProcessor.from_pretrained(folder, trust_remote_code=False)
        self.device, self.batch_size, self.progress = device, batch_size, progress

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions, each with CLIP_PREFIX before it."""
        longest = self.model.config.text_config.max_position_embeddings

        def embed(batch: Sequence[str]) -> Tensor:
            words = [CLIP_PREFIX + text for text in batch]
            inputs = self.processor.tokenizer(
                words, padding=True, truncation=True, max_length=longest, split_special_tokens=True, return_tensors="pt"
            ).to(self.device)
            return self.model.text_projection(self.model.text_model(**inputs).pooler_output)

        return self._in_batches(texts, embed, "CLIP, captions")

    def pictures(self, sources: Sequence[PictureSource]) -> Tensor:
        """Embeddings of pictures."""

        def embed(batch: Sequence[PictureSource]) -> Tensor:
            inputs = self.processor.image_processor([_pixels(source) for source in batch], return_tensors="pt")
            pixel_values = inputs["pixel_values"].to(self.device)
            return self.model.visual_projection(self.model.vision_model(pixel_values).pooler_output)

        return self._in_batches(sources, embed, "CLIP, pictures")

    @torch.no_grad()
    def _in_batches(self, items: Sequence[Any], embed: Any, what: str) -> Tensor:
        starts = tqdm(range(0, len(items), self.batch_size), what, unit="batch", disable=not self.progress)
        parts = [embed(items[start : start + self.batch_size]).cpu().double() for start in starts]
        return normalize(torch.cat(parts), dim=-1)


def _pixels(source: PictureSource) -> NDArray[np.uint8]:
    """A picture as uint8 (H, W, 3) in full size, as CLIP's preprocessing expects it."""
    try:
        return decode(source, 1 << 15)
    except Exception as error:  # Pillow raises many kinds for damaged files
        name = "picture" if isinstance(source, bytes) or not isinstance(source, str | os.PathLike) else str(source)
        raise UserError(in_one_line(f"{name}: not a picture that can be read ({reason(error)})")) from error
