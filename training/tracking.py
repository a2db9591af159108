"""Where the figures of a run go: history.jsonl always, a live line or plain lines, other trackers when asked."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from huggingface_hub import constants
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from heedful import UserError

if TYPE_CHECKING:
    from training.loop import Update


class Sink(Protocol):
    """Another place for the figures, as Accelerate's trackers are."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record figures of one step."""

    def finish(self) -> None:
        """Write out what is left, and let go."""


class Tracker:
    """Records and shows a run's figures. On all ranks but the main one it does nothing.

    Args:
        history: The file that gets one line a logged step; None records nothing.
        console: Where the progress is shown.
        log_every: Updates between two logged ones.
        sinks: Other places for the same figures.
    """

    def __init__(self, history: Path | None, console: Console, *, log_every: int, sinks: tuple[Sink, ...] = ()) -> None:
        self._history, self._console, self._log_every, self._sinks = history, console, log_every, sinks
        self._total = 0
        self._progress: Progress | None = None
        self._started, self._start_step = time.monotonic(), 0
        self._window_tokens, self._window_start = 0, time.monotonic()
        self._speed = 0.0

    def say(self, text: str) -> None:
        """Show one line to the user."""
        self._console.print(text, highlight=False, markup=False)

    @contextmanager
    def live(self, total_steps: int, *, done: int) -> Iterator[None]:
        """Within, show progress: a live line on a terminal, plain lines elsewhere."""
        self._total, self._start_step, self._started = total_steps, done, time.monotonic()
        self._window_tokens, self._window_start = 0, time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console) as self._progress:
            self._progress.add_task("starting", total=total_steps, completed=done)
            yield
        self._progress = None

    def update(self, step: int, epoch: float, update: Update) -> None:
        """Note one update; it is recorded when it is due."""
        if self._history is None:
            return
        self._window_tokens += update.tokens
        due = step % self._log_every == 0 or step == self._total
        if due:
            now = time.monotonic()
            self._speed = self._window_tokens / max(now - self._window_start, 1e-9)
            self._window_tokens, self._window_start = 0, now
            self._record(
                step,
                epoch,
                {
                    "loss": update.loss,
                    "grad_norm": update.grad_norm,
                    "learning_rate": update.learning_rate,
                    "tokens_per_second": round(self._speed, 1),
                },
            )
        figures = f"loss {update.loss:.4f}  lr {update.learning_rate:.2e}  {self._speed:,.0f} tokens/s"
        line = f"step {step}/{self._total}  {figures}"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, description=line)
        elif due:
            self.say(f"{line}  epoch {epoch:.2f}  {self._time_left(step)} left")

    def evaluation(self, step: int, epoch: float, metrics: Mapping[str, float], *, best: bool) -> None:
        """Record the metrics of an evaluation."""
        if self._history is None:
            return
        self._record(step, epoch, {f"eval_{name}": value for name, value in metrics.items()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "_" not in name)
        self.say(f"step {step}  evaluation: {shown}{'  (best so far)' if best else ''}")
        self._window_tokens, self._window_start = 0, time.monotonic()  # an evaluation is not training time

    def close(self) -> None:
        """Finish the other places. After a fault they are left to their own exit hooks, which see its exit code."""
        with redirect_stdout(io.StringIO()):  # trackio's words
            for sink in self._sinks:
                sink.finish()

    def _record(self, step: int, epoch: float, figures: dict[str, float]) -> None:
        assert self._history is not None
        values = {"epoch": round(epoch, 4), **figures}
        with self._history.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for sink in self._sinks:
            sink.log(values, step=step)

    def _time_left(self, step: int) -> str:
        per_step = (time.monotonic() - self._started) / max(step - self._start_step, 1)
        return str(timedelta(seconds=round(per_step * (self._total - step))))


def truncate_history(path: Path, *, after: int) -> None:
    """Drop what a killed run recorded beyond the checkpoint that it goes on from, so that no step stands twice."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= after]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # torn by the kill
        return float("inf")


def require_installed(trackers: Mapping[str, str]) -> None:
    """Find out before the work whether the libraries are there.

    Raises:
        UserError: One is not.
    """
    for name in trackers:
        if find_spec(name) is None:
            fix = f"pip install -e '.[{name}]', or pip install {name}"
            raise UserError(f"{name} is not installed", where=f"tracking.{name}", fix=fix)


def open_sinks(
    trackers: Mapping[str, str], *, project: str, folder: Path, history: Path, config: dict[str, Any]
) -> tuple[Sink, ...]:
    """Open the trackers, each with what history.jsonl holds already.

    Whatever a killed run recorded beyond its checkpoint is gone from there, and so no step stands twice anywhere: wandb
    and trackio could not take it back.

    Args:
        trackers: By name, ``wandb``, ``tensorboard`` or ``trackio``, how: ``offline`` or ``online``.
        folder: Of the run; they write below it alone.
        config: Without secrets.

    Raises:
        UserError: A tracker does not start.
    """
    sinks = tuple(_OPEN[name](project, folder, config, mode) for name, mode in trackers.items())
    for line in history.read_text(encoding="utf-8").splitlines() if history.is_file() else ():
        values = json.loads(line)
        step = values.pop("step")
        for sink in sinks:
            sink.log(values, step=step)
    return sinks


def _open_wandb(project: str, folder: Path, config: dict[str, Any], mode: str) -> Sink:
    import wandb

    # The logs of its service would lie in the home folder.
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder.absolute() / "wandb"))
    # Output and metadata may hold secrets: metadata is the command line, paths, and where git pushes to.
    settings = wandb.Settings(console="off", silent=True, x_disable_meta=True, disable_git=True, program="heedful")
    tracker = WandBTracker(project, name=folder.name, dir=str(folder), mode=mode, config=config, settings=settings)
    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise UserError(
            str(error),
            where=f"tracking.wandb={mode}",
            fix="`wandb login`, or WANDB_API_KEY in the environment; tracking.wandb=offline needs neither",
        ) from error
    return tracker  # type: ignore[no-any-return]


def _open_tensorboard(project: str, folder: Path, config: dict[str, Any], mode: str) -> Sink:
    tracker = TensorBoardTracker("", _emptied(folder / "tensorboard"))
    tracker.start()
    # Its own store_init_configuration takes no nested values, and makes a second run of them, named by the time.
    text = yaml.safe_dump({"project": project, **config}, sort_keys=False)
    tracker.log({"config": "".join(f"    {line}\n" for line in text.splitlines())}, step=0)
    return tracker  # type: ignore[no-any-return]


def _open_trackio(project: str, folder: Path, config: dict[str, Any], mode: str) -> Sink:
    elsewhere = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if name in os.environ]
    if elsewhere:
        raise UserError(
            f"{elsewhere[0]} is set, and the run would be sent there",
            where="tracking.trackio",
            expected=f"a run that stays in {folder}",
            fix=f"unset {elsewhere[0]}",
        )
    if "trackio" in sys.modules:
        raise UserError(
            "trackio was opened in this process already, and keeps to one folder",
            where="tracking.trackio",
            fix="a process for each run",
        )
    os.environ["TRACKIO_DIR"] = str(_emptied(folder / "trackio").absolute())  # read when it is imported
    import trackio

    # It would sample the machine, too.
    quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    tracker = TrackioTracker(project, name=folder.name, config=config, **quiet)
    try:
        with _hub_offline(), redirect_stdout(io.StringIO()):
            tracker.start()
    except ValueError as error:
        raise UserError(str(error), where=f"tracking.project={project}") from error
    return trackio  # its own finish forgets the run, else another would come at exit


_OPEN = {"wandb": _open_wandb, "tensorboard": _open_tensorboard, "trackio": _open_trackio}


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Within, no token goes to the Hub: trackio asks it for the name of its user, for a local run too."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
