"""Key/value heads that are pooled, held to projections that are pooled and to attention written out."""

import pytest
import torch
from attention_samples import make, make_mask, make_tensors
from tiny_families import COMMON, SIZES, make_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from attention.folding import fold
from attention.options import Plan
from attention.reference import dense_attention
from attention.scoring import Scoring
from attention.seam import CHILD, NAME, install
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


@pytest.mark.parametrize(
    ("family", "values"), [("llama", {}), ("llama", {"attention_bias": True}), ("mistral", {}), ("gemma2", {})]
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_folded_model_is_the_one_that_pools(family, values, kv_heads):
    """Without variants, with and without padding, and with a cache of fewer heads; some projections have biases."""
    model = make_model(family, AutoModelForCausalLM, num_attention_heads=4, num_key_value_heads=4, **values)
    install(model, plan(kv_heads))
    ids = torch.arange(5, 65).view(2, 30)
    real = torch.ones_like(ids)
    real[1, :7] = 0
    given = [{"input_ids": ids, "attention_mask": real}, {"input_ids": ids[:1], "attention_mask": real[:1]}]
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in given]
        plain = fold(model)
        ours = [plain(**inputs) for inputs in given]
    for out, logits in zip(ours, expected, strict=True):
        read = real[: len(logits)].bool()  # what padding in front reads is nobody's
        torch.testing.assert_close(out.logits[read], logits[read], rtol=0, atol=1e-6)
        assert out.past_key_values.layers[0].keys.shape[1] == kv_heads
    assert plain.config.num_key_value_heads == kv_heads
    assert not any(hasattr(module, CHILD) for module in plain.modules())
    assert plain.config._attn_implementation != NAME
    assert not hasattr(plain.config, "attention_plan")
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) is bool(
        plain.config.tie_word_embeddings
    )


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llama", None, "without grouped_query in all of its layers"),
        ("llama", "blockwise", "without grouped_query in all of its layers"),
        ("llama", {"decoder.self[0]": {"variant": "grouped_query", "kv_heads": 1}}, "without grouped_query in all"),
        ("gpt2", {"variant": "grouped_query", "kv_heads": 1}, "GPT2LMHeadModel, which has no setting for fewer"),
        ("bart", {"variant": "grouped_query", "kv_heads": 1}, "BartForCausalLM, which has no setting for fewer"),
        ("qwen3", {"variant": "grouped_query", "kv_heads": 1}, "Qwen3ForCausalLM, which norms its keys"),
    ],
)
def test_what_can_not_be_folded_is_refused(family, values, message):
    model = make_model(family, AutoModelForCausalLM)
    if values is not None:
        install(model, Plan.model_validate(values))
    with pytest.raises(UserError, match=message):
        fold(model)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("stablelm", {"qk_layernorm": True}, "which norms its keys"),
        ("phi", {"qk_layernorm": True}, "which norms its keys"),
        ("olmo", {"clip_qkv": 1.0}, "which clips its keys"),
        ("phi3", {"pad_token_id": 0}, "which has no k_proj and v_proj at"),
    ],
)
def test_what_is_no_mean_of_what_was_is_refused(kind, values, message):
    """It would answer otherwise, and no error would say so."""
    sizes = COMMON | SIZES | {"num_attention_heads": 4, "num_key_value_heads": 4} | values
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    install(model, plan(2))
    with pytest.raises(UserError, match=message):
        fold(model)
