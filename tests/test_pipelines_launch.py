"""A run that dies is begun again, and one that is stopped is not."""

import os
import signal
import sys
import threading

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
