"""Rows arrive exactly as they stand in the file, or are refused with the place of the fault."""

import csv
import io
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heedful import UserError
from sources.readers import find_splits, fingerprint, read_rows, rows_from_text
from sources.tables import Dialect
from tasks import TASKS

CLS, NER, QA = (TASKS[name].columns for name in ("classification", "ner", "qa"))
AWKWARD = [
    "007",
    "None",
    "NA",
    "null",
    "1.0",
    "",
    " x ",
    'say "hi", ok',
    "a\r\nb\rc\nd",
    "\u2028\x85",
    "\ufeff",
    "\x00",
]
CONLL = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n# SYM O O\nx NN O O\n"


def read(source, columns=CLS, mapping=None, **options):
    return read_rows(str(source), columns=columns, mapping=mapping or {}, **options)


def write(path: Path, content) -> Path:
    """Write bytes, text, or JSON values (one a line in a .jsonl file)."""
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    elif not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_texts(path: Path, texts) -> Path:
    rows = [{"text": text, "label": "a"} for text in texts]
    if path.suffix in (".csv", ".tsv"):
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter="," if path.suffix == ".csv" else "\t")
        writer.writerows([["text", "label"], *([row["text"], row["label"]] for row in rows)])
        return write(path, buffer.getvalue())
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    return write(path, rows)


def saved(path: Path, dataset) -> str:
    dataset.save_to_disk(str(path))
    return str(path)


def refusal(source, columns=CLS, mapping=None, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(source, columns, mapping, **options)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_text_stays_text(tmp_path, suffix):
    rows = read(write_texts(tmp_path / f"a{suffix}", AWKWARD))
    assert rows["text"][:] == AWKWARD
    assert rows["row"][:] == list(range(len(AWKWARD)))
    assert set(rows.column_names) == {"row", "text", "label"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_survives(tmp_path, suffix, texts):
    assert read(write_texts(tmp_path / f"a{suffix}", texts))["text"][:] == texts


def squad(answer_start=4, **extra):
    return [
        {"question": "q", "context": "the cat", "answers": {"text": ["cat"], "answer_start": [answer_start]}} | extra
    ]


def test_byte_order_mark_is_no_part_of_the_header(tmp_path):
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\nx,a\n")
    assert read(path)["text"][:] == ["x"]


def test_dialect(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"y" z\tcaf\xe9|a\n\tb\n'.encode("latin-1"))
    rows = read(path, dialect=Dialect(encoding="latin-1", quotes=False, label_separator="|"))
    assert rows["text"][:] == ['"y" z', ""]
    assert rows["label"][:] == [["caf\xe9", "a"], ["b"]]
    semicolons = write(tmp_path / "b.csv", "text;label\nx;1\n")
    assert read(semicolons, dialect=Dialect(delimiter=";"))["label"][:] == ["1"]
    assert "data.encoding" in refusal(path, dialect=Dialect(encoding="utf-99"))
    assert "data.delimiter" in refusal(semicolons, dialect=Dialect(delimiter="ab"))


def test_a_cell_of_thirty_megabytes_is_read_and_said(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "text,label\n" + "x" * 30_000_000 + ",a\n")
    limit = csv.field_size_limit()
    assert len(read(path)["text"][0]) == 30_000_000
    assert "line 2" in caplog.text
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0], ["1", "0"]),
        ([1, 0.5], [1.0, 0.5]),
        ([True, False], ["true", "false"]),
        ([["a", "b"], []], [["a", "b"], []]),
        ([[1], [2, 3]], [["1"], ["2", "3"]]),
        (["007", "1.0"], ["007", "1.0"]),
    ],
)
def test_labels(tmp_path, labels, expected):
    rows = read(write(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in labels]))
    assert rows["label"][:] == expected
    assert [type(label) for label in rows["label"]] == [type(label) for label in expected]


def test_class_labels_become_their_names(tmp_path):
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    dataset = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    assert read(tmp_path / "a.parquet")["label"][:] == ["pos", "neg"]
    assert read(saved(tmp_path / "one", dataset.with_format("numpy")))["label"][:] == ["pos", "neg"]
    hidden = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features)
    assert "row index 1" in refusal(saved(tmp_path / "hidden", hidden))


def test_lists_of_class_labels_become_their_names(tmp_path):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    dataset = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, features=features)
    assert read(saved(tmp_path / "d", dataset), NER)["tags"][:] == [["B-PER", "O"]]


def test_pandas_categories_in_parquet(tmp_path):
    labels = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["x", "y", "z"], "label": labels}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")["label"][:] == ["a", "b", "a"]


