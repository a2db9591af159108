"""Masked language modelling: which tokens are masked is a function of seed, epoch and row, and of nothing else."""

import datasets
import numpy as np
import pytest
import torch
from tiny_families import TEXTS, make_decoder_tokenizer, make_masking_tokenizer, make_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from heedful import UserError
from tasks.mlm import Mlm
from tasks.options import MlmOptions
from training.batches import Batching, EpochSteps, epoch_batches

LONG = "Anna met Paul in Berlin " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return make_masking_tokenizer()


def table(*texts):
    return datasets.Dataset.from_dict({"row": list(range(len(texts))), "text": list(texts)})


def build(tokenizer, *, max_length=32, **options):
    rows = table(*TEXTS)
    return Mlm.build(tokenizer, rows, model_config=None, max_length=max_length, stride=0, options=MlmOptions(**options))


def encoded(task, rows):
    features = task.encode(rows[:], training=True)
    return [dict(zip(features, cells, strict=True)) for cells in zip(*features.values(), strict=True)]


def masked(task, rows, draw):
    return task.collate([example | {"draw": draw} for example in encoded(task, rows)])


def test_masks_follow_from_seed_epoch_row_and_window(tokenizer):
    task, rows = build(tokenizer), table(*TEXTS, LONG)
    first, again = (masked(task, rows, (1, 0)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in ((2, 0), (1, 1)):
        assert not torch.equal(first["labels"], masked(task, rows, other)["labels"])
    examples = [example | {"draw": (1, 0)} for example in encoded(task, rows)]
    for i, example in enumerate(examples):  # alone as in the batch
        size = len(example["input_ids"])
        assert torch.equal(task.collate([example])["labels"][0], first["labels"][i, :size])
    windows = first["labels"][-3:-1]
    assert not torch.equal(windows[0], windows[1])


def test_evaluation_always_asks_the_same(tokenizer):
    task, rows = build(tokenizer), table(*TEXTS)
    first, again = (task.collate(encoded(task, rows)) for _ in range(2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert (first["labels"] != -100).any(dim=1).all()


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_shares_are_as_set(share, tokenizer):
    task = build(tokenizer, max_length=128, mlm_probability=share, mask_replace_prob=0.6, random_replace_prob=0.3)
    rows = table(*[LONG] * 60)
    plain, batch = encoded(task, rows), masked(task, rows, (0, 0))
    ids = torch.tensor(
        [example["input_ids"] + [0] * (batch["labels"].shape[1] - len(example["input_ids"])) for example in plain]
    )
    chosen = batch["labels"] != -100
    words = sum(word != -1 for example in plain for word in example["word"])
    assert chosen.sum() / words == pytest.approx(share, abs=0.01)
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    hidden = (batch["input_ids"][chosen] == tokenizer.mask_token_id).float().mean()
    kept = (batch["input_ids"][chosen] == ids[chosen]).float().mean()
    assert hidden == pytest.approx(0.6, abs=0.05)
    assert kept == pytest.approx(0.1, abs=0.05)


def test_whole_words_are_masked_whole(tokenizer):
    task, rows = build(tokenizer, whole_word_mask=True, mlm_probability=0.3), table("moonlight barking " * 5, *TEXTS)
    examples = encoded(task, rows)
    assert any(len(set(e["word"])) < len(e["word"]) - 1 for e in examples), "words of several tokens"
    for epoch in range(5):
        for example in examples:
            labels = task.collate([example | {"draw": (0, epoch)}])["labels"][0].numpy()
            words = np.array(example["word"])
            for word in set(words[words >= 0].tolist()):
                assert len({bool(label != -100) for label in labels[words == word]}) == 1


def test_special_tokens_are_never_masked(tokenizer):
    batch = masked(build(tokenizer, mlm_probability=0.9), table(*TEXTS), (0, 0))
    assert not torch.isin(batch["labels"], torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])).any()


def test_the_loop_hands_the_draw_to_each_example(tokenizer):
    """Another number of micro-batches, or of processes, masks the same tokens."""
    task = build(tokenizer)
    features = datasets.Dataset.from_dict(task.encode(table(*TEXTS, *TEXTS)[:], training=True))
    order = epoch_batches(np.array(features["length"]), Batching(8, seed=3), epoch=1)[0]
    (whole,) = EpochSteps(features, task.collate, [[order]], draw=(3, 1))[0]
    halves = EpochSteps(features, task.collate, [[order[:3], order[3:]]], draw=(3, 1))[0]
    labels = {
        int(row): labels[labels != -100].tolist()
        for half in halves
        for row, labels in zip(half["row"], half["labels"], strict=True)
    }
    for row, expected in zip(whole["row"], whole["labels"], strict=True):
        assert labels[int(row)] == expected[expected != -100].tolist()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_whole_logits(family, training, tokenizer):
    task = build(tokenizer)
    batch = masked(task, table(*TEXTS), (0, 0))
    model = make_model(family, AutoModelForMaskedLM, dropout=False).train(training)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    whole = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    torch.testing.assert_close(task.loss(model, batch), whole)
    assert task.count(batch) == (batch["labels"] != -100).sum()


def test_a_text_with_masks_is_filled_in(tokenizer):
    task, model = build(tokenizer), make_model("bert", AutoModelForMaskedLM)
    rows = table("the [MASK] sat on the [MASK]", "the cat sat")
    with torch.no_grad():
        found = task.predict(model, task.collate(encoded(task, rows)))
    predictions = [{k: v[i].numpy() for k, v in found.items()} for i in range(2)]
    filled, scored = task.decode(predictions, rows)
    assert [len(names) for names in filled["fillings"]] == [5, 5]
    assert scored["tokens"] == 1
    scores = task.score([filled, scored], rows)
    assert scores["perplexity"] == pytest.approx(np.exp(scored["nll"]))
    assert task.resample([filled, scored], rows)(np.arange(2)) == pytest.approx(scores)


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(UserError, match="mask_token"):
        build(make_decoder_tokenizer())
