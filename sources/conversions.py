"""From the files of a package to a Hugging Face folder: parquet files that ``load_dataset`` opens, or a model.

A conversion reads ``source`` (the members, by their names in ``assets.yaml``), writes into the empty folder
``target`` and returns what the dataset card must say about the rows, or "" where the members bring their own card.
Nothing is drawn at random, so the same members make the same rows on every machine.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sources.conll import read_conll
from sources.tables import Dialect
from sources.texts import normalize

Conversion = Callable[[Path, Path], str]
Columns = dict[str, list[Any]]
"""Columns of equal length."""


def write_splits(tables: Mapping[str, Columns], target: Path) -> str:
    """Write one parquet file a split and return the card's table of counts."""
    lines = ["| split | rows |", "|---|---|"]
    for split, columns in tables.items():
        table = pa.table(columns)
        pq.write_table(table, target / f"{split}.parquet", compression="zstd", compression_level=9)
        lines.append(f"| {split} | {table.num_rows:,} |")
    return "\n".join(lines)


def columns_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    """Turn rows into the columns of these names."""
    return {name: [row[name] for row in rows] for name in names}


def model_folder(source: Path, target: Path) -> str:
    """Copy the members of a model folder as they are, its model card among them."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    return ""


# --------------------------------------------------------------------------------------------------- SmolLM2


def smollm2(source: Path, target: Path) -> str:
    """SmolLM2 from llama.cpp's GGUF: the weights de-quantised and rounded to bf16, the tokenizer mended.

    transformers refuses to save what it has read from GGUF, so the weights move to a model of the same shape that
    knows nothing of it. It also reads the tokenizer without the step that splits digits (`tokenizer.ggml.pre` is
    "smollm"): "  5" would become other tokens than those that the model was trained on.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = source.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(
        source, gguf_file=file.name, model_max_length=model.config.max_position_embeddings
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    tokenizer.save_pretrained(target)
    return (
        f"{model.num_parameters():,} parameters. The file holds them quantised, most of them to 4 bits (Q4_1). They "
        "were de-quantised in fp32 and then **rounded to bf16**, by at most 0.2 % of each weight, which halves the "
        "folder. So they are a little worse than those that SmolLM2's authors publish. The tokenizer and its chat "
        "template are those of the file. Digits are split one by one again, as `tokenizer.ggml.pre` asks and "
        "transformers does not read, and `model_max_length` is the model's own "
        f"{tokenizer.model_max_length:,}. The padding token is the file's: `<|im_end|>`, which also ends each turn of "
        "a chat."
    )


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
        f"{write_splits(tables, target)}\n\nWords: {words_of}. The splits are the publisher's own. Columns: `tokens`, "
        "a list of words; `tags`, a list of BIO tags (PER, ORG, LOC, MISC). Lines with -DOCSTART- are left out, so "
        "the borders of documents are lost."
    )


# ------------------------------------------------------------------------------------------------------- TREC

_HELD_OUT = 500


def _normalized(text: str) -> str:
    # Not `normalize`: another order would be another split, and the figures in docs/ were measured on this one.
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
    counts = write_splits(
        {split: columns_of(rows, ("text", "label", "fine_label")) for split, rows in cut.items()}, target
    )
    return (
        f"{counts}\n\nThe package's file is the official training set of 5,452 questions (TREC) together with its own "
        f"subsets of 1,000 to 4,000, {len(lines):,} lines in all, of which {len(set(lines)):,} are distinct. Texts "
        f"that are equal but for case and punctuation were joined ({len(found):,} left), and those with more than one "
        f"label dropped ({len(found) - len(kept)}), before any split. **The splits are heedful's own**, by a fixed "
        "hash of the text: the official 500 test questions are not in the package, so scores here are not to be set "
        "beside published TREC scores. Columns: `text`; `label`, one of 6 coarse classes; `fine_label`, "
        f"one of {len({row['fine_label'] for row in kept})}."
    )


# --------------------------------------------------------------------------------------------------- 20 Newsgroups

_LONG = 511
"""Words. With the two special tokens these are 513 tokens at least, one more than BERT's positions."""


