"""The one place where variants go into transformers: every trap of its registry, and what is saved of a plan."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from attention_samples import Largest, make_mask
from pydantic import ValidationError
from tiny_families import BART_SIZES, COMMON, FAMILIES, SEQ2SEQ, SIZES, SWAPPABLE, TEXTS, make_model, save_body
from tiny_text import make_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CLIPConfig,
    EncoderDecoderModel,
    FNetConfig,
    GptOssConfig,
    MambaConfig,
    ViTConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attention import VARIANTS
from attention.describing import describe
from attention.options import ROLES, Plan
from attention.seam import CHILD, NAME, as_full, attend, find_sites, install, recorded, remove, stored_plan
from attention.variant import Needs
from heedful import UserError
from training.models import load_model
from training.warm_start import join_encoders

LONG = 4096
WINDOW = {"variant": "sliding_window", "reach": 3}


def plan(values):
    return Plan.model_validate(values)


@pytest.fixture
def saved(tmp_path):
    """A classifier with a window, saved, and how it answered."""
    model = make_model("bert", AutoModelForSequenceClassification)
    install(model, plan(WINDOW))
    ids = torch.arange(5, 29)[None]
    model.save_pretrained(tmp_path / "model")

    return tmp_path / "model", ids, model(input_ids=ids).logits.detach()


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("bert", "encoder.self[0] encoder.self[1]"),
        ("distilbert", "encoder.self[0] encoder.self[1]"),
        ("modernbert", "encoder.self[0] encoder.self[1]"),
        ("gemma2", "decoder.self[0] decoder.self[1]"),
        ("gpt2", "decoder.self[0] decoder.self[1]"),
        ("t5", "encoder.self[0] decoder.self[0] cross[0]"),
        ("marian", "encoder.self[0] decoder.self[0] cross[0]"),
    ],
)
def test_sites_are_found_by_what_runs(family, sites):
    model = make_model(family, AutoModel)
    before = model.config._attn_implementation
    assert [str(site) for site in find_sites(model)] == sites.split()
    assert model.config._attn_implementation == before, "it was only looked at"


@pytest.mark.parametrize(
    ("family", "calls"),
    [
        ("bert", [Needs(2, 2, 8), Needs(2, 2, 8)]),
        ("modernbert", [Needs(2, 2, 8), Needs(2, 2, 8, rules=True)]),
        ("gemma2", [Needs(2, 1, 8, softcap=True, rules=True)] * 2),
        ("t5", [Needs(2, 2, 8, bias=True), Needs(2, 2, 8, bias=True, rules=True), Needs(2, 2, 8)]),
    ],
)
def test_what_a_site_asks_for_is_seen(family, calls):
    """T5's cross-attention adds a table of zeros, and asks for nothing."""
    assert [site.needs for site in find_sites(make_model(family, AutoModel))] == calls


@pytest.mark.parametrize(
    ("family", "values", "message", "expected"),
    [
        ("modernbert", "linformer", "encoder.self[1], which masks more than padding", "one of: full, blockwise"),
        ("t5", "additive", "encoder.self[0], which adds a bias to its scores", "one of: full, blockwise"),
        ("gemma2", "additive", "decoder.self[0], which caps its scores", "one of: full, blockwise"),
        ("llama", "linformer", "no place for linformer in this model: decoder.self[0-1]", "a model with encoder.self"),
    ],
)
def test_a_variant_that_can_not_do_what_a_site_asks_for_is_refused_before_it_goes_in(family, values, message, expected):
    model = make_model(family, AutoModel)
    with pytest.raises(UserError) as refusal:
        install(model, plan(values))
    assert message in refusal.value.found
    assert expected in refusal.value.expected
    assert stored_plan(model) is None
    assert not any(hasattr(module, CHILD) for module in model.modules())


@pytest.mark.parametrize(
    ("family", "place", "options"),
    [("modernbert", "encoder.self[0]", {"variant": "linformer", "k": 32}), ("t5", "cross", {"variant": "additive"})],
)
def test_it_goes_to_the_sites_that_ask_for_less(family, place, options):
    model = make_model(family, AutoModel)
    install(model, plan({place: options}))
    assert any(options["variant"] in line for line in describe(model))


