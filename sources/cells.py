"""Cells of each kind, checked and brought to their canonical form; nothing is repaired by guessing."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from datasets import List, Value
from tokenizers.pre_tokenizers import BertPreTokenizer

from heedful import UserError
from sources.columns import Column
from sources.tables import Table, log
from sources.texts import counted

TEXT = Value("large_string")  # 64-bit offsets: one column may hold more than 2 GiB
ANSWERS = {"text": List(TEXT), "answer_start": List(Value("int64"))}
MESSAGE = {"role": TEXT, "content": TEXT}
LONG = 1_000_000

Cells = tuple[list[Any], Any]
"""Canonical cells and their feature."""


def convert(table: Table, name: str, column: Column, *, separator: str | None, split: bool) -> Cells:
    """Bring the column ``name`` to the canonical form of ``column.kind``.

    Args:
        table: The raw table.
        name: The user's name of the column.
        column: What the task expects there.
        separator: Splits a text cell into several labels.
        split: Whether a text cell may stand for words, which are then split by ``split_words``.

    Raises:
        UserError: Cells that are missing or of another type, with their rows.
    """
    match column.kind:
        case "text":
            return _texts(table, name, numbers=column.role == "id"), TEXT
        case "words":
            return _words(table, name, split=split), List(TEXT)
        case "tags":
            return _words(table, name, split=False), List(TEXT)
        case "answers":
            return _answers(table, name), ANSWERS
        case "messages":
            return _messages(table, name), List(MESSAGE)
        case "label":
            return _labels(table, name, separator)


def check_row_wise(table: Table, data: dict[str, list[Any]], columns: Sequence[Column]) -> None:
    """Hold cells of one row against each other: as many tags as words, answers where they are said to stand.

    Raises:
        UserError: With the rows.
    """
    roles = {column.kind: column.role for column in columns if column.role in data}
    if "words" in roles and "tags" in roles:
        _check_lengths(table, data[roles["words"]], data[roles["tags"]])
    if "answers" in roles:
        _check_spans(table, data["context"], data[roles["answers"]])


def split_words(text: str) -> list[str]:
    """Split at white space and around each punctuation character, as BERT's pre-tokenizer does."""
    return [word for word, _ in BertPreTokenizer().pre_tokenize_str(text)]


def _complete(table: Table, name: str) -> list[Any]:
    """Load a column that must have a value in every row."""
    cells = table.cells(name)
    _refuse(
        table,
        name,
        [i for i, cell in enumerate(cells) if cell is None or (isinstance(cell, float) and not math.isfinite(cell))],
        found="no value (null, NaN, or a key that is not there)",
        expected="a value in every row",
        fix="fill these cells or leave the rows out (in a ClassLabel, -1 means no label: the test splits of GLUE)",
    )
    return cells


def _refuse(table: Table, name: str, rows: Sequence[int], **message: str) -> None:
    if rows:
        raise table.fault(name, rows, **message)


def _only(table: Table, name: str, cells: Sequence[Any], good: Callable[[Any], bool], *, expected: str) -> None:
    """Refuse the cells that are not good, showing the first."""
    bad = [i for i, cell in enumerate(cells) if not good(cell)]
    if bad:
        shown = repr(cells[bad[0]])[:60]
        fix = "mend these rows, or choose another column"
        raise table.fault(name, bad, found=f"{type(cells[bad[0]]).__name__} {shown}", expected=expected, fix=fix)


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str)


def _texts(table: Table, name: str, *, numbers: bool) -> list[str]:
    cells = _complete(table, name)
    if numbers:  # identifiers only: they are compared, never read
        cells = [str(cell) if type(cell) is int else cell for cell in cells]
    _only(table, name, cells, _is_text, expected="text (a number as text stands in quotes)")
    _check_unicode(table, name, cells)
    long = [i for i, cell in enumerate(cells) if len(cell) > LONG]
    if long:
        log.warning("%s, column %r: over %d characters in %s", table.source, name, LONG, table.places(long))
    return cells


