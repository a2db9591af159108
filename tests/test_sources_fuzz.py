"""Whatever bytes a file holds, reading it ends in rows or in a UserError; so does a configuration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import UserError
from pipelines import config
from sources.readers import read_rows
from sources.tables import Dialect
from tasks import TASKS

BITS = {
    ".csv": [
        b"text",
        b"label",
        b",",
        b";",
        b"\t",
        b'"',
        b"\n",
        b"\r",
        b"\0",
        b"a",
        b"1",
        b"1.5",
        b"\xff",
        b"\xef\xbb\xbf",
    ],
    ".jsonl": [
        *(
            b'{"text": "a", "label": 1}\n',
            b"{",
            b"}",
            b"[",
            b"]",
            b'"text"',
            b'"label"',
            b":",
            b",",
            b"\n",
            b'"\\ud83d"',
        ),
        *(
            b"null",
            b"NaN",
            b"-Infinity",
            b"1e999",
            b"9" * 5000,
            b"\xff",
            b"true",
            b'""',
            b'{"text": "b", "label": 0.5}\n',
        ),
    ],
    ".json": [
        b'{"data": [',
        b'{"paragraphs": [',
        b'{"context": "a b", "qas": [',
        b'{"id": 1, "question": "q"',
        b"}",
        b"]",
    ],
    ".conll": [b"a", b"O", b"B-X", b" ", b"\t", b"\n", b"\n\n", b"#", b"-DOCSTART-", b"\xc2\xa0", b"\r", b"\0"],
}
YAML = [
    *(
        "task: ner\n",
        "model: {name: m}\n",
        "seed: ",
        "train:\n  ",
        "lora: ",
        "&a ",
        "*a",
        "? ",
        "- ",
        ": ",
        "\n",
        "<<: ",
    ),
    *("!!python/name:os.system ", "!!binary ", "!!timestamp ", "!!int ", "!!float ", "!!bool ", "!!set ", "!!omap "),
    *("2026-13-45", "0b_", "0x_", "1:99", ".inf", "~", "{", "}", "[", "]", "'", '"', "|\n ", "%", "@", "\t", "a", "1"),
]


def joined(bits, anything):
    """Parts of what such a file holds, in any order, and now and then something else."""
    parts = st.lists(st.sampled_from(bits) | anything, max_size=14)
    return parts.map(type(bits[0])().join)


def ends_well(read):
    try:
        return read()
    except UserError:
        return None


@pytest.mark.fault("any bytes in a csv, jsonl, json or CoNLL file", "rows, or one message")
@pytest.mark.parametrize(
    ("suffix", "task"),
    [(".csv", "classification"), (".jsonl", "classification"), (".jsonl", "qa"), (".json", "qa"), (".conll", "ner")],
)
@settings(max_examples=100)
@given(data=st.data())
def test_any_bytes_are_rows_or_refused(suffix, task, data, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data.draw(joined(BITS[suffix], st.binary(max_size=4))))
    how = Dialect(encoding=data.draw(st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-7", "punycode", "x"])))
    rows = ends_well(lambda: read_rows(str(path), columns=TASKS[task].columns, mapping={}, dialect=how))
    assert rows is None or len(rows)


@pytest.mark.fault("any text in a YAML file", "a configuration, or one message")
@settings(max_examples=200)
@given(text=joined(YAML, st.text(max_size=3)))
def test_any_text_is_a_configuration_or_refused(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if (found := ends_well(lambda: config.load(path))) is not None:
        assert config.validate(found.to_dict(), where="again") == found


@pytest.mark.fault("any text as a setting on the command line", "taken, or one message")
@settings(max_examples=100)
@given(
    key=st.sampled_from(["seed", "lora", "data.columns", "train.optim", "task", "a.b", "..", ""]),
    text=joined(YAML, st.text(max_size=3)),
)
def test_any_override_is_taken_or_refused(key, text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: ner\nmodel: {name: m}\n")
    ends_well(lambda: config.load(path, [f"{key}={text}"]))