@pytest.mark.parametrize(
    ("family", "values", "longest"),
    [
        ("bert", {"variant": "sliding_window", "reach": 8}, 9),
        ("bert", {"variant": "sliding_window", "reach": 5, "global_tokens": [0]}, 7),
        ("bert", {"variant": "strided", "stride": 6}, 7),
        ("bert", {"variant": "local_global", "reach": 8}, 9),
        ("bert", {"variant": "lsh", "cluster_size": 9, "rounds": 2, "buckets": 4}, 9),
        ("llama", {"variant": "lsh", "cluster_size": 2, "rounds": 1, "buckets": 4}, 8),
        ("llama", {"variant": "block_sparse", "block_size": 3, "global_blocks": 0, "random_blocks": 0}, 6),
    ],
    ids=str,
)
def test_it_is_said_where_a_variant_changes_nothing(family, values, longest):
    """A default reach of 128 is full attention for sentences, and would be trained as a window without a word."""
    model, other = make_model(family, AutoModel), make_model(family, AutoModel)
    install(other, plan(values))
    for length in (longest, longest + 1):
        ids = torch.arange(5, 5 + length)[None]
        differs = float((model(input_ids=ids)[0] - other(input_ids=ids)[0]).detach().abs().max()) > 1e-5
        said = any("changes nothing" in line for line in describe(other, dict.fromkeys(ROLES, length)))
        assert (said, differs) == (length == longest, length > longest)


def test_a_span_that_training_moves_is_not_said_to_change_nothing():
    model = make_model("bert", AutoModel)
    install(model, plan({"variant": "adaptive_span", "max_span": 8, "ramp": 4}))
    for length in (8, 9):
        model.zero_grad()
        model(input_ids=torch.arange(5, 5 + length)[None])[0].square().sum().backward()
        moves = any(bool(p.grad.any()) for name, p in model.named_parameters() if name.endswith("span"))
        assert any("changes nothing" in line for line in describe(model, dict.fromkeys(ROLES, length))) is not moves


def test_it_is_said_by_what_each_kind_of_attention_meets():
    model = make_model("bart", AutoModel)
    install(model, plan({"variant": "sliding_window", "reach": 8}))
    lines = describe(model, {"encoder.self": 30, "decoder.self": 9, "cross": 30})
    said = [line for line in lines if line.startswith("!")]
    assert len(said) == 1
    assert said[0].startswith(
        "! attention: decoder.self[0] changes nothing: it is full attention over texts of up to 9"
    )


def test_it_is_said_where_no_text_has_the_global_token():
    model = make_model("bert", AutoModel)
    install(model, plan({"variant": "sliding_window", "reach": 3, "global_tokens": [0, 20]}))
    assert not [line for line in describe(model, dict.fromkeys(ROLES, 21)) if line.startswith("!")]
    assert describe(model, dict.fromkeys(ROLES, 20))[1].endswith(
        "global token 20: no text to learn from has more than 20 tokens"
    )


@pytest.mark.parametrize(("kv_heads", "said"), [(1, False), (2, True)])
def test_it_is_said_where_no_heads_are_pooled(kv_heads, said):
    model = make_model("llama", AutoModel)
    install(model, plan({"variant": "grouped_query", "kv_heads": kv_heads}))
    assert any("changes nothing" in line for line in describe(model, dict.fromkeys(ROLES, 30))) is said


@pytest.mark.parametrize("family", ["bert", "modernbert", "mistral", "t5", "bart"])
def test_full_attention_runs_in_the_place_of_the_variants_for_a_while(family):
    model, ids = make_model(family, AutoModel), torch.arange(5, 29).view(2, 12)
    inputs = {"input_ids": ids, "attention_mask": (ids < 26).long()}
    if family in SEQ2SEQ:
        inputs["decoder_input_ids"] = ids
    before = model(**inputs)[0]
    install(model, plan(WINDOW))
    swapped = model(**inputs)[0]
    with as_full():
        with pytest.raises(KeyError), as_full():
            raise KeyError
        torch.testing.assert_close(model(**inputs)[0], before, rtol=0, atol=1e-6)
    assert torch.equal(model(**inputs)[0], swapped)
    assert not torch.allclose(swapped, before, rtol=0, atol=1e-4)


