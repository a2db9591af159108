"""Extractive question answering: windows, labels, loss, the choice of the answer, the account."""

import itertools
import json
import time

import numpy as np
import pytest
import tiny_text
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import UserError
from tasks.options import QaOptions
from tasks.qa import Qa

CONTEXT = "The cat sat on the mat . The dog ran to the big house in Paris , where it slept for two days ."
ROWS = [
    ("Where did the dog run ?", "the big house in Paris"),
    ("Who sat ?", "The cat"),
    ("How long ?", "two days"),
]


def make_rows(rows=ROWS, context=CONTEXT):
    return [
        {
            "row": i,
            "id": f"q{i}",
            "question": question,
            "context": context,
            "answers": {"text": [answer] if answer else [], "answer_start": [context.index(answer)] if answer else []},
        }
        for i, (question, answer) in enumerate(rows)
    ]


def as_columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def as_examples(features):
    return [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]


def build(tokenizer, rows=None, max_length=64, stride=4, **options):
    rows = rows if rows is not None else make_rows()
    return Qa.build(
        tokenizer, rows, model_config=None, max_length=max_length, stride=stride, options=QaOptions(**options)
    )


@pytest.fixture(scope="module", params=["bert", "roberta", "left"])
def tokenizer(request):
    return tiny_text.make_tokenizer(request.param, [CONTEXT, *(question for question, _ in ROWS)])


@pytest.fixture(scope="module")
def bert():
    return tiny_text.make_tokenizer("bert", [CONTEXT, *(question for question, _ in ROWS)])


@pytest.mark.parametrize("max_length", [64, 24, 18])
def test_labels_point_at_the_answer_or_at_cls(tokenizer, max_length):
    rows = make_rows()
    task = build(tokenizer, rows, max_length=max_length)
    examples = as_examples(task.encode(as_columns(rows), training=True))
    held = set()
    for example in examples:
        start, end = example["start_positions"], example["end_positions"]
        assert len(example["input_ids"]) == example["length"] <= max_length
        if start == end == example["input_ids"].index(tokenizer.cls_token_id):
            continue
        held.add(example["row"])
        text = tokenizer.decode(example["input_ids"][start : end + 1])
        expected = tokenizer.decode(tokenizer(ROWS[example["row"]][1], add_special_tokens=False)["input_ids"])
        assert text.strip().lower() == expected.strip().lower()
    assert held == {0, 1, 2}
    assert (len(examples) > 3) == (max_length < 64)


def test_an_answer_beside_punctuation_is_labeled_without_it(bert):
    context = "The cat ( in Paris ) sat on(the)mat"
    rows = make_rows([("Where ?", "the"), ("Who ?", "in Paris")], context)
    task = build(bert, rows)
    for example, answer in zip(
        as_examples(task.encode(as_columns(rows), training=True)), ("the", "in paris"), strict=True
    ):
        ids = example["input_ids"][example["start_positions"] : example["end_positions"] + 1]
        assert bert.decode(ids) == answer


def test_a_window_that_cuts_the_answer_is_labeled_cls_and_the_answer_counted_as_lost(bert):
    rows = make_rows()
    # Four tokens of context fit beside the first question, too few for its answer of five; more beside the others.
    task = build(bert, rows, max_length=13, stride=1)
    features = task.encode(as_columns(rows), training=True)
    starts = [start for start, row in zip(features["start_positions"], features["row"], strict=True) if row == 0]
    assert starts == [0] * len(starts)
    assert task.account(features, rows) == {
        "windows": len(features["row"]),
        "tokens": sum(map(len, features["input_ids"])),
        "answers": 3,
        "answers_lost": 1,
    }


def test_training_keeps_offsets_out_and_prediction_needs_no_answers(tokenizer):
    rows = [{name: row[name] for name in ("row", "question", "context")} for row in make_rows()]
    task = build(tokenizer, rows)
    features = task.encode(as_columns(rows), training=False)
    assert "start_positions" not in features
    for example in as_examples(features):
        inside = [(s, e) for s, e in zip(example["char_starts"], example["char_ends"], strict=True) if s >= 0]
        assert CONTEXT[inside[0][0] : inside[-1][1]] == CONTEXT
    assert "char_starts" not in task.encode(as_columns(make_rows()), training=True)
    outputs = decode_with(task, rows, tiny_text.make_model("bert", transformers.AutoModelForQuestionAnswering))
    assert [output["id"] for output in outputs] == ["0", "1", "2"]


def test_every_character_of_the_context_is_in_some_window_and_pure(tokenizer):
    rows = make_rows()
    task = build(tokenizer, rows, max_length=18)
    features = task.encode(as_columns(rows), training=False)
    covered = {row: np.zeros(len(CONTEXT), dtype=bool) for row in range(3)}
    for example in as_examples(features):
        for start, end in zip(example["char_starts"], example["char_ends"], strict=True):
            covered[example["row"]][max(start, 0) : max(end, 0)] = True
    blank = np.array([character == " " for character in CONTEXT])
    assert all((seen | blank).all() for seen in covered.values())
    assert task.encode(as_columns(rows), training=False) == features


