"""Another causal language model of transformers (Llama, Mistral, Qwen, ...) in GPT-2's place, behind a prefix.

It answers to the methods of model.GPT2Decoder, so that forward,
loss, beams, sampling and adapters are the same for both; the picture's keys and values are computed once here too, and
repeated for its rows, because transformers' cache has a row for each.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from config import UserError, ViTGPT2Config
from decoding.cache import DecoderCache, Looked, Packing, next_logits
from decoding.foreign import refused, their_config


@dataclass
class GrowingCache(DecoderCache):
    """transformers' own cache, of picture and text, for R rows."""

    past: Any = None

    def reorder(self, rows: Tensor) -> None:
        """As DecoderCache's; the picture's part, the same for all rows of a picture, moves along."""
        self.past.reorder_cache(rows)


class LanguageModel(nn.Module):
    """A decoder by transformers: token embeddings, layers and final norm as `body`, and a head unless that is tied."""

    def __init__(self, config: ViTGPT2Config) -> None:
        super().__init__()
        self.config = config
        with refused("this transformers has no such language model"):  # of a newer one, or of none
            theirs = their_config(config.language_model or "{}", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
            self.body: Any = AutoModel.from_config(theirs, dtype=torch.float32, trust_remote_code=False)
            if self.wte.weight.shape != (config.vocab_size, config.decoder_embed_dim):
                raise UserError(f"the language model's embeddings are {tuple(self.wte.weight.shape)}, not the config's")
        # Since transformers 5.24 "cache", before "past_key_values".
        self.cache_name = next(
            n for n in ("cache", "past_key_values") if n in inspect.signature(self.body.forward).parameters
        )
        if not theirs.tie_word_embeddings:
            self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.gradient_checkpointing = False  # which would compute the picture's part again for each layer's cache

    @property
    def wte(self) -> nn.Embedding:
        """The token embeddings."""
        return self.body.get_input_embeddings()

    def look(self, encoder_hidden_states: Tensor) -> Looked:
        """The prefix (N, S, D) -> layers x (keys, values), each (N, heads, S, head size)."""
        past: Any = DynamicCache()
        self.body(inputs_embeds=encoder_hidden_states, use_cache=True, **{self.cache_name: past})
        return [(layer.keys, layer.values) for layer in past.layers]

    def cross_attentions(self) -> list[nn.Module]:
        """None: it reads a prefix."""
        return []

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> GrowingCache:
        """As GPT2Decoder's; the cache grows by itself, whatever max_length is."""
        cross = self.look(encoder_hidden_states)
        return GrowingCache(cross, [], past=repeated(cross, rows))

    def forward(
        self, input_ids: Tensor, cross: Looked, packing: Packing | None = None, cache: GrowingCache | None = None
    ) -> Tensor:
        """input_ids (N * K, T) -> the last layer's normalised states (N * K, T, D), or (M, D) with a packing."""
        length = (cache.length if cache else 0) + input_ids.shape[1]
        if length > self.config.text_positions:
            raise ValueError(f"a caption of {length} tokens does not fit into {self.config.text_positions} positions")
        past = cache.past if cache else repeated(cross, len(input_ids))
        x = self.body(inputs_embeds=self.wte(input_ids), use_cache=True, **{self.cache_name: past}).last_hidden_state
        if cache:
            cache.length = length
        return packing.pack(x) if packing else x

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return self.lm_head(hidden) if hasattr(self, "lm_head") else F.linear(hidden, self.wte.weight)

    next_logits = next_logits


def repeated(cross: Looked, rows: int) -> DynamicCache:
    """A cache that starts with each picture's keys and values in all of its rows."""
    past = DynamicCache()
    for index, layer in enumerate(cross):
        key, value = (part.repeat_interleave(rows // len(part), 0) for part in layer)
        past.update(key, value, index)
    return past
