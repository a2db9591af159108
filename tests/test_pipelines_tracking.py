"""Trackers hold what history.jsonl holds, value for value, once, and below the run alone; and tokens stand nowhere."""

import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tracker_files
import yaml
from hub_server import hub_on_loopback
from huggingface_hub import constants
from rich.console import Console
from tiny_families import save_body
from wandb_server import wandb_on_loopback

from hub.redaction import redacted, secret_keys
from pipelines.config import load
from pipelines.finetune import finetune
from pipelines.push import push
from training import tracking

ROOT = Path(__file__).parent.parent
HF, WANDB = "hf_canaryCANARYcanaryCANARYcanary00", "c0ffee" * 7
ALL = ["tracking.wandb=offline", "tracking.tensorboard=true", "tracking.trackio=on"]
ROWS = "text,label\n" + "".join(f"the cat {w} {'dog' * i},{'ab'[i % 2]}\n" for i, w in enumerate(["sat", "on"] * 6))


def make_project(home, patch):
    """A tiny model and the settings of a run of four updates; canaries where tokens belong, and a home folder."""
    patch.chdir(home)
    (home / "user").mkdir()
    names = {"HF_TOKEN": HF, "WANDB_API_KEY": WANDB, "HOME": str(home / "user")}
    for name, value in names.items():
        patch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "TRACKIO_DIR"):  # which a run sets
        patch.setenv(name, "")
        patch.delenv(name)
    forget_trackio(patch)
    save_body("bert", "base")
    Path("rows.csv").write_text(ROWS)
    values = {
        "task": "classification",
        "model": {"name": str(home / "base"), "max_length": 32},
        "data": {"train": str(home / "rows.csv"), "validation": "rows.csv"},
        "train": {"max_steps": 4, "batch_size": 4, "logging_steps": 1, "save_steps": 2, "eval_steps": 2},
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))


def forget_trackio(patch):
    """It keeps to one folder a process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with every tracker that lost its last checkpoint, was gone on with, and pushed to a folder."""
    home, told, asked = tmp_path_factory.mktemp("tracked"), io.StringIO(), []
    plain = socket.getaddrinfo

    def getaddrinfo(host, *given, **named):
        if host not in ("localhost", "127.0.0.1"):
            asked.append(host)
            raise OSError("no network in tests")
        return plain(host, *given, **named)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(told):
        make_project(home, patch)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setattr(sys, "argv", ["heedful", "finetune", f"{HF}/run.yaml"])
        console = Console(file=told, width=200)
        finetune(load("run.yaml", ALL), console=console)
        before = (home / "runs/run/history.jsonl").read_text().splitlines()
        shutil.rmtree("runs/run/checkpoints/step-4")
        forget_trackio(patch)
        finetune(load("run.yaml", [*ALL, "resume=auto"]), console=console)
        push("runs/run", f"file://{home}/shelf", yes=True, console=console)
        sys.modules["wandb"].teardown()
    return SimpleNamespace(home=home, run=home / "runs/run", told=told.getvalue(), asked=asked, before=before)


