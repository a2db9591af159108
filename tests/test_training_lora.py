"""LoRA leaves nothing new untrained and nothing trained unsaved: six families, every task, whatever the head's name."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, make_config, make_decoder_tokenizer, make_task, save_body
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert import BertModel

from attention.options import Plan
from attention.seam import variant_parameters
from heedful import UserError
from training.batches import examples
from training.export import answers, difference, export
from training.loop import Trainee, run_update
from training.lora import adapter_merged, add_lora, block_linears, open_adapter, owners, save_adapter
from training.models import load_model, pretrained_hash
from training.optimizer import build_optimizer, build_scheduler, parameter_groups

TASK_NAMES = ("classification", "ner", "qa")
VARIANTS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")
    return {family: str(save_body(family, folder / family)) for family in FAMILIES}


def train(model, task, features, *, steps=2):
    """Updates, as the loop makes them. LoRA's B is zero at first, so that A moves in the second one only."""
    accelerator = Accelerator(cpu=True)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0)
    optimizer = build_optimizer("adamw_torch", groups, learning_rate=0.05, betas=(0.9, 0.999), epsilon=1e-8)
    scheduler = build_scheduler("constant", optimizer, warmup_steps=0, num_training_steps=steps)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    trainee = Trainee(accelerator, task, prepared, wrapped, scheduler, max_grad_norm=1.0, seed=0)
    for step in range(steps):
        run_update(trainee, [task.collate(examples(features, np.arange(8)))], features, step=step)


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def trained_in_full(moved):
    """Names in the model that PEFT wraps, adapters left out."""
    plain = {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in moved}
    return {name for name in plain if "lora_" not in name}


def adapted(family, bodies, task, **variant):
    torch.manual_seed(0)
    base = {"name": bodies[family]}
    loaded = load_model(task.auto_class, **base, **task.model_kwargs())
    return base, loaded.new, add_lora(loaded.model, loaded.new, r=4, **variant)


def hash_of(task, base):
    return pretrained_hash(load_model(task.auto_class, **base, **task.model_kwargs()))


CASES = [(family, task, "lora") for family in FAMILIES for task in TASK_NAMES]
CASES += [(family, "classification", variant) for family in FAMILIES for variant in ("dora", "rslora")]