def test_both_halves_of_a_joined_model_are_sites():
    encoder = make_model("bert", AutoModel)
    decoder = make_model("bert", AutoModelForCausalLM, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    found = [str(site) for site in find_sites(model)]
    assert found == ["encoder.self[0]", "encoder.self[1]", "decoder.self[0]", "cross[0]", "decoder.self[1]", "cross[1]"]
    install(model, plan(WINDOW))
    assert describe(model)[-1] == "attention: cross[0-1] full", "which has no neighbours"


INLINE = {
    "deberta-v2": FAMILIES["deberta-v2"],
    "mpnet": SIZES,
    "longformer": SIZES | {"attention_window": 4},
    "led": BART_SIZES | {"attention_window": 4},
    "big_bird": SIZES,
    "nystromformer": SIZES,
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
}
"""Their classes compute attention themselves: most never call a variant, MPNet would add a mask of bools to scores."""


@pytest.mark.parametrize("family", INLINE)
def test_a_class_that_computes_attention_in_its_own_way_is_refused(family):
    model = AutoModel.from_config(AutoConfig.for_model(family, **COMMON | INLINE[family]))
    with pytest.raises(UserError, match="in its own way") as refused:
        install(model, plan("blockwise"))
    assert refused.value.found.startswith(type(model).__name__)
    assert "BERT, RoBERTa" in refused.value.fix
    assert model.config._attn_implementation != NAME
    for full in ("full", {"encoder.self": "full"}):
        install(model, plan(full))


PIXELS = {"image_size": 8, "patch_size": 4, "num_channels": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ViTConfig(**SIZES, **PIXELS), "ViTModel reads pixel_values"),
        (CLIPConfig(text_config=COMMON | SIZES, vision_config=SIZES | PIXELS), "CLIPModel: .*not auto"),
        (FNetConfig(**COMMON, **SIZES), "FNetModel has no attention"),
        (MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=1, state_size=4), "MambaModel has no attention"),
    ],
)
def test_a_model_without_tokens_or_without_attention_is_refused(config, message):
    for values in ("blockwise", {"encoder.self": "blockwise"}):
        with pytest.raises(UserError, match=message):
            install(AutoModel.from_config(config), plan(values))


def test_a_model_that_asks_for_more_than_a_variant_does_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "intermediate_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModel.from_config(GptOssConfig(**COMMON, **sizes, eos_token_id=3))
    with pytest.raises(UserError, match=r"GptOssModel: s_aux: attention sinks"):
        find_sites(model)


def test_the_model_that_calls_no_variant_is_noticed(monkeypatch):
    model = make_model("bert", AutoModel)
    monkeypatch.setattr("attention.seam.find_sites", lambda model: sites)
    sites = find_sites(make_model("bert", AutoModel))  # of another model
    with pytest.raises(RuntimeError, match="not called"):
        install(model, plan("blockwise"))


@pytest.mark.parametrize("padded", [False, True])
def test_a_padded_batch_keeps_its_mask(padded):
    """Without a mask function of the same name transformers drops padding and packing, without a word."""
    model, ids = make_model("bert", AutoModel), torch.arange(5, 29).repeat(2, 1)
    real = torch.ones_like(ids)
    real[0, 12:] = 0 if padded else 1
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=real)[0]
        install(model, plan("blockwise"))
        torch.testing.assert_close(model(input_ids=ids, attention_mask=real)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.fault("an attention is called with a setting that a later transformers has", "refused, and it is named")
@pytest.mark.parametrize("name", ["s_aux", "sinks", "indices", "block_indices", "cache", "head_mask", "temperature"])
def test_a_call_that_asks_for_more_than_a_variant_does_is_refused(name):
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=name):
        attend(torch.nn.Identity(), q, q, q, None, **{name: torch.ones(2)})


