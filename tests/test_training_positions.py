"""More positions: what is made of them, that short texts are read as before, and that plain transformers finds them."""

import pytest
import torch
import transformers
from peft import PeftModel
from tiny_families import (
    COMMON,
    DECODERS,
    FAMILIES,
    SEQ2SEQ,
    SIZES,
    tokenizer_for,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from attention.options import Plan
from attention.seam import variant_parameters
from heedful import UserError
from training.lora import add_lora
from training.models import load_model
from training.positions import Wanted
from training.warm_start import join_encoders

OLD, NEW = 64, 160
ROBERTA = SIZES | {"pad_token_id": 1, "max_position_embeddings": OLD + 2}
MORE = {
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
    },
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": SIZES,
}
"""Families that are tried here alone."""
LEARNED = ("bert", "distilbert", "electra", "albert", "gpt2", "roberta", "xlm-roberta", "camembert", "opt", "bart")
LEARNED += ("mbart", "gpt_neo")
COMPUTED = ("marian", "pegasus")
ROTARY = ("llama", "mistral", "qwen3", "gemma2", "gpt_neox")
KINDS = dict.fromkeys(DECODERS, AutoModelForCausalLM) | dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM)
KINDS |= dict.fromkeys(("opt", "gpt_neo", "gpt_neox", "gemma3_text", "gptj"), AutoModelForCausalLM)
KINDS |= {"encoder-decoder": AutoModelForSeq2SeqLM}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each family's checkpoint lies, written when it is first asked for."""
    root = tmp_path_factory.mktemp("positions")

    def of(family):
        if not (root / family).is_dir():
            config = transformers.AutoConfig.for_model(family, **COMMON | KNOWN[family])
            torch.manual_seed(0)
            kind = KINDS.get(family, AutoModel)
            kind.from_config(config).save_pretrained(root / family)
        return str(root / family)

    return of


KNOWN = FAMILIES | DECODERS | SEQ2SEQ | MORE | {"roberta": ROBERTA}


def load(folder, family, how="auto", *, new=NEW):
    kind = KINDS.get(family, AutoModel)
    return load_model(kind, folder(family), positions=Wanted(new, new, how))


def answer(model, length, **given):
    """What the model makes of a text, with padding behind a second, shorter row."""
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, 400, (2, length), generator=draw)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, length - 3 :] = 0
    ids_BT[1, length - 3 :] = model.config.pad_token_id
    if model.config.is_encoder_decoder:
        given |= {"decoder_input_ids": ids_BT[:1].expand(2, -1)}
    with torch.no_grad():
        return model(input_ids=ids_BT, attention_mask=mask_BT, **given)[0]


def same(one, other, length):
    """The same weights, and answers as near as memory laid out otherwise lets them be."""
    own = other.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in one.state_dict().items())
    return torch.allclose(answer(one, length), answer(other, length), atol=1e-6)


def tables(model):
    names = ("position_embeddings", "embed_positions", "wpe")
    return {
        n: m.weight.detach()
        for n, m in model.named_modules()
        if n.endswith(names) and isinstance(m, torch.nn.Embedding)
    }


@pytest.mark.parametrize("family", [*LEARNED, *COMPUTED, *ROTARY])
def test_a_longer_text_is_read_and_transformers_alone_reads_it_too(family, folder, tmp_path):
    loaded = load(folder, family)
    assert (loaded.growth.old, loaded.growth.new) == (OLD, NEW)
    kind = KINDS.get(family, AutoModel)
    loaded.model.save_pretrained(tmp_path)
    alone, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert same(loaded.model, alone.eval(), NEW)
    if family not in ROTARY:
        with pytest.raises((IndexError, RuntimeError)):
            answer(alone, NEW + 1)
    plain = kind.from_pretrained(folder(family)).eval()
    as_before = torch.allclose(answer(loaded.model, OLD), answer(plain, OLD), atol=1e-6)
    assert as_before == (family not in ROTARY), "what slows rotary positions down changes short texts too"


@pytest.mark.parametrize("family", LEARNED)
def test_a_table_is_repeated_behind_the_rows_that_are_no_positions(family, folder):
    loaded = load(folder, family)
    before = tables(KINDS.get(family, AutoModel).from_pretrained(folder(family)))
    grown = tables(loaded.model)
    assert {f"{name}.weight" for name in grown} <= set(loaded.new)
    assert grown.keys() == before.keys()
    for name, table_ND in grown.items():
        reserved = len(before[name]) - OLD
        assert reserved == (2 if family in {"roberta", "xlm-roberta", "camembert", "bart", "mbart", "opt"} else 0)
        assert torch.equal(table_ND[: OLD + reserved], before[name])
        assert torch.equal(table_ND[reserved + OLD :], table_ND[reserved : NEW - OLD + reserved])
        assert len(table_ND) == NEW + reserved


