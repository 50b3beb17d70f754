"""Self-critical training (Rennie et al. 2017, arXiv:1612.00563): raise the CIDEr-D of captions that the model samples.

A picture's K samples are one batch of the cached decoder, scored by metrics.CiderD over the training references, and
learned in one folded pass like any K captions, each weighted by how much better it was than its baseline. The end of a
caption is a word, for the metric as for the loss: else nothing speaks against captions that break off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from data.table import CaptionTable
from data.tokenizer import decode
from dataset import IGNORE, Batch, rounded_up
from model import ImageCaptionModel
from scoring.metrics import CiderD, tokenize
from utils import autocast

END = "\n"  # no word holds one


class SelfCritic:
    """Samples captions for a batch's pictures and says what each was worth."""

    def __init__(self, table: CaptionTable, config: TrainConfig, max_length: int) -> None:
        """Counts the references of all training pictures once."""
        self.config, self.max_length = config, max_length
        references = [[[*tokenize(text), END] for text in table.captions_of(row)] for row in range(len(table))]
        self.cider = CiderD(references)

    def words(self, model: ImageCaptionModel, sequences: Tensor) -> list[list[str]]:
        """The words of token ids (R, L), with END where the model ended."""
        ended = sequences.eq(model.config.end_token_id or 0).any(-1).tolist()
        texts = decode(model.tokenizer, sequences)
        return [tokenize(text) + [END] * end for text, end in zip(texts, ended, strict=True)]

    def sample(self, model: ImageCaptionModel, batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
        """A batch (on the device) whose captions are K samples of each of its pictures, with `weights` (N, K): what each
        scored above its baseline; and `rewards` (N, K), the scores themselves."""
        pixels, rows = batch.pixel_values, np.array(batch.rows)
        number, captions = len(rows), self.config.captions_per_image
        if not number:  # a process's share may be nothing: the collate's black picture
            nothing = torch.zeros(1, captions, device=device)
            return replace(batch, weights=nothing, rewards=nothing[:0])
        options: dict[str, Any] = {"max_length": self.max_length}
        model.eval()  # by itself generate keeps nothing for a model in training; here the next step comes at once
        with autocast(device, dtype):
            drawn = model.generate(pixels, do_sample=True, top_k=0, num_return_sequences=captions, **options).sequences
            if self.config.baseline == "greedy":
                greedy = model.generate(pixels, **options).sequences
        model.train()
        rewards = self.cider.reward(np.repeat(rows, captions), self.words(model, drawn)).reshape(number, captions)
        if self.config.baseline == "greedy":
            baseline = self.cider.reward(rows, self.words(model, greedy))[:, None]
        else:
            baseline = (rewards.sum(1, keepdims=True) - rewards) / (captions - 1)
        weights = torch.from_numpy(rewards - baseline).float()
        weights[np.isin(rows, [row for row, _ in batch.bad])] = 0  # pictures that were not seen
        learned: dict[str, Any] = as_captions(drawn.cpu().reshape(number, captions, -1), model)
        learned |= {"weights": weights, "rewards": torch.from_numpy(rewards).float()}
        return replace(batch, **learned).to(device)


def as_captions(sequences: Tensor, model: ImageCaptionModel) -> dict[str, Tensor]:
    """Generated tokens (N, K, L) as the collate would give them: input_ids, labels, lengths and positions."""
    start, end = model.config.start_token_id or 0, model.config.end_token_id or 0
    ended = sequences.eq(end)
    lengths = torch.where(ended.any(-1), ended.int().argmax(-1) + 1, sequences.shape[-1])
    real = torch.arange(sequences.shape[-1]) < lengths[..., None]
    input_ids = torch.cat([torch.full_like(sequences[..., :1], start), sequences[..., :-1]], dim=-1)
    positions = rounded_up(real.flatten().nonzero().squeeze(-1), real.numel())
    labels = sequences.masked_fill(~real, IGNORE)
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths, "positions": positions}