def test_conll(tmp_path):
    rows = read(write(tmp_path / "a.conll", CONLL), NER)
    assert rows["tokens"][:] == [["EU", "rejects"], ["#", "x"]]
    assert rows["tags"][:] == [["B-ORG", "O"], ["O", "O"]]
    assert read(tmp_path / "a.conll", NER, {"tags": "column_2"})["tags"][1] == ["SYM", "NN"]
    words = write(tmp_path / "words.txt", "a\n#\n\nb\n")
    assert read(words, NER, need_targets=False)["tokens"][:] == [["a", "#"], ["b"]]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("# sent_id = 1\na O\n", [["a"]]),  # another width
        ("# id\n# text\na O\n# O\n", [["a", "#"]]),
        ("# x\tb\nw\tO\n", [["w"]]),  # the same width, but no tag
        ("a O\n#nlp B-TAG\n\n#nlp B-TAG\nb O\n", [["a", "#nlp"], ["#nlp", "b"]]),
        ("a\xa0b O\n\xa0 O\n", [["a\xa0b", "\xa0"]]),
        ("New York\tO\n\xa0\tO\n", [["New York", "\xa0"]]),
        ("a O\r\n\r\nb O\r\n", [["a"], ["b"]]),
        ("a O\n  \n\nb O", [["a"], ["b"]]),
    ],
)
def test_conll_comments_and_blanks(tmp_path, text, tokens, caplog):
    path = write(tmp_path / "a.bio", text)
    assert read(path, NER)["tokens"][:] == tokens
    assert ("comment" in caplog.text) == ("# " in text.split("\n")[0])


@pytest.mark.parametrize(
    ("text", "said"), [("a O\n" * 257, True), ("a O\n" * 256, False), ("a O\n" * 300 + "\nb O", False)]
)
def test_conll_that_lost_its_blank_lines_is_said(tmp_path, text, said, caplog):
    read(write(tmp_path / "a.conll", text), NER)
    assert ("no blank line, so its 257 words are one sentence" in caplog.text) == said


