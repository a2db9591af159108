"""The data that is committed: what the scripts make of their sources, and that data/ is what they promise."""

import hashlib
import re
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from scripts import build_debian, build_tatoeba
from scripts.build_debian import build, chats, cut, unfolded
from sources.assets import load_table
from sources.conversions import write_splits
from sources.texts import normalize

REPO = Path(__file__).parents[1]
SPLITS = ("train", "validation", "test")
PROSE = "It reads every number from one to ten and writes them all down again in the order of their names, twice"


def read(folder):
    return {split: pq.read_table(folder / f"{split}.parquet").to_pylist() for split in SPLITS}


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ Debian


@pytest.mark.parametrize(
    ("folded", "text"),
    [
        (" One\n two.\n .\n Three.", "One two.\n\nThree."),
        (" Lists:\n  * one\n    more\n  * two\n After.", "Lists:\n * one\n   more\n * two\nAfter."),
        (" One.\n .\n  - two  \n .\n Three  blanks. ", "One.\n\n - two\n\nThree  blanks."),
        (" .\n .hidden\n 1.5 é\n .\n .\n End", ".hidden 1.5 é\n\n\nEnd"),
        ("", ""),
    ],
)
def test_a_description_is_unfolded_as_debian_policy_says(folded, text):
    assert unfolded(folded.split("\n")) == text


def indexes(folder, entries):
    """Write both indexes for (package, source, synopsis, folded lines)."""
    folder.mkdir(exist_ok=True)
    translation, packages = [], []
    for package, source, summary, lines in entries:
        md5 = hashlib.md5(f"{summary}{lines}".encode()).hexdigest()
        text = f"Description-en: {summary}\n{lines}"
        translation.append(f"Package: {package}\nDescription-md5: {md5}\n{text}\n")
        if source:
            named = "" if source == package else f"Source: {source} (1.0-1)\n"
            packages.append(f"Package: {package}\n{named}Depends: a,\n b\nDescription-md5: {md5}\nSize: 1\n")
    paths = folder / "Translation-en", folder / "Packages"
    for path, stanzas in zip(paths, (translation, packages), strict=True):
        path.write_text("\n".join(stanzas))
    return paths


@pytest.fixture
def built(tmp_path, monkeypatch):
    monkeypatch.setattr(build_debian, "ROWS", {"test": 5, "validation": 5, "train": 30})
    monkeypatch.setattr(build_debian, "CHATS", {"test": 2, "validation": 2, "train": 9})
    entries = [
        (f"p{i}{kind}", f"p{i}", f"counts to {i} {kind}", f" {PROSE} {i}.\n .\n This is {kind}: {i}.")
        for i in range(40)
        for kind in ("", "-dev", "-doc", "-data", "-bin")
    ]
    entries += [
        ("p1", "", "counts as on another machine", f" {PROSE} only there."),
        ("lone", "lone", "counts to itself", f" {PROSE} alone."),
        ("twin", "twin", "counts to itself", f" {PROSE}:  ALONE!"),
        ("old", "old", "counts for a while (transitional package)", f" {PROSE} old."),
        ("short", "short", "counts very shortly", " Not much."),
        ("long", "long", "counts for ever", "\n".join([f" {PROSE}."] * 15)),
        ("mute", "mute", "count", f" {PROSE} mute."),
    ]
    build(*indexes(tmp_path / "in", entries), tmp_path / "data", version="0.1")
    build(*indexes(tmp_path / "in", entries[::-1]), tmp_path / "again", version="0.1")
    return tmp_path


def test_debian_is_split_by_source_package_and_all_that_is_left_out_is_counted(built):
    splits = read(built / "data/debian-summaries")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 30, "validation": 5, "test": 5}
    rows = [row for part in splits.values() for row in part]
    sources = [{row["source_package"] for row in part} for part in splits.values()]
    assert sum(map(len, sources)) == len(set.union(*sources))
    assert max(sum(row["source_package"] == name for row in rows) for name in set.union(*sources)) == 3
    assert len({row["package"] for row in rows}) == 40
    assert all(row["summary"].startswith("counts to") for row in rows)
    card = (built / "data/debian-summaries/README.md").read_text()
    assert "Of 207 descriptions 1 are not" in card
    counted = re.findall(r"^- (\d+): (.*)$", card, flags=re.MULTILINE)
    assert {reason.split(" ")[0]: int(count) for count, reason in counted} == {
        "beyond": 80,
        "descriptions": 2,
        "synopses": 1,
        "the": 1,
        "transitional": 1,
    }


