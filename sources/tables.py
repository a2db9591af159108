"""Files as raw tables: what each format holds, cell by cell, with nothing guessed, converted or dropped in silence.

The readers of ``datasets`` guess types: "007" becomes 7, "None" becomes null, a semicolon file becomes one column.
Text formats are therefore read here, with the line of every row kept for the messages; parquet and saved data sets,
which carry their types, go through ``datasets``.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from heedful import UserError
from sources.texts import counted

log = logging.getLogger("heedful.sources")

DELIMITERS = {",": ",", ";": ";", "tab": "\t", r"\t": "\t", "|": "|"}
ROWS_NAMED = 5


@dataclass(frozen=True)
class Dialect:
    """How text files are written; the section ``data`` of the configuration.

    Args:
        delimiter: Between the cells of a csv file; null is a comma, in a tsv file a tab. ``tab`` stands for a tab.
        encoding: Of every text file.
        quotes: Whether ``"`` encloses cells; false reads it as any other character, as in the GLUE tsv files.
        label_separator: Splits one text cell into several labels.
    """

    delimiter: str | None = None
    encoding: str = "utf-8"
    quotes: bool = True
    label_separator: str | None = None


@dataclass(frozen=True)
class Table:
    """Raw columns, loaded when asked for.

    Args:
        source: What the user named, for messages.
        names: The columns there are.
        size: Number of rows.
        cells: Column name -> its cells, ``None`` where there is none.
        place: Row index -> where the user finds it (``line 7``).
        hint: What may be wrong with the file, should a column be missing.
    """

    source: str
    names: tuple[str, ...]
    size: int
    cells: Callable[[str], list[Any]]
    place: Callable[[int], str]
    hint: str = ""

    def take(self, indices: Sequence[int]) -> Table:
        """Keep these rows; their places stay those of the file."""

        def cells(name: str) -> list[Any]:
            column = self.cells(name)
            return [column[i] for i in indices]

        return replace(self, size=len(indices), cells=cells, place=lambda i: self.place(indices[i]))

    def places(self, rows: Sequence[int]) -> str:
        """Name the first few of these rows, and how many more there are."""
        named = ", ".join(self.place(i) for i in rows[:ROWS_NAMED])
        return named + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")

    def fault(self, name: str, rows: Sequence[int], *, found: str, expected: str, fix: str) -> UserError:
        """Build the error for these rows of the column ``name``."""
        where = f"{self.source}, column {name!r}, {self.places(rows)}"
        share = f"{len(rows)} of {counted(self.size, 'rows')}"
        return UserError(f"{found} ({share})", where=where, expected=expected, fix=fix)


def read_text(path: Path, encoding: str) -> str:
    """Decode a whole file; a byte order mark is dropped.

    Raises:
        UserError: Bytes that are not in ``encoding``, an unknown encoding, an empty file.
    """
    text = decode(path.read_bytes(), encoding, path)
    if not text.strip():
        raise UserError("the file is empty", where=str(path), expected="rows", fix="check how the file was written")
    return text


def decode(data: bytes, encoding: str, path: Path, *, line: int = 1) -> str:
    """Decode a file, or the part of it that begins on this line; a byte order mark is dropped.

    Raises:
        UserError: Bytes that are not in ``encoding``, an unknown encoding.
    """
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        guess = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise UserError(
            f"byte 0x{data[error.start]:02x} at offset {error.start} is not {encoding}",
            where=f"{path}, line {line}",
            expected=f"{encoding} text",
            fix=f"convert the file to utf-8, or give its encoding (data.encoding={guess}, latin-1, ...), "
            "which then holds for all splits",
        ) from None
    except (LookupError, ValueError) as error:  # no such codec, or one that is not for files, such as punycode
        raise UserError(
            f"unknown encoding {encoding!r}: {error}",
            where="data.encoding",
            expected="a name that Python knows, e.g. utf-8",
        ) from None


def read_csv(path: Path, dialect: Dialect) -> Table:
    """Read every cell of a csv or tsv file (RFC 4180) as text.

    Raises:
        UserError: A row with more or fewer cells than the header, an open quote, a column name given twice.
    """
    usual = "\t" if path.suffix == ".tsv" else ","
    delimiter = DELIMITERS.get(dialect.delimiter or usual, dialect.delimiter or usual)
    if len(delimiter) != 1:
        raise UserError(f"{delimiter!r} as delimiter", where="data.delimiter", expected="one character, or tab")
    text = read_text(path, dialect.encoding)
    quoting = csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE
    with _any_cell_size():
        reader = csv.reader(io.StringIO(text, newline=""), **_format(delimiter, quoting))
        records = list(_records(path, reader, hint=_other_delimiter([text.split("\n", 1)[0]], delimiter)))
    (_, header), body = records[0], records[1:]
    _refuse_twins(path, header)
    for line, cells in body:
        if len(cells) != len(header):
            raise UserError(
                counted(len(cells), "cells"),
                where=f"{path}, line {line}",
                expected=f"{counted(len(header), 'cells')}, as in the header ({', '.join(map(repr, header))})",
                fix="put a cell that holds the delimiter in double quotes; set data.delimiter if it is another one",
            )
    place = {name: i for i, name in enumerate(header)}
    return Table(
        source=str(path),
        names=tuple(header),
        size=len(body),
        cells=lambda name: [cells[place[name]] for _, cells in body],
        place=lambda i: f"line {body[i][0]}",
        hint=_other_delimiter(header, delimiter),
    )


def _format(delimiter: str, quoting: int) -> dict[str, Any]:
    return {"delimiter": delimiter, "quoting": quoting, "strict": quoting != csv.QUOTE_NONE}


@contextmanager
def _any_cell_size() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a cell, which is global, for the length of one read."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _records(path: Path, reader: Any, *, hint: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line on which it starts; blank lines hold no record.

    Args:
        hint: What to do should the file be broken, if its first line tells.
    """
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{error}",
            where=f"{path}, the record that starts on line {start}",
            expected='a cell opened with " to be closed with " (a quote inside it is written "")',
            fix=hint or "mend the quote; if quotes are ordinary characters in this file, set data.quotes=false",
        ) from None


