"""Key/value heads that are pooled, held to projections that are pooled and to attention written out."""

import pytest
import torch
from attention_samples import make, make_mask, make_tensors
from tiny_families import make_model
from transformers import AutoModel, AutoModelForCausalLM

from attention.options import Plan
from attention.reference import dense_attention
from attention.scoring import Scoring
from attention.seam import install
from heedful import UserError


def plan(kv_heads, where=None):
    options = {"variant": "grouped_query", "kv_heads": kv_heads}
    return Plan.model_validate({where: options} if where else options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [40, 55])
def test_it_is_full_attention_over_the_means_of_heads(causal, keys):
    query, key, value = tensors = make_tensors(heads=4, groups=2, queries=40, keys=keys)
    mask, scoring = make_mask(queries=40, keys=keys, causal=causal), Scoring(0.3, softcap=2.0)
    ours = make("grouped_query", {"kv_heads": 1})(*tensors, mask, scoring)
    pooled = [(x[:, :1] + x[:, 1:]) / 2 for x in (key, value)]
    theirs = dense_attention(query, *pooled, mask.table(query.device), scoring)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_pooling_heads_is_pooling_their_projections():
    """With rotations between the two: a Llama with four key/value heads, pooled to two, and one that has two."""
    heads = {"num_attention_heads": 4}
    four = make_model("llama", AutoModelForCausalLM, num_key_value_heads=4, **heads)
    two = make_model("llama", AutoModelForCausalLM, num_key_value_heads=2, **heads)
    weights = four.state_dict()
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weight.view(2, 2, -1, weight.shape[1]).mean(1).flatten(0, 1)
    two.load_state_dict(weights)
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():
        expected, before = two(input_ids=ids)[0], four(input_ids=ids)[0]
        install(four, plan(2))
        ours = four(input_ids=ids)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert float((ours - before).abs().max()) > 1e-4


def test_it_goes_into_cross_attention_too():
    model = make_model("t5", AutoModel)
    inputs = {"input_ids": torch.arange(5, 29)[None], "decoder_input_ids": torch.arange(5, 11)[None]}
    with torch.no_grad():
        before = model(**inputs)[0]
        install(model, plan(1, "cross"))
        assert not torch.equal(model(**inputs)[0], before)


def test_groups_of_unequal_size_are_refused_before_anything_is_changed():
    model = make_model("bert", AutoModel, num_attention_heads=4)
    for kv_heads in (3, 8):
        with pytest.raises(UserError, match=rf"kv_heads={kv_heads} at encoder.self\[0\], which has 4"):
            install(model, plan(kv_heads))
    assert not hasattr(model.config, "attention_plan")
    with pytest.raises(UserError, match="which has 4") as refused:
        install(model, Plan.model_validate({"encoder.self[0]": "blockwise", "encoder.self": plan(3).root["*"]}))
    assert "1, 2, 4" in str(refused.value)
    assert not [name for name, _ in model.named_modules() if "attention_variant" in name]
