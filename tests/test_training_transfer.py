"""Attention transfer: what it compares, what it trains, that it helps, and that it is the same however it is split.

Run as a script by torchrun, this file makes the same transfer on several processes.
"""

import copy
import itertools
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_loop import flat, launch, make_trainee
from tiny_families import make_model, make_task

from attention.options import Plan
from attention.seam import CHILD, install, recorded, remove
from heedful import NonFiniteLossError, UserError
from pipelines.cli import leave
from training import transfer as module
from training.batches import Batching, examples
from training.evaluation import untold
from training.loop import run_update
from training.lora import add_lora
from training.optimizer import build_optimizer
from training.transfer import BEFORE, Course, Pupil, _halves, _pupil, _wide, agreement, squared_error, transfer

SLOTS = {"variant": "linformer", "k": 4}
WINDOW = {"variant": "sliding_window", "reach": 2}
BOTH = ("layers", "outputs")
CASES = {
    "encoder": ("classification", "bert", SLOTS),
    "shared layers": ("ner", "albert", SLOTS),
    "grouped heads": ("generation", "mistral", {"decoder.self": "additive"}),
    "two halves": ("translation", "bart", {"encoder.self": SLOTS, "decoder.self": "additive", "cross": "additive"}),
    "bias": ("translation", "t5", {"encoder.self": WINDOW, "cross": "additive"}),
    "classifier of two halves": ("classification", "t5", {"encoder.self": WINDOW, "cross": "additive"}),
}
"""Task, family and plan; sizes at which what a variant leaves out is felt."""
LAUNCHED = ("encoder, lora", "two halves")
QUICK = ("encoder", "two halves")


@pytest.fixture(autouse=True)
def _without_collecting(monkeypatch):
    """Half of a short transfer's time would go there."""
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)


def make_case(case, *, lora=False, dropout=False, targets=None):
    name, family, plan = CASES[case] if isinstance(case, str) else ("classification", "bert", case)
    task, _, features = make_task(name, family)
    sizes = {"initializer_range": 0.3, "init_std": 0.3, "initializer_factor": 2.0}
    model = make_model(family, task.auto_class, dropout=dropout, **sizes, **task.model_kwargs())
    install(model, Plan.model_validate(plan))
    if lora:
        new = [n for n, _ in model.named_parameters() if "classifier" in n or f".{CHILD}." in n]
        add_lora(model, new, r=2, target_modules=targets)
    return task, model, features


def run(task, model, features, *, stages=BOTH, steps=12, rate=2e-2, base=5e-3, accelerator=None, **batching):
    return transfer(
        model,
        task,
        features,
        features.select(range(4)),
        accelerator=accelerator or Accelerator(cpu=True),
        course=Course(stages, steps, rate, base, Batching(8, seed=1, **batching)),
        tick=lambda stage: untold,
    )


def batch_of(task, features, rows=slice(6)):
    return task.collate(examples(features, torch.arange(len(features))[rows].numpy()))


def unswapped(model):
    """Another model of the same weights, without variants."""
    other = copy.deepcopy(model)
    remove(other)
    return other


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c not in QUICK)])
def test_the_loss_of_each_stage_falls_and_the_agreement_rises(case):
    task, model, features = make_case(case)
    batch, losses = batch_of(task, features), []
    for stage in BOTH:
        compare = getattr(pupil_of(model), stage)
        losses.append(total(compare(batch)))
        found = run(task, model, features, stages=(stage,), steps=12)
        losses.append(total(compare(batch)))
        assert list(found) == [BEFORE, stage]
    assert losses[1] < 0.97 * losses[0]
    assert losses[3] < 0.9 * losses[2]
    assert sum(found[BEFORE].cosine.values()) < sum(found["outputs"].cosine.values())


def total(pairs):
    return sum(float(squared_error(*pair).detach()) for pair in pairs)


def pupil_of(model):
    """As stage ``outputs`` has it: its teacher stays where it was."""
    pupil = _pupil(model)
    return replace(pupil, start={name: model.get_parameter(name).detach().clone() for name in pupil.attention})


