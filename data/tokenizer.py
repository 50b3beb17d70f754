"""Train a tokenizer on captions, and decode token ids to captions. GPT-2's tokenizer is loaded by weights/file.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from config import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most vocab_size entries (at least 257: the bytes and the end token, which is last).

    Unlike GPT-2's it puts a space before the first word, so that a word is the same token at the start and later.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small to train a tokenizer: it needs at least 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def decode(tokenizer: PreTrainedTokenizerFast, sequences: Tensor) -> list[str]:
    """Decode token ids (N, L) to N captions, without special tokens, leading and trailing spaces."""
    return [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]
