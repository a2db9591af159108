"""Checkpoints: exact to the bit, whole or absent, and refused by name when they are neither."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from heedful import UserError
from sources import files
from sources.files import fault, write_json, write_whole
from training import checkpoints
from training.checkpoints import Position, newest_whole, prune
from training.optimizer import build_optimizer, build_scheduler, parameter_groups

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd")
PAGE = 4096
"""Bytes that a file system gives at a time."""
FILES = (
    "MANIFEST.json",
    "model.safetensors",
    "optimizer.json",
    "optimizer.safetensors",
    "position.json",
    "scheduler.json",
)


class Run:
    """A small model with a buffer and a frozen part; ``train`` goes on where it stands."""

    def __init__(self, optimizer="adamw_torch", seed=0, width=5):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, width), nn.Linear(width, 1))
        self.model[0].requires_grad_(False)
        groups = parameter_groups(self.model.named_parameters(), weight_decay=0.1)
        self.optimizer = build_optimizer(optimizer, groups, learning_rate=0.1, betas=(0.9, 0.99), epsilon=1e-8)
        self.scheduler = build_scheduler("cosine", self.optimizer, warmup_steps=2, num_training_steps=8)
        self.position = Position(data="f00d", best_score=0.1 + 0.2, best_step=1)

    def train(self, steps):
        for _ in range(steps):
            inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(self.position.step))
            self.model(inputs).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.position.step += 1
        return self

    @property
    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def save(self, folder):
        return checkpoints.save(folder, **self.parts, position=self.position)

    def load(self, path):
        self.position = checkpoints.load(path, **self.parts)
        return self


def flip(path, *, at=0.5, bit=0):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(optimizer, tmp_path):
    straight = Run(optimizer).train(4)
    path = Run(optimizer).train(2).save(tmp_path)
    resumed = Run(optimizer).load(path).train(2)
    assert resumed.position == straight.position
    assert resumed.scheduler.state_dict() == straight.scheduler.state_dict()
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    ours, theirs = (run.optimizer.state_dict() for run in (resumed, straight))
    assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])  # a tuple comes back as a list
    assert ours["state"].keys() == theirs["state"].keys()
    for parameter, state in theirs["state"].items():
        again = ours["state"][parameter]
        assert again.keys() == state.keys()
        assert all(torch.equal(torch.as_tensor(again[key]), torch.as_tensor(state[key])) for key in state)
    # The comparison can fail: a run that goes on with a fresh optimizer is another one.
    fresh = Run(optimizer)
    checkpoints.load_model(path, fresh.model)
    fresh.position.step = 2
    assert not torch.equal(fresh.train(2).model[2].weight, straight.model[2].weight)


def test_nothing_frozen_and_nothing_pickled_is_stored(tmp_path):
    path = Run().train(1).save(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    stored = load_file(path / "model.safetensors")
    assert not [name for name in stored if name.startswith("0.")]
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= stored.keys()
    for file in path.glob("*.json"):
        json.loads(file.read_text())


@pytest.mark.fault(
    "any file of a checkpoint flipped, cut short, empty or missing",
    "it is named; `resume=auto` takes the checkpoint before, and nothing of the broken one is loaded",
)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped first", "flipped middle", "flipped last", "truncated", "empty", "missing"])
def test_any_damage_is_named_and_passed_over(name, damage, tmp_path):
    run = Run().train(1)
    older, newer = run.save(tmp_path), run.train(1).save(tmp_path)
    file = newer / name
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        flip(file, at={"first": 0, "middle": 0.5, "last": 0.999}[damage.split()[1]], bit=1)
    assert fault(older) is None
    assert fault(newer) is not None
    said = []
    assert newest_whole(tmp_path, say=said.append) == older
    assert len(said) == 1
    assert "step-2" in said[0]
    if name != "MANIFEST.json":
        assert name in said[0]
    before = [tensor.clone() for tensor in run.model.state_dict().values()]
    with pytest.raises(UserError, match="broken checkpoint"):
        run.load(newer)
    assert all(map(torch.equal, before, run.model.state_dict().values()))


@pytest.mark.parametrize("content", ["{}", "[]", "null", "3"])
def test_a_manifest_that_names_nothing_is_broken(content, tmp_path):
    path = Run().train(1).save(tmp_path)
    (path / "MANIFEST.json").write_text(content)
    assert "MANIFEST.json" in fault(path)


@pytest.mark.fault("a checkpoint of another model", "refused, naming what differs")
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = Run().train(1).save(tmp_path)
    other = Run()
    other.model[3] = nn.Linear(5, 2)
    with pytest.raises(UserError, match="another model"):
        other.load(path)
    other.model[3] = nn.Linear(5, 1, bias=False)
    with pytest.raises(UserError, match=r"another model \(3.bias\)"):
        other.load(path)


def test_no_checkpoint_is_none(tmp_path):
    assert newest_whole(tmp_path, say=print) is None
    assert newest_whole(tmp_path / "absent", say=print) is None


def test_newest_is_by_number_and_other_names_are_left_alone(tmp_path):
    run = Run().train(9)
    run.save(tmp_path)
    newest = run.train(1).save(tmp_path)
    (tmp_path / "step-old").mkdir()
    assert newest_whole(tmp_path, say=print) == newest
    prune(tmp_path, keep=1, best_step=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-old"]


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, None, [4]), (2, 1, [1, 3, 4]), (2, 4, [3, 4]), (9, 2, [1, 2, 3, 4])]
)
def test_prune_keeps_the_newest_and_the_best(keep, best, left, tmp_path):
    for step in range(1, 5):
        (tmp_path / f"step-{step}").mkdir()
    prune(tmp_path, keep=keep, best_step=best)
    assert [path.name for path in checkpoints.steps(tmp_path)] == [f"step-{step}" for step in left]


def test_an_older_folder_of_the_same_name_is_replaced(tmp_path):
    run = Run().train(1)
    path = run.save(tmp_path)
    (path / "stray").touch()
    run.position.stale_evaluations = 7
    run.save(tmp_path)
    assert fault(path) is None
    assert not (path / "stray").exists()
    assert checkpoints.read_position(path).stale_evaluations == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_the_folder_may_read_its_files(umask, mode, tmp_path):
    """safetensors makes files that only their owner can read: nobody else could open the model."""
    before = os.umask(umask)
    try:
        path = Run().train(1).save(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {mode}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torch"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_former_ones(error, tmp_path):
    path = Run().train(1).save(tmp_path)

    def fill(aside):
        (aside / "model.safetensors").write_bytes(b"half")
        raise error

    for name in ("step-1", "step-2"):
        with pytest.raises(type(error)):
            write_whole(tmp_path / name, fill)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]
    assert fault(path) is None


def test_all_that_a_folder_holds_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda *paths: synced.extend(p.relative_to(tmp_path).as_posix() for p in paths))

    def fill(aside):
        (aside / "deep/er").mkdir(parents=True)
        (aside / "deep/er/a").touch()

    write_whole(tmp_path / "x", fill)
    below = ("/MANIFEST.json", "/deep", "/deep/er", "/deep/er/a", "")
    assert sorted(synced) == sorted([".", *(f".tmp-x{name}" for name in below)])


KILLED = """
import pathlib, sys, time
from sources.files import write_whole
def fill(aside):
    (aside / "model.safetensors").write_bytes(b"half")
    print("filling", flush=True)
    time.sleep(60)