def _check_unicode(table: Table, name: str, cells: Sequence[str | Sequence[str]]) -> None:
    """Half a surrogate pair can stand in JSON but in no UTF-8 text, so neither in Arrow nor in a tokenizer."""
    _refuse(
        table,
        name,
        [i for i, cell in enumerate(cells) if not _encodes(cell if isinstance(cell, str) else "".join(cell))],
        found="a lone surrogate (half a character, such as \\ud83d)",
        expected="Unicode text",
        fix="write these rows again from the original text",
    )


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _words(table: Table, name: str, *, split: bool) -> list[list[str]]:
    cells = _complete(table, name)
    if split:
        cells = [split_words(cell) if isinstance(cell, str) else cell for cell in cells]
    _only(
        table,
        name,
        cells,
        lambda cell: isinstance(cell, list) and all(map(_is_text, cell)),
        expected='a list of texts, ["EU", "rejects"], as in jsonl or parquet; or a CoNLL file (.conll). Numbers stand '
        "for tags only with a ClassLabel that names them, as in parquet files and on the Hub",
    )
    _check_unicode(table, name, cells)
    return cells


def _labels(table: Table, name: str, separator: str | None) -> Cells:
    cells = _complete(table, name)
    types = {type(cell) for cell in cells}
    if types == {list}:
        return _label_lists(table, name, cells), List(TEXT)
    if types == {str} and separator:
        return _label_lists(table, name, [_split(cell, separator) for cell in cells]), List(TEXT)
    if types == {int, float} or types == {float}:
        _only(table, name, cells, lambda cell: abs(cell) <= sys.float_info.max, expected="a number of 64 bits")
        return [float(cell) for cell in cells], Value("float64")
    if types in ({str}, {int}, {bool}):
        return _label_names(table, name, [_label_name(cell) for cell in cells]), TEXT
    counts = Counter(type(cell).__name__ for cell in cells)
    rarest = min(counts, key=lambda kind: counts[kind])
    raise table.fault(
        name,
        [i for i, cell in enumerate(cells) if type(cell).__name__ == rarest],
        found=f"labels of the types {dict(counts)}; the {rarest} ones are named",
        expected="all names, all integers, all numbers, or all lists of names",
        fix="write every label in the same way",
    )


def _label_name(cell: Any) -> str:
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _split(cell: str, separator: str) -> list[str]:
    return [part.strip() for part in cell.split(separator)] if cell.strip() else []


def _label_names(table: Table, name: str, labels: list[str]) -> list[str]:
    _check_unicode(table, name, labels)
    _refuse(
        table,
        name,
        [i for i, label in enumerate(labels) if not label.strip()],
        found="an empty label",
        expected="a label in every row",
        fix="fill these cells or leave the rows out; for rows with no or several labels set data.label_separator",
    )
    stripped = Counter(label.strip() for label in set(labels))
    _refuse(
        table,
        name,
        [i for i, label in enumerate(labels) if stripped[label.strip()] > 1 and label != label.strip()],
        found="labels that differ from another one only in blanks around them",
        expected="each class written in one way",
        fix="strip these labels",
    )
    return labels


def _label_lists(table: Table, name: str, cells: list[list[Any]]) -> list[list[str]]:
    _only(
        table,
        name,
        cells,
        lambda cell: all(type(label) is int or (_is_text(label) and label.strip()) for label in cell),
        expected="a list of label names",
    )
    lists = [[str(label) for label in cell] for cell in cells]
    _refuse(
        table,
        name,
        [i for i, labels in enumerate(lists) if len(set(labels)) != len(labels)] or _multi_hot(cells),
        found="one label twice in a row, or 0/1 vectors of one length",
        expected="the names of the labels that hold, each once; an empty list for none",
        fix="turn 0/1 vectors into lists of names",
    )
    _check_unicode(table, name, lists)
    return lists


