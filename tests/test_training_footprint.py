"""What an update needs, counted: against what is known of the model."""

import numpy as np
import pytest
import torch
from test_training_loop import make_trainee
from tiny_families import make_task

from training.batches import examples
from training.footprint import Footprint, activation_bytes, measure


def batch_of(task, features, rows):
    return task.collate(examples(features, np.array(rows)))


def test_weights_gradients_and_state_are_those_of_adamw():
    task, _, features = make_task("classification")
    trainee = make_trainee(task, optim="adamw_torch_fused")
    batch = batch_of(task, features, range(8))
    found = measure(trainee, batch, [batch], features)
    numbers = sum(p.numel() for p in trainee.bare_model.parameters())
    parameters = list(trainee.bare_model.parameters())
    assert found.gradients == 4 * numbers
    assert found.optimizer == 2 * 4 * numbers + 4 * len(parameters)  # two moments, and a count each
    assert found.weights >= found.gradients
    assert found.examples == 8
    assert found.seconds > 0


def test_frozen_weights_have_no_gradients():
    task, _, features = make_task("classification")
    trainee = make_trainee(task)
    for parameter in trainee.bare_model.bert.parameters():
        parameter.requires_grad_(False)
    batch = batch_of(task, features, range(8))
    head = sum(p.numel() for p in trainee.bare_model.classifier.parameters())
    assert measure(trainee, batch, [batch], features).gradients == 4 * head


def test_activations_grow_with_the_batch_and_are_what_autograd_keeps():
    task, _, features = make_task("classification")
    trainee = make_trainee(task)
    one, four = (activation_bytes(trainee, batch_of(task, features, [3] * count)) for count in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.1)
    with torch.no_grad():
        assert activation_bytes(trainee, batch_of(task, features, [3])) == 0


def test_the_largest_micro_batch():
    footprint = Footprint(weights=100, gradients=100, optimizer=200, activations=50, examples=5, seconds=1.0)
    assert footprint.most_examples(1000) == (900 - 400) // 10
    assert footprint.most_examples(400) == 0