def theirs(model, batch):
    return model(**{name: tensor for name, tensor in batch.items() if name != "row"}).loss


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2"])
def test_loss_over_count_is_the_loss_of_transformers(kind):
    tokenizer = tiny_text.make_tokenizer("roberta" if kind in ("roberta", "distilbert") else "bert", [CONTEXT])
    task = build(tokenizer, max_length=40)
    examples = as_examples(task.encode(as_columns(make_rows()), training=True))
    model = tiny_text.make_model(kind, transformers.AutoModelForQuestionAnswering)
    batch = task.collate(examples)
    assert (batch["attention_mask"] == 0).any()
    # In transformers padding is a candidate for start and end, so that only unpadded windows have the right loss.
    alone = torch.stack([theirs(model, task.collate([example])) for example in examples]).mean()
    torch.testing.assert_close(task.loss(model, batch) / task.count(batch), alone)
    unpadded = task.collate([examples[0]] * 3)
    torch.manual_seed(0)
    ours = task.loss(model.train(), unpadded) / task.count(unpadded)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, theirs(model, unpadded))


def test_left_padding_shifts_the_labels():
    tokenizer = tiny_text.make_tokenizer("left", [CONTEXT])
    task = build(tokenizer)
    examples = as_examples(task.encode(as_columns(make_rows()), training=True))
    batch = task.collate(examples)
    assert (batch["attention_mask"][:, 0] == 0).any()
    for i, example in enumerate(examples):
        for name in ("start_positions", "end_positions"):
            assert batch["input_ids"][i, batch[name][i]] == example["input_ids"][example[name]]


class Oracle(torch.nn.Module):
    """A model that gives the logits it was made with, whatever it reads."""

    def __init__(self, start_logits, end_logits):
        super().__init__()
        self.answer = transformers.modeling_outputs.QuestionAnsweringModelOutput(
            start_logits=start_logits, end_logits=end_logits
        )

    def forward(self, **inputs):
        return self.answer


def decode_with(task, rows, model):
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=False)))
    columns = {name: tensor.numpy() for name, tensor in task.predict(model.eval(), batch).items()}
    predictions = [{name: column[i] for name, column in columns.items()} for i in range(len(batch["row"]))]
    return task.decode(predictions, rows)


decode_with = torch.no_grad()(decode_with)


def slow_answer(task, rows, start_logits, end_logits):
    """The best span of each row, its score and the null score, by trying all pairs of tokens of all windows."""
    examples = as_examples(task.encode(as_columns(rows), training=False))
    batch = task.collate(examples)
    best = [(-np.inf, "") for _ in rows]
    nulls = [np.inf] * len(rows)
    for i, row in enumerate(batch["row"].tolist()):
        null = batch["null_position"][i]
        nulls[row] = min(nulls[row], float(start_logits[i, null] + end_logits[i, null]))
        tokens = [t for t in range(start_logits.shape[1]) if batch["char_starts"][i, t] >= 0]
        for first, last in itertools.product(tokens, tokens):
            if 0 <= last - first < task.max_answer_length:
                score = float(start_logits[i, first] + end_logits[i, last])
                start, end = int(batch["char_starts"][i, first]), int(batch["char_ends"][i, last])
                best[row] = max(best[row], (score, rows[row]["context"][start:end].strip()), key=lambda pair: pair[0])
    return best, nulls


@given(seed=st.integers(0, 2**32 - 1), negative=st.booleans(), longest=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_decode_finds_what_trying_every_span_finds(bert, seed, negative, longest):
    rows = make_rows()
    task = build(bert, rows, max_length=20, version_2_with_negative=negative, n_best_size=40, max_answer_length=longest)
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=False)))
    generator = torch.Generator().manual_seed(seed)
    start_logits, end_logits = torch.randn((2, *batch["input_ids"].shape), generator=generator).unbind()
    outputs = decode_with(task, rows, Oracle(start_logits, end_logits))
    best, nulls = slow_answer(task, rows, start_logits, end_logits)
    for output, (score, text), null, row in zip(outputs, best, nulls, rows, strict=True):
        assert output["n_best"][0]["answer"] == text
        if negative:
            assert output["null_score_diff"] == pytest.approx(null - score, abs=1e-5)
            text = "" if null - score > 0 else text
        assert output["answer"] == text
        assert output["start"] == -1 or row["context"][output["start"] :].startswith(text)
        assert 0 <= output["score"] <= 1
    json.dumps(outputs, allow_nan=False)


def test_threshold_decides_for_no_answer(bert):
    rows = make_rows()
    generator = torch.Generator().manual_seed(3)
    task = build(bert, rows, version_2_with_negative=True)
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=False)))
    model = Oracle(*torch.randn((2, *batch["input_ids"].shape), generator=generator).unbind())
    diff = decode_with(task, rows, model)[0]["null_score_diff"]
    for threshold, answered in ((diff - 0.01, False), (diff + 0.01, True)):
        task = build(bert, rows, version_2_with_negative=True, null_score_diff_threshold=threshold)
        assert bool(decode_with(task, rows, model)[0]["answer"]) == answered


