"""Where the figures of a run go: history.jsonl always, a live line or plain lines, wandb when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from heedful import UserError

if TYPE_CHECKING:
    from training.loop import Update


class Sink(Protocol):
    """Another place for the figures, such as a wandb run."""

    def log(self, data: dict[str, Any], step: int) -> None:
        """Record the figures of one step."""


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

    def _record(self, step: int, epoch: float, values: dict[str, float]) -> None:
        assert self._history is not None
        with self._history.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n")
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


def wandb_sinks(
    mode: Literal["off", "offline", "online"], *, project: str, folder: Path, config: dict[str, Any]
) -> tuple[Sink, ...]:
    """A Weights & Biases run, if one is asked for.

    Args:
        mode: ``off``, ``offline`` or ``online``.
        folder: Where wandb keeps its files.

    Raises:
        UserError: wandb is not installed.
    """
    if mode == "off":
        return ()
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb is not installed", where=f"tracking.wandb={mode}", fix="pip install wandb") from error
    settings = wandb.Settings(console="off", silent=True)  # stdout and the command line may hold secrets
    run = wandb.init(mode=mode, project=project, name=folder.name, dir=folder, config=config, settings=settings)
    return (run,)
