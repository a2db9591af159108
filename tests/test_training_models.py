"""Loading a model: what transformers would let pass without a word is refused or said."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, TEXTS, save_body, tokenizer_for
from tiny_text import make_tokenizer
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from heedful import UserError
from sources.files import write_whole
from training.models import load_model
from training.scratch import new_config, new_model
from training.tokenizers import compare_vocabularies, load_tokenizer
from training.vocabulary import train_tokenizer
from training.warm_start import join_encoders


def labels(*names):
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")
    return {family: save_body(family, folder / family) for family in FAMILIES}


@pytest.fixture
def body(bodies, tmp_path):
    """A copy that the test may break."""
    return shutil.copytree(bodies["bert"], tmp_path / "bert")


@pytest.fixture
def with_head(bodies, tmp_path):
    """A checkpoint with a head for the labels no and yes."""
    loaded = load_model(AutoModelForSequenceClassification, str(bodies["bert"]), **labels("no", "yes"))
    loaded.model.save_pretrained(tmp_path / "head")
    return str(tmp_path / "head")


def refusal(*args, load=load_model, **kwargs):
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "electra": {"classifier.dense", "classifier.out_proj"},
    "albert": {"classifier"},
    "deberta-v2": {"pooler.dense", "classifier"},
    "modernbert": {"head.dense", "head.norm", "classifier"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_new_parameters_are_named_and_the_rest_is_the_checkpoints(family, bodies):
    loaded = load_model(AutoModelForSequenceClassification, str(bodies[family]), **labels("a", "b", "c"))
    assert {name.rpartition(".")[0] for name in loaded.new} == HEADS[family]
    stored = load_file(bodies[family] / "model.safetensors")
    own = loaded.model.base_model.state_dict()
    missing = [name for name, tensor in stored.items() if name not in own or not torch.equal(own[name], tensor)]
    assert set(missing) == {name.removeprefix(f"{loaded.model.base_model_prefix}.") for name in loaded.unused}
    assert not loaded.model.training


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_body_under_another_name_is_found(family, tmp_path):
    """The trap: for question answering transformers looks for ``transformer.*`` and starts at random."""
    folder = save_body(family, tmp_path / "body")
    stored = load_file(folder / "model.safetensors")
    _, info = AutoModelForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    assert len(info["missing_keys"]) > 20
    loaded = load_model(AutoModelForQuestionAnswering, str(folder), num_labels=2)
    assert loaded.new == ("qa_outputs.bias", "qa_outputs.weight")
    body = {f"model.{name}": tensor for name, tensor in loaded.model.base_model.state_dict().items()}
    assert all(torch.equal(stored[name], tensor) for name, tensor in body.items())
    loaded.model.save_pretrained(tmp_path / "saved")  # transformers alone must find it again
    _, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (set(), set())


def test_a_checkpoint_of_which_nothing_fits_is_refused(body):
    """Not trained from scratch and called pretrained."""
    tensors = {f"strange.{name}": tensor for name, tensor in load_file(body / "model.safetensors").items()}
    del tensors["strange.embeddings.word_embeddings.weight"]
    save_file(tensors, body / "model.safetensors", {"format": "pt"})
    message = refusal(AutoModelForSequenceClassification, str(body), **labels("a", "b"))
    assert "BertForSequenceClassification has a place for none: strange.embeddings" in message


def test_weights_are_fp32_whatever_the_checkpoint(bodies, tmp_path):
    transformers.AutoModel.from_pretrained(bodies["bert"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(AutoModelForTokenClassification, str(tmp_path), **labels("a", "b"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_a_folder_without_tokenizer_files_is_refused(body):
    assert load_tokenizer(str(body)).is_fast
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (body / file).unlink()
    assert len(transformers.AutoTokenizer.from_pretrained(body)) < 10  # the trap: transformers makes one up
    assert "without tokenizer files" in refusal(str(body), load=load_tokenizer)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    tokenizer = make_tokenizer("bert", TEXTS)
    save_body("bert", tmp_path / "fits", tokenizer=tokenizer, vocab_size=len(tokenizer))
    save_body("bert", tmp_path / "small", tokenizer=tokenizer, vocab_size=len(tokenizer) - 1)
    assert len(load_tokenizer(str(tmp_path / "fits"))) == len(tokenizer)
    assert f"{len(tokenizer)} tokens for a model of {len(tokenizer) - 1}" in refusal(
        str(tmp_path / "small"), load=load_tokenizer
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(body, value):
    tensors = load_file(body / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 2] = value
    save_file(tensors, body / "model.safetensors", {"format": "pt"})
    message = refusal(AutoModelForSequenceClassification, str(body), **labels("a", "b"))
    assert "NaN or infinite weights: bert.encoder.layer.1.output.dense.weight" in message


@pytest.mark.fault("a changed bit in a model that heedful or a pull wrote", "refused by its hash")
def test_a_changed_bit_is_refused_where_there_is_a_manifest(bodies, tmp_path):
    folder = tmp_path / "model"
    write_whole(folder, lambda aside: shutil.copytree(bodies["bert"], aside, dirs_exist_ok=True))
    assert load_model(transformers.AutoModel, str(folder)).new == ()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors does not match its hash" in refusal(transformers.AutoModel, str(folder))


@pytest.mark.parametrize("keep", [0, 5, 400, -3])
def test_truncated_weights_are_refused(body, keep):
    file = body / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "safetensors" in refusal(transformers.AutoModel, str(body))


def test_pickled_weights_are_refused(body):
    torch.save(load_file(body / "model.safetensors"), body / "pytorch_model.bin")
    (body / "model.safetensors").unlink()
    assert "without safetensors, the only weights that are read" in refusal(transformers.AutoModel, str(body))


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_model(transformers.AutoModel, name)])
def test_no_such_folder_and_no_such_model(load, tmp_path):
    assert "no such model folder" in refusal("./absent", load=load)
    assert "no such model folder" in refusal("assets/absent", load=load)
    (tmp_path / "config.json").write_text("{")
    assert "no model configuration" in refusal(str(tmp_path), load=load)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert "no model configuration" in refusal(str(tmp_path), load=load)


@pytest.mark.parametrize("names", [("no", "yes", "maybe"), ("yes", "no"), ("0", "1")])
def test_a_head_for_other_labels_is_refused(with_head, names):
    message = refusal(AutoModelForSequenceClassification, with_head, **labels(*names))
    assert "a head for 2 labels: no, yes" in message
    assert f"in this order: {', '.join(names)}" in message
    assert "model.init=new_head" in message


def test_a_head_for_these_labels_is_kept(with_head):
    loaded = load_model(AutoModelForSequenceClassification, with_head, **labels("no", "yes"))
    assert loaded.new == loaded.unused == ()
    assert torch.equal(loaded.model.classifier.weight, load_file(f"{with_head}/model.safetensors")["classifier.weight"])


def test_a_head_with_nameless_labels_is_kept_if_its_size_fits(bodies, tmp_path):
    load_model(AutoModelForSequenceClassification, str(bodies["bert"]), num_labels=3).model.save_pretrained(tmp_path)
    assert load_model(AutoModelForSequenceClassification, str(tmp_path), **labels("a", "b", "c")).new == ()
    assert "a head for 3 labels" in refusal(AutoModelForSequenceClassification, str(tmp_path), **labels("a", "b"))


@pytest.mark.parametrize("names", [("no", "yes", "maybe"), ("yes", "no"), ("no", "yes")])
def test_new_head_starts_a_fresh_one_and_says_so(with_head, names):
    loaded = load_model(AutoModelForSequenceClassification, with_head, new_head=True, **labels(*names))
    assert loaded.new == ("classifier.bias", "classifier.weight")
    assert loaded.model.config.id2label == dict(enumerate(names))
    stored = load_file(f"{with_head}/model.safetensors")
    assert not torch.equal(loaded.model.classifier.weight[:2], stored["classifier.weight"])
    assert torch.equal(
        loaded.model.bert.embeddings.word_embeddings.weight, stored["bert.embeddings.word_embeddings.weight"]
    )


def test_another_tasks_head_is_left_out_and_said(with_head):
    loaded = load_model(AutoModelForQuestionAnswering, with_head, num_labels=2)
    assert loaded.new == ("qa_outputs.bias", "qa_outputs.weight")
    assert {"classifier.bias", "classifier.weight"} <= set(loaded.unused)


TINY = {
    "t5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
}


@pytest.fixture(scope="module")
def seq2seq_tokenizer():
    """Padding 0, unknown 1, begin 2, end 3, unlike T5's (0, -, -, 1) and BART's (1, 3, 0, 2)."""
    return train_tokenizer(TEXTS, kind="bpe", vocab_size=270)


@pytest.mark.parametrize(
    ("model_type", "ids"),
    [
        ("t5", {"decoder_start_token_id": 0}),
        ("mt5", {"decoder_start_token_id": 0}),
        ("bart", {"decoder_start_token_id": 3, "forced_eos_token_id": 3}),
        ("marian", {"decoder_start_token_id": 0, "forced_eos_token_id": 3}),
        ("pegasus", {"decoder_start_token_id": 0, "forced_eos_token_id": 3}),
        ("mbart", {"decoder_start_token_id": 0, "forced_eos_token_id": 3}),
        ("bert", {}),
        ("gpt2", {}),
        ("modernbert", {"cls_token_id": 2, "sep_token_id": 3}),
    ],
)
def test_token_ids_from_scratch_are_the_tokenizers(model_type, ids, seq2seq_tokenizer):
    config = new_config({"model_type": model_type}, seq2seq_tokenizer)
    found = {name: i for name, i in config.to_dict().items() if name.endswith("_token_id")}
    assert found == {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3} | ids
    assert config.vocab_size == len(seq2seq_tokenizer)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_layers"])
def test_a_configuration_takes_the_classs_names_and_their_common_ones(key, seq2seq_tokenizer):
    config = new_config({"model_type": "t5", key: 3, "tie_word_embeddings": False}, seq2seq_tokenizer)
    assert (config.num_layers, config.scale_decoder_outputs) == (3, False)  # T5 1.1, not T5


def test_a_bert_tokenizers_marks_serve_as_begin_and_end():
    config = new_config({"model_type": "bart"}, make_tokenizer("bert", TEXTS))
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.decoder_start_token_id) == (
        0,
        2,
        3,
        3,
    )


@pytest.mark.parametrize("model_type", TINY)
def test_a_model_from_scratch_is_new_in_every_parameter(model_type, seq2seq_tokenizer):
    generates = model_type in ("t5", "bart")
    auto_class = transformers.AutoModelForSeq2SeqLM if generates else AutoModelForSequenceClassification
    torch.manual_seed(0)
    loaded = new_model(auto_class, {"model_type": model_type, **TINY[model_type]}, seq2seq_tokenizer)
    assert set(loaded.new) == {name for name, _ in loaded.model.named_parameters()}
    assert loaded.unused == ()
    assert not loaded.model.training
    assert loaded.model.get_input_embeddings().num_embeddings == len(seq2seq_tokenizer)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    for config in (loaded.model.config, loaded.model.generation_config if generates else loaded.model.config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 2, 3)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ({"model_type": "t5", "d_modell": 16}, "did you mean d_model?"),
        ({"model_type": "distillbert"}, "did you mean distilbert?"),
        ({"model_type": "t5", "vocab_size": 99}, "what the tokenizer and the task decide"),
        ({"model_type": "t5", "pad_token_id": 9}, "what the tokenizer and the task decide"),
        ({"model_type": "t5", "d_model": "wide"}, "expected int, got str"),
        ({"model_type": "bert", **TINY["bert"], "num_attention_heads": 3}, "could not be made"),
        ({"model_type": "encoder-decoder"}, "composed of other models"),
        ({"model_type": "vit"}, "has no vocabulary"),
        ({"model_type": "marian"}, "could not be made"),
    ],
)
def test_an_architecture_that_would_not_be_what_it_says_is_refused(architecture, expected, seq2seq_tokenizer):
    message = refusal(AutoModelForSequenceClassification, architecture, seq2seq_tokenizer, load=new_model)
    assert "model.architecture" in message
    assert expected in message


def extended(*tokens):
    tokenizer = make_tokenizer("bert", TEXTS)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_embeddings_grow_with_another_tokenizer_and_count_as_new(tmp_path):
    own = make_tokenizer("bert", TEXTS)
    save_body("bert", tmp_path, tokenizer=own, vocab_size=len(own))
    torch.manual_seed(0)
    tokenizer = extended("moonlight", "Berlin-Mitte")
    loaded = load_model(AutoModelForSequenceClassification, str(tmp_path), tokenizer=tokenizer, **labels("a", "b"))
    table, stored = loaded.model.get_input_embeddings().weight, load_file(tmp_path / "model.safetensors")
    assert torch.equal(table[: len(own)], stored["embeddings.word_embeddings.weight"])
    assert len(table) == loaded.model.config.vocab_size == len(own) + 2
    assert "bert.embeddings.word_embeddings.weight" in loaded.new
    assert "2 new: moonlight, Berlin-Mitte" in compare_vocabularies(tokenizer, own)
    assert "all are the model's own" in compare_vocabularies(own, own)


def test_the_same_size_with_another_vocabulary_is_said():
    own, other = make_tokenizer("bert", TEXTS), make_tokenizer("bert", [text[::-1] for text in TEXTS])
    assert "begin with the embedding of another token" in compare_vocabularies(other, own)


def test_a_tokenizer_with_another_padding_than_the_models_is_refused(bodies):
    tokenizer = make_tokenizer("bert", TEXTS)
    tokenizer.pad_token = "the"
    # Not even where the task has the configuration say the same as the tokenizer.
    given = {"tokenizer": tokenizer, "pad_token_id": tokenizer.pad_token_id}
    message = refusal(transformers.AutoModel, str(bodies["bert"]), **given)
    assert f"pad_token_id {tokenizer.pad_token_id}" in message
    assert "0, as the model was trained with" in message


def test_what_is_new_in_an_encoder_used_twice_keeps_the_scale_of_its_states(tmp_path):
    save_body("bert", tmp_path / "body")
    loaded = join_encoders(str(tmp_path / "body"), tokenizer_for("bert"))
    width = loaded.model.config.decoder.hidden_size
    drawn = [p for n, p in loaded.model.named_parameters() if n in loaded.new and "crossattention" in n and p.ndim == 2]
    assert float(torch.cat([p.detach().flatten() for p in drawn]).std()) == pytest.approx(width**-0.5, rel=0.05)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_of_an_encoder_used_twice_the_first_half_looks_both_ways(family, tmp_path):
    """transformers marks the decoder's configuration in place. A half goes by its configuration when it is made, and
    again by its configuration as it runs, but there only where there is padding."""
    save_body(family, tmp_path / "body")
    model = join_encoders(str(tmp_path / "body"), tokenizer_for(family)).model
    model.save_pretrained(tmp_path / "joined")
    ids_BT = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8]])
    mask_BT = torch.ones_like(ids_BT)
    for padding in (0, 1):
        mask_BT[2, 4 - padding :] = 0
        for half in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "joined").eval()):
            encoded_BTD = half.encoder(ids_BT, attention_mask=mask_BT).last_hidden_state
            assert not torch.allclose(encoded_BTD[0, 0], encoded_BTD[1, 0])
            states = {"encoder_hidden_states": encoded_BTD[:1].expand_as(encoded_BTD), "attention_mask": mask_BT}
            logits_BTV = half.decoder(ids_BT, **states).logits
            assert torch.allclose(logits_BTV[0, :3], logits_BTV[1, :3], atol=1e-6)
            assert not torch.allclose(logits_BTV[0, 3], logits_BTV[1, 3])