@pytest.mark.parametrize("family", ["bert", "roberta", "bart"])
def test_a_table_is_stretched_from_end_to_end(family, folder):
    before = tables(KINDS.get(family, AutoModel).from_pretrained(folder(family)))
    for name, table_ND in tables(load(folder, family, "interpolate", new=2 * OLD - 1).model).items():
        reserved = len(before[name]) - OLD
        assert torch.equal(table_ND[:reserved], before[name][:reserved])
        whole, halves = table_ND[reserved::2], table_ND[reserved + 1 :: 2]
        own = before[name][reserved:]
        assert torch.allclose(whole, own, atol=1e-6)
        assert torch.allclose(halves, (own[1:] + own[:-1]) / 2, atol=1e-6)


@pytest.mark.parametrize("family", COMPUTED)
def test_what_the_model_computes_is_computed_further(family, folder):
    loaded = load(folder, family)
    assert not [name for name in loaded.new if "embed_positions" in name]
    grown = tables(loaded.model)
    assert len(grown) == 2
    for table_ND in grown.values():
        position_N1, half = torch.arange(NEW, dtype=torch.float64)[:, None], table_ND.shape[1] // 2
        angle_ND = position_N1 / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
        expected_ND = torch.cat([angle_ND.sin(), angle_ND.cos()], dim=1).float()
        assert torch.allclose(table_ND, expected_ND, atol=1e-5)


def test_rows_of_a_computed_table_stay_as_the_checkpoint_has_them(folder, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder("pegasus"))
    for name in tables(model):
        model.get_parameter(f"{name}.weight").data.mul_(2)
    model.save_pretrained(tmp_path)
    grown = tables(load_model(AutoModelForSeq2SeqLM, str(tmp_path), positions=Wanted(NEW, NEW)).model)
    assert all(torch.equal(grown[name][:OLD], table_PD) for name, table_PD in tables(model).items())


