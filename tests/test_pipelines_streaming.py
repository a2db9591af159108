"""A streamed run: the plain one where the buffer holds everything, clear where it can not go on."""

import json
from collections import defaultdict
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_pipelines_resume import facts
from tiny_families import FAMILY_OF, make_rows, save_body

from heedful import UserError
from pipelines.building import build_task
from pipelines.config import load
from pipelines.preparation import stream_blocks
from sources.readers import read_rows
from tasks import TASKS
from training.batches import Batching, BlockStart
from training.checkpoints import newest_whole
from training.loop import updates

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


def stream_of(task_name):
    """20 rows in blocks of 6, 6, 6, 2, and the task that reads them; four examples an update."""
    if task_name != "classification":
        save_body(FAMILY_OF.get(task_name, "bert"), "other")
        make_rows(task_name, 20).remove_columns("row").to_json("train.jsonl")
    values = yaml.safe_load(Path("run.yaml").read_text()) | {"task": task_name}
    values["model"] = {"name": "./model" if task_name == "classification" else "./other", "max_length": 64}
    values["data"] |= {"stride": 8}
    Path("streamed.yaml").write_text(yaml.safe_dump(values))
    settings = load("streamed.yaml", [*STREAMING, "data.buffer_size=6"])
    task = build_task(settings, read_rows("train.jsonl", columns=TASKS[task_name].columns, mapping={}))
    batching = Batching(4, seed=0)
    return task, batching, partial(stream_blocks, settings, task, "train.jsonl", batching)


@pytest.mark.parametrize("task_name", ["classification", "mlm", "generation"])
def test_blocks_follow_each_other_from_any_of_them(task_name, project):
    """Of one feature a row in 2, 2, 2 and 1 updates a pass; of packed texts, several a feature, in 1 each."""
    blocks_from = stream_of(task_name)[2]
    blocks = list(islice(blocks_from(BlockStart()), 9))
    steps = [1, 1, 1, 1] if task_name == "generation" else [2, 2, 2, 1]
    assert [block.start.first_step for block in blocks] == [0, *accumulate([*steps, *steps])]
    assert [block.start.passes for block in blocks] == [0] * 4 + [1] * 4 + [2]
    assert [block.start.number for block in blocks] == list(range(9))
    inputs = [ids for block in blocks[4:8] for ids in block.features["input_ids"]]
    assert inputs == [ids for block in blocks[:4] for ids in block.features["input_ids"]]
    assert len(inputs) < 16 if task_name == "generation" else len(inputs) == 20
    for block in blocks:
        again = next(blocks_from(block.start))
        assert again.start == block.start
        assert again.features.to_dict() == block.features.to_dict()


@pytest.mark.parametrize("task_name", ["mlm", "generation"])
def test_updates_of_a_stream_are_the_same_from_any_of_them(task_name, project):
    """Masks are drawn by the block: other ones in the next pass, and the same ones where a run goes on."""
    task, batching, blocks_from = stream_of(task_name)
    trainee = SimpleNamespace(task=task, seed=7, share=(0, 1))
    every = list(updates(trainee, blocks_from(BlockStart()), batching, start=0, stop=14))
    for step, (block, _, _) in enumerate(every):
        again = updates(trainee, blocks_from(block.start), batching, start=step, stop=14)
        for (_, _, ours), (_, _, then) in zip(again, every[step:], strict=True):
            torch.testing.assert_close(ours, then, rtol=0, atol=0)
    learned = defaultdict(set)
    for block, _, micro in every:
        for batch in micro:
            for row, labels in zip(batch["row"].tolist(), batch["labels"].tolist(), strict=True):
                places = [(place, label) for place, label in enumerate(labels) if label != -100]
                learned[block.start.passes].add((block.start.row, row, *places))
    assert (learned[0] == learned[1]) == (task_name == "generation")


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


def test_a_block_of_texts_that_say_nothing_is_passed_over(project):
    save_body("llama", "decoder")
    Path("texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("the cat sat", "a dog", "", ""))
    )
    model = {"name": "./decoder", "max_length": 32}
    Path("texts.yaml").write_text(yaml.safe_dump({"task": "generation", "model": model, "data": {"stride": 4}}))
    settings = load("texts.yaml", [*STREAMING, "data.buffer_size=2", "data.train=texts.jsonl"])
    task = build_task(settings, read_rows("texts.jsonl", columns=TASKS["generation"].columns, mapping={}))
    blocks = islice(stream_blocks(settings, task, "texts.jsonl", Batching(2, seed=0), BlockStart()), 2)
    assert [(block.start.first_step, block.start.row, block.start.passes) for block in blocks] == [(0, 0, 0), (1, 0, 1)]


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
