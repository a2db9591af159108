"""Words to sub-words and back, by the fast tokenizer's own ``word_ids``.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from transformers import BatchEncoding

from heedful import UserError
from tasks.batching import NO_WORD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def word_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find what must stand before each word so that it is tokenized as in running text: nothing, or a space.

    Byte-level tokenizers mark the start of a word by the space before it, which a list of words lacks: without it
    ``["New", "York"]`` reads as ``NewYork``. RoBERTa's and GPT-2's can be loaded with ``add_prefix_space=True``; the
    generic class of ModernBERT, Llama 3 and others takes that argument and ignores it, so the tokenizer is asked.

    Raises:
        UserError: Neither gives the tokens of running text.
    """
    text = tokenizer("a a", add_special_tokens=False, return_offsets_mapping=True)
    # In running text the second word's tokens end beyond the first word; its space may be part of them.
    wanted = [i for i, (_, end) in zip(text["input_ids"], text["offset_mapping"], strict=True) if end > 1]
    for prefix in ("", " "):
        split = tokenizer([prefix + "a"] * 2, is_split_into_words=True, add_special_tokens=False)
        if [i for i, word in zip(split["input_ids"], split.word_ids(), strict=True) if word == 1] == wanted:
            return prefix
    raise UserError(
        f"{type(tokenizer).__name__} tokenizes a list of words differently from running text",
        where=tokenizer.name_or_path,
        expected="a tokenizer that keeps words apart with is_split_into_words=True",
        fix="use another checkpoint, or load its tokenizer with add_prefix_space=True and save it",
    )


def tokenize_words(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[Sequence[str]],
    *,
    prefix: str,
    max_length: int | None = None,
) -> BatchEncoding:
    """Tokenize lists of words, whole or cut at ``max_length``."""
    cut = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    prefixed = [[prefix + word for word in words] for words in sentences]
    return tokenizer(prefixed, is_split_into_words=True, **cut)


def first_subwords(word_ids: Sequence[int | None]) -> list[int]:
    """The word of each token that begins one, NO_WORD elsewhere; T numbers."""
    before = [None, *word_ids]
    return [NO_WORD if word is None or word == last else word for word, last in zip(word_ids, before[:-1], strict=True)]


def subwords_per_word(word_ids: Sequence[int | None], num_words: int) -> list[int]:
    """Number of sub-words of each word; 0 for one that the tokenizer maps to nothing."""
    counts = np.bincount([word for word in word_ids if word is not None], minlength=num_words)
    return [int(count) for count in counts]