def test_every_tracker_holds_what_history_holds(tracked):
    history = tracker_files.history(tracked.run / "history.jsonl")
    lines = (tracked.run / "history.jsonl").read_text().splitlines()
    assert (sorted(history), len(lines), len(tracked.before)) == ([1, 2, 3, 4], 6, 6)
    assert lines[:3] == tracked.before[:3]
    assert {"loss", "epoch", "learning_rate", "eval_accuracy"} <= history[4].keys()
    config = redacted(yaml.safe_load((tracked.run / "config.yaml").read_text()))
    assert config["model"]["name"] == ".../base"
    first, second = sorted(tracked.run.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert tracker_files.wandb(second) == (history, config)
    assert tracker_files.wandb(first)[0][2] == history[2]
    assert tracker_files.trackio(tracked.run / "trackio/heedful.db") == (history, config)
    figures, text = tracker_files.tensorboard(tracked.run / "tensorboard")
    assert figures == {step: {k: float(np.float32(v)) for k, v in row.items()} for step, row in history.items()}
    assert yaml.safe_load(text) == {"project": "heedful", **config}


def test_trackers_stay_in_the_run_folder_and_end(tracked):
    assert tracked.asked == []
    strays = [path for path in (tracked.home / "user").rglob("*") if "huggingface" not in path.parts]
    assert [path for path in strays if path.name != ".cache"] == []
    assert [child.name() for child in psutil.Process().children(recursive=True) if "wandb" in child.name()] == []
    assert "rackio" not in tracked.told


@pytest.mark.fault("tokens in the environment of a run and of a push", "in no file, log, card or tracker, on no screen")
def test_no_token_stands_in_any_file_nor_on_the_screen(tracked):
    files = [path for path in tracked.home.rglob("*") if path.is_file()]
    assert {"config.yaml", "manifest.json", "README.md", "MANIFEST.json", "heedful.db"} <= {path.name for path in files}
    assert [path for path in files if any(token.encode() in path.read_bytes() for token in (HF, WANDB))] == []
    assert [token for token in (HF, WANDB) if token in tracked.told] == []


SECRETS = {
    "data.train": f"https://me:{'pass' * 3}word@host/rows.csv",
    "data.test": f"https://host/rows.csv?a=1&X-Amz-Signature={'0123abcd' * 4}",
    "model.name": f"me/{HF}",
    "model.revision": WANDB,
    "output_dir": f"runs/{HF}",
    "tracking.project": f"Bearer {'x1y2' * 5}",
    "model.architecture.note": f"wandb_v1_{'x1y2' * 5}",
}


@pytest.mark.fault("a token or a password in a setting", "refused by its key, not shown; nothing is written")
@pytest.mark.parametrize("key", SECRETS)
def test_a_token_in_the_settings_is_refused_and_not_shown(key, tmp_path, monkeypatch, cli_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    Path("run.yaml").write_text("task: ner\nmodel: {name: m}\n")
    given = f"{key}={SECRETS[key]}"
    Path("own.yaml").write_text(yaml.safe_dump({"task": "ner", key.partition(".")[0]: secret_values(key)}))
    for arguments in (["run.yaml", given], ["run.yaml", given, f"{key}=harmless"], ["own.yaml"]):
        code, out, log = cli_run("finetune", *arguments, "--nproc", "2", "--retries", "1")
        assert (code, f"a token or a password in {key}" in log) == (2, True), log
        assert SECRETS[key] not in out + log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml", "run.yaml"]


def secret_values(key):
    value = SECRETS[key]
    for name in reversed(key.split(".")[1:]):
        value = {name: value}
    return value


@pytest.mark.fault("a token in a path, or in a file that is broken", "not shown by the message")
def test_a_file_and_its_faults_do_not_show_a_token(tmp_path, monkeypatch, cli_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / HF).mkdir()
    Path(HF, "run.yaml").write_text("task: ner\nmodel: {name: m}\n")
    Path("torn.yaml").write_text(f"task: ner\nmodel: [{HF}\n")
    for arguments in (["finetune", f"{HF}/run.yaml"], ["finetune", "torn.yaml"], ["evaluate", f"runs/{HF}"]):
        code, out, log = cli_run(*arguments)
        assert (code, HF in out + log) == (2, False), log


def test_what_only_looks_like_a_secret_is_let_through():
    commit = "0123456789abcdef0123456789abcdef01234567"
    values = {"a": [commit, f"me/rows@{commit}:train"], "b": {"prompt": "Password: {source}\n", "hf_device_map": 1}}
    assert list(secret_keys(values)) == []


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_missing_library_is_said_before_the_work(name, tmp_path, monkeypatch, cli_run):
    make_project(tmp_path, monkeypatch)
    monkeypatch.setattr(tracking, "find_spec", lambda library: None if library == name else object())
    code, _, log = cli_run("finetune", "run.yaml", *ALL)
    assert (code, f"pip install {name}" in log, Path("runs").exists()) == (2, True, False), log


def test_what_would_send_a_local_run_away_is_refused(tmp_path, monkeypatch):
    forget_trackio(monkeypatch)
    given = {"project": "p", "folder": tmp_path, "history": tmp_path / "none", "config": {}}
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(tracking.UserError, match="TRACKIO_SPACE_ID is set"):
        tracking.open_sinks({"trackio": "offline"}, **given)
    monkeypatch.delenv("TRACKIO_SPACE_ID")
    monkeypatch.setitem(sys.modules, "trackio", object())
    with pytest.raises(tracking.UserError, match="keeps to one folder"):
        tracking.open_sinks({"trackio": "offline"}, **given)


def test_online_without_a_key_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("HOME", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    given = {"project": "p", "folder": tmp_path / "run", "history": tmp_path / "none", "config": {}}
    with pytest.raises(tracking.UserError) as caught:
        tracking.open_sinks({"wandb": "online"}, **given)
    assert "WANDB_API_KEY" in caught.value.fix
    sys.modules["wandb"].teardown()


@pytest.mark.fault("tokens in the environment of a run that is tracked online", "on no command line; not sent on")
@pytest.mark.slow
def test_two_processes_online_are_one_run_without_a_token(tmp_path, monkeypatch):
    """The main process records; no command line holds what the environment does; nobody is left."""
    make_project(tmp_path, monkeypatch)
    online = ["tracking.wandb=online", *ALL[1:]]
    command = [sys.executable, "-m", "pipelines.cli", "finetune", "run.yaml", *online, "--nproc", "2"]
    with wandb_on_loopback() as server:
        told, lines, seen = run_watched(command, WANDB_BASE_URL=server.url)
        (run,) = server.runs.values()
        received = b"".join(body for _, body in server.seen)
    history = tracker_files.history(Path("runs/run/history.jsonl"))
    rows = tracker_files.merged((row["_step"], tracker_files.plain(row)) for row in run.history)
    config = redacted(yaml.safe_load(Path("runs/run/config.yaml").read_text()))
    assert (rows, tracker_files.plain(run.config)) == (history, without_empty(config))
    assert (run.name, run.project, run.exitcode, len(run.history)) == ("run", "heedful", 0, len(history))
    assert tracker_files.trackio("runs/run/trackio/heedful.db") == (history, config)
    assert tracker_files.tensorboard("runs/run/tensorboard")[0].keys() == history.keys()
    assert sum("pipelines.cli" in line for line in lines) >= 2
    assert any("wandb-core" in line for line in lines)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for token in (HF, WANDB):
        assert token not in told + "".join(lines)
        assert token.encode() not in kept + received
    assert str(tmp_path).encode() not in received
    _, left = psutil.wait_procs(seen.values(), timeout=5)
    assert left == []


def without_empty(values):
    """As wandb sends it."""
    inside = {key: without_empty(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inside.items() if value != {}}


@pytest.mark.fault("a token in the environment of a push to a hub", "on no command line, in no file there")
@pytest.mark.slow
def test_no_command_line_and_no_file_of_a_hub_holds_the_token_of_a_push(tracked, tmp_path):
    with hub_on_loopback(tmp_path, ("me", "write")) as (server, token):
        command = [sys.executable, "-m", "pipelines.cli", "push", str(tracked.run), "me/m", "--yes"]
        own = {"HF_TOKEN": token, "WANDB_API_KEY": WANDB, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        told, lines, _ = run_watched(command, **own)
        held = server.storage.open("models", "me/m").find("main").files
    assert "README.md" in held
    assert any("pipelines.cli push" in line for line in lines)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (token, WANDB):
        assert secret not in told + "".join(lines)
        assert secret.encode() not in kept


def run_watched(command, **environment):
    """What it says; every command line on this machine meanwhile; the processes below it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    piped = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, **piped) as child:
        lines, seen = set(), {}
        watch = threading.Thread(target=watched, args=(psutil.Process(child.pid), lines, seen))
        watch.start()
        told = child.stdout.read()
        assert child.wait() == 0, told
        watch.join()
    return told, lines, seen


def watched(process, lines, seen):
    """Collect every command line, whosever child it is, and the processes below this one, for as long as it runs."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        with suppress(psutil.NoSuchProcess):
            seen.update({child.pid: child for child in process.children(recursive=True)})
        for other in psutil.process_iter():
            with suppress(psutil.Error):
                lines.add(" ".join(other.cmdline()))
        time.sleep(0.02)
