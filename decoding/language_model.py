"""Another causal language model of transformers (Llama, Mistral, Qwen, ...) in GPT-2's place, behind a prefix.

Imports config, convert, model and transformers; model.py and pretrained.py reach it by late imports. It answers to the
methods of model.GPT2Decoder, so that forward, loss, beams, sampling and adapters are the same for both; the picture's
keys and values are computed once here too, and repeated for its rows, because transformers' cache has a row for each.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from config import UserError, ViTGPT2Config
from convert import find_folder, first_line
from model import DecoderCache, GPT2Decoder, Packing

FILES = ["*.json", "model*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
Looked = list[tuple[Tensor, ...]]


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
        try:
            theirs = AutoConfig.for_model(**json.loads(config.language_model or "{}"))
            self.body: Any = AutoModel.from_config(theirs, dtype=torch.float32)
        except (KeyError, TypeError, ValueError) as error:  # of a newer transformers, or of none
            raise UserError(f"this transformers has no such language model ({first_line(error)}): update it") from error
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

    next_logits = GPT2Decoder.next_logits


def repeated(cross: Looked, rows: int) -> DynamicCache:
    """A cache that starts with each picture's keys and values in all of its rows."""
    past = DynamicCache()
    for index, layer in enumerate(cross):
        key, value = (part.repeat_interleave(rows // len(part), 0) for part in layer)
        past.update(key, value, index)
    return past


def pretrained_language_model(source: str, config: ViTGPT2Config) -> tuple[ViTGPT2Config, dict[str, Tensor], Any]:
    """The sizes, the tensors by our names and the tokenizer of a folder or a Hub name. Raises UserError where it has none
    that fit, or where its captions could not end."""
    if config.bridge != "prefix":
        raise UserError(
            f"{source}: only GPT-2 takes cross-attention, other language models a prefix: add --bridge prefix"
        )
    folder = find_folder(source, FILES)
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        about = theirs.config
        fields: dict[str, Any] = {
            "language_model": json.dumps(about.to_diff_dict() | {"model_type": about.model_type}, sort_keys=True),
            "vocab_size": about.vocab_size,
            "max_length": min(config.max_length, about.max_position_embeddings),
            "decoder_embed_dim": about.hidden_size,
            "decoder_num_layers": about.num_hidden_layers,
            "decoder_num_heads": 1,  # theirs are their own affair
        }
    except Exception as error:  # the client and the many models raise anything
        raise UserError(f"{source}: no language model to be had ({first_line(error)})") from error
    end, start, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    if end is None or not tokenizer.is_fast:
        raise UserError(f"{source}: its tokenizer has no end token, or no tokenizer.json")
    fields |= {"end_token_id": end, "start_token_id": end if start is None else start}
    fields["pad_token_id"] = end if pad is None else pad
    body = {f"decoder.body.{name}": tensor for name, tensor in theirs.base_model.state_dict().items()}
    if not about.tie_word_embeddings:
        body["decoder.lm_head.weight"] = theirs.get_output_embeddings().weight.detach()
    return dataclasses.replace(config, **fields), body, tokenizer
