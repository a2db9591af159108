"""CoNLL column files: one token a line, the word first and its tag last, a blank line between sentences.

Source: Tjong Kim Sang and De Meulder 2003, https://aclanthology.org/W03-0419.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from heedful import UserError
from sources.tables import Dialect, Table, log, read_text
from sources.texts import counted

DOCUMENT_START = "-DOCSTART-"
LONGEST_SENTENCE = 256
"""Words; in a file of one sentence, more are taken for several whose blank lines were lost, and said aloud."""
TAG = re.compile(r"O|[BIESLUMW]-\S.*")
BLANKS = re.compile("[ \t]+")  # not \s: a no-break space may be a token


@dataclass(frozen=True)
class Line:
    """One line that is not blank."""

    number: int
    cells: list[str]
    first: bool
    """Whether no token of the sentence stands before it."""


def read_conll(path: Path, dialect: Dialect) -> Table:
    """Read sentences: the first column is ``tokens``, the last ``tags``, those between ``column_2``, ...

    A line whose first column is ``#`` and that opens a sentence is a comment where it has not the width of the other
    lines, or where its last column is a tag that no other line has; comments are said aloud, other ``#`` are tokens.

    Raises:
        UserError: A line with more or fewer columns than the others.
    """
    groups = _sentences(read_text(path, dialect.encoding))
    lines = [line for group in groups for line in group]
    plain = [line for line in lines if not line.cells[0].startswith("#")] or lines
    width = Counter(len(line.cells) for line in plain).most_common(1)[0][0] if plain else 0
    tags = {line.cells[-1] for line in plain}
    comments = [line for line in lines if _is_comment(line, width, tags)]
    if comments:
        found = counted(len(comments), "comment lines")
        log.warning("%s: %s left out, the first on line %d", path, found, comments[0].number)
    left_out = {line.number for line in comments}
    kept = [[line for line in group if line.number not in left_out] for group in groups]
    sentences = [group for group in kept if group]
    for line in (line for group in sentences for line in group if len(line.cells) != width):
        raise UserError(
            f"{counted(len(line.cells), 'columns')}: {' '.join(line.cells)[:60]!r}",
            where=f"{path}, line {line.number}",
            expected=f"{counted(width, 'columns')}, as on most lines: the word first, its tag last",
            fix="mend that line",
        )
    if len(sentences) == 1 and len(sentences[0]) > LONGEST_SENTENCE:
        log.warning("! %s: no blank line, so its %d words are one sentence", path, len(sentences[0]))
    names = _names(width)
    return Table(
        source=str(path),
        names=names,
        size=len(sentences),
        cells=lambda name: [[line.cells[names.index(name)] for line in group] for group in sentences],
        place=lambda i: f"the sentence from line {sentences[i][0].number}",
    )


def looks_like_words(text: str) -> bool:
    """Whether most lines that are not blank are one word, or end in a tag; of the others ``read_conll`` will tell."""
    lines = [line for group in _sentences(text) for line in group]
    plain = [line for line in lines if not line.cells[0].startswith("#")] or lines
    words = sum(len(line.cells) == 1 or TAG.fullmatch(line.cells[-1]) is not None for line in plain)
    return words > len(plain) / 2


def _sentences(text: str) -> list[list[Line]]:
    """Split a file into sentences, without document marks.

    Comment lines do not count as tokens here, so that several may open one sentence.
    """
    groups: list[list[Line]] = [[]]
    lines = [line.rstrip(" \t\r") for line in text.split("\n")]
    tabs = all("\t" in line for line in lines if line and not line.startswith(("#", DOCUMENT_START)))
    tokens = 0
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t") if tabs and "\t" in line else BLANKS.split(line)
        if not line or cells[0] == DOCUMENT_START:
            groups.append([])
            tokens = 0
            continue
        groups[-1].append(Line(number, cells, first=not tokens))
        tokens += not line.startswith("#")
    return [group for group in groups if group]


def _is_comment(line: Line, width: int, tags: set[str]) -> bool:
    if not line.first or not line.cells[0].startswith("#"):
        return False
    return len(line.cells) != width or (
        width > 1 and f"{line.cells[0]} ".startswith("# ") and line.cells[-1] not in tags
    )


def _names(width: int) -> tuple[str, ...]:
    between = tuple(f"column_{i}" for i in range(2, width))
    return ("tokens", *between, "tags") if width > 1 else ("tokens",)[:width]
