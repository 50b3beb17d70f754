"""Another causal language model of transformers (Llama, Mistral, Qwen, ...) in GPT-2's place, behind a prefix.

It answers to the methods of model.GPT2Decoder, so that forward, loss, beams, sampling and adapters are the same for both;
the picture's keys and values are computed once here too, and repeated for its rows, because transformers' cache has a row
for each. What stands behind a model's last state (a bias, a scale, a cap) is its own code; that all is right is proved.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from config import UserError, ViTGPT2Config
from decoding.cache import DecoderCache, Looked, Packing, next_logits
from decoding.foreign import refused, their_config

KEEPING = (DynamicLayer, DynamicSlidingWindowLayer)  # layers whose cache is all keys and values; the window is a mask's
PROVED_PREFIX = 3  # tokens that stand for a picture when a model is proved


@dataclass
class GrowingCache(DecoderCache):
    """transformers' own cache, of picture and text, for R rows."""

    past: Any = None

    def reorder(self, rows: Tensor) -> None:
        """As DecoderCache's; the picture's part, the same for all rows of a picture, moves along."""
        self.past.reorder_cache(rows)


class Given(nn.Module):
    """Stands in the body's place where the head is asked alone, and hands on the states that it gets."""

    @property
    def decoder(self) -> Given:
        """Itself: some heads ask for a part of their body by this name."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        """States (1, M, D), as they are."""
        states: Any = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)
        states.router_logits = None  # which mixtures of experts ask for
        return states


class TiedLinear(nn.Module):
    """A head's linear layer by the token embeddings, which are stored once: no more than a bias is its own."""

    def __init__(self, embedding: nn.Embedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # past nn.Module, which would store it as a part
        self.register_parameter("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        own: Any = self
        return F.linear(hidden, own.embedding.weight, own.bias)


class LanguageModel(nn.Module):
    """A decoder by transformers: token embeddings, layers and final norm as `body`, beside it what its head has of its own."""

    def __init__(self, config: ViTGPT2Config, lm: Any = None) -> None:
        """lm: transformers' model for the config, which is taken apart (default: a fresh one). Raises UserError."""
        super().__init__()
        self.config = config
        with refused("this transformers has no such language model"):  # of a newer one, or of none
            if lm is None:
                theirs = their_config(config.language_model or "{}", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
                lm = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32, trust_remote_code=False)
            self.body: Any = lm.base_model
            kept = DynamicCache(config=lm.config).layers
        # Since transformers 5.24 "cache", before "past_key_values".
        names = inspect.signature(self.body.forward).parameters
        self.cache_name = next((n for n in ("cache", "past_key_values") if n in names), "")
        if not (self.cache_name and all(type(layer) in KEEPING for layer in kept)):
            raise UserError(f"{type(lm).__name__} keeps no keys and values of all that it reads: name another model")
        if self.wte.weight.shape != (config.vocab_size, config.decoder_embed_dim):
            raise UserError(f"the language model's embeddings are {tuple(self.wte.weight.shape)}, not the config's")
        self.take_head(lm)
        self.gradient_checkpointing = False  # which would compute the picture's part again for each layer's cache

    def take_head(self, lm: Any) -> None:
        """Leaves of the causal language model what stands behind its body, for `head`, and registers that by name."""
        out = lm.get_output_embeddings()
        setattr(lm, lm.base_model_prefix, given := Given())
        if out.weight is self.wte.weight:
            name = next(name for name, module in lm.named_modules() if module is out)
            tied = TiedLinear(self.wte, getattr(out, "bias", None))
            lm.set_submodule(name, tied)
            for module in lm.modules():  # a bias may be there by a second name, which no file can hold
                for other, parameter in module._parameters.items():
                    if parameter is tied.bias and module is not tied:
                        module._parameters[other] = None
            out = tied
        for name, part in lm.named_children():
            if part is not given:
                self.add_module("lm_head" if part is out else name, part)  # one name, as files have it
        self.__dict__["lm"] = lm  # past nn.Module: its parts are registered

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
        """(..., D) -> logits (..., V), by the causal language model's own forward."""
        lm: Any = self.lm
        return lm(inputs_embeds=hidden.flatten(0, -2)[None], use_cache=False).logits[0].unflatten(0, hidden.shape[:-1])

    next_logits = next_logits

    @torch.no_grad()
    def prove(self, expected: Tensor | None = None) -> None:
        """Raises UserError unless words behind a prefix get the same logits from the cache as all at once, and transformers'
        own for few_tokens, `expected` (2, T, V), where those are given."""
        ids, was_training = few_tokens(self.config.vocab_size).to(self.wte.weight.device), self.training
        self.eval()
        prefix, text = self.wte(ids[:1, :PROVED_PREFIX]), ids[:, PROVED_PREFIX:][:, : self.config.text_positions]
        whole = self.head(self(text, self.look(prefix)))
        changed = self.head(self(torch.cat([text[:, :-1], text[:, -1:] + 1], 1), self.look(prefix)))
        cache = self.new_cache(prefix, len(ids), text.shape[1])
        cached = torch.stack([self.next_logits(tokens, cache) for tokens in text.split(1, 1)], 1)
        self.train(was_training)
        theirs = whole if expected is None else expected[:, PROVED_PREFIX:][:, : text.shape[1]]
        for mine, others, fault in (
            (whole[:, :-1], changed[:, :-1], "its words see those behind them: is_decoder in its config.json may help"),
            (whole, cached, "word by word it does not give what it gives all at once"),
            (whole, theirs, "behind a prefix its logits are not what transformers says they are"),
        ):
            if not (mine - others).abs().max() <= 1e-4 * others.abs().max():  # more than rounding, or NaN
                raise UserError(fault)


def few_tokens(vocabulary: int) -> Tensor:
    """int64 (2, PROVED_PREFIX + 4): two texts behind one beginning, without the first ids, which are often special."""
    ids = (torch.arange(2 * (PROVED_PREFIX + 4)) * 7).remainder(vocabulary - 5).view(2, -1) + 4
    ids[1, :PROVED_PREFIX] = ids[0, :PROVED_PREFIX]
    return ids


def repeated(cross: Looked, rows: int) -> DynamicCache:
    """A cache that starts with each picture's keys and values in all of its rows."""
    past = DynamicCache()
    for index, layer in enumerate(cross):
        key, value = (part.repeat_interleave(rows // len(part), 0) for part in layer)
        past.update(key, value, index)
    return past
