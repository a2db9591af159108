"""A run that was killed anywhere and resumed is the run that was not: every loss to the bit, and every weight."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from killed_run import finetune_and_die
from processes import LIMIT, received, started
from tiny_families import make_rows, save_body

from pipelines.evaluate import evaluate
from training.batches import BlockStart
from training.checkpoints import newest_whole, read_position

HERE = Path(__file__).parent
LORA = ["lora.r=2"]
POINTS = ("update:3", "file:4:optimizer.safetensors", "rename:8", "update:11", "file:12:model.safetensors")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Dropout on, saved and evaluated in mid-epoch, more than one epoch."""
    folder = tmp_path_factory.mktemp("resume")
    save_body("bert", folder / "model")
    for split, seed in {"train": 0, "validation": 1}.items():
        make_rows("classification", 36, seed=seed).remove_columns("row").to_json(folder / f"{split}.jsonl")
    values = {
        "task": "classification",
        "model": {"name": str(folder / "model"), "max_length": 32},
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")},
        "train": {
            "batch_size": 8,
            "max_steps": 14,
            "logging_steps": 1,
            "save_steps": 4,
            "eval_steps": 5,
            "eval_on_start": True,
            "learning_rate": 1e-3,
            "warmup_steps": 3,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(config, output_dir, *, point="never", processes=1, overrides=()):
    """How the first process ended, and what all of them said."""
    log, deadline = output_dir.with_name(f"{output_dir.name}.log"), time.monotonic() + LIMIT
    log.write_text("")
    given = [f"output_dir={output_dir}", *overrides]
    with started(processes, finetune_and_die, str(log), point, str(config), given) as pairs:
        endings = [received(pipe, deadline) for _, pipe in pairs]
    faults = [said for kind, said in endings if kind == "failed"]
    return SimpleNamespace(returncode=pairs[0][0].exitcode, stderr="\n".join([log.read_text(), *faults]))


def facts(folder):
    """What must be equal: every logged figure but the speed, the metrics, every file of the model."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return (
        lines,
        json.loads((folder / "metrics.json").read_text()),
        json.loads((folder / "baselines.json").read_text()),
        json.loads((folder / "model/MANIFEST.json").read_text()),
    )


def finish_through_kills(config, folder, points, *, processes=1, overrides=()):
    overrides = ["resume=auto", *overrides]
    for point in points:
        killed = run(config, folder, point=point, processes=processes, overrides=overrides)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    resumed = run(config, folder, processes=processes, overrides=overrides)
    assert resumed.returncode == 0, resumed.stderr
    return resumed.stderr


@pytest.mark.fault(
    "`kill -9` within a save, before its rename, and after an update",
    "`resume=auto` goes on to the same losses and weights, to the bit",
)
def test_killed_and_resumed_run_is_bitwise_the_whole_one(config, tmp_path):
    assert run(config, tmp_path / "whole").returncode == 0
    log = finish_through_kills(config, tmp_path / "killed", POINTS[1:4])
    assert "resuming after step" in log
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


@pytest.mark.fault("`kill -9` of two processes", "the same, on two processes")
def test_two_killed_processes_resume_bitwise(config, tmp_path):
    assert run(config, tmp_path / "whole", processes=2).returncode == 0
    finish_through_kills(config, tmp_path / "killed", POINTS[2:3], processes=2)
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


@pytest.mark.fault("`kill -9` of a run on a stream", "the same, from the row and the block where it stood")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_stream_goes_on_to_the_bit(processes, config, tmp_path):
    """36 rows in blocks of 15, 15, 6: five updates a pass. Update 8 lies within a block, 12 at the end of one."""
    streamed = ["data.streaming=true", "data.buffer_size=15"]
    assert run(config, tmp_path / "whole", processes=processes, overrides=streamed).returncode == 0
    points = ["update:11", "update:13"]
    log = finish_through_kills(config, tmp_path / "killed", points, processes=processes, overrides=streamed)
    assert "resuming after step 12" in log
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")
    position = read_position(newest_whole(tmp_path / "whole/checkpoints", say=pytest.fail))
    assert position.block == BlockStart(number=7, first_step=12, row=15, passes=2)


@pytest.mark.fault(
    "`kill -9` at each of five points, whole, with LoRA and in 4 bits, on one and two processes", "the same, at each"
)
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("lora", [[], LORA, [*LORA, "model.load_in_4bit=true"]], ids=["full", "lora", "qlora"])
def test_every_kill_point(config, tmp_path, processes, lora):
    assert run(config, tmp_path / "whole", processes=processes, overrides=lora).returncode == 0
    finish_through_kills(config, tmp_path / "killed", POINTS, processes=processes, overrides=lora)
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


SHARDED = ["distributed=fsdp2"]
SHARDED_POINTS = ("update:3", "shards:4", "rename:8", "update:11", "shards:12")


@pytest.mark.fault("`kill -9` of a sharded run", "the same, with weights and optimizer in parts")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_every_kill_point_of_a_sharded_run(config, tmp_path, lora):
    assert run(config, tmp_path / "whole", processes=2, overrides=SHARDED + lora).returncode == 0
    finish_through_kills(config, tmp_path / "killed", SHARDED_POINTS, processes=2, overrides=[*SHARDED, *lora])
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


@pytest.mark.fault(
    "a sharded run goes on on one and on three processes", "the same losses but for rounding, and it is said"
)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_two_processes_sharded_others_go_on_with(config, tmp_path):
    """Without dropout, whose masks are the ranks' own, every number of processes gives the same losses."""
    settings = json.loads((config.parent / "model/config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save_body("bert", tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    overrides = [*SHARDED, f"model.name={tmp_path / 'model'}", "train.bf16=false"]  # where rounding is small
    assert run(config, tmp_path / "whole", processes=2, overrides=overrides).returncode == 0
    run(config, tmp_path / "on 1", point="update:9", processes=2, overrides=overrides)
    shutil.copytree(tmp_path / "on 1", tmp_path / "on 3")
    whole = [line["loss"] for line in facts(tmp_path / "whole")[0] if "loss" in line]
    for processes, said in ((1, "1 process"), (3, "3 processes")):
        folder = tmp_path / f"on {processes}"
        resumed = run(config, folder, processes=processes, overrides=["resume=auto", *overrides])
        assert f"resuming on {said} what 2 began" in resumed.stderr
        assert [line["loss"] for line in facts(folder)[0] if "loss" in line] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("overrides", [[], LORA], ids=["full", "lora"])
def test_a_sharded_run_in_bf16_is_scored_as_it_is_saved(overrides, config, tmp_path):
    """Its one batch of validation rows leaves one of two processes without any, and training goes on after it."""
    save_body("llama", tmp_path / "model")
    rows = [{"prompt": row["text"], "completion": " sat down"} for row in make_rows("classification", 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "task": "generation",
        "model": {"name": str(tmp_path / "model"), "max_length": 16},
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "rows.jsonl")},
        "train": {"batch_size": 4, "max_steps": 3, "eval_steps": 1, "learning_rate": 0.02, "bf16": True},
        "generation": {"decoding": {"max_new_tokens": 4}},
        "distributed": "fsdp2",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    done = run(path, tmp_path / "run", processes=2, overrides=overrides)
    assert done.returncode == 0, done.stderr
    assert evaluate(str(tmp_path / "run"), []) == facts(tmp_path / "run")[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_and_not_two_gpus_learn_the_same(config, tmp_path):
    losses = {}
    for distributed in ("ddp", "fsdp2"):
        overrides = [f"distributed={distributed}", "train.bf16=false"]
        done = run(config, tmp_path / distributed, processes=2, overrides=overrides)
        assert done.returncode == 0, done.stderr
        losses[distributed] = [line["loss"] for line in facts(tmp_path / distributed)[0] if "loss" in line]
    assert losses["fsdp2"] == pytest.approx(losses["ddp"], rel=1e-4)


@pytest.mark.fault(
    "the disk is full in a save of two processes", "both end within a minute with one message; it goes on to the bit"
)
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a file system")
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_a_disk_that_fills_in_a_save_ends_both_processes(distributed, share, config, tmp_path):
    """There is room for one checkpoint and a part of the next; of the first, only the main process writes."""
    overrides = [f"distributed={distributed}"]
    assert run(config, tmp_path / "whole", processes=2, overrides=overrides).returncode == 0
    newest = newest_whole(tmp_path / "whole/checkpoints", say=pytest.fail)
    pages = sum(-(-file.stat().st_size // 4096) for file in newest.iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    room = f"size={4 * (12 + round((1 + share) * pages))}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", room, "none", disk], check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        command = [sys.executable, "-m", "pipelines.cli", "finetune", str(config), f"output_dir={disk / 'run'}"]
        began = time.monotonic()
        full = subprocess.run(
            [*command, *overrides, "--nproc", "2"],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert full.returncode == 2, full.stderr
        assert "could not be saved" in full.stderr
        assert "Traceback" not in full.stderr
        assert time.monotonic() - began < 60
        assert [path.name for path in (disk / "run/checkpoints").iterdir()] == ["step-4"]
        assert newest_whole(disk / "run/checkpoints", say=pytest.fail)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        resumed = run(config, disk / "run", processes=2, overrides=["resume=auto", *overrides])
        assert resumed.returncode == 0, resumed.stderr
        assert facts(disk / "run") == facts(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.fault(
    "a flipped byte in the newest checkpoint",
    "it is named and passed over; the run goes on from the one before, to the bit",
)
@pytest.mark.slow
def test_flipped_byte_in_the_newest_checkpoint_falls_back_and_says_so(config, tmp_path):
    run(config, tmp_path / "whole")
    run(config, tmp_path / "broken", point="update:13")
    newest = tmp_path / "broken/checkpoints/step-12/optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    resumed = run(config, tmp_path / "broken", overrides=["resume=auto"])
    assert "skipping step-12: optimizer.safetensors does not match its hash" in resumed.stderr
    assert facts(tmp_path / "broken") == facts(tmp_path / "whole")


@pytest.mark.fault("the best checkpoint is broken", "it is said, and the best of the evaluations to come is kept")
def test_resume_looks_at_the_best_checkpoint_and_at_the_data_first(config, tmp_path):
    """Else the one is found broken when all is learned, and the other said to be another model."""
    run(config, tmp_path / "run", point="update:13")
    newest = newest_whole(tmp_path / "run/checkpoints", say=pytest.fail)
    best = newest.parent / f"step-{read_position(newest).best_step}"
    assert best != newest
    (best / "model.safetensors").write_bytes(b"broken")
    rows = config.parent / "train.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("cat", "unheard", 1))
    changed = run(config, tmp_path / "run", overrides=["resume=auto"])
    rows.write_text(text)
    assert "changed since this checkpoint: train" in changed.stderr
    resumed = run(config, tmp_path / "run", overrides=["resume=auto"])
    assert resumed.returncode == 0, resumed.stderr
    assert f"the best checkpoint, {best.name}, is lost (model.safetensors does not match" in resumed.stderr


def begun(config, folder, *arguments):
    """A command line that trains, once it has logged a few updates."""
    command = [sys.executable, "-m", "pipelines.cli", "finetune", str(config), f"output_dir={folder}", *arguments]
    former = (folder / "history.jsonl").stat().st_ino if folder.exists() else None
    child = subprocess.Popen(command, cwd=HERE.parent, stderr=subprocess.PIPE, text=True)
    history = folder / "history.jsonl"
    while not (history.exists() and history.stat().st_ino != former and history.read_text().count("\n") > 7):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    return child


def kill_the_last_rank(child):
    started = psutil.Process(child.pid).children(recursive=True)
    ranks = [process for process in started if "pipelines.cli" in process.cmdline()]
    max(ranks, key=lambda rank: int(rank.environ().get("RANK", -1))).kill()


@pytest.mark.fault(
    "SIGTERM, to one process or to the launcher of two",
    "saves after the update at hand, exit code 143; `resume=auto` goes on to the bit",
)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_exits_143(processes, config, tmp_path):
    long = ["train.max_steps=300", "train.save_steps=300", "train.eval_steps=300"]
    assert run(config, tmp_path / "whole", processes=processes, overrides=long).returncode == 0
    child = begun(config, tmp_path / "stopped", *long, "--nproc", str(processes))
    child.terminate()
    _, log = child.communicate(timeout=60)
    assert child.returncode == 143, log
    assert "Traceback" not in log
    (saved,) = (tmp_path / "stopped/checkpoints").iterdir()
    assert log.count(f"stopped by SIGTERM after saving {saved.name.replace('-', ' ')}") == 1
    resumed = run(config, tmp_path / "stopped", processes=processes, overrides=["resume=auto", *long])
    assert resumed.returncode == 0, resumed.stderr
    assert facts(tmp_path / "stopped") == facts(tmp_path / "whole")


@pytest.mark.fault(
    "`kill -9` of one of two processes, without `--retries`",
    "the other ends within a minute; one message, which says what ended which",
)
@pytest.mark.slow
def test_who_loses_another_process_ends_without_many_words(config, tmp_path):
    child = begun(config, tmp_path / "run", "train.max_steps=100000", "train.eval_steps=90000", "--nproc", "2")
    kill_the_last_rank(child)
    killed_at = time.monotonic()
    _, log = child.communicate(timeout=60)
    assert time.monotonic() - killed_at < 60
    assert child.returncode == 137, log
    assert "Traceback" not in log
    last, *_ = reversed([line for line in log.splitlines() if not line.startswith("step ")])
    assert last == "process 1 of 2 was ended by SIGKILL; the others were stopped"
    assert "error" not in log


@pytest.mark.fault(
    "one of two processes is killed, with `--retries`",
    "the others are stopped; fresh ones go on from the newest checkpoint, to the bit",
)
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_dies_is_gone_on_with_to_the_bit(processes, config, tmp_path):
    """Of two processes one is killed, and the other must not wait for it."""
    long = ["train.max_steps=60", "train.save_steps=5", "train.eval_steps=30"]
    assert run(config, tmp_path / "whole", processes=processes, overrides=long).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")  # a former run, whose checkpoints are not this one's
    child = begun(config, tmp_path / "killed", *long, "--retries", "1", "--nproc", str(processes))
    assert (tmp_path / "killed.1").exists()
    kill_the_last_rank(child)
    _, log = child.communicate(timeout=120)
    assert child.returncode == 0, log
    assert "the run died (exit code 137); try 2 of 2, going on from its newest checkpoint" in log
    assert ("process 1 of 2 was ended by SIGKILL; the others were stopped" in log) == (processes == 2)
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


def test_resume_with_other_settings_is_refused(config, tmp_path):
    run(config, tmp_path / "run", point="update:6")
    stored = tmp_path / "run/config.yaml"
    former = yaml.safe_load(stored.read_text())
    del former["model"]["positions"]  # as a version wrote it that had no such setting
    stored.write_text(yaml.safe_dump(former))
    refused = run(config, tmp_path / "run", overrides=["resume=auto", "train.learning_rate=0.5"])
    assert "settings than the run had: train.learning_rate=0.5 (was 0.001)\n" in refused.stderr