def _refuse_twins(path: Path, header: Sequence[str]) -> None:
    twins = [name for name, count in Counter(header).items() if count > 1]
    if twins:
        raise UserError(
            f"column names given twice: {', '.join(map(repr, twins))}",
            where=f"{path}, line 1",
            expected="each column name once",
            fix="rename one of them",
        )


def _other_delimiter(header: Sequence[str], delimiter: str) -> str:
    line = delimiter.join(header)
    name, best = max(DELIMITERS.items(), key=lambda item: line.count(item[1]))
    if best == delimiter or line.count(best) <= line.count(delimiter):
        return ""
    return f"the header looks delimited by {best!r}: set data.delimiter='{name}'"


def read_jsonl(path: Path, dialect: Dialect) -> Table:
    """Read one JSON object a line.

    Raises:
        UserError: A line that is not one JSON object, a key given twice in it.
    """
    # Not str.splitlines: U+2028 and the like may stand inside a JSON string.
    lines = enumerate(read_text(path, dialect.encoding).split("\n"), start=1)
    return from_lines(path, [(number, line) for number, line in lines if line.strip()])


def from_lines(path: Path, lines: Sequence[tuple[int, str]]) -> Table:
    """Make a table of numbered lines, a JSON object each; see ``read_jsonl``."""
    numbers = [number for number, _ in lines]
    rows = []
    for number, line in lines:
        where = f"{path}, line {number}"
        rows.append(_object(_parse(line, where=where), where=where))
    return from_objects(path, rows, place=lambda i: f"line {numbers[i]}")


def read_json(path: Path, dialect: Dialect) -> Table:
    """Read a list of objects, ``{"data": [...]}``, or SQuAD's nested form (v1 and v2).

    Raises:
        UserError: Broken JSON, or JSON of another form.
    """
    text = read_text(path, dialect.encoding)
    first, _, rest = text.lstrip().partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and rest.strip():
        return read_jsonl(path, dialect)
    content = _parse(text, where=str(path))
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise UserError(
            f"a JSON {type(content).__name__}"
            + (f" with the keys {list(content)[:8]}" if content and isinstance(content, dict) else ""),
            where=str(path),
            expected='a list of objects, {"data": [objects]}, or SQuAD\'s form',
            fix="write one object for each row",
        )
    if items and isinstance(items[0], dict) and "paragraphs" in items[0]:
        rows = _flatten_squad(path, items)
        return from_objects(path, rows, place=lambda i: f"question {rows[i]['id']!r}")
    objects = [_object(item, where=f"{path}, item {i}") for i, item in enumerate(items, start=1)]
    return from_objects(path, objects, place=lambda i: f"item {i + 1}")


def from_objects(path: Path, rows: Sequence[dict[str, Any]], *, place: Callable[[int], str]) -> Table:
    """Make a table of JSON objects; a key that a row lacks is a null there."""
    names = tuple(dict.fromkeys(key for row in rows for key in row))
    return Table(str(path), names, len(rows), lambda name: [row.get(name) for row in rows], place)