def _posts_of(files: Sequence[Path]) -> tuple[list[tuple[str, str]], int]:
    """All (text, label) of Orange's .tab files, normalized, without the names of groups; in how many one stood."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")[3:] if line]
    rows = [line.split("\t") for line in lines]  # below three lines of header: names, kinds, roles
    names = sorted({re.sub("[.-]", " ", label) for label, _ in rows})
    cut = [(re.subn(rf"\b({'|'.join(names)})\b", " ", text), label) for label, text in rows]
    return [(normalize(text), label) for (text, _), label in cut], sum(found > 0 for (_, found), _ in cut)


def newsgroups(source: Path, target: Path) -> str:
    """The long posts of 20 Newsgroups (Lang, "NewsWeeder: Learning to Filter Netnews", 1995), ordered by a hash."""
    posts, named = _posts_of([source / f"20newsgroups-{part}.tab" for part in ("train", "test")])
    labels_of: dict[str, set[str]] = defaultdict(set)
    for text, label in posts:
        labels_of[text].add(label)
    agreed = [{"text": text, "label": min(labels)} for text, labels in labels_of.items() if len(labels) == 1]
    kept = [row for row in agreed if len(row["text"].split()) >= _LONG]
    kept.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
    cut = {"train": kept[600:], "validation": kept[400:600], "test": kept[:400]}
    return (
        f"{write_splits({split: columns_of(rows, ('text', 'label')) for split, rows in cut.items()}, target)}\n\n"
        f"**The long posts alone**: those of {_LONG} words or more, which no BERT reads whole, of {len(posts):,} in "
        "the package's two files. They are lower case, letters alone: punctuation, numbers and line breaks were taken "
        "out before (Ana Cachopo's all-terms files). Of each post's header the subject is left, at the beginning; "
        "signatures and quoted posts stay. The names of the 20 groups, which say the label, were taken out wherever "
        f"one stands (in {named} posts), each post's own and all others. What else may tell a group, as the names of "
        f"its regulars, stays. Texts that are equal were joined ({len(labels_of):,} left), and those with more than "
        f"one label dropped ({len(labels_of) - len(agreed)}), before any split. **The splits are heedful's own**, by a "
        "fixed hash of the text, not the usual ones by date: one thread may have posts in several, so scores here are "
        "not to be set beside published ones. Columns: `text`; `label`, one of 20 groups."
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
        "answers": columns_of(aligned, ("text", "answer_start")),
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
    counts = write_splits({split: columns_of(rows, names) for split, rows in kept.items()}, target)
    spans = {split: sum(row["dropped"] for row in rows) for split, rows in splits.items()}
    questions = {split: len(splits[split]) - len(rows) for split, rows in kept.items()}
    return (
        f"{counts}\n\nTrain: New Wikipedia and New York Times. Validation: {_EVERY - 1} of {_EVERY} Wikipedia articles "
        f"stay in train and each {_EVERY}th is held out whole, because validation should be of the test's kind. Test: "
        "the SQuAD 1.1 development set. No article or context is in two splits. Answers whose text does not stand at "
        f"their `answer_start` were dropped ({spans}), and questions left without an answer ({questions}). Columns: "
        "`id`, `question`, `context`, `answers` (`text`, `answer_start` in characters)."
    )


# ------------------------------------------------------------------------------------------------ WikiText-2


def _articles(path: Path) -> list[str]:
    """Cut a file of WikiText at its headings of the first level; joined again, the articles are the file.

    Lines such as " = Played , W = " are what is left of tables and formulas: only a heading has blank lines around it.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        lines = list(file)
    blank = [not line.strip() for line in lines]
    starts = [
        i - 1
        for i, line in enumerate(lines)
        if re.fullmatch(r" = (?!= ).* = \n", line) and blank[i - 1 : i] == [True] and blank[i + 1 : i + 2] == [True]
    ]
    return ["".join(lines[a:b]) for a, b in pairwise([0, *starts[1:], len(lines)])]


def wikitext(source: Path, target: Path) -> str:
    """WikiText-2 raw (Merity et al., "Pointer Sentinel Mixture Models", 2016), one row an article."""
    texts = {
        split: _articles(source / f"{name}.raw.gz")
        for split, name in {"train": "train", "validation": "valid", "test": "test"}.items()
    }
    counts = write_splits({split: {"text": articles} for split, articles in texts.items()}, target)
    words = {split: sum(len(article.split()) for article in articles) for split, articles in texts.items()}
    return (
        f"{counts}\n\nWords: {words}. The splits are the publisher's own. Column: `text`, a whole article with its "
        "headings (` = Title = `, ` = = Section = = `). Nothing is changed: the rows of a split, joined in their order "
        "without anything between them, are the publisher's file to the byte, with its blanks around punctuation and "
        "its `@-@`, `@,@` and `@.@` inside words and numbers. A row begins with the blank line before its title."
    )


# --------------------------------------------------------------------------------------------------- Tatoeba

_HELD_OUT_SENTENCES = 2000


def _hash_of(text: str) -> bytes:
    return hashlib.sha256(normalize(text).encode()).digest()


def tatoeba(source: Path, target: Path) -> str:
    """Sentence pairs of Tatoeba, a line each: English, tab, Spanish, tab, attribution.

    The order is that of a hash of the English sentence, and all translations of a sentence are in one split.
    """
    lines = (source / "spa.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
    names = ("source", "target", "attribution")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    rows.sort(key=lambda row: (_hash_of(row["source"]), *row.values()))
    place = {text: i for i, text in enumerate(dict.fromkeys(normalize(row["source"]) for row in rows))}
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        group = min(place[normalize(row["source"])] // _HELD_OUT_SENTENCES, 2)
        splits[("test", "validation", "train")[group]].append(row)
    counts = write_splits({split: columns_of(part, names) for split, part in splits.items()}, target)
    known = {normalize(row["target"]) for row in splits["train"]}
    seen = {s: sum(normalize(row["target"]) in known for row in splits[s]) for s in ("validation", "test")}
    return (
        f"{counts}\n\nPairs of sentences, all {len(lines):,} lines of the package's file, nothing changed. English "
        f"sentences that are equal but for case and punctuation ({len(place):,} are left) stand with all their "
        f"translations in one split. **The splits are heedful's own**, by a fixed hash of the English sentence: "
        f"{_HELD_OUT_SENTENCES:,} sentences each for validation and test. Spanish sentences are not kept apart: of the "
        f"pairs, {seen} have a Spanish side that also translates another sentence in train. Many sentences differ by a "
        "name or a word only. Columns: `source`, English; `target`, Spanish; `attribution`, the line's license and the "
        "numbers and authors of both sentences, to be kept with them."
    )


CONVERSIONS: dict[str, Conversion] = {
    "model_folder": model_folder,
    "smollm2": smollm2,
    "conll": conll,
    "trec": trec,
    "newsgroups": newsgroups,
    "squad": squad,
    "wikitext": wikitext,
    "tatoeba": tatoeba,
}
