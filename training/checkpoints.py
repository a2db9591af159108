"""Checkpoints that are whole or absent (``sources.files.write_whole``); pruned only after the new one is safe.

No pickle anywhere: tensors in safetensors, everything else in JSON. Random state is not stored at all, because every
step seeds its own (``training.loop.seed_step``). See ADR 5.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from heedful import UserError
from sources.files import fault, write_json, write_whole
from training.batches import BlockStart
from training.sharding import is_sharded, local

# Reading without the other ranks is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


@dataclass
class Position:
    """Where a run stands. All of it is saved, and with the tensors it is all that the rest of the run depends on."""

    step: int = 0
    """Updates done."""
    best_step: int | None = None
    best_score: float | None = None
    stale_evaluations: int = 0
    """Evaluations since the best one."""
    world_size: int = 1
    data: dict[str, str] = field(default_factory=dict)
    """Hashes of the files or data sets that the splits were read from."""
    base: str = ""
    """Hash of the pretrained weights (``training.models.pretrained_hash``)."""
    block: BlockStart = field(default_factory=BlockStart)
    """Of the last update."""


def require_whole(path: Path) -> None:
    """Refuse a broken checkpoint.

    Raises:
        UserError: It does not match its manifest.
    """
    if reason := fault(path):
        raise UserError(f"broken checkpoint: {reason}", where=str(path), fix="resume=auto takes the newest whole one")


def steps(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")))


def newest_whole(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that matches its manifest; those passed over are named with the reason."""
    for path in reversed(steps(folder)):
        reason = fault(path)
        if reason is None:
            return path
        say(f"skipping {path.name}: {reason}")
    return None


def save(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    position: Position,
    main: bool = True,
) -> Path:
    """Write ``folder/step-N`` whole. All ranks call this; where the model is not sharded, only the main one writes.

    Args:
        main: Whether this is the main process.
    """
    target = folder / f"step-{position.step}"
    weights, (states, scalars) = model_tensors(model), _optimizer_state(optimizer, _names(model))
    shards = folder / f".tmp-{target.name}-shards"

    def fill(aside: Path) -> None:
        if is_sharded(model):
            for file in shards.iterdir():
                file.rename(aside / file.name)
            _check_complete(aside, weights | states)
        else:
            save_file(weights, aside / "model.safetensors")
            save_file(states, aside / "optimizer.safetensors")
        write_json(aside / "optimizer.json", scalars)
        write_json(aside / "scheduler.json", scheduler.state_dict())
        write_json(aside / "position.json", asdict(position))

    try:
        if is_sharded(model):
            write_shards(weights | states, shards)
        if main:
            write_whole(target, fill)
    finally:
        if main:
            shutil.rmtree(shards, ignore_errors=True)  # what a failure left: a full disk must not stay full
    return target


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write what each rank holds, into a file of its own. All ranks call this.

    Raises:
        OSError: On all ranks, and only when none of them writes any more.
    """
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed, perhaps on more ranks
    dist.barrier()
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # no Exception, but a BaseException
        rank, (cause, _) = min(error.failures.items())
        raise OSError(f"{cause} (process {rank})") from error


def _check_complete(folder: Path, tensors: dict[str, Tensor]) -> None:
    written = {name: sum(prod(chunk.sizes) for chunk in entry.chunks) for name, entry in _stored(folder).items()}
    if missing := [name for name, tensor in tensors.items() if written.get(name) != tensor.numel()]:
        raise OSError(f"not all of {missing[0]} was written here: this folder must be one for all machines")


def prune(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all but the ``keep`` newest checkpoints and the best one, and what a kill left aside."""
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path)
    for path in steps(folder)[:-keep]:
        if path.name != f"step-{best_step}":
            shutil.rmtree(path)


def load(path: Path, *, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> Position:
    """Put a checkpoint back, to the bit.

    Raises:
        UserError: It does not match its manifest, or belongs to another model.
    """
    load_model(path, model)
    _load_optimizer(optimizer, path, _names(model))
    scheduler.load_state_dict(json.loads((path / "scheduler.json").read_text()))
    return read_position(path)


def read_position(path: Path) -> Position:
    """Where the run stood when it wrote this checkpoint.

    Raises:
        UserError: Another version wrote it, that knew other things of a run.
    """
    stored = json.loads((path / "position.json").read_text())
    try:
        return Position(**stored | {"block": BlockStart(**stored["block"])})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"position.json of another version of heedful: {error}", where=str(path), fix="resume=none starts anew"
        ) from None


def load_model(path: Path, model: nn.Module) -> None:
    """Put back the trained weights alone.

    Raises:
        UserError: It does not match its manifest, or has other names or shapes than the model.
    """
    require_whole(path)
    stored, own = {n: e.size for n, e in _stored(path).items() if "|" not in n}, model_tensors(model)
    if stored != {n: t.shape for n, t in own.items()}:
        names = sorted(stored.keys() ^ own.keys())[:3] or ["same names, other shapes"]
        raise UserError(
            f"checkpoint of another model ({', '.join(names)})", where=str(path), fix="resume=none starts anew"
        )
    _read(path, own)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training may have changed: trained parameters and persistent buffers. Frozen weights come from the base."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return trained | {n: t for n, t in model.state_dict(keep_vars=True).items() if not isinstance(t, nn.Parameter)}


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Every tensor of a checkpoint, in however many files: weights, and optimizer state as ``parameter|key``."""
    try:
        return HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata  # type: ignore[return-value]
    except Exception as error:  # of what is no safetensors, whatever Python makes of it
        raise UserError(f"no readable safetensors: {error}", where=str(path), fix="resume=none starts anew") from error


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read into the tensors, or into what this rank holds of them; no rank needs another."""
    if tensors:
        state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _empty(entry: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    """Room for a piece of optimizer state: sharded as its parameter where it has its shape."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype, device=local(parameter).device)


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _optimizer_state(optimizer: Optimizer, names: dict[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split into tensors, keyed ``parameter|key``, and the rest."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{names[parameter]}|{key}"] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return tensors, {"state": scalars, "param_groups": groups}


def _load_optimizer(optimizer: Optimizer, path: Path, names: dict[Tensor, str]) -> None:
    scalars = json.loads((path / "optimizer.json").read_text())
    by_name = {name: parameter for parameter, name in names.items()}
    tensors = {n: _empty(e, by_name[n.split("|")[0]]) for n, e in _stored(path).items() if "|" in n}
    _read(path, tensors)
    state: dict[str, dict[str, Any]] = {}
    for joined, value in (tensors | scalars["state"]).items():
        name, key = joined.split("|")
        state.setdefault(name, {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {
            "state": {i: state[names[p]] for i, p in enumerate(parameters) if names[p] in state},
            "param_groups": [
                {**saved, "params": own["params"]} for own, saved in zip(groups, scalars["param_groups"], strict=True)
            ],
        }
    )
