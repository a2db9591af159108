"""4 bits under LoRA: bitsandbytes' own numbers as the oracle, and what is trained is what is saved."""

import json
from dataclasses import replace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from attention_samples import NARROW
from safetensors.torch import load_file
from test_training_loop import flat, make_trainee
from test_training_lora import train
from tiny_families import make_task, save_body
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.t5.modeling_t5 import T5PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attention.options import Plan
from heedful import UserError
from tasks.batching import model_inputs
from training import checkpoints, quantization
from training.batches import examples
from training.checkpoints import Position, model_tensors
from training.export import answers, export
from training.footprint import activation_bytes, measure
from training.loop import run_update
from training.lora import add_lora, linears_of_blocks
from training.models import load_model, pretrained_hash
from training.quantization import FourBitLinear, FourBits, elements, in_four_bits, merge, quantize

TASK_OF = {"llama": "generation", "qwen3": "generation", "gpt2": "generation", "t5": "summarization"}
NF4, FP4, DOUBLE = FourBits(), FourBits("fp4"), FourBits("nf4", use_double_quant=True)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")

    def body(family):
        if not (folder / family).exists():
            save_body(family, folder / family, initializer_range=0.2)
        return str(folder / family)

    return body


def load(family, bodies, four_bits=NF4, *, attention=None):
    """A task, its features, and what is loaded for it, in 4 bits or not."""
    task, _, features = make_task(TASK_OF.get(family, "classification"), family, count=48)
    torch.manual_seed(0)
    loaded = load_model(task.auto_class, bodies(family), attention=attention, **task.model_kwargs())
    loaded = replace(loaded, sha256=pretrained_hash(loaded))
    if four_bits is not None:
        quantize(loaded.model, loaded.new, four_bits)
    return task, features, loaded


def adapted(loaded, **lora):
    """With LoRA whose B is not zero."""
    torch.manual_seed(1)
    model = add_lora(loaded.model, loaded.new, r=4, **lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def probe(task, features, rows=range(8)):
    return task.collate(examples(features, np.array(rows)))


def four_bit_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FourBitLinear)}


def round_weights(model, names, four_bits):
    """Plain layers with the weights that bitsandbytes makes of them, by its functions alone."""
    for name in names:
        layer = model.get_submodule(name)
        turned = isinstance(layer, Conv1D)
        codes, state = bnb.functional.quantize_4bit(
            (layer.weight.detach().T if turned else layer.weight.detach()).contiguous(),
            quant_type=four_bits.quant_type,
            compress_statistics=four_bits.use_double_quant,
        )
        weight = bnb.functional.dequantize_4bit(codes, state)
        layer.weight.data = weight.T.contiguous() if turned else weight


@pytest.mark.parametrize(
    ("family", "four_bits"), [("bert", NF4), ("qwen3", FP4), ("gpt2", DOUBLE), ("t5", NF4), ("modernbert", DOUBLE)]
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_and_gradients_are_those_of_plain_layers_with_the_same_weights(family, four_bits, mode, bodies):
    def answer(held):
        task, features, loaded = load(family, bodies, four_bits if held else None)
        if not held:
            round_weights(loaded.model, names, four_bits)
        model = adapted(loaded, lora_dropout=0.1).train(mode == "train")
        batch = model_inputs(probe(task, features))
        assert not batch["attention_mask"].all(), "with padding"
        torch.manual_seed(2)  # the same dropout
        logits = model(**batch).logits
        logits.square().mean().backward()
        return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    names = list(four_bit_layers(load(family, bodies)[2].model))
    (ours, gradients), (theirs, expected) = answer(True), answer(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert any("lora_A" in name for name in gradients)
    assert any("lora_B" in name for name in gradients)
    assert all(gradient.norm() > 0 for name, gradient in gradients.items() if "lora_" in name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))


def test_a_model_with_a_pretrained_head_answers_as_transformers_loads_it(bodies):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    device = {"": "cpu"}
    theirs = AutoModelForCausalLM.from_pretrained(bodies("llama"), quantization_config=settings, device_map=device)
    ours = load("llama", bodies)[2].model
    ids = torch.arange(5, 25).view(2, 10)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert len(four_bit_layers(ours)) == 2 * 7


def test_under_autocast_it_computes_as_a_linear_layer_does():
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 32), torch.randn(3, 5, 64, requires_grad=True)
    layer = FourBitLinear(plain, NF4)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert torch.equal(out, linear(x, layer.dequantized().weight, plain.bias))
    assert (out.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float32)
    assert layer(x).dtype == torch.float32, "the first call decides nothing"
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("family", ["deberta-v2", "gpt2", "bart", "t5"])
def test_pretrained_layers_of_the_blocks_are_held_and_no_others(family, bodies):
    _, _, loaded = load(family, bodies)
    held = set(four_bit_layers(loaded.model))
    kept = set(linears_of_blocks(loaded.model)) - held
    assert held
    assert not {name.rpartition(".")[0] for name in loaded.new} & held
    assert {name.rsplit(".", 1)[-1] for name in kept} == ({"wo"} if family == "t5" else set())
    outside = {n for n, m in loaded.model.named_modules() if type(m) in (nn.Linear, nn.Embedding, Conv1D)} - kept
    assert outside, "heads and embeddings"
    assert all(loaded.model.get_submodule(name).weight.dtype == torch.float32 for name in outside)


