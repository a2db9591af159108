"""Every feature predicted once, in order, and training not disturbed. On several processes: test_training_loop.py."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from tiny_families import make_model, make_task

from pipelines.report import progress_lines
from training import evaluation
from training.evaluation import predict


@pytest.fixture(params=["classification", "ner", "qa"])
def setting(request):
    task, rows, _ = make_task(request.param)
    features = datasets.Dataset.from_dict(task.encode(rows[:], training=False))
    model = make_model("bert", task.auto_class, initializer_range=0.2, **task.model_kwargs())
    return SimpleNamespace(task=task, rows=rows, features=features, model=model, accelerator=Accelerator(cpu=True))


def run(setting, batch_size=4, **kwargs):
    return predict(
        setting.task, setting.model, setting.features, accelerator=setting.accelerator, batch_size=batch_size, **kwargs
    )


def test_every_feature_once_and_in_order(setting):
    predictions = run(setting, batch_size=5)
    assert [int(one["row"]) for one in predictions] == setting.features["row"]


def test_the_score_does_not_depend_on_the_batches(setting):
    """One at a time there is no padding, so that padding that leaked into an answer would show."""
    scores = [
        setting.task.score(setting.task.decode(run(setting, size), setting.rows), setting.rows) for size in (1, 5, 64)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    assert scores[2] == pytest.approx(scores[0], abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_training_is_not_disturbed(setting, training):
    setting.model.train(training)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    weights = [parameter.detach().clone() for parameter in setting.model.parameters()]
    first, second = run(setting), run(setting)
    assert str(first) == str(second)  # no dropout
    assert setting.model.training is training
    assert all(module.training is training for module in setting.model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights, setting.model.parameters()))
    assert all(parameter.grad is None for parameter in setting.model.parameters())


def test_progress_is_told(setting):
    done = []
    run(setting, batch_size=6, tick=lambda *counts: done.append(counts))
    assert done[-1] == (len(setting.features), len(setting.features))
    assert done == sorted(set(done))


def test_a_long_evaluation_says_how_far_it_is():
    seconds = iter([0.0, 5.0, 30.0, 30.0, 40.0, 90.0, 90.0])
    console = Console(file=io.StringIO())
    tick = progress_lines(console, "test", now=lambda: next(seconds))
    for done in (10, 20, 30, 60):
        tick(done, 90)
    assert console.file.getvalue().splitlines() == [
        "test: 22% done, 0:01:45 left",
        "test: 67% done, 0:00:45 left",
    ]


def test_a_short_evaluation_says_nothing():
    console = Console(file=io.StringIO())
    seconds = iter([0.0, 5.0, 25.0])
    tick = progress_lines(console, "test", now=lambda: next(seconds))
    tick(1, 2)
    tick(2, 2)
    assert not console.file.getvalue()


def test_the_longest_come_first(setting, monkeypatch):
    """Memory that does not suffice shows in the first batch."""
    lengths = []

    def note(task, model, features, indices, accelerator):
        lengths.extend(np.asarray(features["length"])[indices].tolist())
        return [{} for _ in indices]

    monkeypatch.setattr(evaluation, "_forward", note)
    run(setting, batch_size=3)
    assert lengths == sorted(setting.features["length"], reverse=True)


def test_an_incomplete_evaluation_is_no_result(setting, monkeypatch):
    monkeypatch.setattr(evaluation, "gather_object", lambda answers: answers[:-1])
    setting.accelerator = SimpleNamespace(
        process_index=0, num_processes=2, device=torch.device("cpu"), autocast=nullcontext
    )
    with pytest.raises(RuntimeError, match="evaluation covered"):
        run(setting)
