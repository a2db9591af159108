"""Classification: labels, loss, windows, answers, metrics, the account."""

import json
import logging

import numpy as np
import pytest
import tiny_text
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import spearmanr
from sklearn.utils.class_weight import compute_class_weight

from heedful import UserError
from tasks.classification import Classification
from tasks.options import ClassificationOptions

TEXTS = [
    "the film was good",
    "a dull and long film that never ends and never begins and is too long for its own good",
    "good fun",
    "it is a bad film with a bad end",
    "fun from the begin to the end",
]
LABELS = {
    "single_label_classification": ["pos", "neg", "pos", "neg", "odd"],
    "multi_label_classification": [["fun", "long"], ["long"], ["fun"], [], ["odd"]],
    "regression": [1.5, -2.0, 0.25, 3.0, 0.0],
}
HEAD = transformers.AutoModelForSequenceClassification


def make_rows(labels=None, pairs=False):
    rows = [{"row": i, "text": text} for i, text in enumerate(TEXTS)]
    rows = [row | ({"text_pair": TEXTS[-1 - i]} if pairs else {}) for i, row in enumerate(rows)]
    labels = labels or LABELS["single_label_classification"]
    return [row | {"label": label} for row, label in zip(rows, labels, strict=True)]


def as_columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def as_examples(features):
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def build(tokenizer, rows, max_length=64, stride=0, **options):
    return Classification.build(
        tokenizer,
        rows,
        model_config=None,
        max_length=max_length,
        stride=stride,
        options=ClassificationOptions(**options),
    )


@pytest.fixture(scope="module")
def bert():
    return tiny_text.make_tokenizer("bert", TEXTS)


@pytest.fixture(scope="module", params=["bert", "roberta", "left"])
def tokenizer(request):
    return tiny_text.make_tokenizer(request.param, TEXTS)


def as_predictions(task, rows, model):
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=False)))
    with torch.no_grad():
        columns = {name: tensor.numpy() for name, tensor in task.predict(model, batch).items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(batch["row"]))]


@pytest.mark.parametrize("problem_type", LABELS)
def test_problem_type_is_found_and_said(bert, problem_type, caplog):
    with caplog.at_level(logging.INFO):
        task = build(bert, make_rows(LABELS[problem_type]))
    assert task.problem_type == problem_type
    assert problem_type in caplog.text


def model_for(task, kind="bert"):
    return tiny_text.make_model(kind, HEAD, **task.model_kwargs())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "c", "a", "b"], ("a", "b", "c")),
        (["10", "9", "-1", "9", "10"], ("-1", "9", "10")),
        (["10", "9", "x", "9", "10"], ("10", "9", "x")),
        ([["b"], ["a", "b"], [], [], []], ("a", "b")),
    ],
)
def test_labels_are_sorted_as_numbers_if_they_all_are(bert, labels, expected):
    task = build(bert, make_rows(labels))
    assert task.labels == expected
    assert task.model_kwargs()["id2label"] == dict(enumerate(expected))
    assert task.model_kwargs()["pad_token_id"] == bert.pad_token_id
    assert task.model_kwargs()["label2id"] == {name: i for i, name in enumerate(expected)}


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "llama"])
@pytest.mark.parametrize("problem_type", LABELS)
@pytest.mark.parametrize("training", [False, True])
def test_loss_over_count_is_the_loss_of_transformers(kind, problem_type, training):
    tokenizer = tiny_text.make_tokenizer("roberta" if kind in ("roberta", "distilbert", "llama") else "bert", TEXTS)
    rows = make_rows(LABELS[problem_type], pairs=True)
    task = build(tokenizer, rows)
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=True)))
    assert (batch["attention_mask"] == 0).any()
    model = model_for(task, kind).train(training)
    torch.manual_seed(0)
    ours = task.loss(model, batch) / task.count(batch)
    torch.manual_seed(0)
    theirs = model(**{name: tensor for name, tensor in batch.items() if name != "row"}).loss
    torch.testing.assert_close(ours, theirs)