@pytest.mark.parametrize("case", CASES)
def test_the_teacher_is_the_unswapped_model(case):
    """On padded rows, also when what stage ``outputs`` trains has moved."""
    task, model, features = make_case(case)
    plain, batch, pupil = unswapped(model), batch_of(task, features), pupil_of(model)
    with torch.no_grad():
        for name in pupil.attention:
            model.get_parameter(name).add_(0.1)
    with torch.no_grad(), recorded(plain) as calls:
        states = Pupil(plain, (), (), (), _halves(plain, pupil.places[0].role)).states(batch)
    learners, paths = {name.partition(f".{CHILD}.")[0] for name in pupil.learned}, paths_of(plain)
    expected = [call for call in calls if paths[call.module] in learners]
    assert expected
    for (own, wanted, real), call in zip(pupil.layers(batch), expected, strict=True):
        assert own.requires_grad
        assert not wanted.requires_grad
        torch.testing.assert_close(wanted[real], _wide(call.output)[real], rtol=0, atol=1e-5)
        assert not torch.allclose(own[real], wanted[real], rtol=0, atol=1e-3)
    for (own, wanted, real), state in zip(pupil.outputs(batch), states, strict=True):
        assert own.requires_grad
        torch.testing.assert_close(wanted[real], state[real], rtol=0, atol=1e-5)
        assert not torch.allclose(own[real], state[real], rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", ["two halves", "grouped heads"])
def test_the_agreement_is_that_with_the_unswapped_model(case):
    """Taken on all rows at once, and measured in parts that are padded otherwise."""
    task, model, features = make_case(case)
    plain, batch = unswapped(model), batch_of(task, features, slice(None))
    pupil, accelerator = _pupil(model), Accelerator(cpu=True)
    found = agreement(pupil, task, features, accelerator, Batching(8, seed=1, micro_batch_size=3))
    with torch.no_grad(), recorded(plain) as theirs:
        expected = Pupil(plain, (), (), (), _halves(plain, pupil.places[0].role)).states(batch)
    with torch.no_grad(), recorded(model) as ours:
        states = pupil.states(batch)
    text = batch["attention_mask"].bool()
    masks = {"encoder": text, "decoder": batch["labels"] != -100 if case == "two halves" else text}
    for (half, cosine), one, other in zip(found.cosine.items(), states, expected, strict=True):
        pairs = zip(one[masks[half]], other[masks[half]], strict=True)
        cosines = [float(a @ b / a.norm() / b.norm()) for a, b in pairs]
        assert cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert list(found.error) == [str(site) for site in pupil.places]
    for site, one, other in zip(pupil.places, ours, theirs, strict=True):
        mask = masks[site.role.partition(".")[0].replace("cross", "decoder")]
        given, wanted = (_wide(call.output)[mask] for call in (one, other))
        error = float((given - wanted).norm() / wanted.norm())
        assert found.error[str(site)] == pytest.approx(error, abs=1e-5)


def paths_of(model):
    return {module: path for path, module in model.named_modules()}


def test_what_gives_full_attention_is_left_out():
    _, model, _ = make_case("bias")
    pupil = _pupil(model)
    assert [str(site) for site in pupil.places] == ["encoder.self[0]", "cross[0]"]
    assert {name.partition(".layer.")[0] for name in pupil.attention} == {"encoder.block.0", "decoder.block.0"}
    assert not any("decoder" in name and "SelfAttention" in name for name in pupil.attention)


def test_only_the_real_tokens_count():
    task, model, features = make_case("two halves")
    pupil, batch = _pupil(model), batch_of(task, features)
    text, answer = batch["attention_mask"].bool(), batch["labels"] != -100
    assert not text.all()
    assert not answer.all()
    shapes = {"encoder.self": text, "decoder.self": answer, "cross": answer}
    for site, (*_, real) in zip(pupil.places, pupil.layers(batch), strict=True):
        assert torch.equal(real, shapes[site.role])
    one, other = torch.randn(2, *text.shape, 8).unbind()
    expected = sum(float(((a - b) ** 2).mean()) for a, b in zip(one[text], other[text], strict=True))
    assert float(squared_error(one, other, text)) == pytest.approx(expected, rel=1e-5)
    one[~text] = float("nan")
    assert float(squared_error(one, other, text)) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=8)