@pytest.mark.parametrize(("family", "task_name", "variant"), CASES)
def test_what_is_new_is_trained_and_saved_and_the_base_is_not_touched(family, task_name, variant, bodies, tmp_path):
    task, _, features = make_task(task_name, family)
    base, new, model = adapted(family, bodies, task, **VARIANTS[variant])
    before = snapshot(model)
    train(model, task, features)
    moved = changed(before, model)
    assert trained_in_full(moved) == set(new)
    adapters = {name for name in before if "lora_" in name}
    assert {name for name in moved if "lora_" in name} == adapters
    assert len(adapters) >= 2 * 2 * 4  # A and B, two blocks, at least four linear layers in each

    probe = task.collate(examples(features, np.arange(8)))
    trained = answers(copy.deepcopy(model), probe)
    differences = export(model, task, tmp_path, probes=[probe], base=base, base_hash=hash_of(task, base))
    assert set(differences) == {"adapter", "model"}
    assert max(differences.values()) < 1e-5
    # Loaded here by hand too, lest export compared a model with itself.
    plain_model = task.auto_class.from_pretrained(tmp_path / "model").eval()
    torch.manual_seed(1)  # another draw of the head, which the adapter must bring
    again = PeftModel.from_pretrained(
        load_model(task.auto_class, **base, **task.model_kwargs()).model, tmp_path / "adapter"
    )
    for model_again in (plain_model, again):
        for ours, theirs in zip(answers(model_again, probe), trained, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_merged_for_a_while_as_it_will_be_for_good(variant, bodies):
    """In bf16, where the two round otherwise than beside each other; and not a bit of the weights is lost."""
    task, _, features = make_task("classification")
    _, _, model = adapted("bert", bodies, task, **VARIANTS[variant])
    train(model, task, features, steps=6)
    probe = task.collate(examples(features, np.arange(8)))
    before = snapshot(model)
    with torch.autocast("cpu", torch.bfloat16):
        beside = answers(model, probe)
        with adapter_merged(model):
            within = answers(model, probe)
        assert changed(before, model) == set()
        assert all(map(torch.equal, answers(model, probe), beside))
        for_good = answers(model.merge_and_unload(), probe)
    assert all(map(torch.equal, within, for_good))
    assert not any(map(torch.equal, within, beside))


@pytest.mark.fault("a merge that loses the adapter", "refused, and no model is left")
def test_merging_a_damaged_adapter_is_noticed(bodies, tmp_path, monkeypatch):
    """The proof can fail: a merge that loses an adapter is refused, and leaves no model folder."""
    task, _, features = make_task("classification")
    base, _, model = adapted("bert", bodies, task)
    train(model, task, features, steps=6)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(UserError, match="answers differently"):
        export(
            model,
            task,
            tmp_path,
            probes=[task.collate(examples(features, np.arange(8)))],
            base=base,
            base_hash=hash_of(task, base),
        )
    assert not (tmp_path / "model").exists()


def test_no_difference_hides_behind_another():
    """Python's max takes the first of a number and a NaN."""
    number, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert np.isnan(difference([number, number], [number, nan]))
    assert np.isnan(difference([number, number], [nan, number]))
    assert difference([number, 2 * number], [number, 3 * number]) == 0.5


@pytest.mark.fault("an adapter on another base of the same shapes", "refused by the base's sha256")
def test_an_adapter_goes_on_its_own_base_alone(bodies, tmp_path):
    """PEFT puts it on any model of these shapes. In how many files the base lies is nothing to it."""
    task, _, _ = make_task("classification")
    base, _, model = adapted("bert", bodies, task)
    save_adapter(model, tmp_path / "adapter", base=hash_of(task, base))
    kind = AutoModelForSequenceClassification
    own, other = tmp_path / "own", tmp_path / "other"
    AutoModel.from_pretrained(bodies["bert"]).save_pretrained(own, max_shard_size="10KB")
    assert len(list(own.glob("*.safetensors"))) > 1
    shutil.copytree(bodies["bert"], other)
    tensors = load_file(other / "model.safetensors")
    tensors["encoder.layer.1.output.dense.bias"][3] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    loaded = load_model(kind, str(own), **task.model_kwargs())
    open_adapter(loaded.model, tmp_path / "adapter", base=pretrained_hash(loaded))
    loaded = load_model(kind, str(other), **task.model_kwargs())
    PeftModel.from_pretrained(copy.deepcopy(loaded.model), tmp_path / "adapter")  # the trap
    with pytest.raises(UserError, match="an adapter of another base"):
        open_adapter(loaded.model, tmp_path / "adapter", base=pretrained_hash(loaded))
    (tmp_path / "adapter/base.json").unlink()
    with pytest.raises(UserError, match="does not say what it was trained on"):
        open_adapter(loaded.model, tmp_path / "adapter", base=pretrained_hash(loaded))


def test_a_pretrained_head_is_adapted_not_replaced(bodies, tmp_path):
    """A checkpoint that holds its head: nothing is new, and the frozen head answers."""
    task, _, features = make_task("classification", "deberta-v2")
    first = load_model(task.auto_class, bodies["deberta-v2"], **task.model_kwargs())
    assert {"pooler.dense.weight", "pooler.dense.bias"} < set(first.new)
    first.model.save_pretrained(tmp_path / "whole")
    base = {"name": str(tmp_path / "whole")}
    loaded = load_model(task.auto_class, **base, **task.model_kwargs())
    assert loaded.new == ()
    model = add_lora(loaded.model, loaded.new, r=2)
    before = snapshot(model)
    train(model, task, features)
    assert all("lora_" in name for name in changed(before, model))
    export(
        model,
        task,
        tmp_path,
        probes=[task.collate(examples(features, np.arange(8)))],
        base=base,
        base_hash=hash_of(task, base),
    )


def strange_head(name):
    """A class with a linear head of this name on BERT's body."""

    class Strange(PreTrainedModel):
        config_class = type(make_config("bert"))
        base_model_prefix = "bert"

        def __init__(self, config):
            super().__init__(config)
            self.bert = BertModel(config)
            self.add_module(name, nn.Linear(config.hidden_size, config.num_labels))
            self.post_init()

        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            body = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return SequenceClassifierOutput(logits=getattr(self, name)(body.last_hidden_state[:, 0]))

    return Strange


def test_a_head_under_an_unusual_name(bodies, tmp_path):
    """PEFT knows three names; this is none of them."""
    kind = strange_head("answering_machine")
    task, _, features = make_task("classification")
    loaded = load_model(kind, bodies["bert"], new_head=True, num_labels=3)
    assert loaded.new == ("answering_machine.bias", "answering_machine.weight")
    model = add_lora(loaded.model, loaded.new, r=2)
    before = snapshot(model)
    train(model, task, features)
    moved = changed(before, model)
    assert trained_in_full(moved) == set(loaded.new)
    assert {n for n in moved if "lora_" in n} == {n for n in before if "lora_" in n}
    probe = task.collate(examples(features, np.arange(8)))
    trained = answers(model, probe)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(load_model(kind, bodies["bert"], new_head=True, num_labels=3).model, tmp_path)
    torch.testing.assert_close(answers(again, probe), trained)


@pytest.mark.parametrize("name", ["dense", "query"])
def test_a_head_that_peft_would_mistake_for_pretrained_layers_is_refused(name, bodies):
    loaded = load_model(strange_head(name), bodies["bert"], new_head=True, num_labels=3)
    with pytest.raises(UserError, match=f"the new {name} would free pretrained layers: bert.encoder"):
        add_lora(loaded.model, loaded.new, r=2)


def test_a_renewed_head_is_trained(bodies, tmp_path):
    """DistilBERT's new ``classifier`` also ends ``pre_classifier``, which is then trained and saved too."""
    task, _, features = make_task("classification", "distilbert")
    first = load_model(task.auto_class, bodies["distilbert"], **task.model_kwargs())
    first.model.save_pretrained(tmp_path / "whole")
    base = {"name": str(tmp_path / "whole"), "new_head": True}
    loaded = load_model(task.auto_class, **base, **task.model_kwargs())
    assert loaded.new == ("classifier.bias", "classifier.weight")
    model = add_lora(loaded.model, loaded.new, r=2)
    before = snapshot(model)
    train(model, task, features)
    assert trained_in_full(changed(before, model)) >= set(loaded.new)
    differences = export(
        model,
        task,
        tmp_path,
        probes=[task.collate(examples(features, np.arange(8)))],
        base=base,
        base_hash=hash_of(task, base),
    )
    assert max(differences.values()) < 1e-5


def test_linear_layers_of_the_blocks_are_found_and_heads_are_not(bodies):
    model = load_model(AutoModelForSequenceClassification, bodies["roberta"], num_labels=2).model
    wrapped = add_lora(model, ["classifier.dense.weight"], r=2)
    hit = {name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if "lora_A" in name}
    assert len(hit) == 2 * 6
    assert all(".layer." in name for name in hit)


def test_named_modules_are_taken_and_unknown_ones_refused(bodies):
    def load():
        return load_model(AutoModelForSequenceClassification, bodies["bert"], num_labels=2)

    loaded = load()
    wrapped = add_lora(loaded.model, loaded.new, r=2, lora_alpha=3, target_modules=["query"])
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 2
    assert (wrapped.peft_config["default"].lora_alpha, wrapped.peft_config["default"].r) == (3, 2)
    for targets in (["q_proj"], ["query", "q_proj"]):
        with pytest.raises(UserError, match="BertForSequenceClassification has no module 'q_proj'") as caught:
            add_lora(load().model, loaded.new, r=2, target_modules=targets)
        assert caught.value.expected == "such as dense, key, query, value"


@pytest.mark.parametrize(
    ("values", "learned"),
    [
        ({"variant": "linformer", "k": 8}, ["E", "F"]),
        ({"variant": "additive"}, ["W", "U", "v"]),
        ({"variant": "adaptive_span", "max_span": 1, "ramp": 4}, ["span"]),
    ],
)
def test_what_an_attention_variant_learns_is_trained_and_saved_with_the_adapter(values, learned, bodies, tmp_path):
    task, _, features = make_task("classification")
    base = {"name": bodies["bert"], "attention": Plan.model_validate(values)}
    loaded = load_model(task.auto_class, **base, **task.model_kwargs())
    brought = set(variant_parameters(loaded.model))
    layers = [f"bert.encoder.layer.{i}.attention.self.attention_variant" for i in range(2)]
    assert brought == {f"{layer}.{name}" for layer in layers for name in learned}
    assert brought < set(loaded.new)
    model = add_lora(loaded.model, loaded.new, r=2)
    before = snapshot(model)
    train(model, task, features, steps=3)
    assert trained_in_full(changed(before, model)) == set(loaded.new)
    differences = export(
        model,
        task,
        tmp_path,
        probes=[task.collate(examples(features, np.arange(8)))],
        base=base,
        base_hash=hash_of(task, base),
    )
    assert max(differences.values()) < 1e-5
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {name for name in brought if f"base_model.model.{name}" in stored} == brought
    merged = load_model(task.auto_class, str(tmp_path / "model"), **task.model_kwargs())
    assert merged.new == ()
    for name in brought:
        assert torch.equal(merged.model.get_parameter(name), stored[f"base_model.model.{name}"])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no linear layers inside numbered blocks"):
        block_linears(nn.Linear(2, 2))


def test_owners():
    assert owners(["classifier.weight", "classifier.bias", "pooler.dense.weight"]) == ["classifier", "pooler.dense"]


def test_new_tokens_of_a_tied_model_are_trained_on_both_sides(tmp_path):
    """PEFT alone would train a copy of the embeddings, and leave the output layer the matrix as it was."""
    tokenizer = make_decoder_tokenizer()
    save_body("llama", tmp_path / "base", tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    tokenizer.add_tokens([f"new{i}" for i in range(200)])
    base = {"name": str(tmp_path / "base"), "tokenizer": tokenizer}
    loaded = load_model(AutoModelForCausalLM, **base)
    task, _, features = make_task("generation", "llama", count=48)
    task = replace(task, tokenizer=tokenizer)
    wrapped = add_lora(loaded.model, loaded.new, r=2)
    before = wrapped.get_output_embeddings().weight.detach().clone()
    train(wrapped, task, features)
    words, head = wrapped.get_input_embeddings().weight, wrapped.get_output_embeddings().weight
    assert not torch.equal(head, before)
    torch.testing.assert_close(words, head)
    differences = export(
        wrapped,
        task,
        tmp_path / "run",
        probes=[task.collate(examples(features, np.arange(4)))],
        base=base,
        base_hash=hash_of(task, base),
    )
    assert max(differences.values()) < 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