def test_a_new_layer_inside_the_blocks_is_not_held(bodies):
    _, _, plain = load("bert", bodies, None)
    new = ["bert.encoder.layer.1.output.dense.weight"]
    quantize(plain.model, new, NF4)
    names = set(four_bit_layers(plain.model))
    assert "bert.encoder.layer.0.output.dense" in names
    assert "bert.encoder.layer.1.output.dense" not in names


def test_the_same_codes_each_time(bodies):
    one, other = (four_bit_layers(load("llama", bodies, DOUBLE)[2].model) for _ in range(2))
    for name, layer in one.items():
        assert torch.equal(layer.weight, other[name].weight)
        assert torch.equal(layer.dequantized().weight, other[name].dequantized().weight)


@pytest.mark.parametrize(
    ("family", "four_bits", "lora"),
    [
        ("bert", NF4, {}),
        ("gpt2", FP4, {"use_dora": True}),
        ("t5", DOUBLE, {"use_rslora": True, "target_modules": ["q", "v"]}),
    ],
)
def test_what_was_trained_is_what_is_saved(family, four_bits, lora, bodies, tmp_path):
    task, features, loaded = load(family, bodies, four_bits)
    model = adapted(loaded, **lora)
    train(model, task, features)
    batch = probe(task, features)
    trained = answers(model, batch)
    delta = {
        name: layer.get_delta_weight("default") for name, layer in model.named_modules() if hasattr(layer, "lora_A")
    }
    differences = export(
        model,
        task,
        tmp_path,
        probes=[batch],
        base={"name": bodies(family)},
        base_hash=loaded.sha256,
        four_bits=four_bits,
    )
    assert differences["adapter"] < 1e-6
    assert differences["model"] < 1e-5
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert "quantization_config" not in config
    assert {tensor.dtype for tensor in load_file(tmp_path / "model/model.safetensors").values()} == {torch.float32}
    plain = task.auto_class.from_pretrained(tmp_path / "model").eval()
    for ours, theirs in zip(answers(plain, batch), trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if lora.get("use_dora"):
        return
    _, _, base = load(family, bodies, None)
    round_weights(base.model, four_bit_layers(load(family, bodies)[2].model), four_bits)
    for name, change in delta.items():
        path = name.removeprefix("base_model.model.")
        expected = base.model.get_submodule(path).weight + change
        torch.testing.assert_close(plain.get_submodule(path).weight, expected)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_update_does_not_depend_on_the_micro_batches(lora, tmp_path):
    save_body("bert", tmp_path / "bert", initializer_range=0.2, dropout=False)

    def change(parts):
        task, features, loaded = load("bert", lambda family: str(tmp_path / family))
        trainee = make_trainee(
            task, adapted(loaded, **lora).train(), optim="sgd", learning_rate=1.0, max_grad_norm=0.05
        )
        before = flat(trainee.bare_model)
        run_update(trainee, [probe(task, features, part) for part in parts], features, step=0)
        return flat(trainee.bare_model) - before

    whole, split = change([range(8)]), change([[row] for row in range(8)])
    assert whole.norm() > 1e-3
    assert (split - whole).norm() / whole.norm() < 1e-5


def test_a_run_goes_on_to_the_bit_and_its_checkpoints_leave_the_base_out(bodies, tmp_path):
    def start():
        task, features, loaded = load("bert", bodies, DOUBLE)
        return features, make_trainee(task, adapted(loaded), optim="adamw_torch_fused")

    def go(trainee, features, steps):
        for step in steps:
            run_update(trainee, [probe(trainee.task, features, range(8 * step, 8 * step + 8))], features, step=step)

    features, whole = start()
    go(whole, features, range(2))
    state = {"optimizer": whole.optimizer.optimizer, "scheduler": whole.scheduler}
    path = checkpoints.save(tmp_path, model=whole.bare_model, position=Position(step=2), **state)
    stored = load_file(path / "model.safetensors")
    assert stored.keys() == {name for name, p in whole.bare_model.named_parameters() if p.requires_grad}
    go(whole, features, range(2, 4))
    features, resumed = start()
    go(resumed, features, range(1))  # to be overwritten
    checkpoints.load(path, model=resumed.bare_model, optimizer=resumed.optimizer.optimizer, scheduler=resumed.scheduler)
    go(resumed, features, range(2, 4))
    ours, theirs = model_tensors(resumed.bare_model), model_tensors(whole.bare_model)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_numbers_and_bytes_are_counted(bodies):
    _, _, plain = load("llama", bodies, None)
    numbers = elements(plain.model.parameters())
    assert numbers == sum(p.numel() for p in plain.model.parameters())
    held = sum(layer.weight.numel() for layer in linears_of_blocks(plain.model).values())
    task, features, loaded = load("llama", bodies)
    assert elements(loaded.model.parameters()) == numbers
    assert elements(p for p in loaded.model.parameters() if in_four_bits(p)) == held
    batch = probe(task, features)
    trainee = make_trainee(task, adapted(loaded))
    brought = sum(p.numel() for p in trainee.bare_model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in trainee.bare_model.buffers())
    found = measure(trainee, batch, [batch], features)
    layers = len(four_bit_layers(loaded.model))
    # Half a byte each, 4 bytes for 64 of them, and a table of 16 values a layer.
    expected = 4 * (numbers - held + brought) + held // 2 + 4 * held // 64 + layers * 16 * 4 + buffers
    assert found.weights == expected


@pytest.mark.parametrize("variant", ["grouped_query", "lsh", "additive"])
def test_with_another_attention(variant, bodies):
    plan = Plan.model_validate({"variant": variant, **NARROW.get(variant, {})})
    task, features, loaded = load("bert", bodies, attention=plan)
    assert len(four_bit_layers(loaded.model)) == 2 * 6
    model, batch = adapted(loaded), probe(task, features)
    train(model, task, features, steps=1)
    trained = answers(model, batch)
    torch.testing.assert_close(answers(merge(model), batch), trained, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient_and_keeps_less(bodies):
    def gradients(checkpointing):
        task, features, loaded = load("bert", bodies)
        if checkpointing:
            loaded.model.activation_checkpointing_enable({"use_reentrant": False})
        trainee, batch = make_trainee(task, adapted(loaded)), probe(task, features)
        kept = activation_bytes(trainee, batch)
        torch.manual_seed(2)
        trainee.task.loss(trainee.model.train(), batch).backward()
        return kept, {name: p.grad for name, p in trainee.bare_model.named_parameters() if p.requires_grad}

    (less, ours), (more, theirs) = gradients(True), gradients(False)
    assert less < more
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name])


