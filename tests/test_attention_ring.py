"""Several processes that hold one text together do what one process does, to the last function and in the loop."""

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from attention_samples import make_mask, make_tensors, swap
from hypothesis import given
from hypothesis import strategies as st
from processes import together
from pydantic import ValidationError
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
from attention.sharing import connect, prove, ring_size
from attention.variants.ring import RingAttention, ring_attention
from heedful import UserError
from training.batches import Batching, epochs
from training.loop import run_update, updates

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
    "recomputed": ("qwen3", with_recomputing),
    "recomputed, with a bias": ("t5", with_recomputing),
}
PLANS = {"two rings": {"variant": "ring", "ring_size": 2}, "encoder alone": {"encoder.self": "ring"}}
"""Of cases that are not for all families; else ``ring``."""
CASES |= {"two rings": ("gpt2", lambda model: model), "encoder alone": ("bart", lambda model: model)}
FEW = {2: ("bert", "modernbert", "t5", "recomputed"), 4: ("roberta", "two rings")}
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
    plan = updates(trainee, epochs(features.select(range(5)), batching, step=0), batching, start=0, stop=2)
    made = [run_update(trainee, micro, features, step=step) for step, (*_, micro) in enumerate(plan)]
    found = {name: [getattr(one, name) for one in made] for name in ("loss", "grad_norm", "tokens")}
    found["change"] = flat(trainee.bare_model) - before
    if trainee.accelerator.is_main_process and not sharded:  # alone: in eval mode no process waits for another
        found["answers"] = run(trainee.bare_model, torch.arange(5, 29)[None], torch.ones(1, 24).long())[0]
    return found


def made_updates(cases):
    found = {case: update(case) for case in cases}
    dist.barrier()
    return found


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [*FEW.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in ALL.items())],
)
def test_the_update_is_that_of_one_process(world_size, cases):
    results = together(world_size, made_updates, cases)
    for case in cases:
        whole = update(case, ring=False)
        assert whole["change"].norm() > 1e-3, case
        for found in results:
            assert_same(found[case], whole)
        torch.testing.assert_close(results[0][case]["answers"], whole["answers"], rtol=0, atol=1e-5)


def ring_model(family, plan="ring", **sizes):
    model = make_model(family, AutoModel, initializer_range=0.2, **sizes)
    install(model, Plan.model_validate(plan))
    return model


def test_one_process_makes_no_ring():
    model = ring_model("bert")
    assert connect(model) == ["ring: one process makes none, and trains on whole texts by blockwise attention"]
    assert ring_size(model) == 1
    assert connect(ring_model("bert", "blockwise")) == []


def test_processes_that_make_no_whole_rings_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="ring_size=2 with 3 processes"):
        connect(ring_model("bert", {"variant": "ring", "ring_size": 2}))
    with pytest.raises(ValidationError, match="one number"):
        Plan.model_validate({"encoder.self": "ring", "decoder.self": {"variant": "ring", "ring_size": 2}})
    sizes = [Plan.model_validate({"variant": "ring", "ring_size": size}).data_parallel_size(4) for size in (None, 2, 4)]
    assert [*sizes, Plan.model_validate("blockwise").data_parallel_size(4)] == [1, 2, 1, 4]


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("bart", {"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1 with ring attention"),
        ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 2}, "tokens in another order"),  # each called twice
    ],
)
def test_a_model_in_which_no_text_can_be_shared_out_is_refused(family, sizes, message):
    with pytest.raises(UserError, match=message):
        prove(ring_model(family, **sizes))


def test_a_model_whose_blocks_let_tokens_meet_elsewhere_is_refused():
    model = ring_model("bert")
    prove(model)
    model.encoder.layer[1].output.register_forward_hook(lambda module, args, out: out + out.roll(1, dims=1))
    with pytest.raises(UserError, match="BertModel answers differently"):
        prove(model)
    assert all(module.stretch is None for module in model.modules() if isinstance(module, RingAttention))


def test_a_stack_is_shared_out_as_a_whole():
    with pytest.raises(UserError, match=r"ring beside another attention at decoder.self\[0\]"):
        ring_model("llama", {"decoder.self[0]": "blockwise", "decoder.self": "ring"})
    ring_model("t5", {"encoder.self": "ring", "decoder.self": "strided", "cross": "blockwise"})


def test_more_keys_than_the_text_has_are_refused():
    tensors, mask = make_tensors(queries=8, keys=9), make_mask(queries=8, keys=8, padding=False)
    shards, length = Shards(Ring(((1, 0),)), 8), 8
    with pytest.raises(ValueError, match="ring has no cache"):
        ring_attention(*tensors, mask, Scoring(0.3), shards)
    bias = make_bias("vector", queries=4, keys=4)
    with pytest.raises(ValueError, match=f"for a text of {length} tokens"):
        ring_attention(*(x[:, :, :8] for x in tensors), mask, Scoring(0.3, bias=bias), shards)


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
    """Bytes by which a forward and a backward pass over a long text let this process grow, beyond one over a short."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
    model = ring_model("bert", max_position_embeddings=length, **sizes)
    connect(model)
    ids = torch.randint(5, 300, (1, length), generator=torch.Generator().manual_seed(0))
    model.train()
    for part in (ids[:, :64], ids):  # the first pass of a process loads kernels and starts threads, whatever the text
        before = resident("VmRSS")
        model(part, attention_mask=torch.ones_like(part)).last_hidden_state.square().sum().backward()
        dist.barrier()
    return resident("VmHWM") - before


def resident(which):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_process_needs_its_part_of_the_memory():
    (alone,) = together(1, growth, 4096)
    for world_size in (2, 4):
        assert max(together(world_size, growth, 4096)) <= (1 / world_size + 0.15) * alone