@given(st.sets(st.integers(1, 7), max_size=3), st.sampled_from(BOTH))
def test_the_loss_of_a_batch_is_the_sum_of_its_parts(cuts, stage):
    """However the rows are split, and so however they are padded."""
    task, model, features = make_case("two halves")
    compare, bounds = getattr(_pupil(model), stage), [0, *sorted(cuts), 8]

    def loss(rows):
        return total(compare(batch_of(task, features, rows)))

    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    assert sum(map(loss, parts)) == pytest.approx(loss(slice(8)), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(("stage", "trained"), [("layers", f".{CHILD}."), ("outputs", ".attention.self.")])
def test_a_stage_trains_what_it_says_and_nothing_else(stage, trained, lora):
    task, model, features = make_case("encoder", lora=lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    required = {name for name, p in model.named_parameters() if p.requires_grad}
    accelerator = Accelerator(cpu=True)
    run(task, model, features, stages=(stage,), steps=4, accelerator=accelerator)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in required if trained in name}
    assert any("lora_" in name for name in moved) == (lora and stage == "outputs")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == required
    assert all(p.grad is None for p in model.parameters())
    assert accelerator._models == accelerator._optimizers == []


def test_the_rates_are_those_of_what_is_new_and_of_what_is_pretrained():
    """Adam's first step is as long as its rate."""
    task, model, features = make_case("encoder")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(task, model, features, stages=("outputs",), steps=1, rate=0.03, base=0.002)
    moves = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    for name in _pupil(model).attention:
        if not name.endswith("key.bias"):  # which full attention does not feel, and this one hardly
            assert moves[name] == pytest.approx(0.03 if CHILD in name else 0.002, rel=0.01)


def test_dropout_has_no_part_in_it_and_each_time_it_is_the_same():
    results = []
    for dropout in (False, True):
        task, model, features = make_case("two halves", dropout=dropout)
        model.train()
        torch.rand(1 + dropout)
        results.append((run(task, model, features, steps=2), flat(model)))
    (one, weights), (other, others) = results
    assert torch.equal(weights, others)
    assert one == other


def test_what_is_full_attention_already_is_left_alone():
    """Adam would make of gradients that are rounding alone steps as large as of any."""
    task, model, features = make_case({"variant": "linformer", "k": 64})
    before = flat(model)
    found = run(task, model, features)
    assert list(found) == [BEFORE]
    assert found[BEFORE].cosine["encoder"] == pytest.approx(1.0)
    assert torch.equal(flat(model), before)


def test_variants_without_parameters_leave_out_what_they_can_not_learn(caplog):
    caplog.set_level(logging.INFO)
    task, model, features = make_case(WINDOW)
    found = run(task, model, features, steps=5)
    assert list(found) == [BEFORE, "outputs"]
    assert found[BEFORE].cosine["encoder"] < found["outputs"].cosine["encoder"]
    assert "stage layers is left out" in caplog.text


@pytest.mark.parametrize(
    ("stages", "lora", "targets"), [(("layers",), False, None), (BOTH, True, ["intermediate.dense"])]
)
def test_where_there_is_nothing_to_train_it_is_refused(stages, lora, targets):
    task, model, features = make_case(WINDOW, lora=lora, targets=targets)
    with pytest.raises(UserError, match="no parameter that stage") as refusal:
        run(task, model, features, stages=stages)
    assert refusal.value.where == "attention.transfer"


def test_a_loss_that_is_no_number_names_the_stage():
    task, model, features = make_case("encoder")
    with torch.no_grad():
        model.get_parameter(_pupil(model).learned[0])[0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="finite") as error:
        run(task, model, features, stages=("layers",))
    assert "stage layers, step 1" in error.value.where
    assert "attention.transfer.learning_rate" in error.value.fix


def test_several_micro_batches_or_processes_transfer_as_one_does(tmp_path, monkeypatch):
    """And the wrapper of the transfer has no part in the training after it."""
    monkeypatch.setattr(module, "build_optimizer", steadier)
    for case, ours in launch(__file__, 2, tmp_path).items():
        whole = results_of(case, overhead=1e9)
        assert whole["change"].norm() > 1e-2
        assert_alike(ours, whole)
        assert_alike(results_of(case, micro_batch_size=1), whole)


def results_of(case, **batching):
    """What a transfer changes, and then an update of the task; of nine rows, so that a rank has none in the second."""
    task, model, features = make_case(case.removesuffix(", lora"), lora=case.endswith("lora"))
    before = flat(model)
    accelerator = Accelerator(cpu=True)
    found = run(task, model, features.select(range(9)), steps=2, accelerator=accelerator, **batching)
    between = flat(model)
    trainee = make_trainee(task, model, optim="sgd", learning_rate=1.0)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    run_update(trainee, [batch_of(task, features, slice(rank, 8, world_size))], features, step=0)
    figures = [list((measured.cosine | measured.error).values()) for measured in found.values()]
    return {"change": between - before, "update": flat(model) - between, "found": figures}


def assert_alike(ours, theirs):
    for name in ("change", "update"):
        assert (ours[name] - theirs[name]).norm() / theirs[name].norm() < 1e-5, name
    torch.testing.assert_close(torch.tensor(ours["found"]), torch.tensor(theirs["found"]), rtol=1e-5, atol=1e-6)


def steadier(*args, **kwargs):
    """With Adam's usual epsilon the rounding of gradients that are zero in exact arithmetic would be blown up."""
    return build_optimizer(*args, **kwargs | {"epsilon": 1e-2})


if __name__ == "__main__":
    module.build_optimizer = steadier
    results = {case: results_of(case) for case in LAUNCHED}
    if Accelerator(cpu=True).is_main_process:
        torch.save(results, Path(sys.argv[1]) / "results.pt")
    leave(0)
