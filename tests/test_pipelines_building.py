"""Settings become parts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from attention_samples import swap
from datasets import Dataset
from tiny_families import make_model, make_task
from transformers import AutoModel

from attention.seam import refuse_longer_texts
from heedful import UserError
from pipelines import building
from pipelines.building import build_batching, distribute
from pipelines.config import load
from pipelines.preparation import OTHER_LOOPS, build_accelerator
from training.batches import micro_batches


def test_a_pass_on_a_cpu_is_of_2048_tokens_at_most():
    """So that memory does not grow with the batch; the update is the same."""
    batching = build_batching(load("configs/qa.yaml"), Accelerator(cpu=True))
    parts = micro_batches(np.arange(32), np.full(32, 256), batching)
    assert [len(part) for part in parts] == [8, 8, 8, 8]


SPLIT = ["train.batch_size=32", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4"]
RING = ["attention=ring", "attention.ring_size=2"]


def test_micro_batches_are_counted_by_the_rings(monkeypatch):
    """Named, the ring is known before anything is read; else when the model brings it along."""
    four = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    assert build_batching(load("configs/qa.yaml", [*SPLIT, *RING]), four).accumulation == 4
    with pytest.raises(UserError, match="4 x 4 x 4 processes"):
        build_batching(load("configs/qa.yaml", [*SPLIT, "attention=blockwise"]), four)
    assert build_batching(load("configs/qa.yaml", SPLIT), four).accumulation == 4, "a checkpoint may bring a ring along"
    with pytest.raises(UserError, match="4 x 4 x 4 processes"):
        distribute(load("configs/qa.yaml", SPLIT), torch.nn.Identity(), four)
    monkeypatch.setattr("pipelines.building.connect", lambda model: ["ring"])
    monkeypatch.setattr("pipelines.building.ring_size", lambda model: 4)
    with pytest.raises(UserError, match="4 x 4 x 1 process "):
        distribute(load("configs/qa.yaml", [*SPLIT, *RING]), torch.nn.Identity(), four)


def test_what_becomes_of_a_ring_is_said():
    model = make_model("bert", AutoModel)
    swap(model, "ring")
    one = SimpleNamespace(num_processes=1)
    assert "one process makes none" in distribute(load("configs/qa.yaml"), model, one)[0]


@pytest.mark.parametrize(
    ("name", "family", "lengths"),
    [
        ("classification", "bert", {"encoder.self": 32, "decoder.self": 32, "cross": 32}),
        ("classification", "bart", {"encoder.self": 32, "decoder.self": 32, "cross": 32}),
        ("summarization", "bart", {"encoder.self": 32, "decoder.self": 20, "cross": 32}),
        ("summarization", "llama", {"encoder.self": 52, "decoder.self": 52, "cross": 52}),
    ],
)
def test_each_kind_of_attention_meets_lengths_of_its_own(name, family, lengths):
    """Source and target are apart in an encoder-decoder, and one text elsewhere."""
    settings = {"max_target_length": 20, "decoding": {"max_new_tokens": 9}} if name == "summarization" else {}
    task, _, _ = make_task(name, family, max_length=32, **settings)
    assert building._longest(task, make_model(family, AutoModel)) == lengths


def test_the_longest_text_of_a_packed_row_is_not_the_row():
    rows = {"length": [9, 7], "position_ids": [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3]]}
    assert building._longest_text(Dataset.from_dict(rows)) == 5
    assert building._longest_text(Dataset.from_dict({"length": rows["length"]})) == 9


def test_texts_are_refused_where_a_variant_would_meet_them():
    """A decoder never meets a long source, but in cross-attention."""
    long_source = {"encoder.self": 4096, "decoder.self": 64, "cross": 4096}
    for place in ("encoder.self", "decoder.self", "cross"):
        model = make_model("bart", AutoModel)
        swap(model, {place: "additive"})
        if place == "decoder.self":
            refuse_longer_texts(model, long_source)
            continue
        with pytest.raises(UserError, match="4,096 tokens for additive attention"):
            refuse_longer_texts(model, long_source)


def test_names_of_parameters_are_listed_once_for_all_layers():
    names = ["classifier.bias", *(f"d.layer.{i}.x.bias" for i in range(12)), "e.layer.0.y", "e.layer.2.y", "z.1.w"]
    listed = ["classifier.bias", "d.layer.[0-11].x.bias", "e.layer.[0,2].y", "z.1.w"]
    assert building._across_layers(names) == listed


@pytest.mark.fault("a variable of accelerate asks for another loop", "refused, naming heedful's own setting")
@pytest.mark.parametrize(
    ("name", "value"),
    {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_FSDP": "TRUE",
        "ACCELERATE_MIXED_PRECISION": "fp16",
    }.items(),
)
def test_what_accelerate_would_do_behind_the_loop_is_refused(name, value, monkeypatch):
    """It would divide gradients a second time, and run plain data parallelism on a CPU: both in silence."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}"):
        build_accelerator(bf16=False)
    monkeypatch.setenv(name, OTHER_LOOPS[name])
    assert build_accelerator(bf16=False).gradient_accumulation_steps == 1


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    build_accelerator(bf16=False)  # as accelerate has joined none when it is asked again
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched, of which accelerate joined 1"):
        build_accelerator(bf16=False)
