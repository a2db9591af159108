"""NER: alignment, loss, windows and scores against the tokenizer, the model's own loss, and seqeval."""

import json
import logging

import numpy as np
import pytest
import seqeval.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.scheme import IOB2
from tiny_families import FAMILIES, make_model
from tiny_text import make_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast

from heedful import UserError
from sources.audit import loss_lines
from tasks import TASKS
from tasks.ner import Ner
from tasks.options import NerOptions
from tasks.saved import load_task, save_task
from tasks.words import tokenize_words, word_prefix

EXACT = {"rel": 0, "abs": 1e-12}
WORDS = ["Anna", "Berlin", "met", "Paul", "in", "unbelievably", "rained", "."]
LOST = "\u200b"
"""A word that BERT's normalizer removes: it has no sub-word."""
TOKENIZER = make_tokenizer("bert", ["Anna met Paul in Berlin .", "it rained un believ ably all day"])
SENTENCES = [
    ("Anna met Paul in Berlin .", "B-PER O B-PER O B-LOC O"),
    ("unbelievably Anna Berlin rained", "O B-PER I-PER O"),
    ("Paul", "B-PER"),
    ("in in in in unbelievably unbelievably Berlin Berlin", "O O O O O O B-LOC I-LOC"),
]


def make_rows(pairs=SENTENCES):
    return [{"row": i, "tokens": words.split(), "tags": tags.split()} for i, (words, tags) in enumerate(pairs)]


def make_task(rows=None, tokenizer=TOKENIZER, *, max_length=64, stride=8, **options):
    options = NerOptions(**options)
    return Ner.build(
        tokenizer, rows or make_rows(), model_config=None, max_length=max_length, stride=stride, options=options
    )


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def make_examples(task, rows, *, training=True):
    features = task.encode(columns(rows), training=training)
    return [{name: column[i] for name, column in features.items()} for i in range(len(features["row"]))]


def predict(task, rows, model, *, batch_size=3):
    examples, found = make_examples(task, rows), []
    for start in range(0, len(examples), batch_size):
        batch = task.collate(examples[start : start + batch_size])
        answer = {name: tensor.numpy() for name, tensor in task.predict(model, batch).items()}
        found += [{name: column[i] for name, column in answer.items()} for i in range(len(batch["row"]))]
    return found


def answers(task, rows, tags):
    return [task._output(row["tokens"], list(given)) for row, given in zip(rows, tags, strict=True)]


class Echo(torch.nn.Module):
    """A model that reads the label off the input id, so that only the alignment decides what is predicted."""

    def __init__(self, num_labels, label_of_id):
        super().__init__()
        self.num_labels, self.label_of_id = num_labels, label_of_id

    def forward(self, input_ids, **_):
        labels = self.label_of_id[input_ids] if self.label_of_id is not None else input_ids % self.num_labels
        logits = torch.nn.functional.one_hot(labels, self.num_labels).float()
        return type("Answer", (), {"logits": logits})


# Building


def test_labels_are_o_then_sorted_and_complete():
    task = make_task(make_rows([("Anna met Berlin", "B-PER O I-LOC")]))
    assert task.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    kwargs = task.model_kwargs()
    assert kwargs["num_labels"] == 5
    assert all(kwargs["label2id"][label] == i for i, label in kwargs["id2label"].items())


def test_the_scheme_found_is_said(caplog):
    # The command line stops the logger's messages from going further up, where caplog listens.
    logging.getLogger("heedful").propagate = True
    with caplog.at_level(logging.INFO, logger="heedful"):
        task = make_task(make_rows([("Anna Paul met Berlin", "S-PER S-PER O S-LOC")]))
    assert task.scheme == "BIOES"
    assert "tag scheme BIOES" in caplog.text
    assert "entity types: LOC, PER" in caplog.text