def test_a_class_that_reads_the_weights_is_refused(bodies, monkeypatch):
    """T5's feed-forward layer casts its input to the dtype of ``wo``, to bytes, which is why it is kept."""
    monkeypatch.setattr(T5PreTrainedModel, "_keep_in_fp32_modules", [])
    with pytest.raises(UserError, match="T5ForConditionalGeneration reads weights of its linear layers by itself"):
        load("t5", bodies)


def test_without_the_package_or_layers_it_is_refused(bodies, monkeypatch):
    _, _, loaded = load("bert", bodies, None)
    with pytest.raises(UserError, match="no pretrained linear layers"):
        quantize(loaded.model, list(dict(loaded.model.named_parameters())), NF4)
    monkeypatch.setattr(quantization, "bnb", None)
    with pytest.raises(UserError, match="bitsandbytes is not installed") as caught:
        quantize(loaded.model, loaded.new, NF4)
    assert "heedful[qlora]" in caught.value.fix
    assert not four_bit_layers(loaded.model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("four_bits", [NF4, DOUBLE])
def test_on_a_gpu_it_answers_and_is_saved_as_on_the_cpu(four_bits, bodies, tmp_path):
    task, features, loaded = load("llama", bodies, four_bits)
    model, batch = adapted(loaded), probe(task, features)
    expected = answers(model, batch)
    for ours, theirs in zip(answers(model.cuda(), batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    differences = export(
        model,
        task,
        tmp_path,
        probes=[batch],
        base={"name": bodies("llama")},
        base_hash=loaded.sha256,
        four_bits=four_bits,
    )
    assert max(differences.values()) < 1e-3
