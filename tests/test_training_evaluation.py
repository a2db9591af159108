"""Every feature predicted once, in order, and training not disturbed. On several processes: test_training_loop.py."""

from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_families import make_model, make_task

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
    run(setting, batch_size=6, tick=done.append)
    assert done[-1] == len(setting.features)
    assert done == sorted(set(done))


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