def test_settings_survive_saving(tmp_path):
    task = make_task(strict=True)
    save_task(task, tmp_path)
    json.loads((tmp_path / "heedful.json").read_text())
    assert load_task(tmp_path, TOKENIZER) == task
    assert TASKS["ner"].load() is Ner


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([("Anna met", "O O")], {}, "no entity in any row"),
        ([("Anna met", "B-PER")], {}, "1 tag for 2 words"),
        ([("Anna met", "B-PER noun")], {}, "'noun'"),
        ([("Anna met", "S-PER O")], {"scheme": "IOB2"}, "'S-PER'"),
        ([("Anna met", "I-PER O")], {"scheme": "IOB2", "strict": True}, "continues no entity"),
        ([("Anna met", "B-PER O")], {"stride": 62}, "stride 62"),
    ],
)
def test_rows_that_cannot_train_are_refused(pairs, options, message):
    with pytest.raises(UserError, match=message):
        make_task(make_rows(pairs), **options)


def test_a_tag_unseen_in_training_is_refused_with_its_place():
    task = make_task()
    task.check([{"row": 0, "tokens": ["Anna"]}], where="rows without tags")
    with pytest.raises(UserError) as caught:
        task.check(make_rows([("Anna", "B-PER"), ("met Berlin", "O B-ORG")]), where="data.test")
    assert "'B-ORG'" in caught.value.found
    assert caught.value.where == "data.test, row 1, word 1"
    assert "B-LOC" in caught.value.expected


# Alignment


def byte_level(tokenizer, pre_tokenizer):
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    copy.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return copy


def make_byte_level(kind):
    trained = make_tokenizer("roberta", [words for words, _ in SENTENCES])
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+"), "isolated")  # as GPT-2's, Llama 3's and others'
    byte = pre_tokenizers.ByteLevel
    pre_tokenizer = {
        "prefixed": byte(add_prefix_space=True),
        "plain": byte(add_prefix_space=False),
        "split": pre_tokenizers.Sequence([split, byte(add_prefix_space=False, use_regex=False)]),
    }
    return byte_level(trained, pre_tokenizer[kind])


@pytest.mark.parametrize(("kind", "prefix"), [("prefixed", ""), ("plain", " "), ("split", " ")])
def test_byte_level_words_are_tokenized_as_in_running_text(kind, prefix):
    tokenizer = make_byte_level(kind)
    assert word_prefix(tokenizer) == prefix
    for words, _ in SENTENCES:
        split = tokenize_words(tokenizer, [words.split()], prefix=word_prefix(tokenizer))["input_ids"][0]
        assert split == tokenizer(" " + words)["input_ids"]
        if kind == "plain":
            assert split != tokenizer(words.split(), is_split_into_words=True)["input_ids"], "why a prefix is needed"


def test_the_generic_class_ignores_add_prefix_space(tmp_path):
    """The trap that ``word_prefix`` is for; should this fail one day, ``tokenizer_kwargs`` suffices."""
    make_byte_level("plain").save_pretrained(tmp_path)
    assert word_prefix(AutoTokenizer.from_pretrained(tmp_path, **Ner.tokenizer_kwargs)) == " "


def test_a_tokenizer_that_runs_words_together_is_refused():
    tokenizer = make_byte_level("plain")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # takes away even the space put before a word
    with pytest.raises(UserError, match="differently from running text"):
        make_task(tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["bert", "roberta", "left"])