def test_a_new_head_and_more_positions_go_together(folder, tmp_path):
    kind = AutoModelForSequenceClassification
    load_model(kind, folder("bert"), num_labels=2).model.save_pretrained(tmp_path)
    loaded = load_model(kind, str(tmp_path), new_head=True, num_labels=3, positions=Wanted(NEW, NEW))
    assert loaded.new == ("bert.embeddings.position_embeddings.weight", "classifier.bias", "classifier.weight")
    assert answer(loaded.model, NEW).shape == (2, 3)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_linear_counts_in_smaller_steps(family, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder(family)).eval()
    grown = load(folder, family, "linear", new=4 * OLD).model
    position_BT = torch.arange(10)[None].expand(2, -1)
    assert torch.allclose(
        answer(grown, 10, position_ids=4 * position_BT), answer(plain, 10, position_ids=position_BT), atol=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_yarn_leaves_what_turns_fast_and_slows_down_what_turns_slowly(family, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder(family))
    grown = load(folder, family, new=4 * OLD).model
    (before,), (after,) = (
        [b for n, b in m.named_buffers() if n.endswith("rotary_emb.inv_freq")] for m in (plain, grown)
    )
    turns = OLD * before / (2 * torch.pi)  # within the old positions; YaRN's beta_slow is 1
    assert torch.allclose(after[turns < 1], before[turns < 1] / 4)
    assert (after <= before).all()
    assert grown.config.rope_parameters["original_max_position_embeddings"] == OLD


@pytest.mark.parametrize("family", ["bert", "roberta", "bart", "pegasus", "llama", "modernbert"])
def test_as_many_positions_as_there_are_change_nothing(family, folder):
    kind = KINDS.get(family, AutoModel)
    loaded, plain = load(folder, family, new=OLD), kind.from_pretrained(folder(family))
    assert (loaded.growth, loaded.new) == (None, ())
    assert loaded.model.config.to_dict() == plain.config.to_dict()
    own = loaded.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("family", ["t5", "deberta-v2"])
def test_relative_positions_have_no_end(family, folder, tmp_path):
    config = transformers.AutoConfig.for_model(family, **({"vocab_size": 400} | KNOWN[family]))
    KINDS.get(family, AutoModel).from_config(config).save_pretrained(tmp_path)
    loaded = load_model(KINDS.get(family, AutoModel), str(tmp_path), positions=Wanted(4096, 4096))
    assert loaded.growth is None
    answer(loaded.model, 1000)


GEMMA3 = {"head_dim": 8, "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
HALF = {"model_type": "bert", **SIZES, **COMMON}


@pytest.mark.parametrize(
    ("family", "kwargs", "how", "message"),
    [
        (
            "bert",
            {},
            "yarn",
            "positions=yarn for the table of BertModel expected one of: auto, tile, interpolate",
        ),
        ("llama", {}, "tile", "for the rotary positions of LlamaForCausalLM expected one of: auto, yarn, linear"),
        ("pegasus", {}, "tile", "for the table of PegasusForConditionalGeneration expected one of: auto"),
        ("modernbert", {}, "auto", "at most 64: this model's rotary positions differ by layer"),
        ("gemma3_text", SIZES | GEMMA3, "auto", "at most 64: this model's rotary positions differ by layer"),
        ("llama", {"rope_parameters": SCALED}, "auto", "rotary positions are scaled already"),
        (
            "gptj",
            {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
            "auto",
            "this model's positions have an end",
        ),
        (
            "encoder-decoder",
            {"encoder": HALF, "decoder": HALF | {"max_position_embeddings": 128, "is_decoder": True}},
            "auto",
            "the parts of this model have positions of their own",
        ),
        (
            "deberta-v2",
            {"position_biased_input": True},
            "auto",
            "with which encoder.rel_embeddings.weight would grow too",
        ),
    ],
)
def test_what_can_not_have_more_is_refused(family, kwargs, how, message, tmp_path):
    kind = KINDS.get(family, AutoModel)
    sizes = (COMMON if family != "encoder-decoder" else {}) | KNOWN.get(family, {}) | kwargs
    config = transformers.AutoConfig.for_model(family, **sizes)
    kind.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(kind, str(tmp_path), positions=Wanted(NEW, NEW, how))
    assert message in " ".join(str(caught.value).split())


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "bart"])
def test_with_lora_a_table_that_grew_is_trained_and_saved(family, folder, tmp_path):
    loaded = load(folder, family)
    wrapped = add_lora(loaded.model, loaded.new, r=2)
    grown = {f"{name}.weight" for name in tables(load(folder, family).model)}
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in trained} == grown
    with torch.no_grad():
        for table_ND in trained.values():
            table_ND.normal_()
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder, family).model, tmp_path)
    before = answer(wrapped.eval(), NEW)
    assert torch.allclose(before, answer(again, NEW), atol=1e-6)
    assert torch.allclose(before, answer(again.merge_and_unload(), NEW), atol=1e-5)


def test_what_an_attention_learns_has_the_length_of_the_new_positions(folder, tmp_path):
    plan = Plan.model_validate({"variant": "linformer", "k": 8})
    wanted = Wanted(NEW, NEW)
    loaded = load_model(AutoModel, folder("bert"), attention=plan, positions=wanted)
    assert {tuple(loaded.model.get_parameter(name).shape) for name in variant_parameters(loaded.model)} == {(8, NEW)}
    loaded.model.save_pretrained(tmp_path)

    again = load_model(AutoModel, str(tmp_path), positions=wanted)
    assert same(loaded.model, again.model, NEW)
    with pytest.raises(UserError, match=r"an attention whose .* is \(8, 160\)"):
        load_model(AutoModel, str(tmp_path), positions=Wanted(NEW + 1, NEW + 1))
    wider = load_model(AutoModel, str(tmp_path), attention=Plan.model_validate("full"), positions=Wanted(200, 200))
    answer(wider.model, 200)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_both_halves_of_a_joined_model_grow(family, folder, tmp_path):
    tokenizer = tokenizer_for(family)
    loaded = join_encoders(folder(family), tokenizer, positions=Wanted(NEW, NEW))
    loaded.model.save_pretrained(tmp_path)
    alone = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert same(loaded.model, alone, NEW)
    on = load_model(AutoModelForSeq2SeqLM, str(tmp_path), positions=Wanted(200, 200))
    assert on.growth.old == NEW
    assert [len(table) for table in tables(on.model).values()] == [200 + 2 * (family == "roberta")] * 2
    assert torch.allclose(answer(on.model, NEW), answer(alone, NEW), atol=1e-6)
    answer(on.model, 200)
