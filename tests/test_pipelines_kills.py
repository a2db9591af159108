"""Every task, killed at random moments and gone on with, is the run that was not killed: to the bit."""

import random
import time
from itertools import count

import pytest
import yaml
from processes import started, together
from test_pipelines_resume import facts
from tiny_families import FAMILY_OF, SHORT, make_rows, save_body

from pipelines.config import load
from pipelines.finetune import finetune
from tasks import TASKS

KILLS = 5
"""Of each of a task's four runs: 20 of a task."""


@pytest.fixture
def config(request, tmp_path):
    """Some 12 updates with dropout, more than one epoch, saved more often than not."""
    task = request.getfixturevalue("task")
    save_body(FAMILY_OF.get(task, "bert"), tmp_path / "model")
    for split, seed in {"train": 0, "validation": 1}.items():
        make_rows(task, 36, seed=seed).remove_columns("row").to_json(tmp_path / f"{split}.jsonl")
    values = {
        "task": task,
        "model": {"name": str(tmp_path / "model"), "max_length": 32},
        "data": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")} | {"stride": 4},
        "train": {"batch_size": 8, "max_steps": 12, "logging_steps": 1, "save_steps": 2, "eval_steps": 6},
        task: SHORT.get(task, {}),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(config, overrides):
    finetune(load(config, overrides))


def seconds_of_training(folder):
    """From the first sign of training to its last."""
    return (folder / "metrics.json").stat().st_mtime - (folder / "manifest.json").stat().st_mtime


def killed(config, folder, overrides, *, processes, after):
    """Whether every process was killed, so many seconds after training began, before it had ended."""
    began = folder / "manifest.json"
    former = began.stat().st_mtime_ns if began.exists() else 0
    with started(processes, train, str(config), [*overrides, "resume=auto"]) as pairs:
        while not (began.exists() and began.stat().st_mtime_ns > former):
            assert not any(pipe.poll() for _, pipe in pairs), [pipe.recv_bytes() for _, pipe in pairs if pipe.poll()]
            time.sleep(0.002)
        time.sleep(after)
        ended = any(pipe.poll() for _, pipe in pairs)
        for process, _ in pairs:
            process.kill()
    return not ended


@pytest.mark.fault(
    "kill -9 at 20 random moments of every task, on one and two processes, with no and two loader workers",
    "the run goes on to the same losses, metrics and weights, to the bit",
)
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_killed_at_random_moments(task, processes, workers, config, tmp_path, record_property):
    """A run that ended before its time to be killed is followed by another, until so many were."""
    whole, workers_of = tmp_path / "whole", f"train.dataloader_num_workers={workers}"
    together(processes, train, str(config), [workers_of, f"output_dir={whole}"])
    moments, in_save = [], 0
    for number in count():
        cut = tmp_path / f"cut-{number}"
        overrides = [workers_of, f"output_dir={cut}"]
        while len(moments) < KILLS:
            moment = random.uniform(0, seconds_of_training(whole) / 2)
            if not killed(config, cut, overrides, processes=processes, after=moment):
                break
            moments.append(moment)
            in_save += any(cut.glob("checkpoints/.tmp-step-*"))
        else:
            together(processes, train, str(config), [*overrides, "resume=auto"])
        assert facts(cut) == facts(whole), moments
        if len(moments) == KILLS:
            break
    record_property("kills_in_a_save", in_save)  # pytest --junitxml says it