@given(st.lists(st.lists(st.sampled_from([*WORDS, LOST, ""]), max_size=9), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_labels_lie_on_first_subwords_only(kind, sentences):
    tokenizer = make_tokenizer(kind, WORDS)
    rows = [{"row": i, "tokens": words, "tags": ["B-PER"] * len(words)} for i, words in enumerate(sentences)]
    task = Ner(tokenizer, 512, 8, ("O", "B-PER", "I-PER"), "IOB2", False)
    by_row = {example["row"]: example for example in make_examples(task, rows)}
    for i, words in enumerate(sentences):
        word_ids = tokenizer(words, is_split_into_words=True).word_ids() if words else []
        firsts = {word: at for at, word in reversed(list(enumerate(word_ids))) if word is not None}
        assert (i in by_row) == bool(firsts), "a row without sub-words makes no feature"
        if firsts:
            expected = [word if word is not None and firsts[word] == at else -1 for at, word in enumerate(word_ids)]
            assert by_row[i]["word_index"] == expected
            assert by_row[i]["labels"] == [-100 if word == -1 else 1 for word in expected]


def test_labels_are_those_of_the_words():
    rows = make_rows([("unbelievably Anna Paul met", "O S-PER B-PER E-PER"), ("Anna Berlin", "B-PER E-PER")])
    task = make_task(rows)
    assert task.scheme == "BIOES"
    for example, row in zip(make_examples(task, rows), rows, strict=True):
        found = [task.labels[label] for label in example["labels"] if label != -100]
        assert found == {0: ["O", "B-PER", "B-PER", "I-PER"], 1: ["B-PER", "I-PER"]}[row["row"]]


def test_encode_without_tags_says_where_words_are():
    rows = [{"row": 7, "tokens": ["Anna", "unbelievably"]}]
    task = make_task()
    features = task.encode(columns(rows), training=False)
    assert "labels" not in features
    assert features["row"] == [7]
    assert sorted(features["word_index"][0])[-2:] == [0, 1]
    assert "labels" not in task.collate([{name: column[0] for name, column in features.items()}])


# Loss


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_models_own_summed(family, training):
    kind = "bert" if family in ("bert", "electra", "deberta-v2") else "roberta"
    task = make_task(tokenizer=make_tokenizer(kind, [words for words, _ in SENTENCES]))
    model = make_model(family, AutoModelForTokenClassification, **task.model_kwargs()).train(training)
    batch = task.collate(make_examples(task, make_rows()))
    torch.manual_seed(1)
    loss = task.loss(model, batch)
    torch.manual_seed(1)
    own = model(**{name: batch[name] for name in batch.keys() - {"row", "word_index"}}).loss
    assert task.count(batch) == sum(len(row["tokens"]) for row in make_rows())
    torch.testing.assert_close(loss, own * task.count(batch), rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_loss_adds_over_batches_and_is_fp32():
    task = make_task()
    model = make_model("bert", AutoModelForTokenClassification, **task.model_kwargs())
    examples = make_examples(task, make_rows())
    with torch.no_grad():
        parts = [task.loss(model, task.collate([example])) for example in examples]
        torch.testing.assert_close(sum(parts), task.loss(model, task.collate(examples)), rtol=1e-5, atol=0)
        assert task.loss(model.to(torch.bfloat16), task.collate(examples)).dtype == torch.float32


# Windows


@given(
    st.lists(st.sampled_from([*WORDS, LOST]), max_size=40),
    st.integers(4, 24).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 3))),
)
@settings(max_examples=100, deadline=None)
def test_every_word_is_labelled_in_exactly_one_window(words, size):
    task = Ner(TOKENIZER, *size, ("O", "B-PER", "I-PER"), "IOB2", False)
    rows = [{"row": 0, "tokens": words, "tags": ["O"] * len(words)}]
    examples = make_examples(task, rows)
    found = [word for example in examples for word in example["word_index"] if word != -1]
    assert sorted(found) == [i for i, word in enumerate(words) if word != LOST]
    assert all(len(example["input_ids"]) <= size[0] for example in examples)
    whole = TOKENIZER(words, is_split_into_words=True)["input_ids"] if words else []
    first_ids = {w: whole[whole_at] for w, whole_at in first_positions(words).items()}
    for example in examples:
        for word, token in zip(example["word_index"], example["input_ids"], strict=True):
            assert word == -1 or token == first_ids[word], "a window holds the word's own first sub-word"
    account = task.account(task.encode(columns(rows), training=True), rows)
    assert account["words"] == len(words)
    assert account["words_without_tokens"] == words.count(LOST)


def first_positions(words):
    word_ids = TOKENIZER(words, is_split_into_words=True).word_ids() if words else []
    return {word: at for at, word in reversed(list(enumerate(word_ids))) if word is not None}


