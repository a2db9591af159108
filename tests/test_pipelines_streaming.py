"""A streamed run: the plain one where the buffer holds everything, clear where it can not go on."""

import json
from itertools import islice
from pathlib import Path

import pytest
import yaml
from test_pipelines_resume import facts
from tiny_families import make_rows, save_body

from heedful import UserError
from pipelines.building import build_task
from pipelines.config import load
from pipelines.preparation import stream_blocks
from sources.readers import read_rows
from tasks import TASKS
from training.batches import Batching, BlockStart
from training.checkpoints import newest_whole

STREAMING = ["data.streaming=true", "train.max_steps=7", "train.eval_steps=3", "train.save_steps=3"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_body("bert", "model")
    for split, count in {"train": 20, "dev": 8}.items():
        make_rows("classification", count, seed=count).remove_columns("row").to_json(f"{split}.jsonl")
    values = {
        "task": "classification",
        "model": {"name": "./model", "max_length": 32},
        "data": {"train": "train.jsonl", "validation": "dev.jsonl"},
        # No decay would train the rows of used words alone, which a stream can not know.
        "train": {"batch_size": 4, "logging_steps": 1, "weight_decay": 0.01, "learning_rate": 1e-3},
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_a_buffer_that_holds_everything_makes_the_plain_run(project, cli_run):
    for folder, streamed in {"plain": STREAMING[1:], "streamed": STREAMING}.items():
        code, _, log = cli_run("finetune", "run.yaml", f"output_dir={folder}", "train.eval_on_start=true", *streamed)
        assert code == 0, log
    assert "train is a stream" in log
    plain, streamed = facts(Path("plain")), facts(Path("streamed"))
    for line in (*plain[0], *streamed[0]):
        line.pop("epoch", None)  # a stream's end is not known: it counts whole passes
    assert streamed == plain


def test_blocks_follow_each_other_from_any_of_them(project):
    """20 rows in blocks of 6, 6, 6, 2: seven updates of four rows a pass."""
    settings = load("run.yaml", [*STREAMING, "data.buffer_size=6"])
    task = build_task(settings, read_rows("train.jsonl", columns=TASKS["classification"].columns, mapping={}))
    batching = Batching(4, seed=0)
    blocks = list(islice(stream_blocks(settings, task, "train.jsonl", batching, BlockStart()), 9))
    assert [block.start.first_step for block in blocks] == [0, 2, 4, 6, 7, 9, 11, 13, 14]
    assert [block.start.passes for block in blocks] == [0] * 4 + [1] * 4 + [2]
    assert [block.start.number for block in blocks] == list(range(9))
    inputs = [ids for block in blocks[4:8] for ids in block.features["input_ids"]]
    assert inputs == [ids for block in blocks[:4] for ids in block.features["input_ids"]]
    assert len(inputs) == 20
    for block in blocks:
        again = next(stream_blocks(settings, task, "train.jsonl", batching, block.start))
        assert again.start == block.start
        assert again.features.to_dict() == block.features.to_dict()


def test_a_block_with_nothing_to_learn_is_passed_over(project):
    """The last one may be a single row; of NER, one without words."""
    rows = [*[{"tokens": ["a", "b"], "tags": ["O", "B-X"]}] * 4, {"tokens": [], "tags": []}]
    Path("ner.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("ner.yaml").write_text(yaml.safe_dump({"task": "ner", "model": {"name": "./model"}, "data": {"stride": 4}}))
    settings = load("ner.yaml", [*STREAMING, "data.buffer_size=2", "data.train=ner.jsonl"])
    task = build_task(settings, read_rows("ner.jsonl", columns=TASKS["ner"].columns, mapping={}))
    blocks = islice(stream_blocks(settings, task, "ner.jsonl", Batching(2, seed=0), BlockStart()), 3)
    assert [(block.start.first_step, block.start.row, block.start.passes) for block in blocks] == [
        (0, 0, 0),
        (1, 2, 0),
        (2, 0, 1),
    ]


def test_a_file_that_was_emptied_ends_the_run(project):
    settings = load("run.yaml", STREAMING)
    task = build_task(settings, read_rows("train.jsonl", columns=TASKS["classification"].columns, mapping={}))
    Path("train.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing to learn from"):
        next(stream_blocks(settings, task, "train.jsonl", Batching(2, seed=0), BlockStart()))


def test_a_fault_is_found_where_the_stream_reaches_it(project, cli_run):
    with Path("train.jsonl").open("a") as file:
        file.write('{"text": "well", "label": "unheard of"}\n')
    code, _, log = cli_run("finetune", "run.yaml", *STREAMING, "data.buffer_size=10")
    assert code == 2
    assert "unheard of" in log
    assert "rows from 20 on" in log
    assert "raise data.buffer_size" in log
    assert newest_whole(Path("runs/run/checkpoints"), say=pytest.fail).name == "step-6"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["data.streaming=true"], "train.eval_steps=N train.save_steps=N train.max_steps=N, or train.eval_strategy=no"),
        ([*STREAMING, "data.max_train_samples=5"], "use train.max_steps"),
        (["data.buffer_size=5"], "no effect without data.streaming=true"),
    ],
)
def test_what_needs_the_whole_is_refused(given, expected, project, cli_run):
    code, _, log = cli_run("finetune", "run.yaml", *given)
    assert code == 2
    assert expected in " ".join(log.split())


def test_columns_not_used_are_named_once(project, cli_run):
    rows = make_rows("classification", 20, seed=1).remove_columns("row")
    rows.add_column("source", ["web"] * 20).to_json("train.jsonl")
    code, _, log = cli_run("finetune", "run.yaml", *STREAMING, "data.buffer_size=6")
    assert code == 0, log
    assert log.count("columns not used: 'source'") == 1


def test_an_empty_stream_is_refused(project, cli_run):
    Path("train.jsonl").write_text("\n")
    code, _, log = cli_run("finetune", "run.yaml", *STREAMING)
    assert code == 2
    assert "0 rows" in log


def test_a_streamed_run_is_planned_and_evaluated_as_any(project, cli_run):
    code, _, log = cli_run("plan", "run.yaml", *STREAMING)
    assert code == 0, log
    assert cli_run("finetune", "run.yaml", *STREAMING)[0] == 0
    code, out, log = cli_run("evaluate", "runs/run")
    assert code == 0, log
    assert "accuracy" in out
