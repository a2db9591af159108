"""`heedful tokenizer train`: from files to a folder that AutoTokenizer opens, the same bytes from the same texts."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipelines import cli
from tasks.words import word_prefix
from training.vocabulary import SPECIAL, settle_scores, train_tokenizer

ROOT = Path(__file__).parent.parent
DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices(["ka", "to", "mi", "ren", "sol", "Ä", "ing"], k=DRAW.randint(1, 5))) for _ in range(200)]
WORDS += ["the", "cats", "a", "mat,"]
TEXTS = [" ".join(DRAW.choices(WORDS, k=12)) for _ in range(200)] + ["the cats, a mat"] * 2
KINDS = tuple(SPECIAL)
SIZES = {"bpe": 320, "wordpiece": 120, "unigram": 120}


@pytest.fixture
def cli_run(monkeypatch, capsys, tmp_path):
    """Run the command line in an empty folder; returns (exit code, what was said)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["heedful", "tokenizer", "train", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, kind="bpe", vocab_size=300)


def write_jsonl(path="data.jsonl", **columns):
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_opens_what_was_trained(kind, cli_run):
    write_jsonl(text=TEXTS)
    code, log = cli_run("out", "data.jsonl", "--kind", kind, "--vocab-size", 290, "--special-tokens", "<sep>")
    assert code == 0, log
    tokenizer = AutoTokenizer.from_pretrained("out")
    names = SPECIAL[kind]
    assert {name: getattr(tokenizer, name) for name in names} == names
    assert tokenizer.convert_tokens_to_ids([*names.values(), "<sep>"]) == list(range(len(names) + 1))
    assert f"{len(tokenizer):,} tokens" in log
    assert tokenizer.tokenize("a<sep>b").count("<sep>") == 1
    assert tokenizer.is_fast
    single, pair = tokenizer("the cats").input_ids, tokenizer("the cats", "a mat")
    ends = [tokenizer.sep_token_id if kind == "wordpiece" else tokenizer.eos_token_id]
    assert (single[-1:], pair.input_ids[-1:], pair.input_ids.count(ends[0])) == (ends, ends, 2)
    assert (single[0] == tokenizer.cls_token_id) == (kind == "wordpiece")
    assert ("token_type_ids" in pair) == (kind == "wordpiece")
    assert tokenizer.decode(single, skip_special_tokens=True) == "the cats"