def _multi_hot(cells: Sequence[Sequence[Any]]) -> list[int]:
    """All rows, if each is a 0/1 vector of one length above 1: names would be made of its digits."""
    widths = {len(cell) for cell in cells}
    bits = all(type(label) is int and label in (0, 1) for cell in cells for label in cell)
    return list(range(len(cells))) if len(widths) == 1 and max(widths) > 1 and bits else []


def _answers(table: Table, name: str) -> list[dict[str, Any]]:
    cells = _complete(table, name)
    answers = [_answer(cell) for cell in cells]
    bad = [i for i, answer in enumerate(answers) if answer is None]
    if bad:
        raise table.fault(
            name,
            bad,
            found=f"not an answer: {cells[bad[0]]!r:.80}",
            expected='{"text": ["..."], "answer_start": [0]} or [{"text": "...", "answer_start": 0}], in characters',
            fix="give empty lists for a question without an answer; csv cells can not hold answers, use jsonl",
        )
    known = [answer for answer in answers if answer is not None]
    _check_unicode(table, name, [answer["text"] for answer in known])
    return known


def _answer(cell: Any) -> dict[str, Any] | None:
    """The canonical form, or None if it can not be had."""
    if isinstance(cell, list) and all(isinstance(item, dict) for item in cell):
        cell = {key: [item.get(key) for item in cell] for key in ("text", "answer_start")}
    if not isinstance(cell, dict):
        return None
    texts, starts = (
        value if isinstance(value, list) else [value] for value in (cell.get("text"), cell.get("answer_start"))
    )
    good = len(texts) == len(starts) and all(isinstance(text, str) and text for text in texts)
    good = good and all(type(start) is int and start >= 0 for start in starts)
    return {"text": texts, "answer_start": starts} if good else None


def _messages(table: Table, name: str) -> list[list[dict[str, str]]]:
    cells = _complete(table, name)
    _only(
        table,
        name,
        cells,
        lambda cell: isinstance(cell, list) and bool(cell) and all(map(_is_message, cell)),
        expected='a list of messages, [{"role": "user", "content": "..."}, ...], with text and nothing else',
    )
    _check_unicode(table, name, [[message["content"] for message in cell] for cell in cells])
    return [[{"role": message["role"], "content": message["content"]} for message in cell] for cell in cells]


def _is_message(cell: Any) -> bool:
    """Text only: a tool call or an image beside it would be left out of what is learned."""
    if not isinstance(cell, dict) or any(value for key, value in cell.items() if key not in ("role", "content")):
        return False
    return _is_text(cell.get("role")) and _is_text(cell.get("content"))


def _check_lengths(table: Table, words: Sequence[list[str]], tags: Sequence[list[str]]) -> None:
    bad = [i for i, (left, right) in enumerate(zip(words, tags, strict=True)) if len(left) != len(right)]
    if bad:
        tokens, labels = counted(len(words[bad[0]]), "tokens"), counted(len(tags[bad[0]]), "tags")
        found = f"{tokens} but {labels} in the first such row"
        raise table.fault("tags", bad, found=found, expected="one tag for each token", fix="mend or drop these rows")


def _check_spans(table: Table, contexts: Sequence[str], answers: Sequence[dict[str, Any]]) -> None:
    def faults(i: int) -> list[tuple[str, int]]:
        pairs = zip(answers[i]["text"], answers[i]["answer_start"], strict=True)
        return [(text, start) for text, start in pairs if not contexts[i].startswith(text, start)]

    bad = [i for i in range(len(contexts)) if faults(i)]
    if bad:
        raise _misplaced(table, bad, context=contexts[bad[0]], answer=faults(bad[0])[0])


def _misplaced(table: Table, rows: Sequence[int], *, context: str, answer: tuple[str, int]) -> UserError:
    text, start = answer
    stands = context.find(text)
    return table.fault(
        "answers",
        rows,
        found=f"{text!r:.60} does not stand at {start}, where {context[start : start + len(text)]!r:.60} stands",
        expected=f"the answer's offset in characters, here {stands}" if stands >= 0 else "a text within the context",
        fix="mend answer_start (it counts characters, not bytes or tokens) or drop these rows",
    )
