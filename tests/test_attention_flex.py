"""FlexAttention as a second way through a pattern: equal to the tiles, and taken only where it was seen to be.

On a CPU its kernels compile without a backward pass. What is handed to them is the same on every device, so both passes
are held here to the tiles by torch's own uncompiled form of them, and the forward pass compiled.
"""

import logging

import pytest
import torch
from attention_samples import NO_PATTERN, SAMPLES, each_sample, make, make_mask, make_tensors
from torch.nn.attention import flex_attention as torchs
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from attention import flex
from attention.masks import LazyMask
from attention.pattern import tiles
from attention.scoring import Scoring

PATTERNS = [(name, settings) for name, settings in each_sample() if name not in NO_PATTERN]
GPU = torch.device("cuda")


@pytest.fixture
def uncompiled(monkeypatch):
    """torch's dense form of the kernels, with its backward pass, which it keeps from the CPU."""
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_compiled", lambda function: function)
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    flex._is_right.cache_clear()
    yield
    flex._is_right.cache_clear()


def packed(rows=2, tokens=150):
    """Two texts in the first row, the second row one; no later token is seen."""
    numbers = torch.zeros(rows, tokens, dtype=torch.long)
    numbers[0, 70:] = 1
    rule = and_masks(causal_mask_function, packed_sequence_mask_function(numbers))
    return LazyMask(batch_size=rows, q_length=tokens, kv_length=tokens, mask_function=rule)


MASKS = {
    "padded": make_mask,
    "causal, padded": lambda: make_mask(causal=True),
    "whole": lambda: make_mask(padding=False),
    "causal, behind a cache": lambda: make_mask(keys=170, causal=True),
    "packed": packed,
}


def both(pattern, make_one, scoring, device="cpu", dtype=torch.float64):
    """Output and gradients, by FlexAttention and by the tiles."""
    for attend in (flex.flex, tiles):
        mask = make_one()
        tensors = make_tensors(keys=mask.shape[3], width=16, dtype=dtype)
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
def test_a_variant_takes_it_where_it_was_right(name, settings, monkeypatch, caplog):
    variant, taken = make(name, settings), []
    monkeypatch.setattr("attention.tiled.flex", lambda *given: taken.append(1) or flex.flex(*given))
    given = (*make_tensors(dtype=torch.float32), make_mask())
    with caplog.at_level(logging.INFO, "heedful"), torch.inference_mode():
        out = variant(*given, Scoring(0.3))
    assert taken
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
    not_compiled: "no compiler found; the engine's tiles are taken",
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("fault", "said"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_kernel_that_is_wrong_is_not_taken_and_it_is_said_once(fault, said, monkeypatch, caplog):
    monkeypatch.setattr(flex, "_compiled", lambda function: fault if function is torchs.flex_attention else function)
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
    assert not flex.serves(*given, mask, make("strided", {"stride": 16}).pattern, scoring)


def test_a_cpu_has_the_tiles():
    given = make_tensors(dtype=torch.float32)
    assert not flex.serves(*given, make_mask(), make("strided", {"stride": 16}).pattern, Scoring(0.3))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [(name, SAMPLES[name][-1]) for name, _ in dict(PATTERNS).items()])
def test_its_forward_pass_compiles(name, settings):
    pattern = make(name, settings).pattern
    for kind in ("causal, padded", "packed"):
        tensors = [x.detach() for x in make_tensors(width=16, dtype=torch.float32)]
        ours, theirs = (a(*tensors, MASKS[kind](), pattern, Scoring(0.3, softcap=2.0)) for a in (flex.flex, tiles))
        assert (ours - theirs).abs().max() <= 5e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", flex.LARGEST_ERROR, ids=str)
@pytest.mark.parametrize(("name", "settings"), PATTERNS)
def test_on_a_gpu_it_is_right_and_taken(name, settings, dtype):
    pattern = make(name, settings).pattern
    for causal in (False, True):
        case = flex.Case(pattern, causal, None, GPU, dtype, 4, 2, 16)
        assert flex._is_right(case)
