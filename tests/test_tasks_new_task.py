"""CONTRIBUTING's worked example really is all that a new task needs."""

import json
from pathlib import Path

import yaml
from tiny_families import save_body

from pipelines.config import load
from pipelines.finetune import finetune
from sources.columns import Column
from tasks import TASKS, TaskEntry
from tasks.options import Options

COLUMNS = (Column("text", "text", ("text",)), Column("label", "label", ("stars",), target=True))


def test_a_task_of_one_file_and_one_line_runs_through_every_step(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "stars", TaskEntry("example_task:Stars", Options, COLUMNS, "a film"))
    monkeypatch.chdir(tmp_path)
    save_body("distilbert", "model")
    rows = [{"text": ["it rained all day", "the cat sat"][i % 2], "stars": [1, 5][i % 2]} for i in range(16)]
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "task": "stars",
        "model": {"name": "./model", "max_length": 16},
        "data": {"train": "reviews.jsonl", "validation": "reviews.jsonl"},
        "train": {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2},
    }
    Path("stars.yaml").write_text(yaml.safe_dump(values))
    folder = finetune(load("stars.yaml"))
    assert json.loads((folder / "metrics.json").read_text())["validation"]["exact"] == 1.0
