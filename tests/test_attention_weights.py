"""A variant's table of weights is the one that it attends with, and its count of pairs that of its pattern."""

import dataclasses

import pytest
import torch
from attention_samples import NO_PATTERN, counted_pairs, each_sample, make, make_mask, make_tensors, stir
from tiny_families import DECODERS, SEQ2SEQ, make_model
from transformers import AutoModel

from attention.options import Plan
from attention.pattern import Extent, tile_side
from attention.scoring import Scoring
from attention.seam import install, recorded, sites_of
from attention.variant import Work
from attention.variants import additive, lsh

PLANS = {
    "none": None,
    "full": "full beside another",
    "blockwise": "blockwise",
    "sliding_window": {"variant": "sliding_window", "reach": 3},
}
NO_TABLE = ("linformer",)


def run(family, plan, *, tiled):
    """A model, and its calls with a text of 24 tokens, of an encoder-decoder with 11 in its decoder."""
    model, ids = make_model(family, AutoModel), torch.arange(5, 29)[None]
    if plan == "full beside another":  # a plan of full alone would put nothing in
        plan = {"encoder.self[0]" if family == "bert" else "decoder.self[0]": "blockwise"}
    if plan is not None:
        install(model, Plan.model_validate(plan))
    for module in model.modules():
        if tiled and hasattr(module, "pattern"):
            module.pattern = dataclasses.replace(module.pattern, sdpa_below=0)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :11]} if family in SEQ2SEQ else {})
    with torch.no_grad(), recorded(model) as calls:
        model(**inputs)
    return model, calls


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "kernel"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", ["bert", "llama", "gemma2", "t5", "bart"])
def test_weights_are_those_that_ran(family, plan, tiled):
    model, calls = run(family, plan, tiled=tiled)
    sites = {site.module: site for site in sites_of(model, calls)}
    assert len(calls) == len(sites) == (3 if family in SEQ2SEQ else 2)
    for call in calls:
        weights = call.variant.weights(call.query, call.key, call.mask, call.scoring)
        value = call.value.repeat_interleave(weights.shape[1] // call.value.shape[1], dim=1)
        torch.testing.assert_close(weights @ value, call.output, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]), rtol=0, atol=1e-6)
        role = sites[call.module].role
        if role == "decoder.self":
            assert torch.equal(weights, weights.tril())
        expected = {"encoder.self": (24, 24), "decoder.self": (11, 11), "cross": (11, 24)}
        assert tuple(weights.shape[2:]) == ((24, 24) if family in DECODERS else expected[role])


def test_a_model_without_a_plan_is_as_before_once_it_was_recorded():
    model, before = make_model("t5", AutoModel), make_model("t5", AutoModel)
    inputs = {"input_ids": torch.arange(5, 29)[None], "decoder_input_ids": torch.arange(5, 11)[None]}
    with torch.no_grad():
        with recorded(model):
            model(**inputs)
        assert torch.equal(model(**inputs)[0], before(**inputs)[0])
    assert model.config.to_dict() == before.config.to_dict()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "settings"), [s for s in each_sample() if s[0] not in NO_PATTERN])
def test_work_is_what_the_tiles_hold(name, settings, causal):
    variant, length = make(name, settings), 333
    work = variant.work(length, heads=2, causal=causal)
    scored = torch.zeros(length, length, dtype=torch.int64)
    for visit in variant.pattern.visits(Extent(length, length, 0, causal, tile_side(2))):
        for keys in visit.keys:
            scored[visit.queries, keys] += 1
    seen = counted_pairs(variant.pattern, length)
    assert work.scored == int(scored.sum())
    assert work.seen == int((seen.tril() if causal else seen).sum())


def test_full_attention_works_on_every_pair():
    assert make("full", {}).work(6, 2, causal=False) == Work(36, 36)
    assert make("full", {}).work(6, 2, causal=True) == Work(21, 21)


def test_linformer_works_on_slots():
    for length, pairs in ((333, 333 * 16), (9, 81)):
        work = make("linformer", {"k": 16}).work(length, 2, causal=False)
        assert (work.scored, work.seen) == (pairs, pairs)
        assert "a query and a slot" in work.unit


def test_additive_works_on_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(additive, "BLOCK", 4 * 8 * 333 * 100)  # of heads, width and keys: 100 queries at a time
    variant = make("additive", {})
    for causal, scored, seen in ((False, 333**2, 333**2), (True, 100 * (100 + 200 + 300) + 33 * 333, 333 * 334 // 2)):
        work = variant.work(333, 4, causal=causal)
        assert (work.scored, work.seen) == (scored, seen)
        assert "8 values of tanh" in work.unit


@pytest.mark.parametrize("length", [333, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_lsh_works_on_what_its_rounds_score(causal, length, monkeypatch):
    scored, part = [], lsh.Block.part
    monkeypatch.setattr(
        lsh.Block,
        "part",
        lambda own, chunks, keys, *rest: (
            scored.append(own.query.shape[2] * keys.shape[-1]) or part(own, chunks, keys, *rest)
        ),
    )
    role = "decoder.self" if causal else "encoder.self"
    variant = make("lsh", {"cluster_size": 16, "rounds": 3, "buckets": 8}, role=role)
    query, key, _ = make_tensors(rows=1, heads=1, groups=1, queries=length, keys=length)
    with torch.no_grad():
        weights = variant.weights(query, key, make_mask(1, length, length, causal=causal, padding=False), Scoring(0.4))
    work = variant.work(length, 1, causal=causal)
    assert int((weights > 0).sum()) <= work.seen <= work.scored
    if length > 16 * (lsh.BLOCK if causal else 1):
        assert work.scored == sum(scored)
        assert "every round" in work.unit
    else:
        assert work == make("blockwise", {}).work(length, 1, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "settings"), [s for s in each_sample() if s[0] not in NO_TABLE])
@torch.no_grad()
def test_weights_are_those_of_a_padded_batch(name, settings, causal):
    variant, mask = stir(make(name, settings)).double(), make_mask(causal=causal)
    groups = 1 if name == "full" else 2  # which goes by its module's, and here has none
    query, key, value = make_tensors(groups=groups)
    scoring = Scoring(0.4)
    weights = variant.weights(query, key, mask, scoring)
    assert weights.shape == (2, 4, 150, 150)
    assert bool((weights >= 0).all())
    real = torch.ones(2, 150, dtype=torch.bool)
    real[0, -30:], real[1, :20] = False, False
    taken = value.view(2, settings["kv_heads"], -1, 150, 8).mean(2) if name == "grouped_query" else value
    out = weights @ taken.repeat_interleave(4 // taken.shape[1], dim=1)
    difference = (out - variant(query, key, value, mask, scoring)).transpose(1, 2)[real]
    assert float(difference.abs().max()) <= 1e-10