def test_class_weights_weigh_loss_and_count_alike(bert):
    rows = make_rows()
    task = build(bert, rows, class_weights={"pos": 2.0, "neg": 0.5, "odd": 7.0})
    assert task.labels == ("neg", "odd", "pos")
    assert task.class_weights == (0.5, 7.0, 2.0)
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=True)))
    assert task.count(batch).item() == 2 + 0.5 + 2 + 0.5 + 7
    model = model_for(task)
    logits = task.predict(model, batch)["logits"]
    expected = torch.nn.CrossEntropyLoss(weight=torch.tensor([0.5, 7.0, 2.0]))(logits, batch["labels"])
    torch.testing.assert_close(task.loss(model, batch) / task.count(batch), expected)


def test_balanced_weights_are_those_of_scikit_learn(bert):
    task = build(bert, make_rows(), class_weights="balanced")
    labels = LABELS["single_label_classification"]
    assert task.class_weights == pytest.approx(
        compute_class_weight("balanced", classes=np.array(task.labels), y=labels).tolist()
    )


@given(st.permutations(range(5)))
@settings(max_examples=10, deadline=None)
def test_sums_over_micro_batches_are_those_of_the_whole(bert, order):
    rows = make_rows()
    task = build(bert, rows, class_weights="balanced")
    model, examples = model_for(task), as_examples(task.encode(as_columns(rows), training=True))
    whole = task.collate(examples)
    parts = [task.collate([examples[i] for i in order[:2]]), task.collate([examples[i] for i in order[2:]])]
    torch.testing.assert_close(sum(task.loss(model, part) for part in parts), task.loss(model, whole))
    torch.testing.assert_close(sum(task.count(part) for part in parts), task.count(whole))


def test_pairs_reach_the_model_whole_or_cut_at_the_longer_text(tokenizer):
    rows = make_rows(pairs=True)
    features = build(tokenizer, rows).encode(as_columns(rows), training=True)
    both = tokenizer([row["text"] for row in rows], [row["text_pair"] for row in rows])
    assert features["input_ids"] == both["input_ids"]
    cut = build(tokenizer, rows, max_length=24).encode(as_columns(rows), training=True)["input_ids"]
    short = tokenizer(rows[2]["text"], add_special_tokens=False)["input_ids"]
    assert max(map(len, cut)) <= 24
    assert cut[2][1 : 1 + len(short)] == short


@pytest.mark.parametrize("pairs", [False, True])
@given(max_length=st.integers(8, 70))
@settings(max_examples=20, deadline=None)
def test_account_counts_every_token_that_is_cut(bert, pairs, max_length):
    rows = make_rows(pairs=pairs)
    whole = build(bert, rows, max_length=1000).encode(as_columns(rows), training=True)
    task = build(bert, rows, max_length=max_length)
    features = task.encode(as_columns(rows), training=True)
    assert task.account(features, rows) == {
        "tokens": sum(whole["length"]),
        "tokens_lost": sum(whole["length"]) - sum(features["length"]),
        "rows_truncated": sum(a != b for a, b in zip(whole["length"], features["length"], strict=True)),
    }


def test_windows_cover_a_long_document_and_answer_with_the_mean_logits(tokenizer):
    rows = make_rows()
    task = build(tokenizer, rows, max_length=10, stride=3, long_documents="windows")
    features = task.encode(as_columns(rows), training=True)
    assert len(features["row"]) > len(rows)
    for row, label in zip(features["row"], features["label"], strict=True):
        assert task.labels[label] == rows[row]["label"]
    for row in rows:
        windows = zip(features["input_ids"], features["row"], strict=True)
        seen = [ids[1:-1] for ids, owner in windows if owner == row["row"]]
        joined = seen[0] + [token for ids in seen[1:] for token in ids[3:]]
        assert joined == tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    predictions = as_predictions(task, rows, model_for(task))
    outputs = task.decode(predictions[::-1], rows)
    own = np.mean([one["logits"] for one in predictions if one["row"] == 1], axis=0)
    assert list(outputs[1]["scores"].values()) == pytest.approx(softmax(own.astype(float)), abs=1e-6)
    account = task.account(features, rows)
    assert account["tokens_lost"] == account["rows_truncated"] == 0
    assert account["tokens"] == sum(map(len, tokenizer(TEXTS)["input_ids"]))