def test_squad_files(tmp_path):
    answer = [{"text": "cat", "answer_start": 4}]
    qas = [
        {"id": "a", "question": "q", "answers": answer},
        {"id": "b", "question": "r", "answers": [], "plausible_answers": answer, "is_impossible": True},
    ]
    content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "the cat", "qas": qas}]}]}
    rows = read(write(tmp_path / "dev.json", content), QA)
    assert rows["id"][:] == ["a", "b"]
    assert rows["answers"][:] == [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    flat = [squad()[0] | {"id": 7, "answers": answer}]
    assert read(write(tmp_path / "flat.json", {"data": flat}), QA)["answers"][:] == rows["answers"][:1]
    assert read(tmp_path / "flat.json", QA)["id"][:] == ["7"]
    saved_rows = saved(tmp_path / "d", datasets.Dataset.from_list(squad()))
    assert read(saved_rows, QA)["answers"][:] == rows["answers"][:1]
    del qas[0]["answers"]
    assert "'a'" in refusal(write(tmp_path / "test.json", content), QA)
    assert read(tmp_path / "test.json", QA, need_targets=False).column_names == ["row", "id", "question", "context"]


def test_answers_count_characters_not_bytes(tmp_path):
    row = {"question": "q", "context": "caf\xe9 \U0001f600 cat", "answers": {"text": ["cat"], "answer_start": [7]}}
    assert len(read(write(tmp_path / "a.jsonl", [row]), QA)) == 1
    row["answers"]["answer_start"] = [11]
    assert "here 7" in refusal(write(tmp_path / "a.jsonl", [row]), QA)


def test_no_column_is_proposed_twice(tmp_path):
    assert "add it" in refusal(write(tmp_path / "a.csv", "text\nq\n"))
    assert "data.columns.label=mood" in refusal(write(tmp_path / "b.csv", "text,mood\nq,a\n"))


def test_mapping(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "question,sentence,label,extra\nq,s,1,z\n")
    assert "data.columns.text=question" in refusal(path)
    rows = read(path, mapping={"text_pair": "sentence"})
    assert rows[0] == {"row": 0, "text": "q", "text_pair": "s", "label": "1"}
    assert "not used: 'extra'" in caplog.text
    assert "did you mean data.columns.label=extra" in refusal(path, mapping={"label": "extr", "text": "sentence"})
    assert "data.columns.labels" in refusal(path, mapping={"labels": "extra"})
    assert "a column for each" in refusal(path, mapping={"text": "extra", "label": "extra"})


def test_fields_of_nested_columns(tmp_path, caplog):
    pairs = TASKS["translation"].columns
    both = {"source": "translation.en", "target": "translation.ro"}
    cells = [{"translation": {"en": "x", "ro": "y"}, "id": 1}, {"translation": {"en": "007", "ro": "NA"}, "id": 2}]
    languages = datasets.Features({"translation": datasets.Translation(["en", "ro"]), "id": datasets.Value("int64")})
    hub = saved(tmp_path / "hub", datasets.Dataset.from_list(cells, features=languages))
    for source in (write(tmp_path / "a.jsonl", cells), hub):
        rows = read(source, pairs, both)
        assert (rows["source"][:], rows["target"][:]) == (["x", "007"], ["y", "NA"])
        assert read(source, pairs, both, max_rows=1)["source"][0] in ("x", "007")
        assert "not used: 'id'\n" in caplog.text
        message = refusal(source, pairs, both | {"target": "translation.fr"})
        assert "no field 'fr' in the column 'translation'" in message
        assert "'en', 'ro'" in message
    named = write(tmp_path / "b.jsonl", [{"a": {"b": "no"}, "a.b": "yes", "label": "l"}])
    assert read(named, mapping={"text": "a.b"})["text"][:] == ["yes"]
    deep = write(tmp_path / "c.jsonl", [{"a": {"b": {"c": "x"}}, "label": "l"}, {"a": {"b": {}}, "label": "l"}])
    assert "line 2" in refusal(deep, mapping={"text": "a.b.c"})
    assert "cells with named fields" in refusal(deep, mapping={"text": "label.x", "label": "label"})


def test_prediction_needs_no_targets(tmp_path):
    path = write(tmp_path / "a.csv", "sentence\nx\n")
    assert read(path, need_targets=False).column_names == ["row", "text"]
    labelled = write(tmp_path / "b.jsonl", [{"text": "x", "label": None}])
    assert read(labelled, need_targets=False).column_names == ["row", "text"]
    assert read(write(tmp_path / "c.txt", "one\n\ntwo\n"), need_targets=False)["text"][:] == ["one", "two"]
    plain = write(tmp_path / "d.jsonl", [{"tokens": "Anna, come!"}])
    assert read(plain, NER, need_targets=False)["tokens"][0] == ["Anna", ",", "come", "!"]


@pytest.mark.parametrize("text", ["the cat sat\nthe dog ran\n", "the cat\n\nO my\n", "Anna\nshe came\n"])
def test_sentences_to_predict_are_not_taken_for_columns(tmp_path, text, caplog):
    """Of equally many words each, they would be read as words with tags, and all but the first word be lost."""
    found = read(write(tmp_path / "a.txt", text), NER, need_targets=False)["tokens"][:]
    assert found == [line.split() for line in text.splitlines() if line]
    assert "a sentence on each line; a file with a word on each line ends in .conll" in caplog.text


@pytest.mark.parametrize("text", [CONLL, "the O\n\nParis B-LOC\n", "# a comment\nthe O\n", "Anna\ncame\n"])
def test_a_tagged_text_file_to_predict_is_conll(tmp_path, text, caplog):
    found = read(write(tmp_path / "a.txt", text), NER, need_targets=False)["tokens"][:]
    assert found == read(write(tmp_path / "a.conll", text), NER, need_targets=False)["tokens"][:]
    assert "sentence on each line" not in caplog.text


@pytest.mark.parametrize(
    ("text", "found"), [("the O\nParis\nis O\n", "1 column:"), ("in\nNew York\nthen\n", "2 columns")]
)
def test_an_odd_line_among_words_is_named_not_taken_for_a_sentence(tmp_path, text, found):
    with pytest.raises(UserError, match=found) as error:
        read(write(tmp_path / "a.txt", text), NER, need_targets=False)
    assert "line 2" in error.value.where


def test_sentences_that_begin_with_a_hash_are_no_comments(tmp_path):
    path = write(tmp_path / "a.txt", "#now in Paris\n#then in Rome\n")
    assert [" ".join(words) for words in read(path, NER, need_targets=False)["tokens"]] == [
        "# now in Paris",
        "# then in Rome",
    ]


def test_json_lines_in_a_json_file(tmp_path):
    path = write(tmp_path / "a.json", '{"text": "x", "label": 1}\n{"text": "y", "label": 2}\n')
    assert read(path)["label"][:] == ["1", "2"]


def test_a_sample_keeps_order_and_names_the_lines_of_the_file(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"{i},a\n" for i in range(100)))
    texts = [int(text) for text in read(path, max_rows=10, seed=1)["text"]]
    assert texts == sorted(texts)
    assert len(set(texts)) == 10
    assert texts != list(range(10))
    assert texts == [int(text) for text in read(path, max_rows=10, seed=1)["text"]]
    assert texts != [int(text) for text in read(path, max_rows=10, seed=2)["text"]]
    holed = write(tmp_path / "b.csv", "text,label\n" + "".join(f"{i},\n" for i in range(100)))
    named = refusal(holed, max_rows=2, seed=1)
    kept = sorted(int(i) for i in read(holed, mapping={"label": "text", "text": "label"}, max_rows=2, seed=1)["label"])
    assert f"line {kept[0] + 2}, line {kept[1] + 2}" in named


