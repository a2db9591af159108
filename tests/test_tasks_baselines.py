"""The rules that a model has to beat."""

import math

import datasets
import pytest
from tiny_families import TEXTS, make_config, make_decoder_tokenizer, make_masking_tokenizer, make_seq2seq_tokenizer
from tiny_text import make_tokenizer

from tasks import TASKS
from tasks.baselines import BASELINES, Split, baseline


def table(**columns):
    return datasets.Dataset.from_dict({"row": list(range(len(next(iter(columns.values()))))), **columns})


def build(name, tokenizer, rows, **options):
    entry = TASKS[name]
    config = make_config("t5") if name in ("summarization", "translation") else None
    given = {"model_config": config, "max_length": 16, "stride": 4, "options": entry.options(**options)}
    return entry.load().build(tokenizer, rows, **given)


def split(task, rows, *, training=False):
    return Split(rows, datasets.Dataset.from_dict(task.encode(rows[:], training=training)))


def answers(task, train, rows):
    return baseline(task, split(task, train, training=True), split(task, rows))


def test_every_rule_is_of_a_task():
    assert BASELINES.keys() <= TASKS.keys()


@pytest.mark.parametrize("labels", [["b", "a", "b"], ["yes", "no", "yes"]])
def test_the_most_frequent_label(labels):
    train = table(text=["x", "y", "z"], label=labels)
    task = build("classification", make_tokenizer("bert", TEXTS), train)
    rows = table(text=["u", "v"], label=labels[:2])
    name, outputs = answers(task, train, rows)
    assert name == f"always {labels[0]}"
    assert task.score(outputs, rows)["accuracy"] == 0.5


def test_no_rule_for_numbers():
    train = table(text=["x", "y"], label=[0.5, 1.5])
    assert answers(build("classification", make_tokenizer("bert", TEXTS), train), train, train) is None


def test_the_first_words_as_many_as_a_target_has():
    train = table(source=["a b c d"] * 3, target=["a", "b c", "d e f g h"])
    task = build("summarization", make_seq2seq_tokenizer(), train)
    name, outputs = answers(task, train, table(source=["one two  three", "four"], target=["-", "-"]))
    assert name == "first 2 words"
    assert outputs == [{"generated": "one two"}, {"generated": "four"}]


def test_the_source_copied():
    train = table(source=["Madrid, 1990"], target=["Madrid, 1990"])
    task = build("translation", make_seq2seq_tokenizer(), train)
    _, outputs = answers(task, train, train)
    assert task.score(outputs, train)["chrf"] == pytest.approx(100)


def test_unigram_of_texts_is_counted_by_hand():
    tokenizer = make_decoder_tokenizer()
    train, rows = table(text=["aab", "ab"]), table(text=["ba", "c"])
    task = build("generation", tokenizer, train, packing=True)
    _, outputs = answers(task, train, rows)
    assert [tokenizer.tokenize(text) for text in ("aab", "ab", "ba", "c")] == [
        ["Ġa", "a", "b"],
        ["Ġa", "b"],
        ["Ġ", "b", "a"],
        ["Ġ", "c"],
    ]
    counts = {"a": 1, "b": 2, "c": 0, "end": 2}  # a text's first token is predicted from nothing: it may count or not
    total = sum(counts.values()) + len(tokenizer)
    nats = {name: math.log(total) - math.log(count + 1) for name, count in counts.items()}
    expected = [nats["b"] + nats["a"] + nats["end"], nats["c"] + nats["end"]]
    assert [output["nll"] for output in outputs] == pytest.approx(expected)
    assert [output["tokens"] for output in outputs] == [3, 2]


def test_unigram_of_masked_tokens_is_counted_by_hand():
    tokenizer = make_masking_tokenizer()
    train, rows = table(text=["the cat sat", "the cat"]), table(text=["the", "moon the"])
    task = build("mlm", tokenizer, train, mlm_probability=0.5)
    _, outputs = answers(task, train, rows)
    words = tokenizer("the cat sat the cat", add_special_tokens=False)["input_ids"]
    features = task.encode(rows[:], training=False)
    examples = [dict(zip(features, cells, strict=True)) for cells in zip(*features.values(), strict=True)]
    for output, example in zip(outputs, examples, strict=True):
        masked = [label for label in task.collate([example])["labels"][0].tolist() if label != -100]
        nats = [math.log(len(words) + len(tokenizer)) - math.log(1 + words.count(token)) for token in masked]
        assert (output["tokens"], output["nll"]) == (len(masked), pytest.approx(sum(nats)))
    assert outputs[0]["tokens"] == 1


def test_no_rule_for_prompts():
    rows = table(prompt=["a"], completion=["b"])
    assert answers(build("generation", make_decoder_tokenizer(), rows), rows, rows) is None
