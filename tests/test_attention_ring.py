"""Several processes that hold one text together do what one process does, to the last function and in the loop."""

import itertools

import pytest
import torch
import torch.distributed as dist
from attention_samples import make_mask, make_tensors
from processes import together
from test_attention_engine import EXACT, make_bias
from test_training_loop import assert_same, flat, make_trainee
from test_training_sharding import TASK_OF, with_lora, with_recomputing
from tiny_families import make_model, make_task

from attention.reference import dense_attention
from attention.ring import Ring, Shards, zigzag
from attention.scoring import Scoring
from attention.variants.ring import ring_attention
from training.batches import Batching, epochs
from training.loop import _updates, run_update

KINDS = [
    {"causal": causal, "bias": bias, "softcap": cap, "groups": groups, "length": length}
    for causal, (bias, cap, groups, length) in itertools.product(
        (False, True), (("none", None, 2, 150), ("vector", None, 1, 157), ("table", 2.0, 2, 150))
    )
]


def differences():
    """Of output and gradients from attention written out in one process, the largest of each kind of call."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    ring = Ring(zigzag(size), dist.get_rank(), dist.new_group(list(range(size))))
    return [difference(ring, **kind) for kind in KINDS] + [difference(ring, causal=True, length=3, padding=False)]


def difference(ring, *, causal, length, bias="none", softcap=None, groups=1, padding=True):
    tensors = make_tensors(groups=groups, queries=length, keys=length)
    mask = make_mask(queries=length, keys=length, causal=causal, padding=padding)  # at the right, and at the left
    scoring = Scoring(0.3, bias=make_bias(bias, queries=length, keys=length), softcap=softcap)
    inputs = [*tensors, *([scoring.bias] if scoring.bias is not None else [])]
    expected = dense_attention(*tensors, mask.table(torch.device("cpu")), scoring)
    shards = Shards(ring, length)
    own = ring_attention(*(shards.own(x, 2) for x in tensors), mask, scoring, shards)
    ours = shards.whole(own.transpose(1, 2).flatten(2)).unflatten(2, (4, 8)).transpose(1, 2)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs = torch.autograd.grad(expected, inputs, grad)
    parts = torch.autograd.grad(ours, inputs, grad / ring.size)
    for part in parts:
        dist.all_reduce(part)
    forward = float((ours - expected).abs().max())
    return forward, max(float((a - b).abs().max()) for a, b in zip(parts, theirs, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_it_is_attention_written_out(world_size):
    for found in together(world_size, differences):
        for kind, (forward, backward) in zip([*KINDS, "few tokens"], found, strict=True):
            assert forward <= EXACT[torch.float64][0], kind
            assert backward <= EXACT[torch.float64][1], kind


CASES = {family: (family, lambda model: model) for family in TASK_OF if family != "deberta-v2"} | {
    "lora": ("bert", with_lora),
    "recomputed": ("llama", with_recomputing),
    "recomputed, bias": ("t5", with_recomputing),
}


def update(case, plan):
    """What two updates of five examples change, in micro-batches of which one is padded."""
    family, alter = CASES[case]
    task, _, features = make_task(TASK_OF[family], family)
    model = alter(make_model(family, task.auto_class, dropout=False, initializer_range=0.2, **task.model_kwargs()))
    trainee = make_trainee(task, model, optim="sgd", learning_rate=1.0, max_grad_norm=0.1, attention=plan)
    before, batching = flat(trainee.bare_model), Batching(5, seed=1, micro_batch_size=3)
    plan = _updates(trainee, epochs(features.select(range(10)), batching, step=0), batching, start=0, stop=2)
    made = [run_update(trainee, micro, features, step=step) for step, (*_, micro) in enumerate(plan)]
    return {"change": flat(trainee.bare_model) - before} | {
        name: [getattr(one, name) for one in made] for name in ("loss", "grad_norm", "tokens")
    }


def updates(cases):
    return {case: update(name, plan) for case, (name, plan) in cases.items()}


def test_x():
    cases = {name: (name, "ring") for name in CASES}
    for found in together(2, updates, cases):
        for case, (name, _) in cases.items():
            try:
                assert_same(found[case], update(name, None))
            except AssertionError as error:
                print("BAD", case, error)
