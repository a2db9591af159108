"""The loss in chunks is that over the whole logits, gradients included; where it can not be, nothing is chunked."""

import pytest
import torch
from accelerate import Accelerator
from tiny_families import make_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tasks import lm_loss
from tasks.lm_loss import next_tokens, summed_loss, token_losses
from training.lora import add_lora


def make_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(400, (3, 20), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 20, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, next_tokens(labels)


@pytest.mark.parametrize("chunk", [1, 400 * 7, 2**24])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_chunks_change_nothing(family, smoothing, chunk, monkeypatch):
    monkeypatch.setattr(lm_loss, "CHUNK", chunk)
    inputs, labels = make_batch()
    model = make_model(family, AutoModelForCausalLM, dropout=False, initializer_range=0.3)
    whole = cross_entropy(
        model(**inputs).logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
    )
    ours = summed_loss(model, inputs, labels, label_smoothing=smoothing)
    torch.testing.assert_close(ours, whole)
    theirs, mine = (torch.autograd.grad(loss, list(model.parameters())) for loss in (whole, ours))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_logits_of_the_batch_never_exist_at_once(family, lora, monkeypatch):
    monkeypatch.setattr(lm_loss, "CHUNK", 400 * 4)
    inputs, labels = make_batch()
    bare = make_model(family, AutoModelForCausalLM)
    model = add_lora(bare, [], r=2) if lora else bare
    largest = []
    plain_forward = nn.Linear.forward

    def forward(self, hidden):
        if self is bare.lm_head:
            largest.append(hidden.shape[:-1].numel())
        return plain_forward(self, hidden)

    token_losses(model, inputs, labels)  # the first time the head is tried out, on one example
    monkeypatch.setattr(nn.Linear, "forward", forward)
    summed_loss(model, inputs, labels).backward()
    assert max(largest) == 4


@pytest.mark.parametrize("large", [400, 401])
def test_logits_that_the_model_changes_are_taken_whole(large, monkeypatch, caplog):
    monkeypatch.setattr(lm_loss, "LARGE", large)
    inputs, labels = make_batch()
    kinds = {"llama": True, "gemma2": True, "bart": False}
    for family, plain in kinds.items():
        caplog.clear()
        model = make_model(family, AutoModelForCausalLM if plain else AutoModelForSeq2SeqLM, initializer_range=0.3)
        for _ in range(2):
            token_losses(model, inputs, labels)
        assert lm_loss._plain_heads[model.lm_head] is plain
        assert caplog.text.count("400 tokens are held at once") == (not plain and large == 400)


def test_chunks_in_bf16_are_chunks_too():
    """accelerate hands back fp32 logits of a forward pass in autocast; the head here is in the loop's autocast."""
    inputs, labels = make_batch()
    model = make_model("llama", AutoModelForCausalLM, initializer_range=0.3)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    with accelerator.autocast():
        ours = summed_loss(prepared, inputs, labels)
        whole = cross_entropy(prepared(**inputs).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert lm_loss._plain_heads[model.lm_head]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_in_bf16_the_first_update_of_a_process_is_as_its_later_ones(family):
    """Trying out the head must leave no cast weights behind, or tied ones gather their gradients in another order."""
    batch = {name: torch.randint(5, 300, (4, 12)) for name in ("input_ids", "decoder_input_ids")}
    model = make_model(family, AutoModelForSeq2SeqLM, initializer_range=0.3, tie_word_embeddings=True).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = summed_loss(model, batch, batch["decoder_input_ids"])
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_head_is_itself_again(family):
    inputs, labels = make_batch()
    model = make_model(family, AutoModelForCausalLM, initializer_range=0.3)
    before = model(**inputs).logits
    names = list(model.state_dict())
    summed_loss(model, inputs, labels)
    assert torch.equal(model(**inputs).logits, before)
    assert list(model.state_dict()) == names


def test_no_label_no_loss():
    inputs, labels = make_batch()
    loss = summed_loss(make_model("llama", AutoModelForCausalLM), inputs, torch.full_like(labels, -100))
    assert loss == 0
    loss.backward()