@pytest.mark.parametrize(("own", "said"), [(False, True), (True, False), (True, None), (False, None)])
def test_a_call_without_a_mask_looks_back_as_transformers_has_it(own, said):
    module, tensors = torch.nn.Identity(), torch.randn(3, 1, 2, 6, 8).unbind()
    module.is_causal, module.num_key_value_groups = own, 1
    expected, _ = sdpa_attention_forward(module, *tensors, None, is_causal=said)
    module.add_module(CHILD, VARIANTS["blockwise"].load()(plan("blockwise").at("encoder.self", 0), None))
    torch.testing.assert_close(attend(module, *tensors, None, is_causal=said)[0], expected)


@pytest.mark.fault(
    "weights are asked for where a variant makes none", "refused, where transformers would give an empty tuple"
)
@pytest.mark.parametrize("family", SWAPPABLE)
def test_maps_of_weights_are_refused_and_not_empty(family):
    """Most models' layers are not told that they are asked for."""
    model, inputs = make_model(family, AutoModel), {"input_ids": torch.arange(5, 9)[None]}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if family in SEQ2SEQ else {}
    install(model, plan("blockwise"))
    model(**inputs, output_attentions=False, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    asking = make_model(family, AutoModel, attn_implementation="eager")
    asking.config.output_attentions = True
    with pytest.raises(UserError, match="output_attentions=True in the model's configuration"):
        install(asking, plan("blockwise"))
    assert asking.config._attn_implementation == "eager"
    install(asking, plan("full"))


ATTENTION_DROPOUT = {"bert": "attention_probs_dropout_prob", "gpt2": "attn_pdrop", "t5": "dropout_rate"}


@pytest.mark.parametrize("family", ATTENTION_DROPOUT)
def test_attention_dropout_reaches_the_variants(family):
    """It is the only one here; T5 has one rate for all."""
    model, ids = make_model(family, AutoModel, dropout=False, **{ATTENTION_DROPOUT[family]: 0.25}), torch.arange(5, 29)
    inputs = {"input_ids": ids[None]} | ({"decoder_input_ids": ids[None]} if family in SEQ2SEQ else {})
    for module in model.modules():
        if family == "t5" and isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    install(model, plan("blockwise"))
    for training in (True, False):
        model.train(training)
        with torch.no_grad(), recorded(model) as calls:
            one, other = (model(**inputs)[0] for _ in range(2))
        assert {call.scoring.dropout for call in calls} == {0.25 if training else 0.0}
        assert torch.equal(one, other) != training


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_with_dropout_no_table_of_all_pairs_is_ever_made(family):
    """Neither of weights, nor of T5's bias."""
    sizes = {} if family == "t5" else {"max_position_embeddings": LONG}
    sizes |= {} if family == "t5" else {"num_hidden_layers": 1}
    model, ids = make_model(family, AutoModel, **sizes).train(), torch.arange(LONG)[None] % 300 + 5
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    install(model, plan("blockwise"))
    with Largest() as largest:
        model(**inputs)[0].sum().backward()
    assert largest.elements <= 2 * LONG**2 // 4  # of two heads


def test_a_mask_of_four_dimensions_is_refused():
    model = make_model("bert", AutoModel)
    install(model, plan("blockwise"))
    with pytest.raises(ValueError, match="four dimensions"):
        model(input_ids=torch.arange(5, 9)[None], attention_mask=torch.ones(1, 1, 4, 4))


def test_a_call_without_a_mask_is_as_causal_as_its_module():
    q = torch.randn(1, 2, 6, 8)
    for causal in (False, True):
        module = torch.nn.Identity()
        module.is_causal = causal
        model = make_model("bert", AutoModel)
        install(model, plan("blockwise"))
        module.add_module(CHILD, getattr(find_sites(model)[0].module, CHILD))
        out, weights = attend(module, q, q, q, None, scaling=0.3)
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal, scale=0.3)
        torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=1e-6)
        assert weights is None


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_hooks_of_others_stay_what_they_are(family):
    """One that returns something replaces what its module gave: none is put in, and those of others go on."""
    model, inputs = make_model(family, AutoModel), {"input_ids": torch.arange(5, 29)[None]}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if family in SEQ2SEQ else {}

    def hooks():
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    before, expected = hooks(), model(**inputs)[0]
    for site in find_sites(model):
        site.module.register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))
    doubled, hooked = model(**inputs)[0], hooks()
    install(model, plan("blockwise"))
    with recorded(model) as calls:
        torch.testing.assert_close(model(**inputs)[0], doubled, rtol=0, atol=1e-5)
    assert len(calls) == len(find_sites(model)) == sum(hooked) - sum(before)
    assert len(hooks()) == len(hooked) + len(calls)
    assert sum(hooks()) == sum(hooked)
    assert float((doubled - expected).detach().abs().max()) > 1e-3


