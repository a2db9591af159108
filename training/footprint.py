"""What one update needs in memory and time, measured on the update itself.

Bytes are counted, not read off the process: weights, gradients and optimizer state from their tensors, activations as
what autograd keeps for the backward pass. So the figures are the same on every machine; buffers of kernels and of the
allocator come on top.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from tasks.protocol import Batch
from training.loop import Trainee, run_update
from training.quantization import scales
from training.sharding import local, whole

SPARE = 0.1
"""Share of the memory that is left to kernels and the allocator."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device, and time.

    Args:
        activations: Kept for the backward pass of one micro-batch of ``examples``.
        seconds: Of one update.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    examples: int
    seconds: float

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def most_examples(self, memory: int) -> int:
        """Largest micro-batch of examples as long as those measured that so many bytes hold; 0 if none fits."""
        fixed = self.weights + self.gradients + self.optimizer
        return max(0, int((memory * (1 - SPARE) - fixed) / (self.activations / self.examples)))


def measure(trainee: Trainee, longest: Batch, update: list[Batch], features: Any) -> Footprint:
    """Make one update to warm up and one against the clock; the model is not of use afterwards.

    Of a sharded model this process's part is counted; the blocks gathered for a moment come on top.

    Args:
        longest: The micro-batch whose activations are counted.
        update: The micro-batches of one update.
    """
    with whole(trainee.bare_model):  # or gathered weights would count as activations
        activations = activation_bytes(trainee, longest)
    run_update(trainee, update, features, step=0)
    begin = time.perf_counter()
    run_update(trainee, update, features, step=1)
    seconds = time.perf_counter() - begin
    model = trainee.bare_model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = [v for state in trainee.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return Footprint(
        weights=_bytes([*model.parameters(), *scales(model.parameters()), *model.buffers()]),
        gradients=_bytes(trained),
        optimizer=_bytes(states),
        activations=activations,
        examples=len(longest["row"]),
        seconds=seconds,
    )


def activation_bytes(trainee: Trainee, batch: Batch) -> int:
    """Bytes of all that autograd keeps of one forward pass, each storage once, without the weights."""
    accelerator, model = trainee.accelerator, trainee.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), accelerator.autocast():
        loss = trainee.task.loss(model, send_to_device(batch, accelerator.device))
        # Counted while the graph holds them: a storage that is freed may be handed out again.
        total = sum(kept.values())
    del loss
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take there; what the system would give back of its caches counts as free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _bytes(tensors: Iterable[Tensor]) -> int:
    tensors = map(local, tensors)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