def test_predictions_are_small_and_of_one_width(bert):
    rows = make_rows()
    task = build(bert, rows, n_best_size=50)
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=False)))
    found = task.predict(tiny_text.make_model("bert", transformers.AutoModelForQuestionAnswering), batch)
    assert batch["input_ids"].shape[1] < 50
    assert {tensor.shape for tensor in found.values()} == {(3,), (3, 50)}
    chosen = found["start_logit"].isfinite()
    assert (found["start_char"][chosen] >= 0).all()
    assert (found["start_char"][~chosen] == -1).all() or not (~chosen).any()


def test_perfect_logits_score_one_and_resample_agrees(tokenizer):
    rows = make_rows()
    golds = ["in Paris", ROWS[0][1]]
    rows[0]["answers"] = {"text": golds, "answer_start": [CONTEXT.index(gold) for gold in golds]}
    task = build(tokenizer, rows, max_length=24)
    batch = task.collate(as_examples(task.encode(as_columns(rows), training=False)))
    logits = torch.zeros(2, *batch["input_ids"].shape)
    for side, name in enumerate(("start_positions", "end_positions")):
        logits[side].scatter_(1, batch[name][:, None], 9.0)
    outputs = decode_with(task, rows, Oracle(*logits.unbind()))
    scores = task.score(outputs, rows)
    assert scores == {"exact_match": 1.0, "f1": 1.0}
    outputs[1]["answer"] = "cat dog"
    assert task.resample(outputs, rows)(np.arange(3)) == pytest.approx(task.score(outputs, rows), abs=1e-12)
    assert task.score(outputs, rows)["f1"] == pytest.approx((2 + 2 / 3) / 3)


def test_v2_scores_the_questions_without_an_answer_apart(bert):
    rows = make_rows([*ROWS, ("Why ?", "")])
    task = build(bert, rows, version_2_with_negative=True)
    output = {"answer": "", "null_score_diff": 1.0, "n_best": [{"answer": "x"}]}
    outputs = [output | {"answer": "The cat"}] * 3 + [output]
    scores = task.score(outputs, rows)
    assert scores["NoAns_exact_match"] == 1.0
    assert scores["HasAns_exact_match"] == pytest.approx(1 / 3)
    assert scores["exact_match"] == 0.5
    assert task.resample(outputs, rows)(np.arange(4)) == pytest.approx(scores, abs=1e-12)


def test_a_context_without_tokens_gives_no_answer(bert):
    rows = [{"row": 0, "question": "Who ?", "context": " "}]
    model = tiny_text.make_model("bert", transformers.AutoModelForQuestionAnswering)
    assert decode_with(build(bert, rows), rows, model)[0]["answer"] == ""
    output = decode_with(build(bert, rows, version_2_with_negative=True), rows, model)[0]
    json.dumps(output, allow_nan=False)


def test_faults_of_the_user_are_named(bert):
    rows = make_rows()
    with pytest.raises(UserError, match=r"row 3(.|\n)*version_2_with_negative=true"):
        build(bert, make_rows([*ROWS, ("Why ?", "")]))
    rows[2]["answers"]["answer_start"] = [0]
    with pytest.raises(UserError, match=r"data.train, row 2(.|\n)*'The cat '"):
        build(bert, rows)
    with pytest.raises(UserError, match=r"stride"):
        build(bert, make_rows(), max_length=12, stride=12)
    long = make_rows([("Who sat " * 20, "The cat")])
    for max_length in (30, 47):  # longer than a window; just too long for the stride
        with pytest.raises(UserError, match=r"row 0(.|\n)*model.max_length(.|\n)*data.stride"):
            build(bert, long, max_length=max_length).encode(as_columns(long), training=True)
    build(bert, long, max_length=48).encode(as_columns(long), training=True)


def test_encode_works_in_datasets_map(bert):
    rows = make_rows()
    dataset = Dataset.from_list(rows)
    task = build(bert, dataset, max_length=24)
    mapped = dataset.map(
        lambda batch: task.encode(batch, training=True), batched=True, batch_size=2, remove_columns=dataset.column_names
    )
    assert mapped[:] == task.encode(as_columns(rows), training=True)
    assert task.account(mapped[:], dataset)["answers_lost"] == 0


def test_ten_thousand_questions_decode_in_seconds(bert):
    num_rows, num_best = 10_000, 20
    generator = np.random.default_rng(0)
    row = {"question": "Who ?", "context": CONTEXT}
    rows = [row | {"row": i} for i in range(num_rows)]
    predictions = []
    for i in range(int(num_rows * 1.5)):
        first, last = generator.integers(0, 300, (2, num_best))
        predictions.append(
            {"start_logit": generator.random(num_best), "end_logit": generator.random(num_best), "start_index": first}
            | {"end_index": last, "start_char": first % 90, "end_char": first % 90 + 5, "null_score": 0.0}
            | {"row": i % num_rows}
        )
    begin = time.perf_counter()
    assert len(build(bert).decode(predictions, rows)) == num_rows
    assert time.perf_counter() - begin < 20
