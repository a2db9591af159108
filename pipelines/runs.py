"""The folder of a run: what lies where, and the manifest that makes the run a fact."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from heedful import UserError, __version__
from hub.redaction import hide
from pipelines.config import read_yaml, validate
from pipelines.sections import RunConfig
from sources.files import write_json
from sources.readers import is_local
from training import checkpoints

BASE_MODEL = "the base model"
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "evaluate",
    "tokenizers",
    "numpy",
    "bitsandbytes",
)
FREE_TO_CHANGE = (
    "resume",
    "train.eval_on_start",
    "output_dir",
    "tracking",
    "train.logging_steps",
    "train.save_total_limit",
    "train.dataloader_num_workers",
)
"""Settings that may differ between a run and its continuation, since no update depends on them."""


@dataclass(frozen=True)
class Run:
    """A run's folder. Nothing is written before ``open_``."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are: ``step-N`` each."""
        return self.folder / "checkpoints"

    @property
    def history(self) -> Path:
        """One JSON line a logged step."""
        return self.folder / "history.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Everything that its figures depend on."""
        return self.folder / "manifest.json"

    @property
    def metrics(self) -> Path:
        """The final evaluation."""
        return self.folder / "metrics.json"

    @property
    def baselines(self) -> Path:
        """What the model has to beat: a simple rule and, if asked for, itself before training."""
        return self.folder / "baselines.json"

    @property
    def transfer(self) -> Path:
        """How near other attention was to full attention, before and after ``attention.transfer``."""
        return self.folder / "transfer.json"

    def require_writable(self) -> None:
        """Find out before the work what would else be found out after it. Nothing is left there.

        Raises:
            UserError: The folder can not be made, or not be written to.
        """
        if not self.folder.absolute().name or self.folder.resolve() == Path.cwd():
            raise UserError(
                "a run's folder that is this one", where=f"output_dir={self.folder}", expected="a folder of its own"
            )
        try:
            nearest = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
            with TemporaryDirectory(dir=nearest):
                pass
        except OSError as error:
            raise UserError(
                f"nothing can be written there: {error.strerror}",
                where=f"output_dir={self.folder}",
                expected="a folder, or room for a new one",
                fix="output_dir=ANOTHER",
            ) from error

    def open_(self, config: RunConfig, manifest: Mapping[str, Any], audit: Mapping[str, Any]) -> None:
        """Create the folder and say in it what will run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
        write_json(self.manifest, dict(manifest))
        write_json(self.folder / "audit.json", dict(audit))

    def set_aside(self) -> Path | None:
        """Move a former run of this name to the next free name; nothing of it is lost."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return None
        number = 1
        while (former := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        try:
            return self.folder.rename(former)
        except OSError as error:
            raise UserError(
                f"a former run that can not be moved aside to {former}: {error.strerror}",
                where=f"output_dir={self.folder}",
                fix="output_dir=ANOTHER",
            ) from error


def find_checkpoint(run: Run, config: RunConfig, *, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that ``resume`` asks for; None starts anew.

    Raises:
        UserError: It is broken, or its run had other settings.
    """
    if config.resume == "none":
        return None
    if config.resume == "auto":
        path = checkpoints.newest_whole(run.checkpoints, say=say)
        if path is None:
            say(f"resume=auto: no whole checkpoint in {run.checkpoints}, starting anew")
            return None
    else:
        path = Path(config.resume)
        if not path.is_dir():
            raise UserError(
                "no such checkpoint", where=f"resume={path}", expected="auto, none, or a folder checkpoints/step-N"
            )
        if path.resolve().parent != run.checkpoints.resolve():
            raise UserError(
                "a checkpoint of another run", where=f"resume={path}", fix=f"output_dir={path.resolve().parent.parent}"
            )
        checkpoints.require_whole(path)
    _refuse_other_settings(path.parent.parent / "config.yaml", config)
    return path


def _refuse_other_settings(stored: Path, config: RunConfig) -> None:
    """A run that goes on with other settings would be neither of the two."""
    if not stored.is_file():
        raise UserError("no config.yaml beside the checkpoints", where=str(stored))
    former = validate(read_yaml(stored), where=str(stored))  # of an older version, too
    before, now = _flat(former.to_dict()), _flat(config.to_dict())
    keys = sorted({*before, *now})
    changed = [
        k for k in keys if before.get(k) != now.get(k) and not any(f"{k}.".startswith(f"{f}.") for f in FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            "other settings than the run had: " + ", ".join(f"{k}={now.get(k)} (was {before.get(k)})" for k in changed),
            where=str(stored),
            expected="the same settings, so that the run is one run",
            fix="give the former values, or start anew with resume=none",
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def manifest(
    config: RunConfig,
    *,
    data: Mapping[str, str],
    base: str,
    assets: list[dict[str, Any]],
    world_size: int,
    precision: str,
    scored_by: str,
) -> dict[str, Any]:
    """Everything that the figures of this run depend on."""
    return {
        "heedful": __version__,
        "task": config.task,
        "seed": config.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": hide(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_clean": _git("status", "--porcelain") == "",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "gpu": _gpu(),
            "world_size": world_size,
            "precision": "fp32" if precision == "no" else precision,
        },
        "data": dict(data),
        "base": base,
        "assets": assets,
        "scored_by": scored_by,
        "local": [name for name in _named(config) if is_local(name)],
    }


def _named(config: RunConfig) -> list[str]:
    data, model = config.data, config.model
    given = (model.name, model.tokenizer, data.train, data.validation, data.test)
    return [name for name in given if name is not None]


def origin(data: Mapping[str, str], base: str) -> dict[str, str]:
    """Hashes of what a run learns from and begins with; ``base`` is empty where an older version did not say."""
    return {**data, BASE_MODEL: base}


def refuse_changed(then: Mapping[str, str], now: Mapping[str, str], *, since: str, where: str, fix: str) -> None:
    """Compare two origins.

    Raises:
        UserError: Naming each part that is another one.
    """
    known = then if then[BASE_MODEL] else {**then, BASE_MODEL: now[BASE_MODEL]}
    if changed := [name for name in {**known, **now} if known.get(name) != now.get(name)]:
        raise UserError(
            f"changed since {since}: {', '.join(changed)}",
            where=where,
            expected="the same files as then, by their sha256",
            fix=fix,
        )


def compare_starts(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Hold the start of a run against the one that it repeats.

    Returns:
        A line for each circumstance that is another one: versions, machine, commit. With them, or with others, it may
        well come out otherwise.

    Raises:
        UserError: It has other data or another base, and so is another run.
    """
    then, after = (origin(part["data"], part.get("base", "")) for part in (former, now))
    refuse_changed(then, after, since="that run", where="manifest.json", fix="put them back")
    parts = [{"": m} | {f"{part}, ": m[part] for part in ("versions", "machine")} for m in (former, now)]
    own = ("heedful", "git_commit", "git_clean")
    return [
        f"! {part}{name}: {parts[0][part].get(name)} then, {value} now"
        for part, values in parts[1].items()
        for name, value in values.items()
        if (part or name in own) and parts[0][part].get(name) != value
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Of this project's checkout; None where it was installed without one."""
    home = Path(__file__).parent.parent
    if shutil.which("git") is None or not (home / ".git").exists():
        return None
    answer = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return f"{models[0].split(': ')[1]} x {len(models)}" if models else platform.processor()


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
