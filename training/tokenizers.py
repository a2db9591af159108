"""Load a tokenizer, and refuse what transformers would let pass without a word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from heedful import UserError
from sources.files import leads_out
from sources.texts import first_few, first_line
from training.configurations import MODEL_FOLDER, load_config, refuse_absent

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(
    name: str, *, own: bool = True, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, a fast one where there is one.

    Args:
        own: Whether it is for the model of the same name, and so must fit that model's embeddings.

    Raises:
        UserError: No tokenizer files (transformers 5 hands back one of five tokens), or more
            tokens than the model has embeddings.
    """
    refuse_absent(name, expected="a folder with a tokenizer, or a Hub id" if not own else MODEL_FOLDER)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code) if own else None
    if os.path.isdir(name) and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"a {'model ' * own}folder without tokenizer files",
            where=name,
            expected=f"one of: {', '.join(TOKENIZER_FILES)}",
            fix="save the model's own tokenizer there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, **kwargs
        )
    except Exception as error:  # of a broken file, whatever Python or the tokenizers library makes of it
        raise UserError(f"no tokenizer could be loaded: {first_line(error)}", where=name) from error
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if wrong := [template for template in templates if "/" in template or leads_out(template)]:
        raise UserError(  # it would be a file's name, once the model is trained
            f"a chat template with the name {wrong[0]!r}", where=name, expected="a plain name", fix="rename it"
        )
    vocab_size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise UserError(
            f"a tokenizer of {len(tokenizer)} tokens for a model of {vocab_size} embeddings",
            where=name,
            fix="use the tokenizer that the model was trained with",
        )
    return tokenizer


def compare_vocabularies(tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> str:
    """Say how a tokenizer differs from the model's own: tokens without a trained row, and those with another's."""
    vocabulary, trained = tokenizer.get_vocab(), {i: token for token, i in own.get_vocab().items()}
    by_id = sorted((i, token) for token, i in vocabulary.items())
    new = [token for i, token in by_id if i not in trained]
    moved = [token for i, token in by_id if i in trained and trained[i] != token]
    said = [f"{len(new):,} new: {first_few(new)}"] if new else []
    said += [f"{len(moved):,} begin with the embedding of another token: {first_few(moved)}"] if moved else []
    return f"of the tokenizer's {len(tokenizer):,} tokens " + (" and ".join(said) or "all are the model's own")