def test_answers_of_each_problem_type(bert):
    logits = np.array([[2.0, 0.0, -1.0], [-3.0, 1.0, 0.5]])
    predictions = [{"logits": one, "row": i} for i, one in enumerate(logits)]
    labels = ("a", "b", "c")
    single = Classification(bert, 8, 0, "single_label_classification", labels).decode(predictions, TEXTS[:2])
    assert [output["label"] for output in single] == ["a", "b"]
    for output, row in zip(single, softmax(logits, axis=1), strict=True):
        assert list(output["scores"].values()) == pytest.approx(row)
        assert output["score"] == max(output["scores"].values())
    multi = Classification(bert, 8, 0, "multi_label_classification", labels).decode(predictions, TEXTS[:2])
    assert [output["labels"] for output in multi] == [["a"], ["b", "c"]]
    assert list(multi[0]["scores"].values()) == pytest.approx(expit(logits[0]))
    numbers = Classification(bert, 8, 0, "regression", ()).decode(
        [{"logits": one[:1], "row": i} for i, one in enumerate(logits)], TEXTS[:2]
    )
    assert numbers == [{"score": 2.0}, {"score": -3.0}]
    json.dumps([single, multi, numbers])


@pytest.mark.parametrize("problem_type", LABELS)
def test_score_and_resample_agree_and_perfect_answers_score_one(bert, problem_type):
    rows = make_rows(LABELS[problem_type])
    task = build(bert, rows)
    outputs = task.decode(as_predictions(task, rows, model_for(task)), rows)
    assert task.resample(outputs, rows)(np.arange(5)) == pytest.approx(task.score(outputs, rows), abs=1e-12)
    key = {"single_label_classification": "label", "multi_label_classification": "labels", "regression": "score"}
    perfect = [{key[problem_type]: row["label"]} for row in rows]
    scores = task.score(perfect, rows)
    assert scores[task.headline] == pytest.approx(1)
    json.dumps(scores, allow_nan=False)


def test_regression_scores_the_numbers_of_the_outputs(bert):
    rows = make_rows(LABELS["regression"])
    task = build(bert, rows)
    given_scores = [0.1, 0.2, 0.3, 0.4, 0.5]
    scores = task.score([{"score": score} for score in given_scores], rows)
    assert scores["spearman"] == pytest.approx(spearmanr(given_scores, LABELS["regression"]).statistic)
    assert scores["mse"] == pytest.approx(np.mean((np.array(given_scores) - LABELS["regression"]) ** 2))


def test_prediction_needs_no_labels_and_encode_works_in_datasets_map(tokenizer):
    rows = make_rows()
    task = build(tokenizer, rows)
    bare = Dataset.from_list(rows).remove_columns("label")
    mapped = bare.map(
        lambda batch: task.encode(batch, training=False), batched=True, batch_size=2, remove_columns=bare.column_names
    )
    assert "label" not in mapped.column_names
    assert mapped["input_ids"][:] == tokenizer(TEXTS)["input_ids"]
    task.check(bare, where="data.test")
    assert len(task.decode(as_predictions(task, bare.to_list(), model_for(task)), bare)) == 5


