"""Self-critical training (Rennie et al. 2017, arXiv:1612.00563): raise the score of captions that the model samples.

A picture's K samples are one batch of the cached decoder, scored by CIDEr-D over the training references, by PAC-S or by
both, and learned in one folded pass like any K captions, each weighted by how much its score is above the baseline. A
caption without an end token scores less (CIDEr-D counts the end as a word) or nothing (PAC-S), or else the model learns to
break captions off.

With reference_weight the picture's references are learned in the same pass, so that the model keeps their variety (rewards
and cross-entropy mixed as by Paulus et al. 2018, arXiv:1705.04304). The loss is a mean over all tokens, so the rewards'
part is then about half of what it is alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import TrainConfig, UserError
from data.table import CaptionTable
from data.tokenizer import decode
from dataset import IGNORE, Batch, rounded_up
from model import ImageCaptionModel
from scoring.clip import Clip, similarity
from scoring.metrics import CiderD
from scoring.tokens import TOKENIZERS
from utils import autocast

END = "\n"  # no word holds one


class SelfCritic:
    """Samples captions for a batch's pictures and scores them."""

    def __init__(
        self, table: CaptionTable, config: TrainConfig, max_length: int, device: torch.device, tokenizer: str = "ptb"
    ) -> None:
        """Counts the references of all training pictures once. tokenizer: one of scoring.tokens.TOKENIZERS."""
        self.table, self.config, self.max_length = table, config, max_length
        self.tokenize = TOKENIZERS[tokenizer]
        references = [[[*self.tokenize(text), END] for text in table.captions_of(row)] for row in range(len(table))]
        self.cider = CiderD(references) if config.reward != "pac_s" else None
        self.clip = Clip(config.pac, device) if config.pac else None
        self.embeddings: dict[int, Tensor] = {}  # (D,) of each picture that was in a batch: it is decoded once a run

    def score(self, model: ImageCaptionModel, rows: np.ndarray, sequences: Tensor) -> np.ndarray:
        """Rewards (R,) of the captions with token ids (R, L), each for the picture in its row (R,) of the table.

        mix adds CIDEr-D (0 to 10) and PAC-S (0 to 2) as they are.
        """
        ended = sequences.eq(model.config.end_token_id).any(-1).tolist()
        texts = decode(model.tokenizer, sequences)
        rewards = np.zeros(len(rows))
        if self.cider:
            words = [self.tokenize(text) + [END] * end for text, end in zip(texts, ended, strict=True)]
            rewards += self.cider.reward(rows, words)
        if self.clip:
            rewards += similarity(self.clip.captions(texts), self.pictures(self.clip, rows), "pac").numpy() * ended
        return rewards

    def pictures(self, clip: Clip, rows: np.ndarray) -> Tensor:
        """CLIP's embeddings (R, D) of the pictures at full size; zeros for one that cannot be read. One picture at a time, so
        that a resumed run gets the same bits."""
        for row in set(rows.tolist()) - self.embeddings.keys():
            try:
                self.embeddings[row] = clip.pictures([self.table.picture(row)])[0]
            except UserError:  # damaged: the loader has counted it, and its captions get no weight
                self.embeddings[row] = torch.zeros(clip.model.config.projection_dim, dtype=torch.float64)
        return torch.stack([self.embeddings[row] for row in rows.tolist()])

    def sample(self, model: ImageCaptionModel, batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
        """A batch (on the device) whose captions are K samples of each of its pictures, with `rewards` (N, K), their scores,
        and `weights` (N, K), their scores above the baseline. With reference_weight the references follow: (N, 2 * K)."""
        pixels, rows = batch.pixel_values, np.array(batch.rows)
        number, captions = len(rows), self.config.captions_per_image
        if not number:  # this process's share is empty: the collate's black picture
            nothing = torch.zeros(1, captions, device=device)
            return replace(batch, weights=nothing, rewards=nothing[:0])
        options: dict[str, Any] = {"max_length": self.max_length}
        model.eval()  # in training mode generate would not keep its packed weights
        with autocast(device, dtype):
            drawn = model.generate(pixels, do_sample=True, top_k=0, num_return_sequences=captions, **options).sequences
            if self.config.baseline == "greedy":
                greedy = model.generate(pixels, **options).sequences
        model.train()
        rewards = self.score(model, np.repeat(rows, captions), drawn.cpu()).reshape(number, captions)
        if self.config.baseline == "greedy":
            baseline = self.score(model, rows, greedy.cpu())[:, None]
        else:
            baseline = (rewards.sum(1, keepdims=True) - rewards) / (captions - 1)
        weights = torch.from_numpy(rewards - baseline).float()
        weights[np.isin(rows, [row for row, _ in batch.bad])] = 0  # pictures that could not be read
        learned: dict[str, Any] = as_captions(drawn.cpu().reshape(number, captions, -1), model)
        if share := self.config.reference_weight:
            learned = side_by_side(learned, batch, model)
            weights = torch.cat([weights, torch.full(batch.lengths.shape, share)], 1)
        learned |= {"weights": weights, "rewards": torch.from_numpy(rewards).float()}
        return replace(batch, **learned).to(device)


def side_by_side(samples: dict[str, Tensor], batch: Batch, model: ImageCaptionModel) -> dict[str, Tensor]:
    """The fields of K samples and, after them, of the batch's K references: (N, 2 * K, T)."""
    pairs = {name: (samples[name], getattr(batch, name).cpu()) for name in ("input_ids", "labels")}
    longest = max(tensor.shape[-1] for tensor in pairs["labels"])
    filled = {"input_ids": model.config.pad_token_id, "labels": IGNORE}
    joined = {
        name: torch.cat([F.pad(each, (0, longest - each.shape[-1]), value=filled[name]) for each in pair], 1)
        for name, pair in pairs.items()
    }
    lengths = torch.cat([samples["lengths"], batch.lengths.cpu()], 1)
    real = torch.arange(longest) < lengths[..., None]
    return joined | {"lengths": lengths, "positions": rounded_up(real.flatten().nonzero().squeeze(-1), real.numel())}


def as_captions(sequences: Tensor, model: ImageCaptionModel) -> dict[str, Tensor]:
    """Generated tokens (N, K, L) as the collate would give them: input_ids, labels, lengths and positions."""
    start, end = model.config.start_token_id, model.config.end_token_id
    ended = sequences.eq(end)
    lengths = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, sequences.shape[-1])
    real = torch.arange(sequences.shape[-1]) < lengths[..., None]
    input_ids = torch.cat([torch.full_like(sequences[..., :1], start), sequences[..., :-1]], dim=-1)
    positions = rounded_up(real.flatten().nonzero().squeeze(-1), real.numel())
    labels = sequences.masked_fill(~real, IGNORE)
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths, "positions": positions}
