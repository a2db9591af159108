"""Every task on every family: trained, adapted, saved and found again, or refused in words that help."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from family_matrix import CONFIGS, LEGAL, PAIRS, attempt, run_config, save_pretrained
from tiny_families import DECODERS, make_masking_tokenizer, make_rows

from heedful import UserError
from pipelines import building
from tasks import TASKS
from tasks.fitting import kind_of
from training.batches import examples

ROOT = Path(__file__).parent.parent
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL]
HEADED = ("classification", "ner", "qa")
ALWAYS = {("llama", "qa"), ("bert", "mlm"), ("distilbert", "mlm"), ("pegasus", "summarization")}
"""What transformers or PEFT alone would get wrong without a word; and the family that the third part leaves out."""
# A third of the pairs, so that each family and each task has its turn, is enough for every day.
MATRIX = [
    pair if i % 3 == 0 or pair in ALWAYS else pytest.param(*pair, marks=pytest.mark.slow)
    for i, pair in enumerate(LEGAL)
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders of tiny checkpoints, each made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family, **kwargs):
        key = (family, *kwargs.values())
        if key not in made:
            made[key] = save_pretrained(family, root / "-".join(key), **kwargs)
        return made[key]

    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("family", "task"), MATRIX)
def test_what_goes_together_learns_and_is_found_again(family, task, lora, folder_of, tmp_path):
    trial = attempt(folder_of(family), task, tmp_path, lora=lora)
    assert trial.faults() == {}
    assert bool(trial.new) == (task in HEADED or (task == "mlm" and kind_of(CONFIGS[family]) == "encoder"))
    assert set(trial.differences) == ({"adapter", "model"} if lora else {"model"})


@pytest.mark.parametrize(("family", "task"), ILLEGAL)
def test_what_does_not_go_together_is_refused(family, task, folder_of):
    """Before a row is looked at; and what the message proposes goes together."""
    with pytest.raises(UserError) as caught:
        building.build_task(run_config(folder_of(family), task), rows=None)
    error = caught.value
    assert len(str(error).splitlines()) == 4
    assert f"{family} is a" in error.found
    models = error.expected.removeprefix("a model such as ").split(", ")
    assert models
    assert {(model, task) for model in models} <= set(LEGAL)
    tasks = error.fix.rpartition(": ")[2].split(", ")
    assert [other for other in TASKS if (family, other) in LEGAL] == tasks


def test_an_architecture_that_does_not_fit_is_refused(tmp_path):
    make_masking_tokenizer().save_pretrained(tmp_path)
    config = run_config(tmp_path, "translation")
    scratch = {"init": "scratch", "tokenizer": str(tmp_path), "architecture": {"model_type": "bert"}}
    model = config.model.model_copy(update=scratch)
    with pytest.raises(UserError, match="bert is an encoder: translation is not for encoders") as caught:
        building.build_task(config.model_copy(update={"model": model}), rows=None)
    assert caught.value.where == "model.architecture"


@pytest.mark.parametrize("task", ["generation", "summarization"])
@pytest.mark.parametrize("kind", ["xlnet", "bert-generation"])
def test_a_causal_head_that_looks_ahead_is_refused(kind, task, tmp_path):
    """Whatever the configuration says: the loss would be near zero, and nothing learned."""
    sizes = {"vocab_size": 400, "n_layer": 1, "n_head": 2, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, **{"d_model" if kind == "xlnet" else "hidden_size": 16})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer = make_masking_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    config, rows = run_config(tmp_path, task), make_rows(task)
    with pytest.raises(UserError, match=r"xlnet is an encoder: |sees the tokens that it is to predict"):
        building.load_base(config, building.build_task(config, rows))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("family", "task"), [(f, t) for f, t in LEGAL if f in DECODERS and t in HEADED])
def test_a_row_alone_says_what_it_says_in_a_batch(family, task, padding_side, folder_of):
    """A classifier over a decoder takes the last token that is no padding; GPT-2 counts positions from the first."""
    folder = folder_of(family, padding_side=padding_side)
    assert transformers.AutoTokenizer.from_pretrained(folder).padding_side == padding_side
    config, rows = run_config(folder, task), make_rows(task)
    built = building.build_task(config, rows)
    model = building.load_base(config, built).model
    features = datasets.Dataset.from_dict(built.encode(rows[:], training=False))
    answers = "logits" if task == "classification" else "prediction" if task == "ner" else "start_logit"
    whole = predict(built, model, examples(features, np.arange(8)), answers)
    alone = [predict(built, model, examples(features, np.array([i])), answers)[0] for i in range(8)]
    for one, among in zip(alone, whole, strict=True):
        torch.testing.assert_close(among[: len(one)], one)


@torch.no_grad()
def predict(task, model, rows, name):
    return task.predict(model, task.collate(rows))[name]


def test_a_question_stands_before_its_context_in_a_decoder(folder_of):
    """Behind it, no token of the context would see it."""
    config, rows = run_config(folder_of("llama", padding_side="left"), "qa"), make_rows("qa")
    task = building.build_task(config, rows)
    question = task.tokenizer(rows["question"][0])["input_ids"]
    assert task.encode(rows[:], training=True)["input_ids"][0][: len(question)] == question


def test_the_document_agrees_with_the_code():
    lines = (ROOT / "docs" / "families.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *body = table
    assert head == ["family", "kind", *TASKS]
    cells = {(row[0], task): cell for row in body for task, cell in zip(TASKS, row[2:], strict=True)}
    assert list(cells) == PAIRS
    assert {row[0]: row[1] for row in body} == {family: kind_of(config) for family, config in CONFIGS.items()}
    assert [pair for pair, cell in cells.items() if cell == "full, LoRA"] == LEGAL
    assert [pair for pair, cell in cells.items() if cell == "-"] == ILLEGAL
