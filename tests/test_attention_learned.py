"""Variants with parameters of their own: held to their formulas written out, saved, and adapted."""

import itertools

import pytest
import torch
from attention_samples import Largest, make, make_mask, make_tensors, stir
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import make_model
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from attention.masks import LazyMask
from attention.options import Plan
from attention.reference import dense_attention
from attention.scoring import Scoring
from attention.seam import CHILD, find_sites, install, variant_parameters
from attention.variants import additive, linformer
from attention.variants.linformer import homes
from heedful import UserError
from training.models import load_model

POSITIONS = 160
PLANS = {"linformer": {"variant": "linformer", "k": 8}, "additive": {"variant": "additive"}}


def trained(name, settings=None, *, dtype=torch.float64):
    return stir(make(name, settings or {}, positions=POSITIONS)).to(dtype)


def compare(variant, tensors, mask, dense):
    """Hold output and gradients to a formula of the same tensors, ``dense(query, key, value)``."""
    inputs = [*tensors, *variant.parameters()]
    ours, theirs = variant(*tensors, mask, Scoring(0.3)), dense(*tensors)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(out, inputs, grad) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def linformer_of_one_row(variant, query_HND, key_KMD, value_KMD, places):
    """The paper's formula over the keys at these places, with log(count) for a slot's weight, head by head."""
    own = range(len(places))  # positions are counted from the text's first token
    slots = [[i for i in own if variant.home_L[i] == s] for s in range(len(variant.E))]
    reached = [s for s, members in enumerate(slots) if members]
    counts = torch.tensor([len(slots[s]) for s in reached], dtype=torch.float64)
    E, F = (along[reached][:, own] / counts[:, None] for along in (variant.E, variant.F))
    out = []
    for head, query in enumerate(query_HND):
        group = head // (len(query_HND) // len(key_KMD))
        key, value = E @ key_KMD[group][places], F @ value_KMD[group][places]
        out.append((query @ key.T * 0.3 + counts.log()).softmax(-1) @ value)
    return torch.stack(out)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("k", [1, 16, 100, POSITIONS])
def test_linformer_is_its_formula(k, padding):
    variant, tensors, mask = trained("linformer", {"k": k}), make_tensors(), make_mask(padding=padding)
    places = [range(120), range(20, 150)] if padding else [range(150), range(150)]

    def dense(*tensors):
        rows = [linformer_of_one_row(variant, *row, list(real)) for *row, real in zip(*tensors, places, strict=True)]
        return torch.stack(rows)

    compare(variant, tensors, mask, dense)


@pytest.mark.parametrize(("k", "length"), [(64, 64), (100, 40), (POSITIONS, 150)])
def test_linformer_begins_as_full_attention_over_what_its_slots_can_hold(k, length):
    tensors, mask = make_tensors(queries=length, keys=length), make_mask(queries=length, keys=length)
    out = make("linformer", {"k": k}, positions=POSITIONS).double()(*tensors, mask, Scoring(0.3))
    torch.testing.assert_close(
        out, dense_attention(*tensors, mask.table(torch.device("cpu")), Scoring(0.3)), rtol=0, atol=1e-12
    )


def test_linformer_begins_as_full_attention_over_keys_that_are_alike_within_a_slot():
    variant, mask = make("linformer", {"k": 16}, positions=POSITIONS).double(), make_mask()
    query, key, value = make_tensors()
    homes_of = variant.home_L[:150], variant.home_L[:150].roll(20)  # the second row begins behind its padding
    key, value = (torch.stack([x[row][:, home] for row, home in enumerate(homes_of)]) for x in (key, value))
    out = variant(query, key, value, mask, Scoring(0.3))
    expected = dense_attention(query, key, value, mask.table(torch.device("cpu")), Scoring(0.3))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 90))
def test_every_slot_is_a_home_and_the_first_positions_have_their_own(slots, positions):
    home_L = homes(slots := min(slots, positions), positions)
    assert home_L.shape == (positions,)
    assert torch.equal(home_L[:slots], torch.arange(slots))
    later = home_L[slots:]
    assert torch.equal(later, later.sort().values), "neighbours go together"
    shared = torch.bincount(later, minlength=slots)
    assert int(shared.max()) - int(shared.min()) <= 1, "and evenly"


def test_linformer_reads_a_row_that_is_padded_in_front_as_the_row_alone():
    variant, (query, key, value) = trained("linformer", {"k": 16}), make_tensors()
    padded = variant(query, key, value, make_mask(), Scoring(0.3))
    for row, text in enumerate((slice(0, 120), slice(20, 150))):
        alone = [x[row : row + 1, :, text] for x in (query, key, value)]
        size = text.stop - text.start
        mask = make_mask(rows=1, queries=size, keys=size, padding=False)
        torch.testing.assert_close(
            padded[row : row + 1, :, text], variant(*alone, mask, Scoring(0.3)), rtol=0, atol=1e-12
        )


