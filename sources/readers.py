"""Rows from wherever the user keeps them: a file, a folder, the Hub, or the command line.

A source is one of
    path/to/file.csv        also .tsv .json .jsonl .parquet, and .conll .iob .iob2 .bio .bioes .txt for tokens and tags
    path/to/saved           written by ``Dataset.save_to_disk``; of a ``DatasetDict``, path/to/saved:train
    owner/name:train        a data set on the Hub; owner/name[config]:train names its configuration,
                            owner/name@revision:train a branch, a tag or a commit
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfApi

from heedful import UserError
from sources.cells import check_row_wise, convert, split_words
from sources.columns import Column, ColumnKind
from sources.conll import looks_like_words, read_conll
from sources.files import sha256_of
from sources.matching import match_columns
from sources.streams import BLOCK_READERS, hub_blocks
from sources.tables import (
    Dialect,
    Table,
    from_dataset,
    log,
    read_csv,
    read_json,
    read_jsonl,
    read_parquet,
    read_text,
    with_fields,
)
from sources.texts import counted

TEXT_READERS = {".csv": read_csv, ".tsv": read_csv, ".json": read_json, ".jsonl": read_jsonl, ".ndjson": read_jsonl}
CONLL_SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".bioes")
SUFFIXES = (*TEXT_READERS, ".parquet", *CONLL_SUFFIXES, ".txt")
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?:\[(?P<config>[^\]]+)\])?:(?P<split>.+)"
)
COMMIT = re.compile("[0-9a-f]{40}")
PART = "|||"


def read_rows(
    source: str,
    *,
    columns: tuple[Column, ...],
    mapping: Mapping[str, str],
    need_targets: bool = True,
    dialect: Dialect | None = None,
    max_rows: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Read the columns that a task asks for, exactly as they stand, or refuse with the place of the fault.

    Args:
        source: See the top of this file.
        columns: What the task reads.
        mapping: Role -> the user's column name, for names other than the usual ones; ``a.b`` is the field b of a.
        need_targets: False to read inputs only, for prediction.
        dialect: How text files are written.
        max_rows: Keep a random sample of so many rows, in their order; only these rows are checked.
        seed: Of that sample.

    Returns:
        Canonical rows: a column for each role found, and ``row`` from 0.

    Raises:
        UserError: Whatever would make the rows other than what the user believes them to be.
    """
    dialect = dialect or Dialect()
    wanted = [column for column in columns if need_targets or not column.target]
    table = with_fields(_open_filled(source, wanted, dialect), mapping.values())
    names = match_columns(table, columns, mapping, need_targets=need_targets)
    _say_unused(table, set(names.values()))
    table = _sample(table, max_rows, seed)
    return _converted(table, columns, names, separator=dialect.label_separator, split=not need_targets)


def read_blocks(
    source: str,
    *,
    columns: tuple[Column, ...],
    mapping: Mapping[str, str],
    size: int,
    start: int = 0,
    dialect: Dialect | None = None,
    say_unused: bool = False,
) -> Iterator[datasets.Dataset]:
    """Read one pass over a source that may be larger than memory; only the block at hand is held, and checked.

    Args:
        source: A ``.jsonl``, ``.ndjson`` or ``.parquet`` file, or a data set on the Hub.
        size: Rows in a block; the last one may be smaller.
        start: Rows to pass over.
        say_unused: Name the columns that are not read, which is wanted once and not at every pass.

    Yields:
        Rows as ``read_rows`` returns them, ``row`` counted over all blocks.

    Raises:
        UserError: As ``read_rows``, when the block at fault is reached; a source that can not be streamed.
    """
    dialect = dialect or Dialect()
    for table in _open_blocks(source, size=size, start=start, encoding=dialect.encoding):
        table = with_fields(table, mapping.values())
        names = match_columns(table, columns, mapping, need_targets=True)
        if say_unused:
            _say_unused(table, set(names.values()))
        yield _converted(table, columns, names, separator=dialect.label_separator, split=False, first=start)
        start += table.size


def _converted(
    table: Table,
    columns: Sequence[Column],
    names: Mapping[str, str],
    *,
    separator: str | None,
    split: bool,
    first: int = 0,
) -> datasets.Dataset:
    found = [column for column in columns if column.role in names]
    data, features = {}, datasets.Features({"row": datasets.Value("int64")})
    for column in found:
        data[column.role], features[column.role] = convert(
            table, names[column.role], column, separator=separator, split=split
        )
    check_row_wise(table, data, found)
    rows = list(range(first, first + table.size))
    return datasets.Dataset.from_dict({"row": rows, **data}, features=features)


