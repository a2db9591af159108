"""``heedful tokenizer train``: learn a tokenizer from the texts of any files that the tasks read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from heedful import UserError
from pipelines import config as configuration
from pipelines.preparation import build_accelerator, build_console, dialect, tell
from sources.readers import read_texts
from sources.tables import Dialect
from sources.texts import counted
from tasks import TASKS
from training.vocabulary import Kind, save_tokenizer, train_tokenizer

SETTINGS = ("data.delimiter", "data.encoding", "data.quotes")


def train(
    out: str,
    given: Sequence[str],
    *,
    kind: Kind,
    vocab_size: int,
    columns: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
    lowercase: bool = False,
    console: Console | None = None,
) -> Path:
    """Train a tokenizer and leave it in a folder that ``AutoTokenizer`` opens.

    Args:
        out: A folder that is not there yet, or empty.
        given: Sources, and settings of how they are written, e.g. ``data.delimiter=tab``.
        columns: Where the texts are; none takes those with a usual name.

    Returns:
        The folder.

    Raises:
        UserError: Nothing to read, no such column, a vocabulary too small, or a folder in use; nothing is written.
    """
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError("something is there already", where=out, expected="a new folder", fix="name another one")
    console = build_console(build_accelerator(bf16=False), console)
    how, sources = read_settings(given, out)
    texts: list[str] = []
    for source in sources:
        for column, found in read_texts(source, columns=columns, usual=usual_names(), dialect=how).items():
            tell(console, f"{source}: {counted(f'{len(found):,}', 'texts')} in the column {column!r}")
            texts += found
    tokenizer = train_tokenizer(
        texts, kind=kind, vocab_size=vocab_size, special_tokens=special_tokens, lowercase=lowercase
    )
    save_tokenizer(tokenizer, folder, texts=texts)
    tell(console, *describe(tokenizer, vocab_size), f"tokenizer   {folder}")
    return folder


def read_settings(given: Sequence[str], out: str) -> tuple[Dialect, list[str]]:
    """Part the settings from the sources.

    Raises:
        UserError: No source, or a setting that has no effect here.
    """
    settings = [argument for argument in given if re.match(r"data\.\w+=", argument)]
    for key in (setting.partition("=")[0] for setting in settings):
        if key not in SETTINGS:
            raise UserError(f"{key!r} has no effect on a tokenizer", expected=f"one of: {', '.join(SETTINGS)}")
    sources = [argument for argument in given if argument not in settings]
    if not sources:
        raise UserError("no file with texts", expected=f"heedful tokenizer train {out} FILE ...")
    nothing = {"task": "classification", "output_dir": out, "model": {"name": out}}
    return dialect(configuration.override(nothing, settings, where="the command line").data), sources


def usual_names() -> set[str]:
    """The names that any task looks for its texts under."""
    columns = [column for entry in TASKS.values() for column in entry.columns]
    return {name for c in columns if c.kind in ("text", "words") and c.role != "id" for name in c.names}


def describe(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[str]:
    """How large it became, and which ids its special tokens have."""
    size = f"{tokenizer.backend_tokenizer.model.__class__.__name__}: {len(tokenizer):,} tokens"
    if len(tokenizer) < vocab_size:
        size += f" of the {vocab_size:,} asked for: the texts hold no more"
    return [size, "special tokens: " + ", ".join(f"{t} {i}" for i, t in special_ids(tokenizer))]


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, str]]:
    """Its special tokens, by their ids."""
    return sorted(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
