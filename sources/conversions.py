"""From the files of a package to a Hugging Face folder: parquet files that ``load_dataset`` opens, or a model.

A conversion reads ``source`` (the members, by their names in ``assets.yaml``), writes into the empty folder
``target`` and returns what the dataset card must say about the rows, or "" where the members bring their own card.
Nothing is drawn at random, so the same members make the same rows on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sources.conll import read_conll
from sources.tables import Dialect

Conversion = Callable[[Path, Path], str]
Columns = dict[str, list[Any]]
"""Columns of equal length."""


def _write(tables: Mapping[str, Columns], target: Path) -> str:
    """Write one parquet file a split and return the card's table of counts."""
    lines = ["| split | rows |", "|---|---|"]
    for split, columns in tables.items():
        table = pa.table(columns)
        pq.write_table(table, target / f"{split}.parquet")
        lines.append(f"| {split} | {table.num_rows:,} |")
    return "\n".join(lines)


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    return {name: [row[name] for row in rows] for name in names}


def model_folder(source: Path, target: Path) -> str:
    """Copy the members of a model folder as they are, its model card among them."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    return ""


# ------------------------------------------------------------------------------------------------- CoNLL-2003


def conll(source: Path, target: Path) -> str:
    """CoNLL-2003 columns (word, part of speech, chunk, tag) to ``tokens`` and ``tags``, tags in BIO.

    The format is that of Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", 2003.
    """
    tables: dict[str, Columns] = {}
    for split, name in {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}.items():
        sentences = read_conll(source / name, Dialect())
        tables[split] = {column: sentences.cells(column) for column in ("tokens", "tags")}
    words_of = {split: sum(map(len, table["tokens"])) for split, table in tables.items()}
    return (
        f"{_write(tables, target)}\n\nWords: {words_of}. The splits are the publisher's own. Columns: `tokens`, a list "
        "of words; `tags`, a list of BIO tags (PER, ORG, LOC, MISC). Lines with -DOCSTART- are left out, so the "
        "borders of documents are lost."
    )


# ------------------------------------------------------------------------------------------------------- TREC

_HELD_OUT = 500


def _normalized(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _questions_of(path: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """All lines, and the first text of each (normalized text, fine label)."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for line in lines:
        fine, text = line.split(" ", 1)
        found[_normalized(text)].setdefault(fine, text)
    return lines, found


def trec(source: Path, target: Path) -> str:
    """Questions in the format of Li and Roth, "Learning Question Classifiers", 2002: ``COARSE:fine the question ?``.

    The order is that of a hash of the normalized text: a shuffle that no version of any library can change.
    """
    lines, found = _questions_of(source / "question_labels.txt")
    kept = [
        {"text": text, "label": fine.split(":")[0], "fine_label": fine}
        for by_label in found.values()
        if len(by_label) == 1
        for fine, text in by_label.items()
    ]
    kept.sort(key=lambda row: hashlib.sha256(_normalized(row["text"]).encode()).digest())
    cut = {"train": kept[2 * _HELD_OUT :], "validation": kept[_HELD_OUT : 2 * _HELD_OUT], "test": kept[:_HELD_OUT]}
    counts = _write({split: _columns(rows, ("text", "label", "fine_label")) for split, rows in cut.items()}, target)
    return (
        f"{counts}\n\nThe package's file is the official training set of 5,452 questions (TREC) together with its own "
        f"subsets of 1,000 to 4,000, {len(lines):,} lines in all, of which {len(set(lines)):,} are distinct. Texts "
        f"that are equal but for case and punctuation were joined ({len(found):,} left), and those with more than one "
        f"label dropped ({len(found) - len(kept)}), before any split. **The splits are heedful's own**, by a fixed "
        "hash of the text: the official 500 test questions are not in the package, so scores here are not to be set "
        "beside published TREC scores. Columns: `text`; `label`, one of 6 coarse classes; `fine_label`, "
        f"one of {len({row['fine_label'] for row in kept})}."
    )


# ------------------------------------------------------------------------------------------------ SQuADShifts

_EVERY = 8
"""Each eighth Wikipedia article is held out for validation."""


def _question(title: str, context: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One row, without the answers whose text does not stand at their offset."""
    aligned = [
        answer
        for answer in entry["answers"]
        if answer["text"] and context.startswith(answer["text"], answer["answer_start"])
    ]
    return {
        "id": entry["id"],
        "title": title,
        "question": entry["question"],
        "context": context,
        "answers": _columns(aligned, ("text", "answer_start")),
        "dropped": len(entry["answers"]) - len(aligned),
    }


def _read_squad(path: Path) -> list[dict[str, Any]]:
    """All questions of a file in the format of SQuAD 1.1 (Rajpurkar et al., 2016)."""
    return [
        _question(article["title"], paragraph["context"], entry)
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
    ]


def _split_articles(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    held_out = set(list(dict.fromkeys(row["title"] for row in rows))[_EVERY - 1 :: _EVERY])
    return [row for row in rows if row["title"] not in held_out], [row for row in rows if row["title"] in held_out]


def squad(source: Path, target: Path) -> str:
    """SQuADShifts (Miller et al., 2020) for training and validation, the SQuAD 1.1 development set for the test."""
    wiki, held_out = _split_articles(_read_squad(source / "new_wiki_v1.0.json"))
    splits = {
        "train": wiki + _read_squad(source / "nyt_v1.0.json"),
        "validation": held_out,
        "test": _read_squad(source / "squaddev_v1.1.json"),
    }
    kept = {split: [row for row in rows if row["answers"]["text"]] for split, rows in splits.items()}
    names = ("id", "question", "context", "answers")
    counts = _write({split: _columns(rows, names) for split, rows in kept.items()}, target)
    spans = {split: sum(row["dropped"] for row in rows) for split, rows in splits.items()}
    questions = {split: len(splits[split]) - len(rows) for split, rows in kept.items()}
    return (
        f"{counts}\n\nTrain: New Wikipedia and New York Times. Validation: {_EVERY - 1} of {_EVERY} Wikipedia articles "
        f"stay in train and each {_EVERY}th is held out whole, because validation should be of the test's kind. Test: "
        "the SQuAD 1.1 development set. No article or context is in two splits. Answers whose text does not stand at "
        f"their `answer_start` were dropped ({spans}), and questions left without an answer ({questions}). Columns: "
        "`id`, `question`, `context`, `answers` (`text`, `answer_start` in characters)."
    )


CONVERSIONS: dict[str, Conversion] = {"model_folder": model_folder, "conll": conll, "trec": trec, "squad": squad}
