"""Variants compute where their inputs lie, and give the same there."""

import pytest
import torch
from attention_samples import each_sample, make, make_mask, make_tensors, stir

from attention import VARIANTS
from attention.scoring import Scoring

CASES = [
    (name, settings, causal)
    for name, settings in each_sample()
    for causal in (False, True)
    if name != "full" and (not causal or "decoder.self" in VARIANTS[name].roles)
]
"""All but torch's own kernel."""


def prepare(name, settings, *, causal, tiled=True, device="cpu"):
    """A variant that has learned something, what it attends to, and the model's mask; causal is for decoders."""
    role = "decoder.self" if causal else "encoder.self"
    variant = stir(make(name, settings, role=role, tiled=tiled)).double().to(device)
    tensors = [tensor.detach().to(device).requires_grad_() for tensor in make_tensors()]
    return variant, tensors, make_mask(causal=causal, device=device)


def run(variant, tensors, mask, *, dropout=0.0):
    """Output and gradients; the same of two runs on one device."""
    torch.manual_seed(3)
    out = variant(*tensors, mask, Scoring(0.3, dropout))
    return [out, *torch.autograd.grad(out.sin().sum(), [*tensors, *variant.parameters()])]


@pytest.mark.parametrize(("tiled", "dropout"), [(True, 0.0), (True, 0.1), (False, 0.0)])
@pytest.mark.parametrize(("name", "settings", "causal"), CASES)
def test_no_tensor_is_made_elsewhere_than_where_the_inputs_lie(name, settings, causal, tiled, dropout):
    prepared = prepare(name, settings, causal=causal, tiled=tiled)
    expected = run(*prepared, dropout=dropout)
    with torch.device("meta"):  # where whatever is made that does not say where
        found = run(*prepared, dropout=dropout)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "settings", "causal"), CASES)
def test_a_gpu_gives_what_a_cpu_gives(name, settings, causal):
    expected = run(*prepare(name, settings, causal=causal))
    found = run(*prepare(name, settings, causal=causal, device="cuda"))
    assert all((a.cpu() - b).abs().max() <= 1e-10 for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "settings", "causal"), CASES)
def test_a_gpu_drops_the_same_weights_in_both_passes(name, settings, causal):
    """The output is linear in the values: with the same weights dropped, they and their gradients make it."""
    variant, (query, key, value), mask = prepare(name, settings, causal=causal, device="cuda")
    out = variant(query, key, value, mask, Scoring(0.3, 0.1))
    grad = torch.randn_like(out)
    (dvalue,) = torch.autograd.grad(out, value, grad)
    assert abs(float((dvalue * value).sum() - (grad * out).sum())) <= 1e-9