def test_the_same_texts_give_the_same_bytes_in_every_process_and_order(tmp_path):
    script = (
        "import sys; from pathlib import Path; from test_pipelines_tokenizer import *\n"
        "from training.vocabulary import save_tokenizer\n"
        "for kind in KINDS:\n"
        "    texts = TEXTS[::int(sys.argv[2])]\n"
        "    trained = train_tokenizer(texts, kind=kind, vocab_size=SIZES[kind])\n"
        "    save_tokenizer(trained, Path(sys.argv[1], kind), texts=TEXTS)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for out, order in (("a", "1"), ("b", "-1")):
        subprocess.run([sys.executable, "-c", script, tmp_path / out, order], check=True, env=environment)
    for kind in KINDS:
        one, other = ({p.name: p.read_bytes() for p in (tmp_path / out / kind).iterdir()} for out in "ab")
        assert one == other, kind
        assert len(AutoTokenizer.from_pretrained(tmp_path / "a" / kind)) == SIZES[kind]


def test_unigram_scores_do_not_depend_on_what_chance_gave_them():
    one = [("ab", -1.0), ("a", -2.0), ("x", -9.0), ("y", -8.9999), ("z", -8.9998)]
    two = [("ab", -1.0 + 1e-15), ("a", -2.0), ("z", -9.0), ("x", -8.9999), ("y", -8.9998)]
    assert settle_scores(one) == settle_scores(two)
    assert settle_scores(one) == [("ab", -1.0), ("a", -2.0), ("x", -9.0), ("y", -9.0), ("z", -9.0)]


@given(st.text())
def test_byte_level_bpe_gives_every_text_back(bpe, text):
    ids = bpe(text, add_special_tokens=False).input_ids
    assert bpe.decode(ids) == text
    assert bpe.unk_token_id not in ids or "<unk>" in text


@given(st.text().filter(lambda text: "<" not in text))
def test_byte_level_bpe_gives_the_text_back_from_between_its_special_tokens(bpe, text):
    ids = bpe(text).input_ids
    assert ids[-1] == bpe.eos_token_id
    assert bpe.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_kept_apart(kind, tmp_path):
    train_tokenizer(TEXTS, kind=kind, vocab_size=300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)  # which the generic class ignores
    assert word_prefix(tokenizer) == (" " if kind == "bpe" else "")


def test_lowercase_and_case():
    cased, uncased = (train_tokenizer(TEXTS, kind="wordpiece", vocab_size=200, lowercase=low) for low in (False, True))
    assert cased.tokenize("Ä Cats")[0] == "Ä"
    assert uncased.tokenize("CATS Ä") == uncased.tokenize("cats a")
    assert cased.tokenize("Cats") != cased.tokenize("cats")


def test_columns_are_named_or_found_and_said(cli_run):
    write_jsonl(source=["hello world"], target=["hallo welt"], id=["x"])
    code, log = cli_run("out", "data.jsonl", "--columns", "source,target", "--vocab-size", 300)
    assert code == 0, log
    assert "1 text in the column 'source'" in log
    assert "columns not used: 'id'" in log
    assert "of the 300 asked for: the texts hold no more" in log
    write_jsonl("qa.jsonl", id=["x"], question=["who sat?"], context=["the cat sat"])
    code, log = cli_run("found", "qa.jsonl", "--vocab-size", 300)
    assert code == 0, log
    assert "'question'" in log
    assert "'context'" in log


def test_every_kind_of_file_is_read(cli_run):
    Path("lines.txt").write_text("alpha one\n\nbeta two\n")
    Path("tags.conll").write_text("gamma O\nthree O\n\ndelta O\n")
    Path("semi.csv").write_bytes("text;n\nné;1\n".encode("cp1252"))
    settings = ["data.delimiter=;", "data.encoding=cp1252"]
    code, log = cli_run("out", "lines.txt", "tags.conll", "semi.csv", *settings, "--kind", "wordpiece")
    assert code == 0, log
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.unk_token not in tokenizer.tokenize("alpha beta gamma delta né")


REFUSED = {
    "no such column": (["data.csv", "--columns", "txt"], "did you mean 'text'?"),
    "no usual name": (["odd.csv"], "--columns left"),
    "empty file": (["empty.csv"], "the file is empty"),
    "header only": (["header.csv"], "0 rows"),
    "blank cells": (["blank.csv"], "texts without a single character"),
    "other delimiter": (["semi.csv"], "data.delimiter=';'"),
    "no such file": (["dta.csv"], "did you mean data.csv?"),
    "no file": (["data.quotes=false"], "no file with texts"),
    "no effect": (["data.csv", "data.stride=3"], "'data.stride' has no effect"),
    "bad setting": (["data.csv", "data.quotes=perhaps"], "data.quotes='perhaps'"),
    "bpe too small": (["data.csv", "--vocab-size", "200"], "at least 260"),
    "wordpiece too small": (["data.csv", "--vocab-size", "8", "--kind", "wordpiece"], "at least 15"),
    "unigram too small": (["data.csv", "--vocab-size", "8", "--kind", "unigram"], "at least 11"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_ends_with_one_message_and_nothing_written(name, cli_run):
    arguments, expected = REFUSED[name]
    Path("data.csv").write_text("text,label\nthe cat sat,a\n")
    Path("odd.csv").write_text("left,right\nx,y\n")
    Path("empty.csv").write_text("")
    Path("header.csv").write_text("text\n")
    Path("blank.csv").write_text('text,n\n" ",1\n')
    Path("semi.csv").write_text("text;label\nx;y\n")
    before = {path.name for path in Path.cwd().iterdir()}
    code, log = cli_run("out", *arguments)
    assert code == 2, log
    assert log.count("error\n") == 1
    assert "Traceback" not in log
    assert expected in log, log
    assert {path.name for path in Path.cwd().iterdir()} == before


def test_a_folder_in_use_is_left_alone(cli_run):
    write_jsonl(text=TEXTS)
    Path("out").mkdir()
    assert cli_run("out", "data.jsonl")[0] == 0  # an empty one will do
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    for out in ("out", "data.jsonl"):
        code, log = cli_run(out, "data.jsonl", "--kind", "unigram")
        assert code == 2
        assert "something is there already" in log
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
