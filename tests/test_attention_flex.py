"""FlexAttention as a second way through a pattern: equal to the tiles, and taken only where it was seen to be.

On a CPU its kernels compile without a backward pass. What is handed to them is the same on every device, so both passes
are held here to the tiles by torch's own uncompiled form of them, and the forward pass compiled.
"""

import logging
from functools import partial

import pytest
import torch
from attention_samples import PATTERNS, SAMPLES, make, make_mask, make_tensors, swap
from tiny_families import make_model
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention as torchs
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from attention import flex
from attention.masks import LazyMask
from attention.pattern import tiles
from attention.scoring import Scoring

GPU = torch.device("cuda")


@pytest.fixture
def uncompiled(monkeypatch):
    """torch's dense form of the kernels, with its backward pass, which it keeps from the CPU."""
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_compiled", lambda function, pattern: function)
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex, "_RIGHT", {})
    monkeypatch.setattr(flex, "_WRONG", set())


def packed(queries=150, keys=150):
    """Two texts in the first row, the second row one; no later token is seen."""
    numbers = torch.zeros(2, keys, dtype=torch.long)
    numbers[0, 70:] = 1
    rule = and_masks(causal_mask_function, packed_sequence_mask_function(numbers))
    return LazyMask(batch_size=2, q_length=queries, kv_length=keys, mask_function=rule)


def sliding(tokens=150):
    """A model's own window."""
    rule = sliding_window_causal_mask_function(40)
    return LazyMask(batch_size=2, q_length=tokens, kv_length=tokens, mask_function=rule)


MASKS = {
    "padded": make_mask,
    "causal, padded": partial(make_mask, causal=True),
    "whole": partial(make_mask, padding=False),
    "causal, behind a cache": partial(make_mask, keys=170, causal=True),
    "packed": packed,
}


def both(pattern, make_one, scoring, device="cpu", dtype=torch.float64, tokens=150):
    """Output and gradients, by FlexAttention and by the tiles."""
    for attend in (flex._flex, tiles):
        mask = make_one()
        tensors = make_tensors(queries=tokens, keys=mask.shape[3], width=16, dtype=dtype)
        tensors = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        out = attend(*tensors, mask, pattern, scoring)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out)
        yield out, torch.autograd.grad(out, tensors, grad)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("name", "settings"), PATTERNS)
def test_it_gives_what_the_tiles_give_and_so_do_its_gradients(name, settings, kind):
    for cap in (None, 2.0):
        (ours, grads), (theirs, expected) = both(make(name, settings).pattern, MASKS[kind], Scoring(0.3, softcap=cap))
        assert (ours - theirs).abs().max() <= 1e-12
        assert all((a - b).abs().max() <= 1e-11 for a, b in zip(grads, expected, strict=True))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("name", "settings"), PATTERNS)
def test_a_variant_takes_it_where_it_was_right(name, settings, caplog):
    variant = make(name, settings)
    given = (*make_tensors(dtype=torch.float32), make_mask())
    with caplog.at_level(logging.INFO, "heedful"), torch.inference_mode():
        out = variant(*given, Scoring(0.3))
    assert list(flex._RIGHT.values()) == [{(150, 150)}]
    assert "taken" in caplog.text
    assert (out - tiles(*given, variant.pattern, Scoring(0.3))).abs().max() <= 5e-6


def off_by_a_pair(*tensors, block_mask, **others):
    """As if a kernel let each query see one key too many."""
    wrong = torchs.create_block_mask(
        lambda b, h, q, k: block_mask.mask_mod(b, h, q, k) | (k == q + 1), 2, None, *block_mask.shape[2:], "cpu"
    )
    return torchs.flex_attention(*tensors, block_mask=wrong, **others)


def wrong_in_the_backward_pass(*tensors, **others):
    return torchs.flex_attention(tensors[0], tensors[1].detach() * 1.0 + 0 * tensors[1], tensors[2], **others)


def not_a_number(*tensors, **others):
    return torchs.flex_attention(*tensors, **others) * torch.nan


def not_compiled(*tensors, **others):
    raise RuntimeError("no compiler found\nand a long trace")