def test_windows_are_joined_to_the_words_they_came_from():
    """Each word's label depends on its first sub-word alone, so windows must change nothing."""
    rows = make_rows([(" ".join(WORDS * 9), " ".join(["O"] * 71 + ["B-PER"])), *SENTENCES])
    wide, narrow = make_task(rows, max_length=512), make_task(rows, max_length=12, stride=5)
    model = Echo(len(wide.labels), None)
    found = [task.decode(predict(task, rows, model), rows) for task in (wide, narrow)]
    assert found[0] == found[1]
    assert len({*found[0][0]["tags"]}) > 1
    assert narrow.score(found[1], rows) == wide.score(found[0], rows)
    assert wide.account(wide.encode(columns(rows), training=True), rows)["windows"] == 0
    account = narrow.account(narrow.encode(columns(rows), training=True), rows)
    assert account["windows"] > 5
    assert account["tokens_lost"] == account["words_without_tokens"] == 0


def test_a_document_that_fits_is_one_feature_whatever_the_stride():
    rows = make_rows()
    longest = max(len(TOKENIZER(row["tokens"], is_split_into_words=True)["input_ids"]) for row in rows)
    exact, wide = make_task(rows, max_length=longest, stride=3), make_task(rows, max_length=512, stride=0)
    assert make_examples(exact, rows) == make_examples(wide, rows)


def test_a_word_longer_than_a_window_is_predicted_by_its_first_subword():
    rows = make_rows([("in " + "unbelievably" * 8 + " Berlin", "O B-PER B-LOC"), ("Anna", "B-PER")])
    task = make_task(rows, max_length=8, stride=2)
    features = task.encode(columns(rows), training=True)
    assert max(features["length"]) == 8
    found = [
        word for row, index in zip(features["row"], features["word_index"], strict=True) if row == 0 for word in index
    ]
    assert sorted(word for word in found if word != -1) == [0, 1, 2]
    account = task.account(features, rows)
    whole = TOKENIZER(rows[0]["tokens"], is_split_into_words=True)
    assert account["tokens_lost"] == whole.word_ids().count(1) - 6
    assert account["tokens"] == len(whole["input_ids"]) + features["length"][-1]
    assert account["words_without_tokens"] == account["entities_with_a_word_without_tokens"] == 0


def test_words_without_tokens_and_empty_rows_stay_in_the_denominator():
    rows = make_rows([("Anna met", "B-PER O")])
    rows.append({"row": 1, "tokens": ["Paul", LOST], "tags": ["B-PER", "I-PER"]})
    rows.append({"row": 2, "tokens": [""], "tags": ["B-LOC"]})
    rows.append({"row": 3, "tokens": [], "tags": []})
    task = make_task(rows)
    features = task.encode(columns(rows), training=True)
    assert features["row"] == [0, 1]
    account = task.account(features, rows)
    assert {name: number for name, number in account.items() if not name.startswith("tokens")} == {
        "words": 5,
        "words_without_tokens": 2,
        "entities": 3,
        "entities_with_a_word_without_tokens": 2,
        "windows": 0,
    }
    assert list(loss_lines("train", account)) == [
        "! train: 2 words without tokens",
        "! train: 2 entities with a word without tokens",
    ], "no max_length would keep them, so nothing is cut off"
    # A model that knows every label that it is asked for.
    label_of_id = torch.zeros(len(TOKENIZER), dtype=torch.int64)
    for example in make_examples(task, rows):
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            label_of_id[token] = max(label, 0)
    outputs = task.decode(predict(task, rows, Echo(len(task.labels), label_of_id)), rows)
    assert [output["tags"] for output in outputs] == [["B-PER", "O"], ["B-PER", "O"], ["O"], []]
    scores = task.score(outputs, rows)
    assert scores["recall"] == pytest.approx(1 / 3)
    assert scores["precision"] == pytest.approx(1 / 2)
    assert scores["accuracy"] == pytest.approx(3 / 5)


# Scores


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
tagged = st.lists(st.lists(st.sampled_from(TAGS), max_size=8), min_size=1, max_size=8)