def test_what_is_padding_does_not_reach_linformer():
    variant, mask = trained("linformer", {"k": 16}), make_mask()
    tensors = make_tensors()
    before = variant(*tensors, mask, Scoring(0.3))
    with torch.no_grad():
        for tensor in tensors[1:]:
            tensor[0, :, -30:], tensor[1, :, :20] = 1e6, -1e6
    assert torch.equal(variant(*tensors, mask, Scoring(0.3)), before)


@pytest.mark.parametrize("name", PLANS)
def test_a_row_of_padding_alone_gets_zeros_and_no_gradient(name, monkeypatch):
    monkeypatch.setattr(linformer, "scaled_dot_product_attention", plain_kernel)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1] = False
    mask = LazyMask(batch_size=2, q_length=20, kv_length=20, attention_mask=real)
    variant, tensors = trained(name, {"k": 8} if name == "linformer" else {}), make_tensors(queries=20, keys=20)
    out = variant(*tensors, mask, Scoring(0.3))
    assert (out[1] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), [*tensors, *variant.parameters()])
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[1] == 0).all() for grad in grads[:3])


def plain_kernel(query, key, value, *, attn_mask, scale, **others):
    """Of a row without a key it gives NaN, as some of torch's kernels do."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return (query @ key.mT * scale + attn_mask).softmax(-1) @ value


def additive_of_one_head(W, U, v, query_ND, key_MD):
    """The paper's alignment model, pair by pair of a table."""
    hidden = torch.tanh((query_ND @ W.T)[:, None, :] + (key_MD @ U.T)[None, :, :])
    return hidden @ v