def read_texts(
    source: str, *, columns: Sequence[str], usual: Collection[str], dialect: Dialect | None = None
) -> dict[str, list[str]]:
    """Read texts alone, as a tokenizer is trained on; a list of words is joined by spaces.

    Args:
        source: See the top of this file; a ``.txt`` file holds one text a line.
        columns: The columns to read; none takes those that have a usual name.
        usual: Names that texts usually have.

    Returns:
        Column -> its texts.

    Raises:
        UserError: No such column, no column with a usual name, cells that are no texts.
    """
    table = _open_filled(source, (Column("text", "text", ("text",)),), dialect or Dialect())
    table = with_fields(table, columns)
    plain = Path(source).suffix == ".txt"  # has no columns that could be named
    names = table.names if plain else columns or [name for name in table.names if name in usual]
    missing = [name for name in names if name not in table.names]
    if missing or not names:
        near = get_close_matches(missing[0], table.names, n=1) if missing else []
        raise UserError(
            f"no column {missing[0]!r}" if missing else "no column with a usual name for texts",
            where=source,
            expected=f"one of the columns there: {', '.join(map(repr, table.names))}",
            fix=table.hint or (f"did you mean {near[0]!r}?" if near else f"name it: --columns {table.names[0]}"),
        )
    _say_unused(table, set(names))
    return {name: _plain_texts(table, name) for name in names}


def _plain_texts(table: Table, name: str) -> list[str]:
    kind: ColumnKind = "words" if any(isinstance(cell, list) for cell in table.cells(name)) else "text"
    cells, _ = convert(table, name, Column(name, kind, (name,)), separator=None, split=False)
    return cells if kind == "text" else [" ".join(words) for words in cells]


def rows_from_text(text: str, columns: tuple[Column, ...]) -> datasets.Dataset:
    """Make one row of a text given on the command line; several inputs are parted by ``|||``.

    Words are split by ``split_words``; a question is written ``question ||| context``.

    Raises:
        UserError: Not as many parts as the task has inputs.
    """
    inputs = [c for c in columns if not c.target and c.role != "id"]
    if not any(column.required for column in inputs):  # alternatives: the first is the one that a text stands for
        inputs = inputs[:1]
    parts = [part.strip() for part in text.split(PART)] if len(inputs) > 1 else [text]
    least = max(1, sum(column.required for column in inputs))
    if not least <= len(parts) <= len(inputs) or not all(parts):
        raise UserError(
            f"{counted(len(parts), 'parts')} in {text[:60]!r}",
            where="the text on the command line",
            expected=f" {PART} ".join(column.role for column in inputs),
            fix=f"part the inputs by {PART}, or give a jsonl file with these columns",
        )
    cells = {c.role: split_words(p) if c.kind == "words" else p for c, p in zip(inputs, parts, strict=False)}
    return datasets.Dataset.from_list([{"row": 0, **cells}])


def find_splits(folder: str) -> dict[str, str]:
    """Find the sources of train, validation and test in a folder: ``train.csv``, ``dev.jsonl``, ...

    A folder of the Hub's layout (``data/train-00000-of-00001.parquet``) and one saved by ``save_to_disk`` do too.

    Returns:
        Split -> source, for those that are there; ``train`` always is.

    Raises:
        UserError: No train split, or two files for one split.
    """
    path = Path(folder)
    if not path.is_dir():
        raise _not_found(folder)
    if (path / "state.json").is_file():
        return {"train": folder}
    saved = path / "dataset_dict.json"
    names = [child.name for child in path.iterdir() if child.is_dir()] if saved.is_file() else []
    sources = {name: [f"{folder}:{name}"] for name in names} or _files_by_stem(path)
    found: dict[str, str] = {}
    for split, aliases in SPLIT_NAMES.items():
        candidates = sorted(source for alias in aliases for source in sources.get(alias, []))
        if len(candidates) > 1:
            raise UserError(
                f"{len(candidates)} candidates for {split}: {', '.join(candidates)}",
                where=folder,
                expected="one",
                fix=f"name it: data.{split}={candidates[0]}",
            )
        if candidates:
            found[split] = candidates[0]
    if "train" not in found:
        raise UserError(
            f"no train split among {sorted(child.name for child in path.iterdir())[:12]}",
            where=folder,
            expected=f"train with one of the endings {' '.join(SUFFIXES)}",
            fix="name the files: data.train=FILE data.validation=FILE",
        )
    return found


