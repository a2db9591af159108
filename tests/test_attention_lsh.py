"""Attention by hashes, held to the same attention written out pair by pair; what its clusters may not depend on."""

import itertools

import pytest
import torch
from attention_samples import make, make_mask, make_tensors, swap
from tiny_families import make_model
from torch.autograd import gradcheck
from transformers import AutoModel, AutoModelForCausalLM
from transformers.masking_utils import causal_mask_function

from attention.masks import LazyMask
from attention.options import Plan
from attention.reference import attention_weights, dense_attention
from attention.scoring import Scoring
from attention.seam import install
from attention.variants import lsh
from attention.variants.lsh import BLOCK, directions
from heedful import UserError

SETTINGS = [
    {"cluster_size": 16, "rounds": 3, "buckets": 8},
    {"cluster_size": 5, "rounds": 2, "buckets": 2},
    {"cluster_size": 9, "rounds": 4},
    {"cluster_size": 125, "rounds": 2, "buckets": 4},
]
"""The last of them has clusters that hold every real token of ``make_mask``."""


def make_variant(settings, *, causal, layer=1):
    return make("lsh", settings, role="decoder.self" if causal else "encoder.self", layer=layer)


def make_real(queries=150):
    """Padding at the end, at the start, and in the middle."""
    real = torch.ones(3, queries, dtype=torch.bool)
    real[0, -30:], real[1, :20], real[2, 40:55] = False, False, False
    return real


def mask_of(real, *, causal):
    rows, tokens = real.shape
    rule = {"mask_function": causal_mask_function} if causal else {}
    return LazyMask(batch_size=rows, q_length=tokens, kv_length=tokens, attention_mask=real, **rule)


