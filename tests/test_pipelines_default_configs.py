"""Each file of ``configs/`` makes a step and is scored, through the command line.

With MiniLM and the data where they are at hand; a tiny model stands in for a larger one, a few rows for whole articles.
"""

import json
from pathlib import Path

import pytest
from tiny_families import make_rows, save_body, tokenizer_for

from pipelines import config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/full").glob("*.yaml")])
MINILM = "assets/all-MiniLM-L6-v2"
SMALL = ("train.max_steps=1", "train.batch_size=2", "train.per_device_train_batch_size=2", "data.max_train_samples=8")
SMALL += ("data.max_eval_samples=2", "train.bf16=false")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def stand_in_model(given, folder):
    family = "bert" if given == MINILM else "llama"
    tokenizer = tokenizer_for(family)
    tokenizer.chat_template = TEMPLATE if family == "llama" else None
    save_body(family, folder, tokenizer=tokenizer, max_position_embeddings=1100)
    return folder


def stand_in_rows(task, folder):
    """As the data of ``configs/<task>.yaml``: what is plain text there is plain text here."""
    make_rows("mlm" if task == "generation" else task, 16).remove_columns("row").to_json(folder / f"{task}.jsonl")
    return folder / f"{task}.jsonl"


def stand_ins(loaded, folder):
    """Overrides for a model and for data that are large or not at hand."""
    if loaded.model.name not in (None, MINILM) or not (ROOT / MINILM).is_dir():
        yield f"model.name={stand_in_model(loaded.model.name, folder / 'model')}"
    for split in ("train", "validation", "test"):
        source = getattr(loaded.data, split)
        if source is None:
            continue
        if "wikitext" in source or not (ROOT / source).is_file():
            yield f"data.{split}={stand_in_rows(loaded.task, folder)}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_step_of_each_configuration(path, tmp_path, monkeypatch, cli_run):
    monkeypatch.chdir(ROOT)
    loaded = config.load(path)
    code, _, log = cli_run("finetune", path, *SMALL, *stand_ins(loaded, tmp_path), f"output_dir={tmp_path / 'run'}")
    assert code == 0, log
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics.keys() == {split for split in ("validation", "test") if getattr(loaded.data, split)}
    before = json.loads((tmp_path / "run/baselines.json").read_text())
    assert ("before training" in before.get("test", {})) == loaded.train.eval_on_start