def _parse(text: str, *, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        spot = f"column {error.colno}" if "line" in where else f"line {error.lineno}, column {error.colno}"
        raise UserError(
            f"broken JSON: {error.msg}", where=f"{where}, {spot}", expected="valid JSON", fix="mend the file there"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"unusable JSON: {error}", where=where, expected="valid JSON", fix="mend the file") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twins = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"key given twice in one object: {', '.join(map(repr, twins))}")
    return result


def _object(value: Any, *, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UserError(
        f"a JSON {type(value).__name__}: {str(value)[:60]!r}", where=where, expected='an object, {"column": value, ...}'
    )


def _flatten_squad(path: Path, articles: Sequence[Any]) -> list[dict[str, Any]]:
    """SQuAD's articles -> one row a question (https://rajpurkar.github.io/SQuAD-explorer)."""
    try:
        return [
            _question(qa, paragraph["context"])
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"not SQuAD's form: {type(error).__name__} {error}",
            where=str(path),
            expected='{"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers"}]}]}]}',
        ) from None


def _question(qa: dict[str, Any], context: str) -> dict[str, Any]:
    answers = [] if qa.get("is_impossible") else qa.get("answers")
    return {"id": qa["id"], "question": qa["question"], "context": context, "answers": answers}


def read_parquet(path: Path) -> Table:
    """Read a parquet file; label names that ``datasets`` has put in its schema are used.

    Raises:
        UserError: The file is not parquet.
    """
    with reading_parquet(path):
        table = pq.read_table(path)
    return from_arrow(table, source=str(path))


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Say of a file that is no parquet that it is none."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"not a readable parquet file: {str(error).splitlines()[0]}",
            where=str(path),
            expected="parquet",
            fix="write or download the file again",
        ) from None


def from_arrow(table: pa.Table, *, source: str, first: int = 0) -> Table:
    """Make a table of an arrow table; see ``from_dataset``."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # pandas categories, for which datasets has no feature
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return from_dataset(datasets.Dataset(InMemoryTable(table)), source=source, first=first)


def from_dataset(dataset: datasets.Dataset, *, source: str, first: int = 0) -> Table:
    """Make a table of a data set; integers of a ``ClassLabel`` become their names, -1 a missing label.

    Args:
        first: Index of its first row in ``source``, of which it may be a part.
    """
    plain = dataset.with_format(None)

    def cells(name: str) -> list[Any]:
        feature, values = plain.features[name], plain[name][:]
        if isinstance(feature, datasets.ClassLabel):
            return [_class_name(feature, value) for value in values]
        inner = getattr(feature, "feature", None)
        if isinstance(inner, datasets.ClassLabel):
            return [None if row is None else [_class_name(inner, value) for value in row] for row in values]
        return list(values)

    return Table(source, tuple(plain.column_names), len(plain), cells, lambda i: f"row index {first + i}")


def with_fields(table: Table, names: Iterable[str]) -> Table:
    """Add the fields of nested columns that are asked for, in the place of those columns.

    ``translation.en`` is what each cell of ``translation`` holds under ``en``, unless a column has that whole name.
    """
    wanted = set(names)
    nested = {name: tuple(name.split(".")) for name in wanted - set(table.names)}
    nested = {name: path for name, path in nested.items() if len(path) > 1 and path[0] in table.names}
    parents = {path[0] for path in nested.values()} - wanted

    def cells(name: str) -> list[Any]:
        return _fields(table, nested[name]) if name in nested else table.cells(name)

    kept = [name for name in table.names if name not in parents]
    return replace(table, names=(*kept, *sorted(nested)), cells=cells) if nested else table


def _fields(table: Table, path: Sequence[str]) -> list[Any]:
    """What stands under the path in each cell; None where the key is not there.

    Raises:
        UserError: No cell has such a key.
    """
    cells = table.cells(path[0])
    for depth, key in enumerate(path[1:], start=1):
        known = {found for cell in cells if isinstance(cell, dict) for found in cell}
        if key not in known:
            raise UserError(
                f"no field {key!r} in the column {'.'.join(path[:depth])!r}",
                where=table.source,
                expected=f"one of: {', '.join(map(repr, sorted(known)))}" if known else "cells with named fields",
            )
        cells = [cell.get(key) if isinstance(cell, dict) else None for cell in cells]
    return cells


def _class_name(feature: Any, value: int | None) -> str | None:
    return None if value is None or value < 0 else str(feature.names[value])
