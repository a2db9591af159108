"""Weights, gradients and optimizer state in parts, one a process (FSDP2; ZeRO-3 in Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054).

torch's own ``fully_shard`` gathers the weights of a block before its forward and its backward pass and lets them go
after. All ranks gather together: each must make the same number of passes, which ``passes`` sees to, or none but on
``whole`` weights, where no rank waits for another. See ADR 12.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sources.texts import counted

# It fears for blocks that add to a view in place; each family's update is compared with the one of one process.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)


def shard(model: nn.Module, accelerator: Accelerator) -> str:
    """Leave each rank its part of every parameter. Before the optimizer is made: the parameters are others afterwards.

    Returns:
        What this rank holds now, in words.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Autocast alone would keep a second, bf16 copy of every gathered weight for the backward pass. Sums stay in fp32.
    low = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    parts = blocks(model)
    for block in parts:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # What stands outside the blocks stays gathered until the backward pass, since a loss may call the head by itself.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # torch takes for the root whatever runs first: the blocks of an encoder, where a text is generated before training.
    cast(FSDPModule, model)._get_fsdp_state()._lazy_init()
    if plain := [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]:
        raise RuntimeError(f"not sharded: {', '.join(plain[:3])}")
    own, total = (sum(f(p).numel() for p in model.parameters()) for f in (local, lambda p: p))
    return (
        f"fsdp2: {counted(len(parts), 'blocks')} and the rest in {accelerator.num_processes} parts; "
        f"this process holds {own:,} of {total:,} parameters"
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's numbered blocks: the outermost members of its lists of modules.

    One that shares a parameter with what stands elsewhere is left out, since both must be gathered at once.
    """
    held = Counter(p for module in model.modules() for p in module._parameters.values())
    own = {block: Counter(p for m in block.modules() for p in m._parameters.values()) for block in _listed(model)}
    return [block for block, inside in own.items() if all(held[p] == inside[p] for p in inside if p is not None)]


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield child
        else:
            yield from _listed(child)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only a part of this model."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def passes(model: nn.Module, accelerator: Accelerator, own: int) -> int:
    """Forward and backward passes that this rank must make for ``own`` micro-batches.

    Data parallelism needs one of every rank; sharded weights, which are gathered in each, as many as any rank makes.
    """
    if not is_sharded(model):
        return max(own, 1)
    return int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max())


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within, each rank holds all weights and makes forward passes of its own, as many as it likes."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)
        if isinstance(model, FSDPModule):
            # torch gathers ahead in the order of all forward passes since the last backward pass, these among them: a
            # rank that made none would wait for ever for one that then gathers a block more.
            model.reset_iter_state()
