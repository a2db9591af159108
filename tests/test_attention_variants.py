"""What every variant owes the models it goes into, whatever it does inside."""

import copy
import itertools

import pytest
import torch
from attention_samples import (
    DECODERS,
    NARROW,
    NEUTRAL,
    NEVER_NEUTRAL,
    NO_PATTERN,
    REFUSED,
    SAMPLES,
    counted_pairs,
    neutral,
    swap,
)
from tiny_families import DECODERS as DECODER_FAMILIES
from tiny_families import SEQ2SEQ, SWAPPABLE, make_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from attention import VARIANTS
from attention.seam import CHILD, find_sites
from heedful import UserError

CHANGING = {**NARROW, "linformer": {"k": 8}, "additive": {}}
"""And all others that are not full attention."""


def auto_class(family):
    return {
        **dict.fromkeys(DECODER_FAMILIES, AutoModelForCausalLM),
        **dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM),
    }.get(family, AutoModel)


def takers(families, names):
    """Each of the families with each of the variants that goes into it."""
    return [(family, name) for family in families for name in names if family not in REFUSED.get(name, ())]


def swapped(model, plan, *, tiled=True, trained=False):
    """A copy with the plan in it."""
    model = copy.deepcopy(model)
    swap(model, plan, tiled=tiled, trained=trained)
    return model