def pinned(source: str) -> str:
    """The same source, of a data set on the Hub as it is now: with the commit that its name stands for.

    Raises:
        UserError: The Hub can not be asked.
    """
    if _locate(source)[0] is not None:
        return source
    named = _hub_name(source)
    with _asking_the_hub(source):
        commit = HfApi().dataset_info(named["name"], revision=named["revision"]).sha
    return f"{named['name']}@{commit}" + (f"[{named['config']}]" if named["config"] else "") + f":{named['split']}"


def fingerprint(source: str) -> str:
    """Hash the bytes that a source stands for (sha256, hexadecimal); of a folder, names and bytes of all its files.

    Of a data set on the Hub that is named with its commit, it is that commit: a stream's bytes are not at hand.
    """
    path, split = _locate(source)
    if path is None:
        if COMMIT.fullmatch(_hub_name(source)["revision"] or ""):
            return str(_hub_name(source)["revision"])
        files = sorted(Path(item["filename"]) for item in _load_hub(source).cache_files)
        return _hash_files([(str(i), file) for i, file in enumerate(files)])
    if path.is_file():
        return sha256_of(path)
    root = path / split if split else path
    return _hash_files(sorted((str(file.relative_to(root)), file) for file in root.rglob("*") if file.is_file()))


def _hash_files(files: Sequence[tuple[str, Path]]) -> str:
    return hashlib.sha256("".join(f"{name}\0{sha256_of(file)}\n" for name, file in files).encode()).hexdigest()


def _files_by_stem(folder: Path) -> dict[str, list[str]]:
    """Stem -> files, with the Hub's shard numbers taken off the stem."""
    found: dict[str, list[str]] = {}
    for file in [*folder.glob("*"), *folder.glob("data/*")]:
        if file.is_file() and file.suffix in SUFFIXES:
            stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
            found.setdefault(stem, []).append(str(file))
    return found


def _open_filled(source: str, columns: Sequence[Column], dialect: Dialect) -> Table:
    table = _open(source, columns, dialect)
    if not table.size:
        raise UserError("0 rows", where=source, expected="at least one row", fix="check how the file was written")
    return table


def _open_blocks(source: str, *, size: int, start: int, encoding: str) -> Iterator[Table]:
    path, _ = _locate(source)
    if path is None:
        return hub_blocks(_load_hub(source, streaming=True), source=source, size=size, start=start)
    if path.suffix in BLOCK_READERS:
        return BLOCK_READERS[path.suffix](path, size=size, start=start, encoding=encoding)
    raise UserError(
        f"data.streaming=true with {'a folder' if path.is_dir() else f'a file that ends in {path.suffix!r}'}",
        where=source,
        expected=f"{' '.join(BLOCK_READERS)} or a data set on the Hub",
        fix="convert it, or leave data.streaming out: what save_to_disk wrote is not read into memory anyway",
    )


def _open(source: str, columns: Sequence[Column], dialect: Dialect) -> Table:
    path, split = _locate(source)
    if path is None:
        return from_dataset(_load_hub(source), source=source)
    if path.is_dir():
        return _open_folder(path, split)
    if path.suffix in TEXT_READERS:
        return TEXT_READERS[path.suffix](path, dialect)
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix in CONLL_SUFFIXES or (path.suffix == ".txt" and _holds_words(path, columns, dialect)):
        return read_conll(path, dialect)
    if path.suffix == ".txt":
        return _read_lines(path, columns, dialect)
    raise UserError(
        f"a file that ends in {path.suffix!r}" if path.suffix else "a file without an ending",
        where=source,
        expected=f"one of {' '.join(SUFFIXES)}",
        fix="rename or convert the file",
    )


def _holds_words(path: Path, columns: Sequence[Column], dialect: Dialect) -> bool:
    """Whether a ``.txt`` file has a word on each line, as it must where words and tags are wanted.

    Where words alone are, it may as well hold a sentence on each line; the lines themselves tell.
    """
    kinds = {column.kind for column in columns}
    if "words" not in kinds or "tags" in kinds:
        return "words" in kinds
    words = looks_like_words(read_text(path, dialect.encoding))
    if not words:
        log.warning("%s: a sentence on each line; a file with a word on each line ends in .conll", path)
    return words


def is_local(source: str) -> bool:
    """Whether a source, or a model, is a file or a folder here, maybe with the name of a split after it."""
    before, colon, _ = source.rpartition(":")
    # Unlike those of Path these give no error where a name is too long for a file.
    return os.path.exists(source) or bool(colon and os.path.isdir(before))


