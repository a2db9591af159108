"""Who is decayed, and how the learning rate goes."""

import pytest
import torch
import transformers
from tiny_families import FAMILIES, make_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from heedful import UserError
from training.lora import add_lora
from training.optimizer import build_optimizer, build_scheduler, decays, parameter_groups

OPTIMIZERS = {
    "adamw_torch_fused": torch.optim.AdamW,
    "adamw_torch": torch.optim.AdamW,
    "adafactor": transformers.optimization.Adafactor,
    "sgd": torch.optim.SGD,
}
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def make_optimizer(name="sgd", *, learning_rate=0.1, weight_decay=0.0, model=None):
    model = model or nn.Linear(2, 2)
    groups = parameter_groups(model.named_parameters(), weight_decay=weight_decay)
    return build_optimizer(name, groups, learning_rate=learning_rate, betas=(0.8, 0.9), epsilon=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_are_not_decayed(family):
    """The oracle is Trainer's own list, and the rule by hand: vectors are not decayed, matrices are."""
    model = make_model(family, AutoModelForSequenceClassification, num_labels=3)
    decayed = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    trainers = transformers.Trainer.get_decay_parameter_names(None, model)  # noqa: TID251
    assert decayed == {name for name, _ in model.named_parameters()} & set(trainers)
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.ndim > 1}


def test_every_trained_parameter_is_in_one_group():
    model = make_model("bert", AutoModelForSequenceClassification, num_labels=3)
    model.bert.embeddings.requires_grad_(False)
    decayed, other = parameter_groups(model.named_parameters(), weight_decay=0.3)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    grouped = [id(p) for p in (*decayed["params"], *other["params"])]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_an_adapter_is_decayed_and_its_frozen_base_is_not_held():
    model = make_model("bert", AutoModelForSequenceClassification, num_labels=3)
    wrapped = add_lora(model, ["classifier.weight", "classifier.bias"], r=2, use_dora=True)
    decayed, other = parameter_groups(wrapped.named_parameters(), weight_decay=0.3)
    names = {id(p): name for name, p in wrapped.named_parameters()}
    assert all("lora_" in names[id(p)] or "classifier" in names[id(p)] for p in decayed["params"])
    assert all("magnitude" in names[id(p)] or names[id(p)].endswith("bias") for p in other["params"])
    assert any("magnitude" in names[id(p)] for p in other["params"])


def test_empty_groups_are_left_out():
    assert len(parameter_groups([("weight", nn.Parameter(torch.ones(2, 2)))], weight_decay=0.1)) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_get_their_settings(name):
    optimizer = make_optimizer(name, weight_decay=0.2)
    assert type(optimizer) is OPTIMIZERS[name]
    decayed, other = optimizer.param_groups
    assert (decayed["lr"], decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.2, 0.0)
    if "adamw" in name:
        assert (decayed["betas"], decayed["eps"]) == ((0.8, 0.9), 1e-6)
        assert decayed["fused"] == name.endswith("fused")


def test_decay_shrinks_matrices_only():
    model = nn.Linear(2, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = make_optimizer("adamw_torch", weight_decay=0.5, model=model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight, weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, bias)


def rates(optimizer, scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup_steps", "expected"), [(0.0, 0), (5.0, 5), (0.1, 3), (0.9, 23), (1.0, 1)])
def test_schedules_are_those_of_trainer(name, warmup_steps, expected, tmp_path):
    one, other = make_optimizer(), make_optimizer()
    ours = build_scheduler(name, one, warmup_steps=warmup_steps, num_training_steps=25)
    warmup = transformers.TrainingArguments(str(tmp_path), warmup_steps=warmup_steps).get_warmup_steps(25)
    assert warmup == expected
    theirs = transformers.get_scheduler(name, other, num_warmup_steps=warmup, num_training_steps=25)
    assert rates(one, ours, 25) == rates(other, theirs, 25)


def test_linear_with_warmup_by_hand():
    optimizer = make_optimizer(learning_rate=1.0)
    scheduler = build_scheduler("linear", optimizer, warmup_steps=0.2, num_training_steps=10)
    expected = [0.0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates(optimizer, scheduler, 10) == pytest.approx(expected)


@pytest.mark.parametrize(("decay_steps", "expected"), [(0.2, 5), (8.0, 8)])
def test_warmup_stable_decay_is_that_of_trainer(decay_steps, expected):
    one, other = make_optimizer(), make_optimizer()
    ours = build_scheduler("warmup_stable_decay", one, warmup_steps=0.1, num_training_steps=25, decay_steps=decay_steps)
    theirs = transformers.get_wsd_schedule(other, 3, expected, 25)
    seen = rates(one, ours, 25)
    assert seen == rates(other, theirs, 25)
    assert seen.count(0.1) == 25 - 3 - expected + 1


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_share_of_a_short_run_fits_into_it(steps):
    optimizer = make_optimizer()
    scheduler = build_scheduler(
        "warmup_stable_decay", optimizer, warmup_steps=0.1, num_training_steps=steps, decay_steps=0.2
    )
    assert rates(optimizer, scheduler, steps) == pytest.approx([0.0, *[0.1] * (steps - 1)])
    assert scheduler.get_last_lr()[0] == 0.0


@pytest.mark.parametrize(("decay_steps", "decay"), [(5, 5), (0.2, 0)])
def test_stages_longer_than_the_run_are_refused(decay_steps, decay):
    stages = {"warmup_steps": 20, "num_training_steps": 10, "decay_steps": decay_steps}
    with pytest.raises(UserError, match=f"20 steps of warm-up and {decay} of decay in a run of 10"):
        build_scheduler("warmup_stable_decay", make_optimizer(), **stages)