def make_inputs(family, *, left=False):
    """Two texts of 30 tokens, of which the first has 20."""
    ids = torch.randint(5, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[0, : 10 if left else None] = 0 if left else 1
    if not left:
        real[0, 20:] = 0
    inputs = {"input_ids": ids.masked_fill(real == 0, 0), "attention_mask": real}
    return inputs | ({"decoder_input_ids": ids[:, :12]} if family in SEQ2SEQ else {})


def answers(model, inputs):
    """Of real tokens: logits, or hidden states."""
    with torch.no_grad():
        out = model(**inputs)[0]
    return out if "decoder_input_ids" in inputs else out[inputs["attention_mask"].bool()]


def test_every_variant_has_samples():
    assert set(SAMPLES) == set(VARIANTS) == {*NEUTRAL, *NEVER_NEUTRAL}


@pytest.mark.parametrize("family", SWAPPABLE)
def test_in_its_neutral_setting_a_variant_is_full_attention(family):
    model, inputs = make_model(family, auto_class(family), attention_dropout=0.0), make_inputs(family)
    expected = answers(model, inputs)
    prompt = {name: value for name, value in make_inputs(family, left=True).items() if name != "decoder_input_ids"}

    def generated(model):
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return [model.generate(**prompt, **settings, num_beams=n).tolist() for n in (1, 3) if model.can_generate()]

    tokens = generated(model)
    for name in NEUTRAL:
        if family in REFUSED.get(name, ()):
            continue
        for tiled in (True, False):
            same = swapped(model, {"variant": name, **neutral(name, model)}, tiled=tiled)
            ours = answers(same, inputs)
            assert float((ours - expected).abs().max() / expected.abs().max()) <= 1e-5, (name, tiled)
            assert generated(same) == tokens, (name, tiled)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart"])
def test_variants_are_mixed_by_role_and_layer(family):
    layers = {"t5": {"num_layers": 2}, "bart": {"decoder_layers": 2}}.get(family, {})
    model, inputs = make_model(family, auto_class(family), **layers), make_inputs(family)
    own = "encoder.self" if family == "bert" else "decoder.self"
    plan = {f"{own}[0]": "blockwise", own: {"variant": "strided", "stride": 10_000}}
    mixed = swapped(model, plan)
    kinds = [type(getattr(site.module, CHILD)).__name__ for site in find_sites(mixed)]
    assert kinds.count("Full") == len([s for s in find_sites(model) if s.role != own])
    torch.testing.assert_close(answers(mixed, inputs), answers(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), [(f, name) for name, families in REFUSED.items() for f in families])
def test_a_family_that_asks_for_more_than_a_variant_can_do_is_refused(family, name):
    model, inputs = make_model(family, auto_class(family)), make_inputs(family)
    expected = answers(model, inputs)
    with pytest.raises(UserError, match=name):
        swap(model, name)
    assert torch.equal(answers(model, inputs), expected), "and nothing went in"


@pytest.mark.parametrize(
    ("family", "name"), takers(["bert", "modernbert", "llama", "mistral", "gemma2", "t5", "bart"], CHANGING)
)
def test_a_padded_row_answers_as_it_does_alone(family, name):
    """And so the pattern is of the row, not of the batch."""
    model = swapped(make_model(family, auto_class(family)), {"variant": name, **CHANGING[name]}, trained=True)
    inputs = make_inputs(family)
    together = answers(model, inputs)
    alone = {key: value[:1, : 20 if key != "decoder_input_ids" else None] for key, value in inputs.items()}
    together = together[:1] if family in SEQ2SEQ else together[:20]
    torch.testing.assert_close(together.view(-1), answers(model, alone).view(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), takers(["llama", "gpt2", "mistral", "gemma2"], [*DECODERS, "lsh"]))
def test_a_causal_model_is_blind_to_the_future(family, name):
    plan = {"variant": name, **CHANGING.get(name, {})}
    model = swapped(make_model(family, AutoModelForCausalLM), plan, trained=True)
    inputs = make_inputs(family)
    changed = inputs["input_ids"].clone()
    changed[:, 15:] = 7
    with torch.no_grad():
        before, after = (model(**inputs | {"input_ids": ids})[0][:, :15] for ids in (inputs["input_ids"], changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize(("name", "settings"), [case for case in NARROW.items() if case[0] not in NO_PATTERN])
def test_what_no_pattern_reaches_changes_nothing(name, settings):
    """One layer: a token's answer depends on the tokens that its pattern names, and on each of them."""
    model = swapped(make_model("bert", AutoModel, num_hidden_layers=1), {"variant": name, **settings})
    pattern = find_sites(model)[0].module.attention_variant.pattern
    ids = make_inputs("bert")["input_ids"][1:]
    seen = counted_pairs(pattern, 30)
    with torch.no_grad():
        before = model(input_ids=ids)[0][0]
        for key in range(30):
            after = model(input_ids=ids.clone().index_fill(1, torch.tensor([key]), 301))[0][0]
            moved = (after != before).any(-1)
            moved[key] = seen[key, key]  # whose own embedding changed
            assert torch.equal(moved, seen[:, key]), key


@pytest.mark.parametrize(("family", "name"), takers(["llama", "gpt2", "mistral", "gemma2", "t5", "bart"], DECODERS))
def test_decoding_with_a_cache_gives_what_decoding_without_gives(family, name):
    model = swapped(make_model(family, auto_class(family)), {"variant": name, **NARROW.get(name, {})}, trained=True)
    inputs = make_inputs(family, left=family not in SEQ2SEQ)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (
        model.generate(**inputs, **settings, use_cache=use_cache, output_logits=True, return_dict_in_generate=True)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    beams = model.generate(**inputs, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**inputs, **settings, num_beams=3, use_cache=False))


STARTS = [(name, NARROW[name]) for name in DECODERS if name in NARROW]
STARTS += [("sliding_window", {"reach": 3, "global_tokens": [0, 2]})]


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_row_padded_at_its_start_decodes_as_it_does_alone(family, tiled):
    """Blocks and global tokens are counted from the first token, not from the padding before it."""
    model, inputs = make_model(family, AutoModelForCausalLM), make_inputs(family, left=True)
    short = {key: value[:1, 10:] for key, value in inputs.items()}
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for name, narrow in STARTS:
        swap = swapped(model, {"variant": name, **narrow}, tiled=tiled, trained=True)
        together, alone = (swap.generate(**given, **settings, pad_token_id=0) for given in (inputs, short))
        for one, other in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(one[:1], other, rtol=0, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


STATIC = [("llama", name) for name in DECODERS]
STATIC += itertools.product(["gpt2", "mistral", "gemma2", "t5", "bart"], ["blockwise", "sliding_window"])


@pytest.mark.parametrize(("family", "name"), STATIC)
def test_a_static_cache_gives_the_same_tokens(family, name):
    """generate makes the masks of such a cache early and hands them in again; see ``LazyMask``."""
    model = swapped(make_model(family, auto_class(family)), {"variant": name, **NARROW.get(name, {})}, trained=True)
    inputs = make_inputs(family, left=family not in SEQ2SEQ)
    inputs.pop("decoder_input_ids", None)
    for beams in (1, 3):
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        settings |= {"num_beams": beams}
        static = model.generate(**inputs, **settings, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, model.generate(**inputs, **settings))


@pytest.mark.parametrize(
    ("family", "name"), takers(["llama", "mistral", "gemma2"], [name for name in DECODERS if name != "block_sparse"])
)
def test_packed_texts_do_not_see_each_other(family, name):
    model = swapped(make_model(family, AutoModelForCausalLM), {"variant": name, **NARROW.get(name, {})}, trained=True)
    ids = make_inputs(family)["input_ids"][1:]
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        apart = torch.cat([model(input_ids=part)[0] for part in ids.split([12, 18], dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "plan",
    [
        {"variant": "sliding_window", "reach": 3, "global_tokens": [0, 14]},
        {"variant": "block_sparse", **NARROW["block_sparse"]},
        {"variant": "lsh", **NARROW["lsh"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tiled", [True, False])
def test_packed_texts_do_not_see_each_other_where_the_pattern_is_of_the_row(plan, tiled):
    """A text sees other tokens of its own than it does alone: global ones, blocks and clusters are the row's."""
    model = swapped(make_model("llama", AutoModelForCausalLM), plan, tiled=tiled)
    ids = make_inputs("llama")["input_ids"][1:]
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad():
        before, after = (
            model(input_ids=given, position_ids=positions, use_cache=False)[0][:, 12:]
            for given in (ids, ids.index_fill(1, torch.arange(12), 7))
        )
    if plan["variant"] != "lsh":  # whose clusters what comes before decides on
        assert torch.equal(before, after)
    alone = model(input_ids=ids[:, 12:])[0].detach()
    assert float((before - alone).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("family", "name"),
    takers(["bert", "llama", "t5"], ["blockwise", "strided", "linformer", "additive", "adaptive_span", "lsh"]),
)
def test_recomputing_activations_repeats_the_dropout(family, name):
    plan = {"variant": name, **CHANGING.get(name, {})}
    model = swapped(make_model(family, auto_class(family), attention_dropout=0.1), plan, trained=True).train()
    inputs, gradients = make_inputs(family), []
    for recomputing in (False, True):
        if recomputing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs, use_cache=False)[0].float().square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-6)