FAULTS = [
    (["pos"] * 5, {}, r"every label is 'pos'"),
    ([1.0] * 5, {}, r"every label is 1.0"),
    ([[]] * 5, {}, r"no row has a label"),
    (["1", "2", "x", "3", "4"], {"problem_type": "regression"}, r"row 2(.|\n)*'x'"),
    (["1", "2", "3", "nan", "4"], {"problem_type": "regression"}, r"row 3(.|\n)*'nan'"),
    ([1.0, 2.0, 3.0, 4.0, float("inf")], {}, r"row 4(.|\n)*inf"),
    (list("abcab"), {"problem_type": "multi_label_classification"}, r"row 0(.|\n)*data\.label_separator"),
    ([1.5, 2.0, 3.0, 1.0, 1.0], {"problem_type": "single_label_classification"}, r"row 0(.|\n)*1.5"),
    (list("abcab"), {"class_weights": {"a": 1.0, "b": 1.0, "d": 2.0}}, r"unknown: d; missing: c"),
    (list("abcab"), {"class_weights": {"a": 1.0, "b": 0.0, "c": 2.0}}, r"'b': 0.0"),
    ([1.0, 2.0, 3.0, 4.0, 5.0], {"class_weights": "balanced"}, r"class weights for regression"),
    (list("abcab"), {"long_documents": "windows", "stride": 62}, r"stride 62"),
]


@pytest.mark.parametrize(("labels", "options", "message"), FAULTS)
def test_faults_of_the_user_are_named(bert, labels, options, message):
    with pytest.raises(UserError) as error:
        build(bert, make_rows(labels), **options)
    error.match(message)
    assert error.value.where
    assert error.value.expected
    assert error.value.fix


def test_numbers_as_text_train_a_regression_if_asked(bert):
    rows = make_rows(["1", "2.5", "-3", "1e2", "0"])
    task = build(bert, rows, problem_type="regression")
    assert task.encode(as_columns(rows), training=True)["label"] == [1.0, 2.5, -3.0, 100.0, 0.0]


def test_unseen_label_is_refused_with_row_and_known_labels(bert):
    task = build(bert, make_rows())
    with pytest.raises(UserError, match=r"data.validation, row 1(.|\n)*'new'(.|\n)*neg, odd, pos"):
        task.check(make_rows(["pos", "new", "pos", "pos", "pos"]), where="data.validation")
    with pytest.raises(UserError, match=r"row 0(.|\n)*'new'"):
        build(bert, make_rows(LABELS["multi_label_classification"])).check(make_rows([["new"]] * 5), where="dev")


def test_windows_over_pairs_and_texts_without_tokens_are_refused(bert):
    with pytest.raises(UserError, match="pair"):
        build(bert, make_rows(pairs=True), long_documents="windows")
    plain = tiny_text.make_tokenizer("bert", TEXTS)
    plain.backend_tokenizer.post_processor = None  # adds no special tokens, as GPT-2
    with pytest.raises(UserError, match="row 7"):
        build(plain, make_rows()).encode({"row": [6, 7], "text": ["good", ""]}, training=False)
    plain.pad_token = None
    with pytest.raises(UserError, match="padding token"):
        build(plain, make_rows())


def test_a_model_of_pairs_refuses_single_texts_and_the_reverse(bert):
    pairs = [{"row": i, "text": "a", "text_pair": "b", "label": label} for i, label in enumerate("xy")]
    single = [{name: row[name] for name in ("row", "text", "label")} for row in pairs]
    options = ClassificationOptions()
    for rows, others in ((pairs, single), (single, pairs)):
        task = Classification.build(bert, rows, model_config=None, max_length=16, stride=0, options=options)
        task.check(rows, where="dev.csv")
        with pytest.raises(UserError, match="texts"):
            task.check(others, where="dev.csv")


def test_decimal_labels_of_a_text_file_are_not_taken_for_classes(bert):
    rows = [{"row": i, "text": "a", "label": label} for i, label in enumerate(["3.5", "2", "1.25"])]
    with pytest.raises(UserError) as caught:
        Classification.build(bert, rows, model_config=None, max_length=16, stride=0, options=ClassificationOptions())
    assert "problem_type=regression" in caught.value.fix
    options = ClassificationOptions(problem_type="regression")
    assert Classification.build(bert, rows, model_config=None, max_length=16, stride=0, options=options).labels == ()
