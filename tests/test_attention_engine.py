"""The tiled engine and the patterns over it, held to attention written out."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from attention_samples import (
    NEUTRAL,
    PATTERNS,
    Largest,
    counted_pairs,
    each_sample,
    make,
    make_mask,
    make_tensors,
    stir,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from attention.dropout import LEVELS, draw_keep
from attention.engine import Visit, ranges, tiled_attention
from attention.masks import LazyMask
from attention.pattern import Extent, seen_pairs
from attention.pieces import merged, without
from attention.reference import attention_weights, dense_attention
from attention.scoring import Scoring
from attention.variant import read_weights

CPU = torch.device("cpu")
EXACT = {torch.float64: (1e-12, 1e-11), torch.float32: (5e-6, 1e-5)}


def make_bias(kind, heads=4, queries=150, keys=150, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = {"none": None, "vector": (heads, queries + keys - 1), "table": (1, heads, queries, keys)}
    shape = shapes[kind]
    return None if shape is None else torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def compare(variant, tensors, mask, scoring):
    """Largest differences of output and gradients from attention written out."""
    out = variant(*tensors, mask, scoring)
    expected = dense_attention(*tensors, seen_pairs(variant.pattern, mask, CPU), scoring)
    inputs = [*tensors, *([scoring.bias] if scoring.bias is not None else [])]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    ours, theirs = (torch.autograd.grad(result, inputs, grad) for result in (out, expected))
    return (out - expected).abs().max(), max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("name", "settings"), PATTERNS)
def test_every_pattern_is_attention_over_its_pairs(name, settings, dtype, monkeypatch):
    if dtype == torch.float64:  # several tiles to each row of queries, where blockwise has but one of them
        monkeypatch.setattr("attention.pattern.tile_side", lambda tables: 32)
    variant = make(name, settings)
    kinds = itertools.product((False, True), (150, 200), ("none", "vector", "table"), (None, 2.0))
    for causal, keys, kind, cap in kinds:
        scoring = Scoring(0.3, bias=make_bias(kind, keys=keys, dtype=dtype), softcap=cap)
        mask = make_mask(keys=keys, causal=causal)
        forward, backward = compare(variant, make_tensors(keys=keys, dtype=dtype), mask, scoring)
        assert forward <= EXACT[dtype][0], (causal, keys, kind, cap)
        assert backward <= EXACT[dtype][1], (causal, keys, kind, cap)


def in_blocks(i, j, *, size, around, first, drawn):
    q, k = i // size, j // size
    return abs(q - k) <= around or q < first or k < first or k in drawn[q]


def draws(seed, layer, *, blocks, count):
    return [set(np.random.default_rng([seed, layer, b]).choice(blocks, count, replace=False)) for b in range(blocks)]


SEEN = [
    ("strided", {"stride": 16}, 0, lambda i, j: abs(i - j) < 16 or abs(i - j) in (16, 32, 48, 64, 80)),
    *(
        (
            "local_global",
            {"reach": 9, "global_every": 3},
            layer,
            lambda i, j, layer=layer: layer in (2, 5) or abs(i - j) <= 9,
        )
        for layer in range(6)
    ),
    *(
        (
            "block_sparse",
            {"block_size": 8, "window_blocks": 5, "global_blocks": 1, "random_blocks": 2, "seed": seed},
            layer,
            partial(in_blocks, size=8, around=2, first=1, drawn=draws(seed, layer, blocks=12, count=2)),
        )
        for seed, layer in ((0, 0), (0, 1), (7, 1))
    ),
]
"""Variants at a layer, and which pairs of 96 tokens their pages say count, without a word of theirs."""


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize(("name", "settings", "layer", "seen"), SEEN)
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_that_are_written_out(name, settings, layer, seen, causal, tiled):
    variant = make(name, settings, layer=layer, positions=96, tiled=tiled)
    query, key, _ = make_tensors(rows=1, queries=96, keys=96)
    weights = read_weights(variant, query, key, make_mask(1, 96, 96, causal=causal, padding=False), Scoring(0.3))
    expected = torch.tensor([[seen(i, j) and (j <= i or not causal) for j in range(96)] for i in range(96)])
    assert torch.equal(weights > 0, expected.expand_as(weights))


def test_what_blocks_see_at_random_follows_from_seed_and_layer():
    def table(seed, layer):
        pattern = make("block_sparse", {"block_size": 8, "seed": seed}, layer=layer, positions=96).pattern
        return counted_pairs(pattern, 96)

    assert torch.equal(table(0, 0), table(0, 0))
    assert not torch.equal(table(0, 0), table(0, 1))
    assert not torch.equal(table(0, 0), table(1, 0))


@given(
    sample=st.sampled_from(PATTERNS),
    queries=st.integers(1, 90),
    cached=st.integers(0, 60),
    causal=st.booleans(),
    tile=st.sampled_from([16, 64, 512]),
)
def test_a_schedule_holds_each_pair_that_counts_once(sample, queries, cached, causal, tile):
    pattern, keys = make(*sample).pattern, queries + cached
    held = torch.zeros(queries, keys, dtype=torch.int64)
    for visit in pattern.visits(Extent(queries, keys, cached, causal, tile)):
        rows = torch.arange(queries)[visit.queries]
        for piece in visit.keys:
            columns = torch.arange(keys)[piece]
            seen = torch.ones(len(rows), len(columns), dtype=torch.bool)
            if visit.sees is not None:
                seen = visit.sees(rows[:, None] + cached, columns[None, :])
            held[rows[:, None], columns[None, :]] += seen
    rows, columns = torch.arange(queries)[:, None] + cached, torch.arange(keys)[None, :]
    counts = counted_pairs(pattern, keys, queries)
    if causal:  # what is ahead of a query is masked in any case
        counts, held = counts & (columns <= rows), held * (columns <= rows)
    assert torch.equal(held, counts.long())


@pytest.mark.parametrize(("name", "settings"), PATTERNS)
def test_short_texts_go_through_torchs_kernel_with_the_same_result(name, settings):
    tensors, mask = make_tensors(), make_mask(causal=True)
    short, tiled = (make(name, settings, tiled=tiled)(*tensors, mask, Scoring(0.3)) for tiled in (False, True))
    torch.testing.assert_close(short, tiled, rtol=0, atol=1e-12)
    for grads in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (short, tiled)), strict=True):
        torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_where_no_table_is_needed_torchs_kernel_takes_long_texts(causal, monkeypatch):
    monkeypatch.setattr("attention.tiled.tiles", None)
    tensors, mask = make_tensors(1, queries=1100, keys=1100), make_mask(1, 1100, 1100, causal=causal, padding=False)
    with Largest() as largest:
        out = make("blockwise", {}, tiled=False)(*tensors, mask, Scoring(0.3))
    assert largest.elements < 1100 * 1100
    assert (out - dense_attention(*tensors, mask.table(CPU), Scoring(0.3))).abs().max() <= 1e-12


@pytest.mark.parametrize("queries", [1, 150])
def test_behind_a_cache_long_texts_are_seen_up_to_the_query(queries):
    """torch's kernel would put the corner of its triangle at the first key."""
    tensors = make_tensors(1, queries=queries, keys=1100)
    mask = make_mask(1, queries, 1100, causal=True, padding=False)
    out = make("blockwise", {}, tiled=False)(*tensors, mask, Scoring(0.3))
    assert (out - dense_attention(*tensors, mask.table(CPU), Scoring(0.3))).abs().max() <= 1e-12


