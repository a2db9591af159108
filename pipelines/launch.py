"""A verb in several processes of this machine, and one that is begun again when it dies."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

ENDINGS = (0, 2, 3, 130, 143)
"""Exit codes that a new try would not change, or that somebody wanted: see docs/training.md."""


def launch(arguments: Sequence[str], *, nproc: int) -> int:
    """Run a command of ``heedful`` once a rank, through torchrun's own launcher.

    torchrun itself would exit with 1 whatever the ranks exited with, under a page of traceback.

    Returns:
        The ranks' exit code.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    ranks = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(ranks, sys.executable)("-m", "pipelines.cli", *_without(arguments, "--nproc"))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:  # it could say nothing itself
            name = signal.Signals(-first.exitcode).name
            typer.echo(f"process {rank} of {nproc} was ended by {name}; the others were stopped", err=True)
        return _as_a_shell_says(max(failure.exitcode for failure in error.failures.values()))
    except SignalException as error:
        return 128 + error.sigval
    return 0


def supervise(arguments: Sequence[str], *, retries: int, folder: Path) -> int:
    """Run ``heedful finetune``, and go on from its newest checkpoint where it dies: killed, out of memory, a lost rank.

    Each try is a fresh process, and of several ranks a fresh torchrun on a port of its own: torchrun's own restarts
    meet what the dead ranks left behind.

    Args:
        retries: How often; a fault of the user's, NaN and whoever stopped it end the run at once.
        folder: Of the run.

    Returns:
        The exit code of the last try.
    """
    command, tries = [sys.executable, "-m", "pipelines.cli", *_without(arguments, "--retries")], 1
    former = _saved(folder)  # of another run of this name, until this one moves it aside
    with _until_stopped() as (run, stopped):
        while (code := run(command)) not in ENDINGS and not stopped() and tries <= retries:
            tries += 1
            own = _saved(folder) - former
            again = "going on from its newest checkpoint" if own else "as it began: it had saved nothing new"
            typer.echo(f"the run died (exit code {code}); try {tries} of {retries + 1}, {again}", err=True)
            if own and command[-1] != "resume=auto":
                command.append("resume=auto")
    return code


def _saved(folder: Path) -> set[tuple[str, int]]:
    """Which checkpoints there are, wherever they are moved; by no clock, since a file server has its own."""
    return {(path.name, path.stat().st_ino) for path in folder.glob("checkpoints/step-*")}


@contextmanager
def _until_stopped() -> Iterator[tuple[Callable[[Sequence[str]], int], Callable[[], bool]]]:
    """A function that runs a command, and one that says whether SIGTERM or Ctrl-C came, which ends what runs."""
    child: subprocess.Popen[bytes] | None = None
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if child is not None and number == signal.SIGTERM:  # Ctrl-C reaches it by itself
            child.terminate()

    def run(command: Sequence[str]) -> int:
        nonlocal child
        child = subprocess.Popen(command)
        if stopped:  # while it was being started
            child.terminate()
        return _as_a_shell_says(child.wait())

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield run, lambda: stopped
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)


def _as_a_shell_says(code: int) -> int:
    return code if code >= 0 else 128 - code


def _without(arguments: Sequence[str], option: str) -> list[str]:
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest)
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
