"""Several processes that hold one text together do what one process does, to the last function and in the loop."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from attention_samples import make_mask, make_tensors, swap
from hypothesis import given
from hypothesis import strategies as st
from processes import together
from test_attention_engine import EXACT, make_bias
from test_training_loop import assert_same, flat, make_trainee
from test_training_sharding import TASK_OF, with_lora, with_recomputing
from tiny_families import make_model, make_task
from transformers import AutoModel

from attention.options import Plan
from attention.reference import attention_weights, dense_attention
from attention.ring import Ring, Shards, zigzag
from attention.scoring import Scoring
from attention.seam import install, run
from attention.sharing import connect
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


def dropped_out():
    """Which weights of this process's queries dropout leaves, as values of 1 show them; and how far they are off."""
    dist.init_process_group("gloo")
    ring = Ring(zigzag(dist.get_world_size()), dist.get_rank(), dist.new_group(list(range(dist.get_world_size()))))
    query, key, _ = make_tensors(rows=1, queries=130, keys=130)
    eye, mask, shards = (
        torch.eye(130).double().expand(1, 2, 130, 130),
        make_mask(1, 130, 130, padding=False),
        Shards(ring, 130),
    )
    torch.manual_seed(ring.rank)
    out = ring_attention(*(shards.own(x, 2) for x in (query, key, eye)), mask, Scoring(0.3, dropout=0.25), shards)
    own = torch.cat([torch.arange(130)[queries] for _, queries in shards.pieces(ring.rank)])
    out = out[:, :, : len(own)]  # what fills up stands last
    weights = attention_weights(query, key, mask.table(torch.device("cpu")), Scoring(0.3))[:, :, own]
    kept = out.detach() != 0
    pairs = [(out, weights * kept / 0.75)]
    parts = [torch.autograd.grad(made.square().sum(), (query, key)) for made in (out, pairs[0][1])]
    for part in itertools.chain(*parts):
        dist.all_reduce(part)
    pairs += zip(*parts, strict=True)
    return kept, max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)


def test_dropout_is_drawn_in_each_process_anew_and_the_same_in_both_passes():
    (first, error), (second, other_error) = together(2, dropped_out)
    assert max(error, other_error) <= 1e-11
    for kept in (first, second):
        assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.01)
        for one, other in itertools.combinations(kept[:, :, :33, :99].split(33, dim=-1), 2):  # by pieces of the keys
            assert not torch.equal(one, other)
    assert not torch.equal(first[:, :, :33], second[:, :, :33])


@given(processes=st.integers(1, 6), length=st.integers(1, 90))
def test_each_token_lies_in_one_process(processes, length):
    whole, found = torch.arange(length)[None, :, None], torch.zeros(length, dtype=torch.int64)
    for rank in range(processes):
        shards = Shards(Ring(zigzag(processes), rank), length)
        own = shards.own(whole, 1)[0, :, 0]
        assert len(own) == shards.tokens < length / processes + 2
        for place, tokens in shards.pieces(rank):
            assert torch.equal(own[place], whole[0, tokens, 0])
            found[tokens] += 1
    assert torch.equal(found, torch.ones_like(found))


CASES = {family: (family, lambda model: model) for family in TASK_OF if family != "deberta-v2"} | {
    "lora": ("bert", with_lora),
    "recomputed": ("llama", with_recomputing),
    "recomputed, with a bias": ("t5", with_recomputing),
}
PLANS = {"two rings": {"variant": "ring", "ring_size": 2}, "encoder alone": {"encoder.self": "ring"}}
"""Of cases that are not for all families; else ``ring``."""
CASES |= {"two rings": ("gpt2", lambda model: model), "encoder alone": ("bart", lambda model: model)}
FEW = {2: ("bert", "t5", "recomputed", "encoder alone"), 4: ("roberta", "modernbert", "lora", "two rings")}
ALL = {2: tuple(case for case in CASES if case != "two rings"), 4: tuple(CASES)}


def update(case, *, ring=True, sharded=False):
    """What an update of four examples and one of a single one change, and how the model answers then."""
    family, alter = CASES[case]
    task, _, features = make_task(TASK_OF[family], family)
    model = make_model(family, task.auto_class, dropout=False, initializer_range=0.2, **task.model_kwargs())
    if ring:
        swap(model, PLANS.get(case, "ring"))
    trainee = make_trainee(task, alter(model), optim="sgd", learning_rate=1.0, max_grad_norm=0.1, sharded=sharded)
    before, batching = flat(trainee.bare_model), Batching(4, seed=1, micro_batch_size=3)
    plan = _updates(trainee, epochs(features.select(range(5)), batching, step=0), batching, start=0, stop=2)
    made = [run_update(trainee, micro, features, step=step) for step, (*_, micro) in enumerate(plan)]
    found = {name: [getattr(one, name) for one in made] for name in ("loss", "grad_norm", "tokens")}
    found["change"] = flat(trainee.bare_model) - before
    if trainee.accelerator.is_main_process and not sharded:  # alone: in eval mode no process waits for another
        found["answers"] = run(trainee.bare_model, torch.arange(5, 29)[None], torch.ones(1, 24).long())[0]
    return found


def updates(cases):
    found = {case: update(case) for case in cases}
    dist.barrier()
    return found


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [*FEW.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in ALL.items())],
)
def test_the_update_is_that_of_one_process(world_size, cases):
    results = together(world_size, updates, cases)
    for case in cases:
        whole = update(case, ring=False)
        assert whole["change"].norm() > 1e-3, case
        for found in results:
            assert_same(found[case], whole)
        torch.testing.assert_close(results[0][case]["answers"], whole["answers"], rtol=0, atol=1e-5)


def sharded_updates(cases):
    return {case: update(case, sharded=True) for case in cases}


@pytest.mark.slow
def test_weights_can_be_in_parts_too():
    """And the gathering of weights waits for no token."""
    cases = ("bert", "llama", "recomputed, with a bias")
    for found in together(2, sharded_updates, cases):
        for case in cases:
            assert_same(found[case], update(case, ring=False))


def growth(length):
    """Bytes by which a forward and a backward pass over a long text let this process grow."""
    dist.init_process_group("gloo")
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
    model = make_model("bert", AutoModel, max_position_embeddings=length, **sizes)
    install(model, Plan.model_validate("ring"))
    connect(model)
    ids = torch.randint(5, 300, (1, length), generator=torch.Generator().manual_seed(0))
    before = resident("VmRSS")
    model.train()(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.square().sum().backward()
    dist.barrier()
    return resident("VmHWM") - before


def resident(which):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


@pytest.mark.slow
def test_each_process_needs_its_part_of_the_memory():
    (alone,) = together(1, growth, 4096)
    for world_size in (2, 4):
        assert max(together(world_size, growth, 4096)) <= (1 / world_size + 0.15) * alone
