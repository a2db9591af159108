"""The metric modules against the field's libraries and scripts, and their fast forms against the modules."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from tasks.metrics import resampling
from tasks.metrics.classification.classification import multi_label, single_label
from tasks.metrics.loading import load_metric
from tasks.metrics.regression.regression import regression
from tasks.metrics.squad.squad import best_over_golds, f1, normalize_answer, squad, squad_v2

EXACT = {"rel": 0, "abs": 1e-12}
seeds = st.integers(0, 2**32 - 1)


def make_classes(seed):
    generator = np.random.default_rng(seed)
    num_classes, num_rows = generator.integers(2, 25), generator.integers(1, 60)
    predictions, references = generator.integers(num_classes, size=(2, num_rows))
    return predictions, references, [f"c{i}" for i in range(num_classes)]


def make_indicators(seed):
    generator = np.random.default_rng(seed)
    size = (2, generator.integers(1, 60), generator.integers(2, 25))
    predictions, references = (generator.random(size) < generator.random()).astype(int)
    return predictions, references, [f"c{i}" for i in range(size[2])]


def make_numbers(seed):
    generator = np.random.default_rng(seed)
    # Few levels, so that there are ties; sometimes constant.
    return generator.integers(generator.integers(1, 9), size=(2, generator.integers(2, 60))) / 3


def make_questions(seed):
    generator = np.random.default_rng(seed)
    words = ["the", "a", "Paris", "paris.", "new", "York", "in", "1999", "!"]
    num_rows = generator.integers(1, 40)
    spans = [" ".join(generator.choice(words, generator.integers(1, 4))) for _ in range(num_rows)]
    golds = [
        [" ".join(generator.choice(words, generator.integers(1, 4))) for _ in range(generator.integers(0, 3))]
        for _ in range(num_rows)
    ]
    diffs = generator.permutation(num_rows) / 7.0 - 1.0
    answers = ["" if diff > 0 else span for span, diff in zip(spans, diffs, strict=True)]
    return answers, golds, spans, diffs.tolist()


@given(seeds)
def test_single_label_equals_scikit_learn(seed):
    predictions, references, labels = make_classes(seed)
    scores = single_label(predictions, references, labels=labels)
    report = sklearn.metrics.classification_report(
        references, predictions, labels=range(len(labels)), target_names=labels, output_dict=True, zero_division=0
    )
    assert scores["accuracy"] == pytest.approx(np.mean(predictions == references), **EXACT)
    assert scores["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], **EXACT)
    assert scores["mcc"] == pytest.approx(sklearn.metrics.matthews_corrcoef(references, predictions), **EXACT)
    shown = [name for name in scores if name.startswith("f1_")]
    assert shown == ([f"f1_{label}" for label in labels] if len(labels) <= 20 else [])
    for name in shown:
        assert scores[name] == pytest.approx(report[name[3:]]["f1-score"], **EXACT)


def test_macro_f1_counts_a_class_that_no_row_has():
    scores = single_label([0, 1], [0, 1], labels=["a", "b", "c"])
    assert scores["macro_f1"] == pytest.approx(2 / 3)


@given(seeds)
def test_multi_label_equals_scikit_learn(seed):
    predictions, references, labels = make_indicators(seed)
    scores = multi_label(predictions.tolist(), references.tolist(), labels=labels)
    both = (predictions & references).sum()
    assert scores["micro_f1"] == pytest.approx(2 * both / max(predictions.sum() + references.sum(), 1), **EXACT)
    each = sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(each, **EXACT)
    assert scores["accuracy"] == pytest.approx((predictions == references).all(axis=1).mean(), **EXACT)


@given(seeds)
def test_regression_equals_scipy(seed):
    predictions, references = make_numbers(seed)
    assume(np.ptp(predictions) > 0 and np.ptp(references) > 0)
    scores = regression(predictions, references)
    assert scores["pearson"] == pytest.approx(pearsonr(predictions, references).statistic, **EXACT)
    assert scores["spearman"] == pytest.approx(spearmanr(predictions, references).statistic, **EXACT)
    assert scores["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(references, predictions), **EXACT)


def test_correlation_with_a_constant_is_zero():
    assert regression([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx({"pearson": 0, "spearman": 0, "mse": 5 / 3})


# Computed by hand from the rules of the official scripts.
@pytest.mark.parametrize(
    ("prediction", "golds", "v1", "v2"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], (1, 1), (1, 1)),
        ("in the new York", ["New York City"], (0, 2 / 3), (0, 2 / 3)),
        ("York", ["London", "New York"], (0, 2 / 3), (0, 2 / 3)),
        ("to to be", ["to be be"], (0, 2 / 3), (0, 2 / 3)),  # bags, not sets
        ("theater", ["ater"], (0, 0), (0, 0)),  # an article is a word, not a part of one
        ("U.S.", ["us"], (1, 1), (1, 1)),
        ("the", ["!"], (1, 0), (1, 1)),  # v2 drops a gold answer without words, and then wants an answer without words
        ("x", ["!"], (0, 0), (0, 0)),
        ("x", ["!", "x"], (1, 1), (1, 1)),
    ],
)
def test_squad_by_hand(prediction, golds, v1, v2):
    assert best_over_golds(prediction, golds, version_2=False) == pytest.approx(v1)
    assert best_over_golds(prediction, golds, version_2=True) == pytest.approx(v2)


@given(st.text(), st.text())
def test_squad_f1_is_a_symmetric_ratio_and_one_only_for_equal_bags(prediction, gold):
    score = f1(prediction, gold)
    assert 0 <= score <= 1
    assert score == pytest.approx(f1(gold, prediction), **EXACT)
    bags = [Counter(normalize_answer(text).split()) for text in (prediction, gold)]
    assert (score == pytest.approx(1)) == (bags[0] == bags[1])


def test_squad_v2_by_hand():
    scores = squad_v2(
        ["Rome", "", "", "Oslo"],
        [["Rome"], ["Paris"], [], []],
        spans=["Rome", "Paris", "Bonn", "Oslo"],
        null_score_diffs=[-3.0, 1.0, 2.0, -1.0],
    )
    assert scores == pytest.approx(
        {
            "exact_match": 0.5,
            "f1": 0.5,
            "HasAns_exact_match": 0.5,
            "HasAns_f1": 0.5,
            "NoAns_exact_match": 0.5,
            "NoAns_f1": 0.5,
            # Answering Rome alone: Rome and both questions without an answer are right.
            "best_f1": 0.75,
            "best_f1_thresh": -3.0,
        }
    )


def test_squad_v2_leaves_out_a_kind_of_question_that_is_not_there():
    scores = squad_v2(["x"], [["x"]], spans=["x"], null_score_diffs=[0.0])
    assert "NoAns_f1" not in scores
    assert scores["HasAns_f1"] == 1.0


@given(seeds)
def test_best_f1_is_the_best_over_all_thresholds(seed):
    _, golds, spans, diffs = make_questions(seed)
    # The official search takes any answer to an unanswerable question for wrong, even "the", so give each text a word.
    golds, spans = [[f"x {text}" for text in texts] for texts in golds], [f"x {span}" for span in spans]
    thresholds = [min(diffs) - 1, *diffs]

    def f1_at(threshold):
        answers = ["" if diff > threshold else span for span, diff in zip(spans, diffs, strict=True)]
        return squad_v2(answers, golds, spans=spans, null_score_diffs=diffs)["f1"]

    best = squad_v2(spans, golds, spans=spans, null_score_diffs=diffs)["best_f1"]
    assert best == pytest.approx(max(map(f1_at, thresholds)), **EXACT)


def case_single(seed):
    predictions, references, labels = make_classes(seed)
    score = lambda rows: single_label(predictions[rows], references[rows], labels=labels)  # noqa: E731
    return len(predictions), score, resampling.single_label(predictions, references, labels=labels)


def case_multi(seed):
    predictions, references, labels = make_indicators(seed)
    score = lambda rows: multi_label(predictions[rows], references[rows], labels=labels)  # noqa: E731
    return len(predictions), score, resampling.multi_label(predictions, references, labels=labels)


def case_regression(seed):
    predictions, references = make_numbers(seed)
    score = lambda rows: regression(predictions[rows], references[rows])  # noqa: E731
    return len(predictions), score, resampling.regression(predictions, references)


def case_squad(seed):
    answers, golds, _, _ = make_questions(seed)
    golds = [texts or ["x"] for texts in golds]
    score = lambda rows: squad([answers[i] for i in rows], [golds[i] for i in rows])  # noqa: E731
    return len(answers), score, resampling.squad(answers, golds)


def case_squad_v2(seed):
    answers, golds, spans, diffs = make_questions(seed)

    def score(rows):
        columns = [[column[i] for i in rows] for column in (answers, golds, spans, diffs)]
        return squad_v2(*columns[:2], spans=columns[2], null_score_diffs=columns[3])

    return len(answers), score, resampling.squad_v2(answers, golds, spans=spans, null_score_diffs=diffs)


@pytest.mark.parametrize("case", [case_single, case_multi, case_regression, case_squad, case_squad_v2])
@given(seed=seeds)
@settings(max_examples=50)
def test_resampled_metrics_equal_the_metrics_of_the_rows(case, seed):
    num_rows, score, resample = case(seed)
    drawn = np.random.default_rng(seed).integers(num_rows, size=num_rows)
    for rows in (np.arange(num_rows), drawn):
        resampled = {name: value for name, value in resample(rows).items() if not np.isnan(value)}
        assert resampled == pytest.approx(score(rows), **EXACT)


def test_modules_load_by_path_and_equal_their_functions():
    predictions, references, labels = make_classes(5)
    module = load_metric("classification", "single_label")
    assert module.compute(predictions=predictions, references=references, labels=labels) == single_label(
        predictions, references, labels=labels
    )
    predictions, references, labels = make_indicators(5)
    module = load_metric("classification", "multi_label")
    assert module.compute(predictions=predictions, references=references, labels=labels) == multi_label(
        predictions, references, labels=labels
    )
    predictions, references = make_numbers(5)
    assert load_metric("regression").compute(predictions=predictions, references=references) == regression(
        predictions, references
    )
    answers, golds, spans, diffs = make_questions(5)
    rows = zip(answers, spans, diffs, strict=True)
    v2 = load_metric("squad", "v2").compute(
        predictions=[{"answer": answer, "span": span, "null_score_diff": diff} for answer, span, diff in rows],
        references=[{"text": texts} for texts in golds],
    )
    assert v2 == squad_v2(answers, golds, spans=spans, null_score_diffs=diffs)


def test_several_processes_may_load_and_compute_at_once_without_a_network(tmp_path):
    program = (
        "from tasks.metrics.loading import load_metric\n"
        "metric = load_metric('regression')\n"
        "for _ in range(20):\n"
        "    print(metric.compute(predictions=[1.0, 2.0, 3.0], references=[1.0, 2.0, 4.0])['spearman'])\n"
    )
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(len(numbers) == 20 and set(map(float, numbers)) == {1.0} for numbers in outputs)