def test_a_compiled_model_calls_its_variants_as_they_are():
    """What lies between them is compiled; in them it would be broken up at every question for a size or for padding."""
    model, ids, graphs = make_model("bert", AutoModel, num_hidden_layers=1), torch.arange(5, 29).view(2, 12), []
    inputs = {"input_ids": ids, "attention_mask": (ids < 26).long()}
    install(model, plan(WINDOW))
    expected = model(**inputs)[0]
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=0, atol=1e-6)
    traces = [str(node.stack_trace) for graph in graphs for node in graph.graph.nodes]
    assert any("modeling_bert.py" in trace for trace in traces)
    assert not any(f"attention/{name}.py" in trace for trace in traces for name in ("masks", "seam", "tiled"))


def test_a_plan_is_taken_out_without_a_trace():
    for family, kind in (("bert", AutoModel), ("t5", AutoModel), ("gemma2", AutoModel)):
        model, before = make_model(family, kind), make_model(family, kind)
        inputs = {"input_ids": torch.arange(5, 29)[None]}
        inputs |= {"decoder_input_ids": torch.arange(5, 11)[None]} if family == "t5" else {}
        install(model, plan(WINDOW))
        assert not torch.equal(model(**inputs)[0], before(**inputs)[0])
        remove(model)
        assert torch.equal(model(**inputs)[0], before(**inputs)[0])
        assert model.config.to_dict() == before.config.to_dict()


@pytest.mark.parametrize(
    "places",
    [
        {"encoder.self[0]": "full", "encoder.self": WINDOW},
        {"encoder.self[1]": WINDOW, "encoder.self[0-1]": {"variant": "strided", "stride": 4}},
    ],
)
def test_the_first_place_that_fits_still_decides_when_a_plan_is_opened_again(places, tmp_path):
    """config.json is written with sorted keys."""
    model = make_model("bert", AutoModelForSequenceClassification)
    install(model, plan(places))
    ids = torch.arange(5, 29)[None]
    model.save_pretrained(tmp_path)
    loaded = load_model(AutoModelForSequenceClassification, str(tmp_path)).model
    assert list(stored_plan(loaded).root.items()) == list(plan(places).root.items())
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-8)


def test_a_saved_plan_is_opened_again_with_the_same_answers(saved):
    folder, ids, expected = saved
    loaded = load_model(AutoModelForSequenceClassification, str(folder))
    assert stored_plan(loaded.model) == plan(WINDOW)
    # To the bit but for where the weights lie in memory, which moves a plain model's answers as much.
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected, rtol=0, atol=1e-8)
    full = load_model(AutoModelForSequenceClassification, str(folder), attention=plan("full")).model
    assert float((full(input_ids=ids).logits - expected).abs().max()) > 1e-6
    other = load_model(AutoModelForTokenClassification, str(folder)).model
    assert describe(other) == ["attention: encoder.self[0-1] sliding_window reach=3 global_tokens=[]"]


def test_opened_without_this_project_it_fails_by_name(saved):
    """It would run as full attention: transformers saves no attention's name."""
    folder, _, _ = saved
    program = (
        "import sys, transformers\n"
        "for kind in ('AutoModelForSequenceClassification', 'BertForSequenceClassification'):\n"
        "    try:\n"
        "        getattr(transformers, kind).from_pretrained(sys.argv[1])\n"
        "    except ValueError as error:\n"
        "        assert 'heedful' in str(error), error\n"
        "    else:\n"
        "        raise SystemExit(f'{kind} opened it')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_opened_by_transformers_beside_this_project_it_is_refused_when_called(saved):
    folder, ids, _ = saved
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="open the model with heedful"):
        model(input_ids=ids)


