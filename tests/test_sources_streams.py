"""A stream gives the rows that the whole file gives, from any row on, and meets a fault where it stands."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heedful import UserError
from sources.columns import Column
from sources.readers import fingerprint, pinned, read_blocks, read_rows
from sources.tables import Dialect

COLUMNS = (Column("text", "text", ("text",)), Column("label", "label", ("label",), target=True))
COUNT = 23
ROWS = [{"text": f"007 \u2028 é {i}", "label": "ab"[i % 2]} for i in range(COUNT)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" * (1 + i % 3) for i, row in enumerate(ROWS)]
    (folder / "rows.jsonl").write_text("\ufeff" + "".join(lines), encoding="utf-8")
    table = pa.Table.from_pandas(pd.DataFrame(ROWS).astype({"label": "category"}))
    pq.write_table(table, folder / "rows.parquet", row_group_size=7)
    return folder


def read(source, **how):
    return [rows.to_list() for rows in read_blocks(str(source), columns=COLUMNS, mapping={}, **how)]


def check_blocks(source, blocks, *, size, start):
    expected = read_rows(str(source), columns=COLUMNS, mapping={}).to_list()[start:]
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert all(blocks)
    assert [row for block in blocks for row in block] == expected


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@given(size=st.integers(1, COUNT + 2), start=st.integers(0, COUNT + 2))
def test_a_stream_holds_the_rows_of_the_file(name, files, size, start):
    check_blocks(files / name, read(files / name, size=size, start=start), size=size, start=start)


@pytest.mark.parametrize(("size", "start"), [(5, 0), (5, 8), (40, 3), (23, 23)])
def test_a_hub_data_set_is_streamed_with_its_label_names(size, start, monkeypatch, files):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"text": [row["text"] for row in ROWS], "label": ["ab".index(row["label"]) for row in ROWS]}
    whole = datasets.Dataset.from_dict(columns, features=features)

    def load(name, config, *, split, revision, streaming):
        assert (name, split) == ("owner/name", "train")
        return whole.to_iterable_dataset(num_shards=3) if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    check_blocks("owner/name:train", read("owner/name:train", size=size, start=start), size=size, start=start)


@pytest.mark.parametrize("config", ["", "[sub]"])
def test_a_hub_stream_is_pinned_to_its_commit(config, monkeypatch):
    """Else a push in mid-run would change what later passes, and resumed runs, read."""
    commit = "0123456789" * 4

    class Api:
        def dataset_info(self, name, *, revision):
            assert (name, revision) == ("owner/name", "v2")
            return type("Info", (), {"sha": commit})

    monkeypatch.setattr("sources.readers.HfApi", Api)
    source = pinned(f"owner/name@v2{config}:train")
    assert source == f"owner/name@{commit}{config}:train"
    assert fingerprint(source) == commit


def test_a_file_needs_no_pin(files):
    assert pinned(str(files / "rows.jsonl")) == str(files / "rows.jsonl")


def test_a_hub_that_can_not_be_asked_for_the_commit_is_said():
    with pytest.raises(UserError, match="Offline") as error:
        pinned("owner/name:train")
    assert error.value.where == "owner/name:train"


@pytest.mark.fault("a streamed file that is broken in the middle", "one message, when it is reached")
def test_a_parquet_file_broken_in_the_middle_is_said_when_it_is_reached(tmp_path, files):
    content = bytearray((files / "rows.parquet").read_bytes())
    offset = pq.ParquetFile(files / "rows.parquet").metadata.row_group(1).column(0).data_page_offset
    content[offset : offset + 40] = bytes(40)
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(content)
    blocks = read_blocks(str(broken), columns=COLUMNS, mapping={}, size=7)
    assert len(next(blocks)) == 7
    with pytest.raises(UserError, match="not a readable parquet file"):
        next(blocks)


def test_only_the_block_at_hand_is_read(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "x", "label": "a"}\n\n{"text": "y", "label": "b"}\n{"text": \n')
    blocks = read_blocks(str(source), columns=COLUMNS, mapping={}, size=2)
    assert len(next(blocks)) == 2
    with pytest.raises(UserError, match="broken JSON") as error:
        next(blocks)
    assert "line 4" in error.value.where


@pytest.mark.parametrize(
    ("name", "content", "encoding", "expected"),
    [
        ("rows.csv", b"text,label\nx,a\n", "utf-8", ".csv"),
        ("rows.jsonl", '{"text": "x"}\n'.encode("utf-16"), "utf-16", "utf-16 in a streamed file"),
        ("rows.jsonl", b'{"text": "x", "label": "a"}\n', "nonsense", "unknown encoding"),
        ("rows.jsonl", b'{"text": "x", "label": "a"}\n{"text": "\xff", "label": "a"}\n', "utf-8", "byte 0xff"),
        ("rows.parquet", b"nothing of the kind", "utf-8", "not a readable parquet file"),
        ("folder", None, "utf-8", "with a folder"),
        ("rows.jsonl", b'{"text": "x"}\n', "utf-8", "label"),
    ],
)
def test_what_can_not_be_streamed_is_refused(name, content, encoding, expected, tmp_path):
    source = tmp_path / name
    source.mkdir() if content is None else source.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read(source, size=1, dialect=Dialect(encoding=encoding))


def test_a_field_of_a_column_is_streamed_too(tmp_path):
    source = tmp_path / "rows.jsonl"
    Path(source).write_text('{"of": {"text": "x"}, "label": "a"}\n{"of": {"text": "y"}, "label": "b"}\n')
    blocks = read_blocks(str(source), columns=COLUMNS, mapping={"text": "of.text"}, size=1)
    assert [rows[0]["text"] for rows in blocks] == ["x", "y"]
