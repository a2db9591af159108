"""A trained model, opened to be used: what ``evaluate`` and ``predict`` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from rich.console import Console
from torch import nn

from heedful import UserError
from pipelines import config as configuration
from pipelines.preparation import build_accelerator, build_console, say_unread, tell
from pipelines.sections import RunConfig
from tasks.decoding import described
from tasks.positions import check_lengths
from tasks.protocol import Task
from tasks.saved import load_task, read
from training.models import load_model
from training.tokenizers import load_tokenizer

EFFECTIVE = ("data.", "train.per_device_eval_batch_size", "train.bf16", "model.trust_remote_code", "seed")
"""Beginnings of the settings that scoring and predicting go by."""


@dataclass(frozen=True)
class Opened:
    """A model with its task, on the device it will run on."""

    task: Task
    model: nn.Module
    accelerator: Accelerator
    console: Console
    config: RunConfig


def open_model(checkpoint: str, overrides: list[str], console: Console | None) -> Opened:
    """Open a model folder, or the run that it lies in.

    Args:
        checkpoint: ``runs/ner``, ``runs/ner/model``, or any folder that holds a ``heedful.json``.
        overrides: ``a.b=value``, on top of the run's own configuration where there is one.
        console: None makes the usual one.

    Raises:
        UserError: It is no such folder, or a file of it was changed.
    """
    folder = model_folder(checkpoint)
    stored = read(folder)
    search = f"{stored['task']}.decoding."
    refuse_idle(overrides, effective=(*EFFECTIVE, search) if "decoding" in _options(stored) else EFFECTIVE)
    config = _config_of(folder, stored, overrides)
    trust = config.model.trust_remote_code
    accelerator = build_accelerator(bf16=config.train.bf16)
    console = build_console(accelerator, console)  # first, or reading the weights shows a progress bar of its own
    task = load_task(folder, load_tokenizer(str(folder), trust_remote_code=trust))
    model = load_model(task.auto_class, str(folder), trust_remote_code=trust, **task.model_kwargs()).model
    say_unread(str(folder), console, trust_remote_code=trust)
    if any(override.startswith(search) for override in overrides):
        options: Any = config.options  # the model's own but for the search: all other changes were refused
        task = replace(cast(Any, task), options=options)
        check_lengths(model, task.sequences())
        task.prepare_model(model)
        tell(console, f"decoding: {described(options.decoding)}")
    return Opened(task, accelerator.prepare_model(model, evaluation_mode=True), accelerator, console, config)


def refuse_idle(overrides: Sequence[str], *, effective: tuple[str, ...]) -> None:
    """Refuse settings of the training: the model is made.

    Raises:
        UserError: Naming those that have an effect.
    """
    for key in (override.partition("=")[0] for override in overrides):
        if not key.startswith(effective):
            raise UserError(
                f"{key!r} has no effect on a model that is trained", expected=f"one of: {', '.join(effective)}..."
            )


def model_folder(checkpoint: str) -> Path:
    """The model folder that the user means."""
    path = Path(checkpoint)
    if (path / "model").is_dir():
        return path / "model"
    unfinished = (path / "checkpoints").is_dir()
    if path.is_dir() and not unfinished:
        return path
    raise UserError(
        "a run without a model: it did not finish" if unfinished else "no such checkpoint",
        where=checkpoint,
        expected="a model folder, such as runs/ner/model",
        fix="finish it with resume=auto" if unfinished else "`make finetune TASK=...` writes one",
    )


def _options(stored: dict[str, Any]) -> dict[str, Any]:
    """The task's own settings, of a task that keeps them."""
    return stored["settings"].get("options", {})  # type: ignore[no-any-return]


def _config_of(folder: Path, stored: dict[str, Any], overrides: list[str]) -> RunConfig:
    """The configuration of the model's run; of a model without a run, the defaults."""
    path = folder.parent / "config.yaml"
    raw = configuration.read_yaml(path) if path.is_file() else {}
    raw |= {"task": stored["task"], "output_dir": str(folder.parent)}
    raw[stored["task"]] = (raw.get(stored["task"]) or {}) | _options(stored)
    raw.setdefault("model", {"name": str(folder)})
    return configuration.override(raw, overrides, where=str(path if path.is_file() else folder))