@pytest.mark.parametrize("block", [1, 2**14, 2**30])
def test_additive_is_its_formula(block, monkeypatch):
    monkeypatch.setattr(additive, "BLOCK", block)
    variant = trained("additive")
    for causal, keys in itertools.product((False, True), (30, 40)):
        tensors, mask = make_tensors(queries=30, keys=keys), make_mask(queries=30, keys=keys, causal=causal)

        def dense(query, key, value, mask=mask):
            out, allowed = [], mask.table(torch.device("cpu"))
            for row, head in itertools.product(range(2), range(4)):
                net = variant.W[head], variant.U[head // 2], variant.v[head]
                scores = additive_of_one_head(*net, query[row, head], key[row, head // 2])
                seen = allowed.expand(2, 1, 30, -1)[row, 0]
                weights = scores.exp() * seen
                out.append(weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ value[row, head // 2])
            return torch.stack(out).view(2, 4, 30, 8)

        compare(variant, tensors, mask, dense)


def test_additive_begins_as_the_mean_of_what_is_seen():
    (query, key, value), mask = make_tensors(queries=30, keys=40), make_mask(queries=30, keys=40, causal=True)
    out = make("additive", {}).double()(query, key, value, mask, Scoring(0.3))
    even = dense_attention(query * 0, key, value, mask.table(torch.device("cpu")), Scoring(0.3))
    torch.testing.assert_close(out, even, rtol=0, atol=1e-12)


def test_the_table_inside_additive_never_stands_whole(monkeypatch):
    monkeypatch.setattr(additive, "BLOCK", 2**14)
    variant, tensors = trained("additive"), make_tensors(queries=128, keys=128)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = variant(*tensors, make_mask(queries=128, keys=128, padding=False), Scoring(0.3))
        out.sum().backward()
    assert largest.elements <= 2**14
    assert sum(storage.nbytes() for storage in kept.values()) <= 2**20, "of 8 MiB"


@pytest.mark.parametrize("name", PLANS)
def test_dropout_drops_the_weights_it_says_and_the_same_ones_in_both_passes(name):
    variant, p = make(name, {"k": 130} if name == "linformer" else {}, positions=130).double(), 0.25
    variant = variant if name == "linformer" else stir(variant)
    query, key, _ = make_tensors(rows=1, queries=130, keys=130)
    eye = torch.eye(130, dtype=torch.float64).expand(1, 2, 130, 130)  # of which the weights themselves come out
    mask = make_mask(1, 130, 130, padding=False)
    weights = variant(query, key, eye, mask, Scoring(0.3))

    def dropped():
        torch.manual_seed(5)
        return variant(query, key, eye, mask, Scoring(0.3, dropout=p))

    out = dropped()
    kept = out.detach() != 0
    torch.testing.assert_close(out, weights * kept / (1 - p), rtol=0, atol=1e-12)
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=0.01)
    assert torch.equal(dropped(), out)
    inputs = [p for p in variant.parameters() if p is not getattr(variant, "F", None)]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(r, [query, key, *inputs], grad) for r in (out, weights * kept / (1 - p)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", PLANS)
def test_half_precision_is_near(name):
    tensors, mask = [tensor.detach() for tensor in make_tensors()], make_mask()
    exact = trained(name)(*tensors, mask, Scoring(0.3))
    half = [tensor.bfloat16() for tensor in tensors]
    for variant in (trained(name, dtype=torch.bfloat16), trained(name, dtype=torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(variant.parameters()).dtype == torch.float32):
            out = variant(*half, mask, Scoring(0.3))
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("linformer", {"mask": {"causal": True}}, ValueError, "more than padding"),
        ("linformer", {"scoring": {"bias": torch.zeros(4, 299)}}, ValueError, "with a bias"),
        ("linformer", {"scoring": {"softcap": 30.0}}, ValueError, "with a soft cap"),
        ("linformer", {"keys": 161}, UserError, "161 tokens for linformer"),
        ("additive", {"scoring": {"bias": torch.zeros(4, 299)}}, ValueError, "with a bias"),
        ("additive", {"scoring": {"softcap": 30.0}}, ValueError, "with a soft cap"),
        ("additive", {"keys": 2049}, UserError, "2,049 tokens for additive"),
        ("lsh", {"scoring": {"bias": torch.zeros(4, 299)}}, ValueError, "with a bias"),
        ("lsh", {"scoring": {"softcap": 30.0}}, ValueError, "with a soft cap"),
    ],
)
def test_what_a_variant_can_not_honour_is_refused_when_it_is_called(name, changed, error, message):
    keys = changed.get("keys", 150)
    tensors, mask = make_tensors(keys=keys), make_mask(keys=keys, **changed.get("mask", {}))
    with pytest.raises(error, match=message):
        trained(name)(*tensors, mask, Scoring(0.3, **changed.get("scoring", {})))


def test_linformer_has_no_more_slots_than_positions():
    with pytest.raises(
        UserError, match=rf"k={POSITIONS + 1} at encoder.self\[0\] of a model with {POSITIONS} positions"
    ):
        make("linformer", {"k": POSITIONS + 1}, positions=POSITIONS)


def test_a_model_that_does_not_say_its_positions_takes_no_linformer():
    with pytest.raises(UserError, match=r"linformer at encoder.self\[0\] of a model that does not say how many"):
        make("linformer", {}, positions=None)


def test_a_variant_that_can_not_be_made_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(linformer, "make", lambda options, site: [][site.layer])
    model = make_model("bert", AutoModel)
    with pytest.raises(IndexError):
        install(model, Plan.model_validate({"encoder.self[0]": "blockwise", "encoder.self[1]": "linformer"}))
    assert not any(hasattr(module, CHILD) for module in model.modules())


SAVED = {
    "linformer": ("bert", PLANS["linformer"]),
    "additive": ("bert", PLANS["additive"]),
    "adaptive_span": ("bert", {"variant": "adaptive_span", "max_span": 8, "ramp": 4}),
    "both": ("bart", {"encoder.self": PLANS["linformer"], "decoder.self": "additive", "cross": "additive"}),
}


def learned(model):
    return {name: model.get_parameter(name) for name in variant_parameters(model)}


@pytest.mark.parametrize("case", SAVED)
def test_what_variants_have_learned_is_opened_again(case, tmp_path):
    family, values = SAVED[case]
    kind = AutoModelForSequenceClassification if family == "bert" else AutoModelForSeq2SeqLM
    model, plan, ids = make_model(family, kind), Plan.model_validate(values), torch.arange(5, 29)[None]
    install(model, plan)
    begun = {name: parameter.clone() for name, parameter in learned(model).items()}
    for site in find_sites(model):
        stir(getattr(site.module, CHILD))
    expected = model(input_ids=ids).logits.detach()
    model.save_pretrained(tmp_path)

    for named in (None, plan):  # a configuration that names the plan again must not lose what was learned under it
        loaded = load_model(kind, str(tmp_path), attention=named)
        assert loaded.new == loaded.unused == ()
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected, rtol=0, atol=1e-8)
        assert learned(loaded.model).keys() == begun.keys()
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in learned(loaded.model).items())
    for other in (AutoModelForTokenClassification, AutoModel) if family == "bert" else (AutoModel,):
        body = load_model(other, str(tmp_path))
        assert not set(body.new) & set(variant_parameters(body.model))
        assert all(
            torch.equal(a, b) for a, b in zip(learned(body.model).values(), learned(model).values(), strict=True)
        )
    fewer = load_model(kind, str(tmp_path), attention=Plan.model_validate({"encoder.self[0]": values_of(values)}))
    assert set(fewer.new) == set(variant_parameters(fewer.model)), "another plan starts anew"
    for name, parameter in learned(fewer.model).items():
        assert torch.equal(parameter, begun[name])


def values_of(plan):
    return plan.get("encoder.self", plan)