@given(tagged, st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_scores_equal_seqeval_and_the_resampled_form(references, seed, strict):
    generator = np.random.default_rng(seed)
    predictions = [
        [tag if generator.random() < 0.7 else str(generator.choice(TAGS)) for tag in tags] for tags in references
    ]
    rows = [{"row": i, "tokens": ["x"] * len(tags), "tags": tags} for i, tags in enumerate(references)]
    task = Ner(TOKENIZER, 64, 8, ("O", "B-LOC", "B-PER", "I-LOC", "I-PER"), "IOB2", strict)
    outputs = answers(task, rows, predictions)
    scores = task.score(outputs, rows)
    mode = {"mode": "strict", "scheme": IOB2} if strict else {}
    for name in ("precision", "recall", "f1"):
        expected = getattr(seqeval.metrics, f"{name}_score")(references, predictions, zero_division=0, **mode)
        assert scores[name] == pytest.approx(expected, **EXACT), name
    resample = task.resample(outputs, rows)
    again = resample(np.arange(len(rows)))
    assert again.keys() == scores.keys()
    assert again == pytest.approx(scores, **EXACT)
    drawn = generator.integers(len(rows), size=len(rows))
    drawn_rows = [rows[i] | {"row": at} for at, i in enumerate(drawn)]
    expected = task.score([outputs[i] for i in drawn], drawn_rows)
    some = resample(drawn)
    assert {name: some[name] for name in expected} == pytest.approx(expected, **EXACT)
    assert all(np.isnan(some[name]) for name in some.keys() - expected.keys()), "types that were not drawn"


@pytest.mark.parametrize(
    ("gold", "predicted", "strict", "f1"),
    [
        ("B-PER I-PER O", "I-PER I-PER O", False, 1.0),  # an I- without a B- begins an entity
        ("B-PER I-PER O", "I-PER I-PER O", True, 0.0),
        ("B-PER I-PER O", "B-PER I-LOC O", False, 0.0),  # a change of type ends the entity: PER 0-1, LOC 1-2
        ("B-PER B-LOC O", "B-PER I-LOC O", False, 1.0),
        ("B-PER B-PER O", "B-PER I-PER O", False, 0.0),  # two neighbors are not one
        ("B-PER I-PER I-PER", "B-PER I-PER O", False, 0.0),  # a part of an entity counts nothing
        ("B-PER O B-LOC", "B-PER O O", False, 2 / 3),
        ("O O O", "O O O", False, 0.0),
    ],
)
def test_entity_f1_by_hand(gold, predicted, strict, f1):
    rows = [{"row": 0, "tokens": ["x"] * 3, "tags": gold.split()}]
    task = Ner(TOKENIZER, 64, 8, ("O",), "IOB2", strict)
    assert task.score(answers(task, rows, [predicted.split()]), rows)["f1"] == pytest.approx(f1, **EXACT)


def test_gold_tags_of_another_scheme_are_scored_as_entities():
    rows = make_rows([("Anna Paul met Berlin", "I-PER B-PER O I-LOC"), ("Anna", "I-PER")])
    task = make_task(rows)
    assert task.scheme == "IOB1"
    outputs = answers(task, rows, [["B-PER", "B-PER", "O", "B-LOC"], ["B-PER"]])
    assert task.score(outputs, rows) == {"precision": 1, "recall": 1, "f1": 1, "accuracy": 1, "f1_LOC": 1, "f1_PER": 1}


def test_outputs_name_the_entities():
    rows = make_rows([("Anna Paul met Berlin", "O O O O")])
    output = answers(make_task(), rows, [["B-PER", "I-PER", "O", "B-LOC"]])[0]
    assert output["entities"] == [
        {"type": "PER", "start": 0, "end": 2, "text": "Anna Paul"},
        {"type": "LOC", "start": 3, "end": 4, "text": "Berlin"},
    ]
    json.dumps(output)


def test_predictions_are_small_and_whole():
    task = make_task()
    batch = task.collate(make_examples(task, make_rows()))
    model = make_model("bert", AutoModelForTokenClassification, **task.model_kwargs())
    answer = task.predict(model, batch)
    assert all(len(tensor) == len(batch["row"]) for tensor in answer.values())
    assert all(tensor.ndim <= 2 for tensor in answer.values())
    assert torch.equal(
        answer["prediction"].long(), model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
    )
    json.dumps(task.decode(predict(task, make_rows(), model), make_rows()))
