"""Optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.optimization import Adafactor

from heedful import UserError

NO_DECAY = ("bias", "layernorm", "rmsnorm", "norm")
"""Modules and parameters whose last name holds one of these are not decayed, nor is any vector."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices that are neither biases nor weights of a norm."""
    owner = name.lower().split(".")[-2:]
    return parameter.ndim > 1 and not any(word in part for part in owner for word in NO_DECAY)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not, of the parameters that are trained. An empty group is left out."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float], epsilon: float
) -> Optimizer:
    """Make the optimizer that TrainingArguments calls ``name``."""
    match name:
        case "adamw_torch_fused" | "adamw_torch":
            fused = name.endswith("fused")
            return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)
        case "adafactor":
            return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)  # type: ignore[no-any-return]
        case "sgd":
            return torch.optim.SGD(groups, lr=learning_rate)
    raise ValueError(name)


def build_scheduler(
    name: str, optimizer: Optimizer, *, warmup_steps: float, num_training_steps: int, decay_steps: float = 0.0
) -> LRScheduler:
    """The usual schedules, a function of the step alone.

    Args:
        warmup_steps: Below 1 a share of all steps, as in TrainingArguments.
        decay_steps: The same, but rounded down, for the end of ``warmup_stable_decay`` (Hu et al. 2024, MiniCPM,
            section 4); no other schedule reads it.

    Raises:
        UserError: Warm-up and decay are longer than the run.
    """
    warmup = ceil(warmup_steps * num_training_steps) if warmup_steps < 1 else int(warmup_steps)
    decay = int(decay_steps)
    if decay_steps < 1:  # of a short run too, a step
        decay = max(0, min(max(1, int(decay_steps * num_training_steps)), num_training_steps - warmup))
    extra = {}
    if name == "warmup_stable_decay":
        if warmup + decay > num_training_steps:
            raise UserError(
                f"{warmup} steps of warm-up and {decay} of decay in a run of {num_training_steps}",
                where="train.warmup_steps, train.decay_steps",
                expected="together no more than the run has",
            )
        extra = {"num_decay_steps": decay}
    return get_scheduler(  # type: ignore[no-any-return]
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=extra,
    )
