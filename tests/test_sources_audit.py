"""The audit finds what was planted, and nothing else."""

import json
import random
import time
from dataclasses import asdict

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import UserError
from sources.audit import Limits, audit, check, summary
from sources.texts import counted, normalize
from tasks import TASKS

CLS, NER, QA = (TASKS[name].columns for name in ("classification", "ner", "qa"))


def texts(*pairs):
    return Dataset.from_dict({"row": range(len(pairs)), "text": [p[0] for p in pairs], "label": [p[1] for p in pairs]})


def run(columns=CLS, lengths=None, losses=None, **splits):
    return audit(splits, columns=columns, lengths=lengths or {}, losses=losses or {})


def found(part):
    return {name: part[name] for name in ("exact", "normalized", "examples") if name in part}


def test_planted_duplicates_leaks_and_conflicts():
    result = run(
        train=texts(("Good film", "pos"), ("bad", "neg"), ("good  film!", "neg"), ("bad", "neg"), ("own", "pos")),
        validation=texts(("BAD.", "pos"), ("new", "pos")),
        test=texts(("own", "pos"), ("Good film", "neg"), ("new?", "neg")),
    )
    assert found(result.duplicates["train"]) == {"exact": 1, "normalized": 2, "examples": [[0, 2], [1, 3]]}
    assert result.duplicates["train"]["fraction"] == pytest.approx(2 / 5)
    assert result.duplicates["validation"]["normalized"] == 0
    assert list(result.leaks) == ["train->validation", "train->test", "validation->test"]
    assert found(result.leaks["train->validation"]) == {"exact": 0, "normalized": 1, "examples": [[1, 0]]}
    assert found(result.leaks["train->test"]) == {"exact": 2, "normalized": 2, "examples": [[4, 0], [0, 1]]}
    assert found(result.leaks["validation->test"]) == {"exact": 0, "normalized": 1, "examples": [[1, 2]]}
    assert found(result.conflicts["train"]) == {"normalized": 2, "examples": [[0, 2]]}
    assert found(result.conflicts["train->validation"]) == {"normalized": 1, "examples": [[1, 0]]}
    assert result.conflicts["train->test"]["normalized"] == 0  # both of its labels stand in train
    assert result.conflicts["validation->test"]["normalized"] == 1


def test_pairs_differ_where_one_part_differs():
    rows = {"text": ["a", "a", "ab"], "text_pair": ["b", "c", ""], "label": ["x", "x", "x"], "row": range(3)}
    assert run(train=Dataset.from_dict(rows)).duplicates["train"]["normalized"] == 0


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("Hello,  World!", "hello world", True),
        ("\uff21\ufb01", "afi", True),  # NFKC: full-width A, fi ligature
        ("well-known", "well known", True),
        ("?!", "!?", False),
        ("C++", "C", False),
        ("\u0915\u093f", "\u0915\u0940", False),  # Devanagari ki and kii differ in a vowel sign
        ("a b", "ab", False),
    ],
)
def test_normalize(left, right, same):
    assert (normalize(left) == normalize(right)) == same


@pytest.mark.parametrize(
    ("number", "plural", "expected"),
    [
        (1, "rows", "1 row"),
        (0, "rows", "0 rows"),
        (21, "rows", "21 rows"),
        ("1,001", "rows", "1,001 rows"),
        (1, "entities", "1 entity"),
        (1, "processes", "1 process"),
        (1, "new tokens", "1 new token"),
    ],
)
def test_one_is_no_plural(number, plural, expected):
    assert counted(number, plural) == expected


@given(st.text())
def test_normalize_is_idempotent_but_for_case_folding_by_nfkc(text):
    once = normalize(text)
    assert once == " ".join(once.split())
    assert bool(once) == bool(text.split())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xy")), min_size=1, max_size=12))
def test_counts_against_the_quadratic_definition(pairs):
    result = run(train=texts(*pairs))
    n = range(len(pairs))
    assert result.duplicates["train"]["normalized"] == sum(any(pairs[j][0] == pairs[i][0] for j in range(i)) for i in n)
    conflicts = sum(any(pairs[j][0] == pairs[i][0] and pairs[j][1] != pairs[i][1] for j in n) for i in n)
    assert result.conflicts["train"]["normalized"] == conflicts


def labelled(labels, feature):
    columns = {"row": range(len(labels)), "text": [str(i) for i in range(len(labels))], "label": labels}
    features = Features({"row": Value("int64"), "text": Value("string"), "label": feature})
    return Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        (["a", "b", "b"], Value("string"), {"kind": "labels", "counts": {"b": 2, "a": 1}}),
        (["1", "0", "0"], Value("string"), {"kind": "labels", "counts": {"0": 2, "1": 1}}),
        (["1", "0.5", "0"], Value("string"), {"kind": "numbers", "min": 0.0, "mean": 0.5, "max": 1.0}),
        ([1.0, 3.0], Value("float64"), {"kind": "numbers", "min": 1.0, "mean": 2.0, "max": 3.0}),
        (
            [["a", "b"], [], ["b"]],
            List(Value("string")),
            {"kind": "label sets", "counts": {"b": 2, "a": 1}, "without": 1},
        ),
    ],
)
def test_balance(labels, feature, expected):
    assert run(train=labelled(labels, feature)).balance["train"] == expected


def tagged(*sentences):
    return Dataset.from_dict(
        {
            "row": range(len(sentences)),
            "tokens": [words.split() for words, _ in sentences],
            "tags": [tags.split() for _, tags in sentences],
        }
    )