def test_the_backward_pass_is_the_derivative():
    tensors = make_tensors(rows=1, queries=7, keys=9, width=3)
    mask, visits = make_mask(1, 7, 9, causal=True, padding=False), [Visit(slice(0, 7), (slice(0, 4), slice(4, 9)))]
    bias = make_bias("vector", queries=7, keys=9)

    def attend(q, k, v, b):
        return tiled_attention(q, k, v, mask, visits, Scoring(0.5, bias=b, softcap=3.0))

    assert gradcheck(attend, (*tensors, bias))
    (first,) = torch.autograd.grad(attend(*tensors, bias).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # said, not wrong
        first.sum().backward()


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    tensors, real = make_tensors(rows=1, queries=70, keys=70), torch.ones(1, 70, dtype=torch.bool)
    real[:, :10] = False  # so that the first queries, which look back only, see padding alone
    mask = LazyMask(batch_size=1, q_length=70, kv_length=70, mask_function=causal_mask_function, attention_mask=real)
    for tiled in (True, False):
        out = make("blockwise", {}, tiled=tiled)(*tensors, mask, Scoring(0.3))
        assert (out[:, :, :10] == 0).all()
        query, key, value = torch.autograd.grad(out.sum(), tensors)
        assert (query[:, :, :10] == 0).all()
        assert (key[:, :, :10] == 0).all()
        assert all(grad.isfinite().all() for grad in (query, key, value))


@pytest.mark.parametrize("name", ["blockwise", "sliding_window"])
def test_dropout_drops_the_weights_it_says_and_the_same_ones_in_both_passes(name):
    tensors, mask = make_tensors(rows=1, queries=130, keys=130), make_mask(1, 130, 130, padding=False)
    variant, p = make(name, {"reach": 30} if name == "sliding_window" else {}), 0.25
    weights = attention_weights(*tensors[:2], seen_pairs(variant.pattern, mask, CPU), Scoring(0.3))
    eye = torch.eye(130, dtype=torch.float64).expand(1, 2, 130, 130)  # of which the weights themselves come out
    torch.manual_seed(5)
    out = variant(*tensors[:2], eye, mask, Scoring(0.3, dropout=p))
    kept = out.detach() != 0
    seen = weights.detach() > 0
    torch.testing.assert_close(out, weights * kept / (1 - p), rtol=0, atol=1e-12)
    assert float(kept[seen].double().mean()) == pytest.approx(1 - p, abs=0.01)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(r, tensors[:2], grad) for r in (out, weights * kept / (1 - p)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    torch.manual_seed(5)
    assert torch.equal(variant(*tensors[:2], eye, mask, Scoring(0.3, dropout=p)), out)
    assert not torch.equal(variant(*tensors[:2], eye, mask, Scoring(0.3, dropout=p)), out)


def test_dropout_is_drawn_with_the_share_it_is_given():
    keep = draw_keep((400, 1001), LEVELS // 10, torch.Generator().manual_seed(0))
    assert keep.shape == (400, 1001)
    assert float(keep.double().mean()) == pytest.approx(0.9, abs=0.002)


def test_autocast_does_not_take_products_back_to_half_precision():
    half, mask = [t.detach().bfloat16().requires_grad_() for t in make_tensors()], make_mask(causal=True)
    ours = make("blockwise", {})(*half, mask, Scoring(0.3))
    assert ours.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = make("blockwise", {})(*half, mask, Scoring(0.3))
    assert torch.equal(again, ours)
    ours.sum().backward()
    assert half[0].grad.dtype == torch.bfloat16


def distances(attend, exact, tensors, parameters=((), ())):
    """Largest differences from fp64 of the output, of the gradients, and of those of parameters, by their own size."""
    learned = []
    for run, leaves, own in ((attend, tensors, parameters[0]), (exact, [t.double() for t in tensors], parameters[1])):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = run(*leaves).double() * REAL
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        learned.append([out.detach(), *torch.autograd.grad((out * grad).sum(), [*leaves, *own])])
    off = [float((a.double() - b).abs().max()) for a, b in zip(*learned, strict=True)]
    off[4:] = [d / max(1.0, float(b.abs().max())) for d, b in zip(off[4:], learned[1][4:], strict=True)]
    return off[0], max(off[1:4]), max(off[4:], default=0.0)


REAL = torch.ones(2, 1, 150, 1, dtype=torch.bool)
REAL[0, :, -30:], REAL[1, :, :20] = False, False
CLOSE = [(name, settings) for name, settings in each_sample() if name != "full"]
CLOSE += [(name, settings) for name, settings in NEUTRAL.items() if settings and None not in settings.values()]
CLOSE += [("blockwise", {}), ("linformer", {"k": 160})]


@pytest.mark.parametrize(("name", "settings"), CLOSE, ids=str)
def test_each_type_is_as_exact_as_it_can_be(name, settings):
    """fp32 by its bars, bf16 at most twice as far off as torch's kernel over the same pairs."""
    variant, mask = make(name, settings, positions=160), make_mask()
    variant = stir(variant) if name in ("additive", "adaptive_span") else variant  # which begin with nothing to round
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [tensor.detach().to(dtype) for tensor in make_tensors()]
        low = copy.deepcopy(variant).to(dtype)
        high = copy.deepcopy(low).double()
        both = list(low.parameters()), list(high.parameters())
        ours = distances(*(partial(v, mask=mask, scoring=Scoring(0.3)) for v in (low, high)), tensors, both)
        if dtype == torch.float32:
            assert ours[0] <= EXACT[dtype][0]
            assert max(ours[1:]) <= EXACT[dtype][1]
            continue
        pairs = mask.table(CPU).expand(2, 4, 150, 150)
        if hasattr(high, "weights"):
            pairs = high.weights(*(t.double() for t in tensors[:2]), mask, Scoring(0.3)).detach() > 0
        kernel = partial(scaled_dot_product_attention, attn_mask=pairs | ~REAL, scale=0.3, enable_gqa=True)
        theirs = distances(kernel, kernel, tensors)
        assert ours[0] <= 2 * theirs[0]
        assert ours[1] <= 2 * theirs[1]
        assert ours[2] <= 2e-2


def test_a_mask_answers_for_a_tile_as_its_table_does():
    for rule, offset in itertools.product((bidirectional_mask_function, causal_mask_function, _odd), (0, 6)):
        real = torch.ones(2, 30, dtype=torch.bool)
        real[1, 25:] = False
        mask = LazyMask(
            batch_size=2,
            q_length=30 - offset,
            kv_length=30,
            q_offset=offset,
            mask_function=rule,
            attention_mask=real,
            allow_is_causal_skip=False,
        )
        rows, columns = torch.arange(3, 11), torch.arange(2, 27, 3)
        tile = mask.tile(rows, columns, below_diagonal=False).expand(2, 1, len(rows), len(columns))
        assert torch.equal(tile, mask.dense().expand(2, 1, -1, -1)[:, :, rows][..., columns])


def _odd(row, head, query, key):
    """A rule that transformers does not name, as of packed texts."""
    return (query // 7 == key // 7) & (row >= 0)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=6), st.integers(0, 50))
def test_pieces_hold_the_same_indices(pairs, length):
    pieces = merged(slice(start, start + size) for start, size in pairs)
    held = {i for start, size in pairs for i in range(start, start + size)}
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == sorted(held)
    rest = [i for piece in without(slice(0, length), pieces) for i in range(piece.start, piece.stop)]
    assert rest == sorted(set(range(length)) - held)
    assert [i for piece in ranges(length, 7) for i in range(piece.start, piece.stop)] == list(range(length))