@torch.no_grad()
def seen_pairs(variant, query, key, real, *, causal):
    """BHNN, token by token: its block and the clusters of what comes before, or the clusters of all."""
    options, seen = variant.options, torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
    half = directions(variant.seed, options.rounds, query.shape[-1], options.buckets // 2)
    along_RDE = torch.cat([half, -half], dim=-1).to(query.dtype)
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
        tokens = real[b].nonzero().flatten()
        size = BLOCK * options.cluster_size if causal else len(tokens)
        for place, token in enumerate(tokens.tolist()):
            start = place // size * size
            before = tokens[:start] if causal else tokens
            if causal:
                seen[b, h, token, tokens[start : place + 1]] = True
            for along_DE in along_RDE if len(before) else ():
                bucket = (query[b, h, token] @ along_DE).argmax()
                heights = key[b, h // (query.shape[1] // key.shape[1]), before] @ along_DE[:, bucket]
                furthest = heights.topk(min(options.cluster_size, len(before))).indices
                seen[b, h, token, before[furthest]] = True
    return seen


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_each_query_attends_to_the_union_of_its_clusters(causal, settings):
    """And so to no pair twice, however many rounds it meets in."""
    variant, real, tensors = make_variant(settings, causal=causal), make_real(), make_tensors(rows=3)
    ours = variant(*tensors, mask_of(real, causal=causal), Scoring(0.3))
    theirs = dense_attention(*tensors, seen_pairs(variant, *tensors[:2], real, causal=causal), Scoring(0.3))
    matters = real[:, None, :, None]
    torch.testing.assert_close(ours * matters, theirs * matters, rtol=0, atol=1e-12)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * matters
    for a, b in zip(*(torch.autograd.grad(out, tensors, grad) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert ours.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_backward_pass_is_the_derivative(causal):
    variant = make_variant({"cluster_size": 2, "rounds": 2, "buckets": 4}, causal=causal)
    tensors, mask = make_tensors(1, queries=12, keys=12, width=3), make_mask(1, 12, 12, causal=causal, padding=False)
    assert gradcheck(lambda q, k, v: variant(q, k, v, mask, Scoring(0.3)), tensors)


def test_one_cluster_that_holds_all_real_tokens_is_full_attention():
    """Of 150 tokens 120 and 130 are real: their cluster is filled by them, not by padding."""
    variant, tensors, mask = make_variant({"cluster_size": 130}, causal=False), make_tensors(), make_mask()
    expected = dense_attention(*tensors, mask.table(torch.device("cpu")), Scoring(0.3))
    torch.testing.assert_close(variant(*tensors, mask, Scoring(0.3)), expected, rtol=0, atol=1e-12)


def test_what_is_near_is_found():
    """Each query has one key that it is made for, among 400: of a tenth of the keys it sees that one nearly always."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 400, 32, generator=generator) for _ in range(2))
    places = torch.randperm(400, generator=generator)
    key = (0.3 * key).index_add_(2, places, query)
    variant, mask = make_variant({"cluster_size": 14}, causal=False), make_mask(1, 400, 400, padding=False)
    seen = variant(query, key, torch.eye(400)[None, None], mask, Scoring(0.3))[0, 0] > 0
    assert float(seen.double().mean()) < 0.13
    assert float(seen[torch.arange(400), places].double().mean()) > 0.9


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_is_the_same_alone_and_beside_longer_ones(causal):
    settings, real = {"cluster_size": 8, "rounds": 3, "buckets": 8}, make_real()
    variant, tensors = make_variant(settings, causal=causal), make_tensors(rows=3)
    together = variant(*tensors, mask_of(real, causal=causal), Scoring(0.3))
    for row in range(3):
        own = [tensor[row : row + 1, :, real[row]] for tensor in tensors]
        alone = variant(
            *own, mask_of(torch.ones(1, int(real[row].sum()), dtype=torch.bool), causal=causal), Scoring(0.3)
        )
        torch.testing.assert_close(together[row : row + 1, :, real[row]], alone, rtol=0, atol=1e-12)


def test_the_future_changes_nothing_whatever_it_is():
    """Not even which keys are in a cluster, nor where the text ends."""
    variant, tensors = make_variant({"cluster_size": 4, "rounds": 3, "buckets": 4}, causal=True), make_tensors(rows=1)
    whole = variant(*tensors, make_mask(1, causal=True, padding=False), Scoring(0.3))
    for end in (33, 90, 149):
        changed = [torch.cat([x[:, :, :end], 5 * x[:, :, end:].flip(2)], dim=2) for x in tensors]
        after = variant(*changed, make_mask(1, causal=True, padding=False), Scoring(0.3))
        torch.testing.assert_close(after[:, :, :end], whole[:, :, :end], rtol=0, atol=1e-14)
        short = variant(
            *(x[:, :, :end] for x in tensors), make_mask(1, end, end, causal=True, padding=False), Scoring(0.3)
        )
        torch.testing.assert_close(short, whole[:, :, :end], rtol=0, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_takes_each_pair_as_a_whole(causal):
    """Also one that meets in several rounds: of values that are the tokens themselves come out the weights."""
    variant = make_variant({"cluster_size": 8, "rounds": 3, "buckets": 4}, causal=causal)
    tensors, p = make_tensors(rows=1, queries=130, keys=130), 0.25
    real, mask = torch.ones(1, 130, dtype=torch.bool), make_mask(1, 130, 130, causal=causal, padding=False)
    weights = attention_weights(*tensors[:2], seen_pairs(variant, *tensors[:2], real, causal=causal), Scoring(0.3))
    eye = torch.eye(130, dtype=torch.float64).expand(1, 2, 130, 130)
    torch.manual_seed(5)
    out = variant(*tensors[:2], eye, mask, Scoring(0.3, dropout=p))
    kept, seen = out.detach() != 0, weights.detach() > 0
    torch.testing.assert_close(out, weights * kept / (1 - p), rtol=0, atol=1e-12)
    assert float(kept[seen].double().mean()) == pytest.approx(1 - p, abs=0.015)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(r, tensors[:2], grad) for r in (out, weights * kept / (1 - p))), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    torch.manual_seed(5)
    assert torch.equal(variant(*tensors[:2], eye, mask, Scoring(0.3, dropout=p)), out)
    assert not torch.equal(variant(*tensors[:2], eye, mask, Scoring(0.3, dropout=p)), out)


@pytest.mark.parametrize("causal", [False, True])
def test_small_tables_that_are_kept_give_what_those_made_again_give(causal, monkeypatch):
    variant, tensors = make_variant(SETTINGS[1], causal=causal), make_tensors(rows=3, groups=2)
    mask, found = mask_of(make_real(), causal=causal), []
    for kept in (0, 10**9):
        monkeypatch.setattr(lsh, "KEPT", kept)
        torch.manual_seed(0)
        out = variant(*tensors, mask, Scoring(0.3, dropout=0.25))
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert all(torch.equal(again, kept) for again, kept in zip(*found, strict=True))


def test_directions_follow_from_the_seed_and_the_layer():
    tensors, mask = make_tensors(), make_mask()

    def attend(layer, seed):
        settings = {"cluster_size": 8, "seed": seed}
        torch.manual_seed(layer + seed)  # which they must not hang on
        variant = make_variant(settings, causal=False, layer=layer)
        assert not variant.state_dict()
        return variant(*tensors, mask, Scoring(0.3))

    first = attend(0, 0)
    assert torch.equal(attend(0, 0), first)
    assert not torch.equal(attend(1, 0), first)
    assert not torch.equal(attend(0, 1), first)
    torch.testing.assert_close(directions((0, 0), 2, 8, 4).norm(dim=1), torch.ones(2, 4, dtype=torch.float64))


def test_a_token_that_is_decoded_sees_all_of_the_cache():
    variant, tensors = make_variant({"cluster_size": 4, "rounds": 1}, causal=True), make_tensors(queries=40, keys=150)
    mask = make_mask(queries=40, keys=150, causal=True)
    expected = dense_attention(*tensors, mask.table(torch.device("cpu")), Scoring(0.3))
    torch.testing.assert_close(variant(*tensors, mask, Scoring(0.3)), expected, rtol=0, atol=1e-12)


def test_a_static_cache_gives_the_same_answers():
    """Its places for tokens to come are no keys."""
    model = make_model("llama", AutoModelForCausalLM)
    swap(model, {"variant": "lsh", "cluster_size": 2, "rounds": 1, "buckets": 2})
    ids = torch.arange(5, 45)[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "disable_compile": True}
    static, growing = (model.generate(ids, **settings, cache_implementation=kind).logits for kind in ("static", None))
    for one, other in zip(static, growing, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_what_the_models_own_mask_hides_no_cluster_shows(causal):
    """As of a window of Mistral's, or of texts in one pack."""

    def near(row, head, query, key):
        return ((query - key).abs() < 40 + 5 * row) & ((key <= query) | (not causal))

    variant, real, tensors = make_variant(SETTINGS[0], causal=causal), make_real(), make_tensors(rows=3)
    mask = LazyMask(batch_size=3, q_length=150, kv_length=150, mask_function=near, attention_mask=real)
    ours = variant(*tensors, mask, Scoring(0.3))
    seen = seen_pairs(variant, *tensors[:2], real, causal=causal) & mask.table(torch.device("cpu"))
    matters = real[:, None, :, None]
    theirs = dense_attention(*tensors, seen, Scoring(0.3))
    torch.testing.assert_close(ours * matters, theirs * matters, rtol=0, atol=1e-12)


def test_a_mask_answers_for_pairs_as_its_table_does():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(0, 150, (3, 2, 5, size), generator=generator) for size in (4, 6))
    rows = torch.arange(3)[:, None, None, None, None]
    for real, causal in itertools.product((make_real(), torch.ones(3, 150, dtype=torch.bool)), (False, True)):
        mask = mask_of(real, causal=causal)
        pairs, table = mask.pairs(queries, keys, below_diagonal=False), mask.table(torch.device("cpu"))
        assert (pairs is None) == (table is None)
        if table is not None:
            expected = table.expand(3, 1, 150, 150)[rows, 0, queries[..., None], keys[..., None, :]]
            assert torch.equal(pairs.expand_as(expected), expected)
    before = mask_of(make_real(), causal=True).pairs(140 + 0 * queries, keys.clamp(max=139), below_diagonal=True)
    assert torch.equal(before, make_real()[rows, keys.clamp(max=139)[..., None, :]])


@pytest.mark.parametrize(("family", "asked"), [("t5", "adds a bias to its scores"), ("gemma2", "caps its scores")])
def test_a_model_that_asks_for_more_than_hashes_know_is_refused(family, asked):
    model = make_model(family, AutoModel)
    for values in ({"variant": "lsh"}, {"decoder.self": "lsh"}):
        with pytest.raises(UserError, match=rf"lsh at .*self\[0\], which {asked}") as refused:
            install(model, Plan.model_validate(values))
        assert "blockwise" in refused.value.expected
        assert "lsh" not in refused.value.expected
    assert not hasattr(model.config, "attention_plan")