def test_entities_are_counted_whatever_the_scheme():
    result = run(
        NER,
        train=tagged(("a b c d", "B-PER I-PER O B-LOC"), ("x", "O")),
        validation=tagged(("e f g", "I-PER O S-ORG"), ("A b C, d", "B-PER O O B-LOC")),
    )
    assert result.balance["train"] == {"kind": "entities", "counts": {"PER": 1, "LOC": 1}, "without": 1}
    assert result.unseen == {"validation": ["ORG"]}
    assert result.leaks["train->validation"]["normalized"] == 1
    assert result.conflicts["train->validation"]["normalized"] == 1
    assert run(NER, train=tagged(("a b", "NN VB"))).balance["train"]["kind"] == "tags"


@pytest.mark.parametrize("tags", ["U-PER U-PER B-LOC L-LOC", "W-PER W-PER B-LOC E-LOC", "U-PER U-PER B-LOC M-LOC"])
def test_entities_of_bilou_and_bmewes_are_counted_too(tags, recwarn):
    """seqeval takes their tags for words, and warns."""
    result = run(NER, train=tagged(("a b c d", tags)))
    assert result.balance["train"] == {"kind": "entities", "counts": {"PER": 2, "LOC": 1}, "without": 0}
    assert not [w for w in recwarn if "NE tag" in str(w.message)]


def test_final_stop_is_no_conflict_of_tags():
    rows = tagged(("Anna runs", "B-PER O"), ("Anna runs .", "B-PER O O"))
    result = run(NER, train=rows)
    assert result.duplicates["train"]["normalized"] == 1
    assert result.conflicts["train"]["normalized"] == 0


def test_questions_are_known_without_their_id():
    answers = [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    rows = {"row": [0, 1], "id": ["a", "b"], "question": ["q"] * 2, "context": ["the cat"] * 2, "answers": answers}
    result = run(QA, train=Dataset.from_dict(rows))
    assert result.balance["train"]["counts"] == {"answer": 1, "no answer": 1}
    assert result.duplicates["train"]["exact"] == 1
    assert result.conflicts["train"]["normalized"] == 2


def test_lengths_losses_and_empty_inputs():
    result = run(
        train=texts(("", "a"), ("x", "b")),
        lengths={"train": list(range(1, 101))},
        losses={"train": {"tokens": 200, "tokens_lost": 5, "words": 0, "words_lost": 0, "questions_without_window": 3}},
    )
    assert result.lengths["train"] == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert result.losses["train"]["tokens_lost_fraction"] == 0.025
    assert result.losses["train"]["words_lost_fraction"] == 0.0
    assert result.losses["train"]["questions_without_window"] == 3
    assert result.empty == {"train": 1}
    questions = {"row": [0, 1], "id": ["a", "b"], "question": ["", "q"], "context": ["c", "d"]}
    assert run(QA, train=Dataset.from_dict(questions)).empty == {"train": 1}, "one empty input of two is enough"


def faulty():
    return run(
        train=texts(("a", "x"), ("a", "y"), ("b", "x"), ("", "x")),
        test=texts(("a", "z"), ("c", "x")),
        losses={"train": {"tokens": 10, "tokens_lost": 1}},
    )


def test_check_lists_everything_over_its_limit():
    check(faulty(), Limits())
    check(faulty(), Limits(0.5, 0.25, 0.5, 0.1))  # at the limit is within it
    with pytest.raises(UserError) as caught:
        check(faulty(), Limits(0.49, 0.2, 0.4, 0.09))
    message = str(caught.value)
    for part in (
        "train->test: 0.5000 > 0.49 (max_leak",
        "train: 0.2500 > 0.2 (max_dup",
        "train: 0.5000 > 0.4 (max_con",
    ):
        assert part in message
    assert "tokens_lost_fraction of train: 0.1000 > 0.09 (max_lost" in message


def test_summary_marks_what_deserves_a_look():
    lines = summary(faulty())
    assert len(lines) <= 15
    assert lines[0] == "train: 4 rows; labels x 3, y 1"
    marked = "\n".join(line for line in lines if line.startswith("!"))
    for part in ("test: z not in train", "empty input", "duplicates within train: 1 row (25.00%), 1 exactly", "leak"):
        assert part in marked
    assert "train: 1 token cut off (10.00%)" in marked
    clean = summary(run(train=texts(("a", "x"), ("b", "y"))))
    assert clean == ["train: 2 rows; labels x 1, y 1"]


def test_labels_that_may_be_one_are_named():
    assert "! train: labels that differ in case or blanks alone: 'A', 'a'" in summary(
        run(train=labelled(["a", "A", "b", "a-", "a"], Value("string")))
    )
    told = summary(run(train=labelled([["news item", "News  Item"], ["x"]], List(Value("string")))))
    assert "! train: labels that differ in case or blanks alone: 'News  Item', 'news item'" in told
    assert not [line for line in summary(run(train=texts(("a", "x"), ("b", "y")))) if "case" in line]


def test_the_audit_is_json_and_needs_no_targets():
    assert json.loads(json.dumps(asdict(faulty()))) == asdict(faulty())
    bare = run(train=Dataset.from_dict({"row": [0, 1], "text": ["a", "a"]}))
    assert bare.balance == {"train": {"kind": "no targets"}}
    assert bare.conflicts["train"]["normalized"] == 0


def test_a_hundred_thousand_rows_take_seconds():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    pairs = [(" ".join(rng.choices(words, k=15)), rng.choice("ab")) for _ in range(100_000)]
    rows = texts(*pairs, pairs[7])
    start = time.process_time()
    result = run(train=rows)
    assert result.duplicates["train"]["examples"] == [[7, 100_000]]
    assert time.process_time() - start < 15  # measured: about 3
