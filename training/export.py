"""What a run leaves behind: ``model/``, a plain Hugging Face folder, proved to answer as the trained model does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from heedful import UserError
from sources.files import write_whole
from tasks.batching import model_inputs
from tasks.protocol import Batch, Task
from tasks.saved import save_task
from training.lora import open_adapter, save_adapter
from training.models import load_model, pretrained_hash
from training.quantization import FourBits, merge, quantize

MERGE_TOLERANCE = 1e-3
"""Largest relative change of the logits that merging may cause in fp32 (rounding of W + BA; about 1e-6 is usual)."""


def export(
    model: nn.Module,
    task: Task,
    folder: Path,
    *,
    probes: Sequence[Batch],
    base: dict[str, Any],
    base_hash: str,
    four_bits: FourBits | None = None,
) -> dict[str, float]:
    """Write ``folder/model`` (and ``folder/adapter`` with LoRA), reload both, and compare their answers.

    Args:
        model: The trained model without wrappers; a PeftModel is merged in place, and one in 4 bits emptied.
        probes: Batches to compare answers on, best with padding and without.
        base: Arguments of ``load_model`` that gave the model its start, to load the adapter on.
        base_hash: ``pretrained_hash`` of what that gave, for the adapter to know its base by.
        four_bits: How the linear layers of the blocks were held then.

    Returns:
        For each folder the largest difference of the logits, relative to their largest size.

    Raises:
        UserError: A reloaded model answers differently, or the base was changed meanwhile.
    """
    trained = answers(model, *probes)
    differences: dict[str, float] = {}
    if isinstance(model, PeftModel):
        adapter: PeftModel = model
        write_whole(folder / "adapter", lambda aside: save_adapter(adapter, aside, base=base_hash))
        again = answers(_with_adapter(task, folder / "adapter", base, four_bits).to(model.device), *probes)
        differences["adapter"] = difference(trained, again)
        model = adapter.merge_and_unload() if four_bits is None else merge(adapter.cpu())
    write_whole(folder / "model", lambda aside: write_model(model, task, aside))
    trust = bool(base.get("trust_remote_code"))
    device = next(model.parameters()).device
    if four_bits is not None:
        model.to("meta")  # whoever still holds it: a second one need not fit
    reloaded = load_model(task.auto_class, str(folder / "model"), trust_remote_code=trust).model.to(device)
    differences["model"] = difference(trained, answers(reloaded, *probes))
    if wrong := {name: d for name, d in differences.items() if not d <= MERGE_TOLERANCE}:  # NaN too
        for name in wrong:
            shutil.rmtree(folder / name)
        raise UserError(
            f"the reloaded model answers differently: {wrong}", where=str(folder), expected=f"at most {MERGE_TOLERANCE}"
        )
    return differences


def _with_adapter(task: Task, adapter: Path, base: dict[str, Any], four_bits: FourBits | None) -> PeftModel:
    loaded = load_model(task.auto_class, **base, **task.model_kwargs())
    found = pretrained_hash(loaded)
    if four_bits is not None:
        quantize(loaded.model, loaded.new, four_bits)
    return open_adapter(loaded.model, adapter, base=found)


def write_model(model: Any, task: Task, folder: Path) -> None:
    """Save a model with its tokenizer and its task."""
    model.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    save_task(task, folder)


@torch.inference_mode()
def answers(model: nn.Module, *batches: Batch) -> list[Tensor]:
    """Every floating output of the model in eval mode: logits, or start and end logits."""
    model.eval()
    device = next(model.parameters()).device
    outputs = [model(**{name: tensor.to(device) for name, tensor in model_inputs(b).items()}) for b in batches]
    values = [value for output in outputs for value in output.values()]
    return [value.float().cpu() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest one of ``answers`` of the same batches, relative to the largest of the first."""
    each = [(a - b).abs().max() / a.abs().max().clamp(min=1e-6) for a, b in zip(one, other, strict=True)]
    return float(torch.stack(each).max())  # NaN where one is, which Python's max may pass over