def _locate(source: str) -> tuple[Path | None, str | None]:
    """Path and split of a local source; no path for a data set on the Hub."""
    if os.path.exists(source):
        return Path(source), None
    if is_local(source):
        before, _, split = source.rpartition(":")
        return Path(before), split
    if HUB_ID.fullmatch(source) and not source.startswith("."):
        return None, None
    raise _not_found(source)


def _not_found(source: str) -> UserError:
    path = Path(source)
    expected, fix = "an existing file or folder", "for a data set on the Hub name its split: owner/name:train"
    folder = path.parent
    if not folder.is_dir():
        expected += f" (there is no folder {str(folder)!r} either)"
    else:
        near = get_close_matches(path.name, [child.name for child in folder.iterdir()], n=1)
        fix = f"did you mean {folder / near[0]}?" if near else fix
    return UserError("no such file or folder", where=source, expected=expected, fix=fix)


def _open_folder(path: Path, split: str | None) -> Table:
    """Open what ``save_to_disk`` wrote; of several splits, the one named."""
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        files = sorted(child.name for child in path.iterdir())[:12]
        raise UserError(
            f"a folder with {files}",
            where=str(path),
            expected="a file, or a folder written by save_to_disk",
            fix="name one of the files; data.train=FOLDER alone finds train, validation and test in it",
        )
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # of a file that is lost or broken: OSError, ValueError, KeyError, Arrow's own
        raise UserError(
            f"no readable data set: {type(error).__name__}: {error}",
            where=str(path),
            expected="the folder as save_to_disk wrote it",
            fix="save or copy it again",
        ) from error
    if isinstance(loaded, datasets.Dataset) and split is None:
        return from_dataset(loaded, source=str(path))
    splits = list(loaded) if isinstance(loaded, datasets.DatasetDict) else []
    if split not in splits:
        raise UserError(
            f"the split {split!r}" if split else "no split named",
            where=str(path),
            expected=f"one of {splits}" if splits else "no split: the folder holds a single data set",
            fix=" or ".join(f"{path}:{name}" for name in splits) or str(path),
        )
    return from_dataset(loaded[split], source=f"{path}:{split}")


def _load_hub(source: str, *, streaming: bool = False) -> Any:
    named = _hub_name(source)
    with _asking_the_hub(source):
        return datasets.load_dataset(
            named["name"], named["config"], split=named["split"], revision=named["revision"], streaming=streaming
        )


def _hub_name(source: str) -> dict[str, Any]:
    match = HUB_ID.fullmatch(source)
    assert match is not None  # _locate let it through
    return match.groupdict()


@contextmanager
def _asking_the_hub(source: str) -> Iterator[None]:
    try:
        yield
    # The library raises its own errors, the HTTP client's, and plain ValueError, RuntimeError and OSError here.
    except Exception as error:
        raise UserError(
            f"{type(error).__name__}: {str(error).strip()[:400]}",
            where=source,
            expected="an existing file, or a data set that can be had from the Hub: owner/name[config]:split",
            fix="check the name, the split, the network, HF_HUB_OFFLINE; for a gated set: `hf auth login`",
        ) from error


def _read_lines(path: Path, columns: Sequence[Column], dialect: Dialect) -> Table:
    """Read a plain text file as the task's text or first required input, one row a line; blank lines are no rows."""
    role = next((c.role for c in columns if c.required), None) or next(c.role for c in columns if c.role == "text")
    lines = read_text(path, dialect.encoding).replace("\r\n", "\n").split("\n")
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    blank = len(lines) - len(kept) - (not lines[-1])
    if blank:
        log.warning("%s: %s left out", path, counted(blank, "blank lines"))
    return Table(str(path), (role,), len(kept), lambda _: [line for _, line in kept], lambda i: f"line {kept[i][0]}")


def _say_unused(table: Table, used: set[str]) -> None:
    unused = [name for name in table.names if name not in used]
    if unused:
        log.warning("%s: columns not used: %s", table.source, ", ".join(map(repr, unused)))


def _sample(table: Table, max_rows: int | None, seed: int) -> Table:
    if max_rows is None or max_rows >= table.size:
        return table
    log.warning("%s: a random %d of %d rows (seed %d)", table.source, max_rows, table.size, seed)
    indices = np.random.default_rng(seed).choice(table.size, max_rows, replace=False)
    return table.take(sorted(int(i) for i in indices))