def test_missing_files_and_plain_folders(tmp_path):
    write(tmp_path / "train.csv", "text,label\nx,a\n")
    assert "did you mean" in refusal(tmp_path / "trian.csv")
    assert "no folder" in refusal(tmp_path / "nowhere" / "train.csv")
    assert "train.csv" in refusal(tmp_path)
    assert "owner/name:train" in refusal("glue")


def test_saved_splits(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["x"], "label": ["a"]})
    path = saved(tmp_path / "both", datasets.DatasetDict({"train": one, "validation": one}))
    assert find_splits(path) == {"train": f"{path}:train", "validation": f"{path}:validation"}
    assert len(read(f"{path}:validation")) == 1
    assert f"{path}:train or {path}:validation" in refusal(path)
    assert "['train', 'validation']" in refusal(f"{path}:test")
    single = saved(tmp_path / "one", one)
    assert find_splits(single) == {"train": single}
    assert "single" in refusal(f"{single}:train")


def test_find_splits(tmp_path):
    for name in ("train.csv", "dev.jsonl", "notes.md", "testing.csv"):
        write(tmp_path / name, "x")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "test-00000-of-00001.parquet", "x")
    folder = str(tmp_path)
    assert find_splits(folder) == {
        "train": f"{folder}/train.csv",
        "validation": f"{folder}/dev.jsonl",
        "test": f"{folder}/data/test-00000-of-00001.parquet",
    }
    write(tmp_path / "validation.csv", "x")
    with pytest.raises(UserError, match="2 candidates for validation"):
        find_splits(folder)
    with pytest.raises(UserError, match="no train split"):
        find_splits(f"{folder}/data")
    with pytest.raises(UserError, match="no such file"):
        find_splits(f"{folder}/nowhere")


def test_hub_sources(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": ["x"], "label": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("imdb:train", "nyu-mll/glue[sst2]:validation", "a/b:train[:10%]", "a/b@refs/pr/1[c]:train"):
        assert read(source)["text"][:] == ["x"]
    assert asked == [
        (("imdb", None), {"split": "train", "revision": None, "streaming": False}),
        (("nyu-mll/glue", "sst2"), {"split": "validation", "revision": None, "streaming": False}),
        (("a/b", None), {"split": "train[:10%]", "revision": None, "streaming": False}),
        (("a/b", "c"), {"split": "train", "revision": "refs/pr/1", "streaming": False}),
    ]


def test_a_hub_that_can_not_be_reached_is_a_user_error(monkeypatch):
    def load(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("owner/name:train")
    assert "ConnectionError: Couldn't reach the Hub" in message
    assert "HF_HUB_OFFLINE" in message


def test_rows_from_text():
    assert rows_from_text("a ||| b", CLS)[0] == {"row": 0, "text": "a", "text_pair": "b"}
    assert rows_from_text("fine, thanks", CLS)[0] == {"row": 0, "text": "fine, thanks"}
    assert rows_from_text("Anna lives in Rome.", NER)["tokens"][0] == ["Anna", "lives", "in", "Rome", "."]
    assert rows_from_text("who? ||| Anna", QA)[0] == {"row": 0, "question": "who?", "context": "Anna"}
    for text, columns in (("who?", QA), ("a ||| b ||| c", CLS), ("a |||", CLS)):
        with pytest.raises(UserError, match=r"1 part in|[23] parts in"):
            rows_from_text(text, columns)


def test_fingerprint(tmp_path):
    path = write(tmp_path / "a.csv", "abc")
    assert fingerprint(str(path)) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in "xy")
    both = saved(tmp_path / "both", datasets.DatasetDict({"train": one, "test": two}))
    prints = [fingerprint(both), fingerprint(f"{both}:train"), fingerprint(f"{both}:test")]
    assert len(set(prints)) == 3
    assert prints[1] == fingerprint(str(tmp_path / "both" / "train"))


def test_reading_is_silent_where_nothing_is_left_out(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="heedful"):
        read(write_texts(tmp_path / "a.csv", AWKWARD))
    assert caplog.text == ""