def test_debian_is_made_again_to_the_byte_whatever_the_order_of_the_index(built):
    for name in SPLITS:
        for folder in ("debian-summaries", "debian-chat"):
            again = (built / "again" / folder / f"{name}.parquet").read_bytes()
            assert again == (built / "data" / folder / f"{name}.parquet").read_bytes()


def test_chats_ask_once_a_source_and_stay_in_the_split_of_their_text(built):
    texts, talks = read(built / "data/debian-summaries"), read(built / "data/debian-chat")
    assert {split: len(rows) for split, rows in talks.items()} == {"train": 9, "validation": 2, "test": 2}
    for split in SPLITS:
        text_of = {row["package"]: row for row in texts[split]}
        asked = [row["messages"][0]["content"][len("What is ") : -1] for row in talks[split]]
        answers = [row["messages"][1]["content"] for row in talks[split]]
        assert answers == [text_of[package]["text"].split("\n\n")[0] for package in asked]
        assert len({text_of[package]["source_package"] for package in asked}) == len(asked)
    assert [message["role"] for message in talks["test"][0]["messages"]] == ["user", "assistant"]


def test_chats_pass_over_what_is_no_paragraph_of_prose():
    openings = {"a": f"{PROSE}:", "b": f"{PROSE}:\n * one.", "c": "Too short.", "d": f"{PROSE}."}
    rows = [{"text": f"{text}\n\nMore.", "package": name, "source_package": "s"} for name, text in openings.items()]
    assert [chat[0]["content"] for chat in chats(rows)] == ["What is d?"]
    assert chats(rows[:3]) == []


def test_a_split_begins_with_a_new_source_package():
    rows = [{"source_package": source} for source in "aaabbbccc"]
    found = cut(rows, {"test": 2, "validation": 1, "train": 9})
    assert {split: "".join(row["source_package"] for row in part) for split, part in found.items()} == {
        "train": "ccc",
        "validation": "b",
        "test": "aa",
    }


# ----------------------------------------------------------------------------------------------------- Tatoeba


def test_tatoeba_is_the_beginning_of_the_asset(tmp_path, monkeypatch):
    monkeypatch.setattr(build_tatoeba, "ROWS", {"train": 3, "validation": 1, "test": 2})
    columns = {name: [f"{name} {i}" for i in range(5)] for name in ("source", "target", "attribution")}
    folder = tmp_path / "asset"
    folder.mkdir()
    write_splits(dict.fromkeys(SPLITS, columns), folder)
    build_tatoeba.build(load_table(REPO / "assets.yaml")["tatoeba-en-es"], folder, tmp_path / "data")
    rows, whole = read(tmp_path / "data"), read(folder)
    assert rows == {"train": whole["train"][:3], "validation": whole["validation"][:1], "test": whole["test"][:2]}


# ---------------------------------------------------------------------------------------------- what is committed

COMMITTED = {
    "tatoeba-en-es": ({"train": 18_000, "validation": 1_000, "test": 1_000}, ["source", "target", "attribution"]),
    "debian-summaries": (
        {"train": 11_000, "validation": 500, "test": 500},
        ["text", "summary", "package", "source_package"],
    ),
    "debian-chat": ({"train": 3_000, "validation": 200, "test": 200}, ["messages"]),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_what_is_committed_opens_with_load_dataset_and_has_its_card(name, tmp_path):
    rows, columns = COMMITTED[name]
    folder = REPO / "data" / name
    opened = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {split: len(part) for split, part in opened.items()} == rows
    assert all(part.column_names == columns for part in opened.values())
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] in ("cc-by-2.0", "other")
    assert all(f"| {split} | {count:,} |" in card for split, count in rows.items())


def test_no_committed_input_is_in_two_splits():
    keys = {
        "tatoeba-en-es": lambda row: normalize(row["source"]),
        "debian-summaries": lambda row: row["source_package"],
        "debian-chat": lambda row: row["messages"][0]["content"],
    }
    for name, key in keys.items():
        found = [{key(row) for row in part} for part in read(REPO / "data" / name).values()]
        assert sum(map(len, found)) == len(set.union(*found)), name
    texts = [normalize(row["text"]) for part in read(REPO / "data/debian-summaries").values() for row in part]
    assert len(texts) == len(set(texts))
    assert all("CC-BY" in row["attribution"] for part in read(REPO / "data/tatoeba-en-es").values() for row in part)