write_whole(pathlib.Path(sys.argv[1]) / "step-2", fill)
"""


@pytest.mark.fault(
    "`kill -9` in the middle of a save", "the checkpoints before are whole; what was left is cleared away"
)
def test_a_kill_while_saving_leaves_the_former_ones(tmp_path):
    run = Run().train(1)
    first = run.save(tmp_path)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"filling\n"
        process.send_signal(signal.SIGKILL)
    assert newest_whole(tmp_path, say=pytest.fail) == first
    assert not (tmp_path / "step-2").exists()
    second = run.train(1).save(tmp_path)
    assert newest_whole(tmp_path, say=pytest.fail) == second
    prune(tmp_path, keep=1, best_step=None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-2"]


def test_what_a_kill_left_aside_is_cleared_away(tmp_path):
    """Hundreds of megabytes, under a name that no later step may have."""
    (tmp_path / ".tmp-step-7").mkdir()
    Run().train(1).save(tmp_path)
    prune(tmp_path, keep=1, best_step=None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB; without the right to mount one, the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=False).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.fault(
    "the disk is full at each 4 kB of a save", "the checkpoint before loads; nothing half-written is left"
)
def test_a_full_disk_leaves_the_former_ones(small_disk):
    run = Run(width=400).train(1)
    run.position.data = {f"split {number}": "f00d" * 16 for number in range(80)}
    first = run.save(small_disk)
    pages = {file.name: -(-file.stat().st_size // PAGE) for file in first.iterdir()}
    assert {name for name in pages if pages[name] > 1} == {
        "model.safetensors",
        "optimizer.safetensors",
        "position.json",
    }
    run.train(1)
    failed = {}
    for room in range(sum(pages.values()) + 2):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"x" * (free - PAGE * room))
        try:
            shutil.rmtree(run.save(small_disk))
        except Exception as error:
            failed[room] = type(error).__name__
            assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "step-1"]
            assert newest_whole(small_disk, say=pytest.fail) == first
        ballast.unlink()
    assert list(failed) == list(range(sum(pages.values())))  # it needs so many pages, and fails with any fewer
    assert set(failed.values()) == {"OSError", "SafetensorError"}  # catching OSError alone would not do
    assert Run(width=400).load(first).position.step == 1


@pytest.mark.fault("a save fails where one checkpoint is kept", "the former one stays until the new one is whole")
@pytest.mark.parametrize("fails", [True, False])
def test_old_ones_go_only_after_the_new_one_is_safe(fails, tmp_path, monkeypatch):
    from training import loop

    run = Run().train(1)
    run.position.best_step = 2
    run.save(tmp_path)
    if fails:
        monkeypatch.setattr(checkpoints, "write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    run.train(1)
    trainee = make_trainee(run)
    if fails:
        with pytest.raises(UserError, match="step 2 could not be saved: full"):
            loop._save(trainee, tmp_path, run.position, keep=1)
    else:
        loop._save(trainee, tmp_path, run.position, keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1" if fails else "step-2"]


def make_trainee(run):
    from accelerate import Accelerator

    from training.loop import Trainee

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    return Trainee(accelerator, None, model, optimizer, run.scheduler, max_grad_norm=1.0, seed=0)


def test_saving_is_quick(tmp_path):
    """The guard must not be felt: hashing and syncing a small checkpoint takes no time."""
    run = Run().train(1)
    started = time.monotonic()
    run.save(tmp_path)
    assert time.monotonic() - started < 5


def test_json_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """What another process reads meanwhile, or after a kill or a full disk."""
    path, plain = tmp_path / "a.json", Path.write_text
    write_json(path, {"a": 1})

    def torn(target, text, **how):
        plain(target, text[:3], **how)
        raise OSError("full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="full"):
        write_json(path, {"a": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(path.read_text()) == {"a": 1}