def test_a_model_without_a_plan_is_saved_as_ever(tmp_path):
    model = make_model("bert", AutoModel)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    install(model, plan(WINDOW))
    install(model, plan("full"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_plan_of_a_later_version_is_named(saved):
    folder, _, _ = saved
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"attention_plan": {"variant": "telepathy"}}))
    with pytest.raises(UserError, match="telepathy"):
        load_model(AutoModelForSequenceClassification, str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cross": WINDOW}, "no such place in this model: cross"),
        ({"encoder.self": "full", "encoder.self[0-1]": WINDOW}, r"no such place in this model: encoder\.self\[0-1\]"),
        ({"encoder.self[0-2]": WINDOW, "encoder.self[7]": "blockwise"}, r"no such place in this model: .*\[7\]"),
    ],
)
def test_a_place_that_the_model_lacks_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        install(make_model("bert", AutoModel), plan(values))


@pytest.mark.fault("a global token that no text of the model has", "refused, and the last position is named")
def test_a_global_token_that_no_text_has_is_refused():
    for family in ("bert", "gpt2"):
        model = make_model(family, AutoModel)
        install(model, plan(WINDOW | {"global_tokens": [63]}))
        remove(model)
        with pytest.raises(UserError, match=r"global token 64 at .*self\[0\] of a model with 64 positions") as refused:
            install(model, plan(WINDOW | {"global_tokens": [0, 64]}))
        assert "at most 63" in refused.value.expected
        assert stored_plan(model) is None


def test_a_variant_at_a_place_where_it_has_no_meaning_is_refused():
    with pytest.raises(UserError, match=r"sliding_window at cross\[0\]"):
        install(make_model("t5", AutoModel), plan({"cross": WINDOW}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("telepathy", "no such variant: 'telepathy'"),
        ({"variant": "sliding_window", "reach": 0}, "greater than or equal to 1"),
        ({"variant": "sliding_window", "width": 4}, "Extra inputs"),
        ({"variant": "sliding_window", "reach": True}, "valid integer"),
        ({"variant": "sliding_window", "global_tokens": [True]}, "valid integer"),
        ({"variant": "block_sparse", "window_blocks": 2}, "odd number"),
        ({"encoder": "blockwise"}, "no place"),
        ({"encoder.self[1-]": "blockwise"}, "no place"),
    ],
)
def test_a_wrong_plan_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        plan(values)


def test_the_first_place_that_fits_decides():
    several = plan({"encoder.self[0,2-3]": "full", "encoder.self": WINDOW, "cross": "blockwise"})
    assert [several.at("encoder.self", layer).variant for layer in range(4)] == [
        "full",
        "sliding_window",
        "full",
        "full",
    ]
    assert several.at("cross", 9).variant == "blockwise"
    assert several.at("decoder.self", 0).variant == "full"
    assert plan(several.model_dump(mode="json")) == several
    assert plan("blockwise").model_dump(mode="json") == {"variant": "blockwise"}


def test_a_mask_can_be_copied_and_shown():
    mask = make_mask()
    assert mask.contiguous() is mask
    assert "LazyMask" in repr(mask)
    assert copy.copy(mask).shape == (2, 1, 150, 150)


def test_the_body_of_a_swapped_classifier_goes_under_another_head(tmp_path):
    save_body("bert", tmp_path / "plain")
    loaded = load_model(AutoModelForTokenClassification, str(tmp_path / "plain"), attention=plan(WINDOW))
    assert describe(loaded.model)[0].startswith("attention: encoder.self[0-1] sliding_window")


