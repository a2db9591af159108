"""A verb in several processes of this machine, and one that is begun again when it dies."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil
import typer

from heedful import NonFiniteLossError, UserError

ENDINGS = (0, 2, 3, 130, 143)
"""Exit codes that a new try would not change, or that somebody wanted: see docs/training.md."""
RUN_ID = "heedful"
"""What torchrun calls the ranks of ``launch``, in their environment."""
LOST = 70
"""Exit code of a rank of ``launch`` that another one left; the launcher finds the words, since it sees them all."""


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
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=RUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # Not SIGTERM, after which torchrun would kill in 30 s what is being saved, and hide how the ranks ended.
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        with _handled(_pass_on, signal.SIGTERM):
            elastic_launch(ranks, sys.executable)("-m", "pipelines.cli", *_without(arguments, "--nproc"))
    except ChildFailedError as error:
        return _ending({rank: failure.exitcode for rank, failure in error.failures.items()}, nproc=nproc)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Let the ranks end by themselves, however long they save: the signal's sender knows how long it will wait."""
    ranks = psutil.Process().children()
    if not ranks:  # as yet
        raise SystemExit(128 + number)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _ending(codes: Mapping[int, int], *, nproc: int) -> int:
    """One exit code for those of the ranks that failed, and words where they could say none themselves.

    A rank exits with 143 only when all have saved. One that SIGTERM ended was sent it by torchrun, after another had
    failed, or had nothing to save: it was not training.
    """
    ends = set(codes.values()) - {-signal.SIGTERM}
    if told := ends & {UserError.exit_code, NonFiniteLossError.exit_code}:  # whatever torchrun did to the others then
        return max(told)
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            typer.echo(f"process {rank} of {nproc} was ended by {name}; the others were stopped", err=True)
            return _as_a_shell_says(code)
    if others := ends - {143, LOST}:
        return max(others)
    if ends == {LOST}:
        typer.echo("the processes lost one another; what was saved is whole, and resume=auto goes on", err=True)
        return 1
    return 143


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

    with _handled(stop, signal.SIGTERM, signal.SIGINT):
        yield run, lambda: stopped


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Within, these signals call the handler."""
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in former.items():
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
