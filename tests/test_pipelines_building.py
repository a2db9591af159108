"""Settings become parts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from attention_samples import swap
from tiny_families import make_model
from transformers import AutoModel

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
