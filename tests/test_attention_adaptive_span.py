"""Spans that are learned, held to the paper's formula written out; how z moves."""

import itertools

import pytest
import torch
from attention_samples import make, make_mask, make_tensors
from pydantic import ValidationError
from tiny_families import make_model
from transformers import AutoModel

from attention.bias import dense_bias
from attention.options import Plan
from attention.scoring import Scoring
from attention.seam import install
from heedful import UserError

SPANS = [0.001, 0.31, 0.56, 0.999]
"""With no pair on an end of a ramp, where the formula has two slopes."""


def make_variant(spans, *, max_span=60, ramp=7, dtype=torch.float64):
    variant = make("adaptive_span", {"max_span": max_span, "ramp": ramp}).to(dtype)
    with torch.no_grad():
        variant.span.copy_(torch.tensor(spans, dtype=dtype))
    return variant


def written_out(tensors, spans_H, mask, scoring, *, max_span=60, ramp=7):
    """Equations 3 and 4 of the paper, over the whole table."""
    query, key, value = tensors
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * scoring.scaling
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if scoring.bias is not None:
        scores = scores + dense_bias(scoring.bias, query.shape[2], key.shape[2])
    rows, columns = torch.arange(query.shape[2])[:, None] + mask.q_offset, torch.arange(key.shape[2])[None, :]
    soft = ((ramp + spans_H[:, None, None] * max_span - (rows - columns).abs()) / ramp).clamp(0, 1)
    weights = soft * (scores - scores.detach().amax(-1, keepdim=True)).exp()
    if (allowed := mask.table(query.device)) is not None:
        weights = weights * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ value


def make_bias(kind, keys):
    shape = {"none": None, "vector": (4, 149 + keys), "table": (1, 4, 150, keys)}[kind]
    generator = torch.Generator().manual_seed(1)
    return None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("causal", "keys"), itertools.product((False, True), (150, 200)))
def test_it_is_the_papers_formula_with_gradients_of_z(causal, keys):
    for kind, cap in itertools.product(("none", "vector", "table"), (None, 2.0)):
        variant, tensors = make_variant(SPANS), make_tensors(keys=keys)
        mask, scoring = make_mask(keys=keys, causal=causal), Scoring(0.3, bias=make_bias(kind, keys), softcap=cap)
        inputs = [*tensors, variant.span, *([] if scoring.bias is None else [scoring.bias])]
        ours, theirs = variant(*tensors, mask, scoring), written_out(tensors, variant.span, mask, scoring)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for a, b in zip(*(torch.autograd.grad(out, inputs, grad) for out in (ours, theirs)), strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert (variant.spans() == variant.span).all()


def test_z_stays_within_its_bounds_and_never_dies():
    span = torch.linspace(-2.5, 3.5, 241, dtype=torch.float64, requires_grad=True)
    variant = make_variant(SPANS)
    variant.span = torch.nn.Parameter(span.detach().clone())
    spans = variant.spans()
    assert (spans.detach().min(), spans.detach().max()) == (0, 1)
    (slopes,) = torch.autograd.grad(spans.sum(), variant.span)
    assert (slopes.abs() == 1).all()
    assert float((spans.diff().abs() - span.detach().diff()).abs().max()) < 1e-12, "it goes on without a jump"


@pytest.mark.parametrize("start", [0.0, 1.0, 1.3])
def test_a_span_is_found_from_either_end(start):
    """Of keys that are all alike and values that are positions the mean tells how far a head looks back."""
    query, key, value = make_tensors(rows=1, queries=70, keys=70)
    tensors = query.detach(), torch.zeros_like(key), torch.arange(70.0, dtype=torch.float64)[:, None].expand_as(value)
    mask = make_mask(1, 70, 70, causal=True, padding=False)
    with torch.no_grad():
        target = make_variant([0.5] * 4)(*tensors, mask, Scoring(0.3))
    variant = make_variant([start] * 4)
    optimizer = torch.optim.Adam(variant.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        (variant(*tensors, mask, Scoring(0.3)) - target).square().mean().backward()
        optimizer.step()
    assert float((variant.spans() - 0.5).abs().max()) < 0.05


def test_it_goes_no_further_than_its_widest_head():
    variant, mask = make_variant([0.1, 0.2, 0.0, 0.1], max_span=50), make_mask(1, 300, 300, padding=False)
    tensors = make_tensors(rows=1, queries=300, keys=300)  # reaching 7 + 10 - 1
    out = variant(*tensors, mask, Scoring(0.3))
    (grad,) = torch.autograd.grad(out[:, :, 150].sum(), tensors[1])
    reached = grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert (int(reached.min()), int(reached.max())) == (150 - 16, 150 + 16)


@pytest.mark.parametrize(("spans", "reach"), [([0.0] * 4, 6), ([0.1, 0.2, 0.0, 0.1], 16), ([1.0] * 4, 56)])
def test_only_tiles_that_some_head_reaches_are_visited(spans, reach, monkeypatch):
    areas, length = [], 300
    monkeypatch.setattr(
        "attention.pattern.tiled_attention", lambda query, key, value, mask, visits, _: areas.extend(visits) or query
    )
    variant = make_variant(spans, max_span=50)
    variant(*make_tensors(queries=length, keys=length), make_mask(queries=length, keys=length), Scoring(0.3))
    work = variant.work(length, heads=8, causal=False)
    assert sum((v.queries.stop - v.queries.start) * (k.stop - k.start) for v in areas for k in v.keys) == work.scored
    positions = torch.arange(length)
    assert work.seen == int(((positions[:, None] - positions).abs() <= reach).sum()) < work.scored < length**2


def test_a_ramp_in_which_z_could_get_stuck_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Plan.model_validate({"variant": "adaptive_span", "ramp": 1})


def test_it_has_no_meaning_in_cross_attention():
    with pytest.raises(UserError, match=r"adaptive_span at cross\[0\]"):
        install(make_model("t5", AutoModel), Plan.model_validate({"cross": "adaptive_span"}))