FAULTS = {
    off_by_a_pair: "off by",
    wrong_in_the_backward_pass: "off by",
    not_a_number: "off by nan",
    not_compiled: "RuntimeError: no compiler found; the engine's tiles are taken",
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("fault", "said"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_kernel_that_is_wrong_is_not_taken_and_it_is_said_once(fault, said, monkeypatch, caplog):
    kernels = {torchs.flex_attention: fault}
    monkeypatch.setattr(flex, "_compiled", lambda function, pattern: kernels.get(function, function))
    variant, tensors = make("sliding_window", {"reach": 5}), make_tensors(dtype=torch.float32)
    for _ in range(2):
        out = variant(*tensors, make_mask(), Scoring(0.3))
    assert torch.equal(out, tiles(*tensors, make_mask(), variant.pattern, Scoring(0.3)))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert said in caplog.text
    assert "tiles are taken" in caplog.text


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("tensors", "scoring"),
    [
        ({}, Scoring(0.3, dropout=0.1)),
        ({}, Scoring(0.3, bias=torch.zeros(4, 299))),
        ({"queries": 1}, Scoring(0.3)),
        ({"dtype": torch.float64}, Scoring(0.3)),
    ],
    ids=["dropout", "bias", "decoding", "fp64"],
)
def test_what_it_can_not_do_is_left_to_the_tiles(tensors, scoring):
    given = make_tensors(**{"dtype": torch.float32} | tensors)
    mask = make_mask(queries=given[0].shape[2])
    assert flex.by_flex(*given, mask, make("strided", {"stride": 16}).pattern, scoring) is None


def test_a_cpu_has_the_tiles():
    given = make_tensors(dtype=torch.float32)
    assert flex.by_flex(*given, make_mask(), make("strided", {"stride": 16}).pattern, Scoring(0.3)) is None


@pytest.mark.usefixtures("uncompiled")
def test_it_may_be_tried_out_while_activations_are_recomputed(caplog):
    """What the trial computes is none of the checkpoint's tensors."""
    variant, (query, key, value) = make("sliding_window", {"reach": 5}), make_tensors(dtype=torch.float32)
    out = checkpoint(variant, query, key, value, make_mask(), Scoring(0.3), use_reentrant=False)
    ours = torch.autograd.grad(out.sin().sum(), [query, key, value])
    expected = tiles(query, key, value, make_mask(), variant.pattern, Scoring(0.3))
    theirs = torch.autograd.grad(expected.sin().sum(), [query, key, value])
    assert list(flex._RIGHT.values()) == [{(150, 150)}], caplog.text
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_takes_it_in_mixed_precision(family, monkeypatch):
    """Llama's queries and keys come rotated in fp32 under autocast, its values in half precision."""

    def of_one_type(*tensors, **others):
        assert len({tensor.dtype for tensor in tensors}) == 1, "kernels for GPUs refuse others in the backward pass"
        return torchs.flex_attention(*tensors, **others)

    kernels = {torchs.flex_attention: of_one_type}
    monkeypatch.setattr(flex, "_compiled", lambda function, pattern: kernels.get(function, function))
    model = make_model(family, AutoModel, max_position_embeddings=256)
    ids = torch.arange(2 * 140).view(2, 140) % 50 + 5
    swap(model, {"variant": "sliding_window", "reach": 5})
    model.eval()
    uncached = {"use_cache": False} if family == "llama" else {}  # a cache would bring both to one type
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=ids, **uncached)[0]
        assert [kernel.dtype for kernel in flex._RIGHT] == [torch.bfloat16]
        exact = model(input_ids=ids, **uncached)[0]
    assert not flex._WRONG
    assert (found - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.usefixtures("uncompiled")
def test_a_length_that_does_not_compile_is_left_to_the_tiles(monkeypatch, caplog):
    variant, tensors = make("strided", {"stride": 16}), make_tensors(dtype=torch.float32)
    variant(*tensors, make_mask(), Scoring(0.3))

    def limit(*given, **others):
        raise FailOnRecompileLimitHit("too many")

    monkeypatch.setattr(flex, "_compiled", lambda function, pattern: limit)
    for _ in range(2):
        out = variant(*tensors, make_mask(), Scoring(0.3))
    assert torch.equal(out, tiles(*tensors, make_mask(), variant.pattern, Scoring(0.3)))
    assert caplog.text.count("too many; the engine's tiles are taken") == 1


@pytest.mark.usefixtures("uncompiled")
def test_each_kind_of_kernel_is_tried_out():
    variant = make("strided", {"stride": 16})
    for rows in (1, 2):
        for padding in (False, True) if rows == 2 else (False,):
            for trains in (False, True):
                with torch.set_grad_enabled(trains):
                    variant(*make_tensors(rows, dtype=torch.float32), make_mask(rows, padding=padding), Scoring(0.3))
    assert len(flex._RIGHT) == 6
    assert all(flex._RIGHT.values())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", MASKS)
def test_the_first_two_lengths_of_each_kind_of_mask_are_tried(kind, caplog):
    variant = make("strided", {"stride": 16})
    with caplog.at_level(logging.INFO, "heedful"):
        for queries in (150, 200, 150, 260):
            keys = queries + (20 if kind == "causal, behind a cache" else 0)
            tensors = make_tensors(queries=queries, keys=keys, dtype=torch.float32)
            variant(*tensors, MASKS[kind](queries=queries, keys=keys), Scoring(0.3))
        variant(*make_tensors(dtype=torch.float32), sliding(), Scoring(0.3))
    assert [len(lengths) for lengths in flex._RIGHT.values()] == [2, 1], "a rule of its own is a kernel of its own"
    assert caplog.text.count(", taken") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", dict(PATTERNS))
def test_its_forward_pass_compiles(name):
    """For one length: torch 2.13 takes the name of one symbol for part of another's in kernels for CPUs."""
    pattern = make(name, SAMPLES[name][-1]).pattern
    for kind in ("causal, padded", "packed"):
        tensors = [x.detach() for x in make_tensors(width=16, dtype=torch.float32)]
        mask, scoring = MASKS[kind](), Scoring(0.3, softcap=2.0)
        out = flex._flex(*tensors, mask, pattern, scoring)
        assert (out - tiles(*tensors, mask, pattern, scoring)).abs().max() <= 5e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", flex.LARGEST_ERROR, ids=str)
@pytest.mark.parametrize(("name", "settings"), PATTERNS)
def test_on_a_gpu_it_is_right_and_taken(name, settings, dtype):
    pattern = make(name, settings).pattern
    close = flex.LARGEST_ERROR[dtype]
    for tokens in (150, 200, 387):
        for causal in (False, True):
            make_one = partial(make_mask, queries=tokens, keys=tokens, causal=causal, device=GPU)
            (ours, grads), (theirs, expected) = both(pattern, make_one, Scoring(0.3), GPU, dtype, tokens)
            for found, true in zip((ours, *grads), (theirs, *expected), strict=True):
                assert (found - true).abs().max() <= close * true.abs().max()
