"""Training the used rows alone is training the whole table, element for element."""

import copy

import pytest
import torch
from tiny_families import make_model, make_task
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from training.batches import examples
from training.embeddings import UsedRows, restore_embeddings, train_used_rows
from training.optimizer import build_optimizer, parameter_groups


def train(model, task, features, *, optim, steps=4):
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0)
    optimizer = build_optimizer(optim, groups, learning_rate=1e-2, betas=(0.9, 0.999), epsilon=1e-8)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        batch = task.collate(examples(features, torch.arange(step, step + 4).numpy()))
        task.loss(model, batch).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert"])
def test_used_rows_train_as_the_whole_table_does(family, optim):
    task, _, features = make_task("ner", family)
    whole = make_model(family, task.auto_class, **task.model_kwargs())
    used = copy.deepcopy(whole)
    train_used_rows(used, features, padding=task.tokenizer.pad_token_id)
    assert isinstance(used.get_input_embeddings(), UsedRows)
    assert sum(p.numel() for p in used.parameters()) < sum(p.numel() for p in whole.parameters())
    train(whole, task, features, optim=optim)
    train(used, task, features, optim=optim)
    everything = torch.arange(whole.config.vocab_size).reshape(-1, 20)
    torch.testing.assert_close(used.eval()(input_ids=everything).logits, whole.eval()(input_ids=everything).logits)
    restore_embeddings(used)
    assert used.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(used.state_dict()[name], tensor, msg=name)


def test_a_table_tied_to_the_output_layer_is_left_alone():
    model = make_model("bert", AutoModelForCausalLM, is_decoder=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    train_used_rows(model, make_task("ner")[2], padding=0)
    assert not isinstance(model.get_input_embeddings(), UsedRows)
