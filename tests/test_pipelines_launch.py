"""A run that dies is begun again, and one that is stopped is not."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.launch import supervise


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Let a shell script stand for the interpreter; it writes down what it is called with."""

    def become(script):
        program = tmp_path / "program"
        program.write_text(f'#!/bin/sh\ncd {tmp_path}\necho "$@" >> calls\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return lambda: (tmp_path / "calls").read_text().splitlines()

    return become


def test_a_run_that_dies_goes_on_from_what_it_saved_itself(calls, tmp_path, capsys):
    """Not from what a former run of the name left, whatever its clock says."""
    former = tmp_path / "checkpoints/step-2"
    former.mkdir(parents=True)
    os.utime(former, (2e9, 2e9))
    made = calls("case $(wc -l < calls) in 1) exit 137;; 2) mkdir checkpoints/step-4; exit 137;; esac")
    assert supervise(["finetune", "run.yaml", "--retries", "3"], retries=3, folder=tmp_path) == 0
    plain = "-m pipelines.cli finetune run.yaml"
    assert made() == [plain, plain, f"{plain} resume=auto"]
    said = capsys.readouterr().err.splitlines()
    assert ["saved nothing new" in line for line in said] == [True, False]


def test_retries_are_counted(calls, tmp_path):
    made = calls("exit 137")
    assert supervise(["finetune"], retries=2, folder=tmp_path) == 137
    assert len(made()) == 3


def test_a_run_that_is_stopped_is_not_begun_again_however_it_ends(calls, tmp_path):
    made = calls("trap 'kill $!; exit 137' TERM; sleep 3 & wait")
    before = signal.getsignal(signal.SIGTERM)
    stop = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    assert supervise(["finetune"], retries=3, folder=tmp_path) == 137
    assert len(made()) == 1
    assert signal.getsignal(signal.SIGTERM) is before


LAUNCH = """
import sys
from pipelines.launch import launch
sys.executable = sys.argv[1]
sys.exit(launch(["finetune"], nproc=2))
"""
KILLED = "process 1 of 2 was ended by SIGKILL; the others were stopped\n"


@pytest.mark.fault(
    "SIGTERM to the launcher, and one of its processes fails in its save or is killed",
    "the others may take their time; 143 is said only if all saved",
)
@pytest.mark.parametrize(
    ("first", "second", "code", "said"),
    [
        ("sleep 3; touch saved0; exit 143", "sleep 3; touch saved1; exit 143", 143, ""),
        ("exit 2", "sleep 1; exit 2", 2, ""),
        ("exit 2", "sleep 1; kill -9 $$", 2, ""),
        ("exit 143", "kill -9 $$", 137, KILLED),
        ("exit 70", "sleep 1; kill -9 $$", 137, KILLED),
        ("exit 70", "exit 70", 1, "the processes lost one another"),
    ],
    ids=["saved", "disk full", "killed as the disk was full", "killed as it left", "killed in its save", "lost"],
)
def test_a_launcher_that_is_stopped_says_how_its_ranks_ended(first, second, code, said, tmp_path):
    """A shell script stands for the ranks. torchrun itself would kill them here after a second, and say nothing."""
    program = tmp_path / "program"
    program.write_text(
        f"""#!/bin/sh
exec 2>/dev/null  # it says so when its own sleep is ended
cd {tmp_path}
on_term() {{ if [ $RANK = 0 ]; then {first}; else {second}; fi; }}
trap on_term TERM
touch began$RANK
while :; do sleep 0.1; done
"""
    )
    program.chmod(0o755)
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    command = [sys.executable, "-c", LAUNCH, str(program)]
    here = Path(__file__).parent.parent
    child = subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("began*"))) < 2:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    child.terminate()
    _, log = child.communicate(timeout=60)
    assert child.returncode == code, log
    assert log.startswith(said)
    assert bool(log) == bool(said)
    assert len(list(tmp_path.glob("saved*"))) == (2 if code == 143 else 0)