@pytest.fixture
def learned(tmp_path):
    """A saved classifier with linformer, and what changes the plan in its config.json by hand."""
    folder = tmp_path / "learned"
    model = make_model("bert", AutoModelForSequenceClassification)
    install(model, plan({"variant": "linformer", "k": 8}))
    model.save_pretrained(folder)

    def change(**values):
        path = folder / "config.json"
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return str(folder), change


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "heedful's attention, and no attention_plan"),
        (WINDOW, "weights of attention variants: bert.encoder.layer.0"),
        ({"encoder.self[0]": {"variant": "linformer", "k": 8}}, "weights of attention variants: bert.encoder.layer.1"),
        ({"variant": "additive"}, "weights of attention variants: bert.encoder.layer.0"),
        ({"variant": "linformer", "k": 4}, "is (8, 64)"),
    ],
)
@pytest.mark.fault(
    "a plan in config.json that was changed by hand, so that what was learned does not fit it",
    "refused: it would be dropped",
)
def test_a_plan_that_is_not_that_of_the_weights_is_refused(learned, stored, message):
    folder, change = learned
    change(attention_plan=stored)
    with pytest.raises(UserError) as refused:
        load_model(AutoModelForSequenceClassification, folder)
    assert message in str(refused.value)
    assert "plan that it was saved with" in refused.value.fix


def test_a_variant_that_learned_nothing_of_what_it_has_is_refused(saved):
    """Of a plan that was put in by hand; it would be scored as if it had been trained."""
    folder, _, _ = saved
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_plan": {"variant": "additive"}}))
    with pytest.raises(UserError, match="weights of attention variants: none"):
        load_model(AutoModelForSequenceClassification, str(folder))


def test_a_plan_that_was_taken_out_of_config_json_is_missed(saved):
    folder, _, _ = saved
    path = folder / "config.json"
    path.write_text(json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n != "attention_plan"}))
    with pytest.raises(UserError, match="heedful's attention, and no attention_plan"):
        load_model(AutoModelForSequenceClassification, str(folder))
    full = load_model(AutoModelForSequenceClassification, str(folder), attention=plan("full")).model
    assert torch.isfinite(full(input_ids=torch.arange(5, 15)[None]).logits).all()


def test_the_plan_that_another_takes_the_place_of_is_kept_in_mind(saved):
    folder, _, _ = saved
    kind = AutoModelForSequenceClassification
    assert load_model(kind, str(folder)).replaced is None
    assert load_model(kind, str(folder), attention=plan(WINDOW)).replaced is None
    assert load_model(kind, str(folder), attention=plan("full")).replaced == plan(WINDOW)


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize(
    ("saved_as", "opened_as"),
    [
        (AutoModelForCausalLM, AutoModelForQuestionAnswering),
        (AutoModelForQuestionAnswering, AutoModelForCausalLM),
        (AutoModelForQuestionAnswering, AutoModel),
        (AutoModelForCausalLM, AutoModel),
        (AutoModel, AutoModelForQuestionAnswering),
    ],
)
def test_what_variants_learned_is_found_under_another_name_of_the_body(saved_as, opened_as, shard, tmp_path):
    """Llama's question answering says ``transformer`` where its other classes say ``model``."""
    model = make_model("llama", saved_as)
    install(model, plan({"variant": "additive"}))
    learned = [parameter for name, parameter in model.named_parameters() if CHILD in name]
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(torch.rand_like(parameter))
    model.save_pretrained(tmp_path, **{"max_shard_size": shard} if shard else {})
    again = load_model(opened_as, str(tmp_path))
    assert not [name for name in again.new if "head" not in name and "qa_outputs" not in name]
    found = [parameter for name, parameter in again.model.named_parameters() if CHILD in name]
    assert all(map(torch.equal, learned, found))


def test_plans_in_another_order_are_others():
    one, other = ({"encoder.self[0,1]": "strided", "encoder.self[1,2]": "full"}, {"encoder.self[1,2]": "full"})
    assert plan(one) == plan(dict(one))
    assert plan(one) != plan(other | one)


def test_two_halves_with_a_plan_of_their_own_are_refused(saved):
    """Each half would keep its variants, and the joined model's configuration not say so."""
    folder, _, _ = saved
    tokenizer = make_tokenizer("bert", TEXTS)
    with pytest.raises(UserError, match="another attention"):
        join_encoders(str(folder), tokenizer)
