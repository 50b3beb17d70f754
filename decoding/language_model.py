"""A causal language model of transformers (Llama, Mistral, Qwen, ...) as decoder instead of GPT-2, with a prefix.

It has the methods of model.GPT2Decoder, so that forward, loss, beams, sampling and adapters are the same for both. The
picture's keys and values are computed once, then repeated for its rows, because transformers' cache has one entry per
row. What follows the last state (a bias, a scale, a cap) is left to the model's code, and `prove` checks the result.
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

KEEPING = (DynamicLayer, DynamicSlidingWindowLayer)  # caches of keys and values only; the window is set by a mask
PROVED_PREFIX = 3  # number of tokens used as the prefix when a model is checked


@dataclass
class GrowingCache(DecoderCache):
    """transformers' KV cache of picture and text, for R rows."""

    past: Any = None

    def reorder(self, rows: Tensor) -> None:
        """As in DecoderCache; the picture's keys and values move too, but all rows of a picture have the same."""
        self.past.reorder_cache(rows)


class IdentityBody(nn.Module):
    """Replaces the body so that the head can run alone: returns the states that it gets."""

    @property
    def decoder(self) -> IdentityBody:
        """Itself, because some heads call body.decoder."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        """Return the states (1, M, D) unchanged."""
        states: Any = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)
        states.router_logits = None  # mixture-of-experts models read it
        return states


class TiedLinear(nn.Module):
    """A head's linear layer that shares the weight of the token embeddings and has at most a bias itself."""

    def __init__(self, embedding: nn.Embedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # nn.Module would register it as a submodule and save it twice
        self.register_parameter("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        layer: Any = self
        return F.linear(hidden, layer.embedding.weight, layer.bias)


class LanguageModel(nn.Module):
    """A decoder from transformers: `body` is embeddings, layers and final norm; the head's modules are beside it."""

    def __init__(self, config: ViTGPT2Config, lm: Any = None) -> None:
        """lm: transformers' model for the config (default: a new random one); it is changed. Raises UserError."""
        super().__init__()
        self.config = config
        with refused("this version of transformers has no such language model"):  # a newer version may, or none
            if lm is None:
                theirs = their_config(config.language_model or "{}", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
                lm = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32, trust_remote_code=False)
            self.body: Any = lm.base_model
            layers = DynamicCache(config=lm.config).layers
        # "cache" since transformers 5.24, "past_key_values" before.
        names = inspect.signature(self.body.forward).parameters
        self.cache_name = next((n for n in ("cache", "past_key_values") if n in names), "")
        if not (self.cache_name and all(type(layer) in KEEPING for layer in layers)):
            raise UserError(f"{type(lm).__name__} does not cache keys and values in every layer: name another model")
        if self.wte.weight.shape != (config.vocab_size, config.decoder_embed_dim):
            raise UserError(f"the language model's embeddings are {tuple(self.wte.weight.shape)}, not the config's")
        self.take_head(lm)
        self.gradient_checkpointing = False  # not used: each layer would compute the picture's part again

    def take_head(self, lm: Any) -> None:
        """Reduce the causal language model to the modules after its body, for `head`, and register them by name."""
        out = lm.get_output_embeddings()
        setattr(lm, lm.base_model_prefix, given := IdentityBody())
        if out.weight is self.wte.weight:
            name = next(name for name, module in lm.named_modules() if module is out)
            tied = TiedLinear(self.wte, getattr(out, "bias", None))
            lm.set_submodule(name, tied)
            for module in lm.modules():  # a bias may be registered under a second name, which safetensors cannot save
                for other, parameter in module._parameters.items():
                    if parameter is tied.bias and module is not tied:
                        module._parameters[other] = None
            out = tied
        for name, part in lm.named_children():
            if part is not given:
                self.add_module("lm_head" if part is out else name, part)  # the same name for all models in our files
        self.__dict__["lm"] = lm  # not as a submodule, because its modules are registered already

    @property
    def wte(self) -> nn.Embedding:
        """The token embeddings."""
        return self.body.get_input_embeddings()

    def look(self, encoder_hidden_states: Tensor) -> Looked:
        """Compute every layer's (keys, values) of the prefix (N, S, D), each (N, heads, S, head size)."""
        past: Any = DynamicCache()
        self.body(inputs_embeds=encoder_hidden_states, use_cache=True, **{self.cache_name: past})
        return [(layer.keys, layer.values) for layer in past.layers]

    def cross_attentions(self) -> list[nn.Module]:
        """Return no modules, because the decoder reads a prefix."""
        return []

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> GrowingCache:
        """As in GPT2Decoder, but the cache grows as needed, so max_length is not used."""
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
        """(..., D) -> logits (..., V), with the causal language model's forward."""
        lm: Any = self.lm
        return lm(inputs_embeds=hidden.flatten(0, -2)[None], use_cache=False).logits[0].unflatten(0, hidden.shape[:-1])

    next_logits = next_logits

    @torch.no_grad()
    def prove(self, expected: Tensor | None = None) -> None:
        """Check the model on few_tokens. Raises UserError unless text after a prefix gets the same logits token by
        token with the cache as in one pass, and the logits `expected` (2, T, V) of transformers, if given."""
        ids, was_training = few_tokens(self.config.vocab_size).to(self.wte.weight.device), self.training
        self.eval()
        prefix, text = self.wte(ids[:1, :PROVED_PREFIX]), ids[:, PROVED_PREFIX:][:, : self.config.text_positions]
        full = self.head(self(text, self.look(prefix)))
        changed = self.head(self(torch.cat([text[:, :-1], text[:, -1:] + 1], 1), self.look(prefix)))
        cache = self.new_cache(prefix, len(ids), text.shape[1])
        cached = torch.stack([self.next_logits(tokens, cache) for tokens in text.split(1, 1)], 1)
        self.train(was_training)
        theirs = full if expected is None else expected[:, PROVED_PREFIX:][:, : text.shape[1]]
        for mine, others, fault in (
            (full[:, :-1], changed[:, :-1], "its tokens attend to later ones: try is_decoder in its config.json"),
            (full, cached, "its logits token by token differ from those of one pass"),
            (full, theirs, "its logits after a prefix differ from those of transformers"),
        ):
            if not (mine - others).abs().max() <= 1e-4 * others.abs().max():  # more than rounding, or a NaN
                raise UserError(fault)


def few_tokens(vocabulary: int) -> Tensor:
    """int64 (2, PROVED_PREFIX + 4): two texts with the same prefix, without the first ids, which are often special."""
    ids = (torch.arange(2 * (PROVED_PREFIX + 4)) * 7).remainder(vocabulary - 5).view(2, -1) + 4
    ids[1, :PROVED_PREFIX] = ids[0, :PROVED_PREFIX]
    return ids


def repeated(cross: Looked, rows: int) -> DynamicCache:
    """Make a cache that starts with each picture's keys and values in all of its rows."""
    past = DynamicCache()
    for index, layer in enumerate(cross):
        key, value = (part.repeat_interleave(rows // len(part), 0) for part in layer)
        past.update(key, value, index)
    return past
