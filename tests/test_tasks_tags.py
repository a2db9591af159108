"""Tag schemes: every scheme tells the same entities, seqeval being the judge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Tokens

from heedful import UserError
from tasks.tags import check_tags, detect_scheme, opens_with_inside, to_iob2

TYPES = ("PER", "LOC", "creative-work")
LETTERS = {"BIOES": "BIES", "BILOU": "BILU", "BMES": "BMES", "BMEWO": "BMEW"}


@st.composite
def sentences(draw):
    """A length and non-overlapping entities ``(type, start, end)`` in it, often next to one another."""
    spans, position = [], 0
    for _ in range(draw(st.integers(0, 6))):
        start = position + draw(st.integers(0, 2))
        position = start + draw(st.integers(1, 4))
        spans.append((draw(st.sampled_from(TYPES)), start, position))
    return position + draw(st.integers(0, 3)), spans


def write_iob2(length, spans):
    tags = ["O"] * length
    for kind, start, end in spans:
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


def write_iob1(length, spans):
    tags, ends = ["O"] * length, {(kind, end) for kind, _, end in spans}
    for kind, start, end in spans:
        first = "B" if (kind, start) in ends else "I"
        tags[start:end] = [f"{first}-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


def write_bioes(length, spans, letters):
    begin, inside, last, single = letters
    tags = ["O"] * length
    for kind, start, end in spans:
        middle = [f"{inside}-{kind}"] * (end - start - 2)
        many = [f"{begin}-{kind}", *middle, f"{last}-{kind}"]
        tags[start:end] = many if end - start > 1 else [f"{single}-{kind}"]
    return tags


def read(tags, scheme):
    return [(entity.tag, entity.start, entity.end) for entity in Tokens(tags, scheme).entities]


@given(sentences())
def test_each_scheme_converts_to_the_same_iob2(sentence):
    expected = write_iob2(*sentence)
    assert to_iob2(write_iob1(*sentence), "IOB1") == expected
    assert to_iob2(expected, "IOB2") == expected
    assert to_iob2(expected, "IOB1") == expected, "reading IOB2 as IOB1 changes nothing"
    for name, letters in LETTERS.items():
        assert to_iob2(write_bioes(*sentence, letters), "BIOES") == expected, name


@given(sentences())
def test_seqeval_reads_the_written_schemes_as_the_same_entities(sentence):
    written = {
        IOB1: write_iob1(*sentence),
        IOB2: write_iob2(*sentence),
        IOBES: write_bioes(*sentence, "BIES"),
        BILOU: write_bioes(*sentence, "BILU"),
    }
    for scheme, tags in written.items():
        assert read(tags, scheme) == sentence[1]


@given(st.lists(st.sampled_from([p + t for p in ("B-", "I-", "E-", "S-") for t in TYPES] + ["O"]), max_size=12))
def test_faulty_tags_convert_to_what_conlleval_reads(tags):
    converted = to_iob2(tags, "BIOES")
    assert opens_with_inside(converted) is None
    assert read(converted, IOB2) == [(kind, start, last + 1) for kind, start, last in get_entities(tags)]


@given(st.lists(sentences(), min_size=1, max_size=8))
def test_detection_finds_the_scheme_that_was_written(many):
    spans = [span for _, found in many for span in found]
    scheme = detect_scheme([write_iob2(*one) for one in many], where="x")[0]
    assert scheme == "IOB2"
    scheme = detect_scheme([write_iob1(*one) for one in many], where="x")[0]
    assert scheme == ("IOB1" if spans else "IOB2")
    for letters in LETTERS.values():
        scheme = detect_scheme([write_bioes(*one, letters) for one in many], where="x")[0]
        assert scheme == ("BIOES" if spans else "IOB2")


def test_a_mixture_is_read_as_iob1_and_said_to_be_one():
    scheme, finding = detect_scheme([["B-PER", "O"], ["I-LOC"]], where="x")
    assert scheme == "IOB1"
    assert finding.startswith("neither IOB1 nor IOB2: 1 entities begin with B-, 1 with I-")


def test_inside_only_tags_are_iob1():
    assert detect_scheme([["I-PER", "I-PER", "O", "I-LOC"]], where="x")[0] == "IOB1"


def test_ioe_is_refused():
    with pytest.raises(UserError, match="IOE"):
        detect_scheme([["I-PER", "E-PER", "O"]], where="data.train")


@pytest.mark.parametrize("bad", ["PER", "o", "", "B-", "B_PER", "X-PER", "B- ", "-PER", "NN"])
def test_what_is_no_tag_is_refused_with_its_place(bad):
    with pytest.raises(UserError) as caught:
        check_tags([["O"], ["O", "B-PER", bad]], where="data.train")
    assert caught.value.where == "data.train, row 1, word 2"
    assert repr(bad) in caught.value.found


def test_a_prefix_that_the_scheme_lacks_is_refused():
    check_tags([["S-PER"]], where="x", scheme="BIOES")
    with pytest.raises(UserError, match="S-PER"):
        check_tags([["S-PER"]], where="x", scheme="IOB2")


@pytest.mark.parametrize(
    ("tags", "position"),
    [(["I-A"], 0), (["B-A", "I-A", "O", "I-A"], 3), (["B-A", "I-B"], 1), (["B-A", "I-A"], None), ([], None)],
)
def test_stray_inside_tags_are_found(tags, position):
    assert opens_with_inside(tags) == position
