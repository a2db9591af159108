"""Where in a model a text is shared out (context parallelism): between the first block of a stack and the last.

Embeddings, positions and masks are made of the whole text in each process of a ring, and so need not know. The first
block gets this process's tokens of it, and after the last one all processes' are joined, so that heads and losses see
the whole text, too. Each process comes to the same loss; the gradient of their sum is as many times too large as there
are processes, and so is the count of targets that it is divided by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attention.masks import LazyMask
from attention.ring import Ring, Shards, Stretch, zigzag
from attention.seam import CHILD, last_token, run
from attention.variant import stack_of
from attention.variants.ring import RingAttention
from heedful import UserError

BY_TOKEN = {"position_embeddings": -2, "position_ids": -1}
"""What a block is given beside its tokens, and the dimension in which it goes by them."""
BY_QUERY = "encoder_attention_mask"
"""Of cross-attention: the keys stay whole."""
SKIPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Settings by which a model leaves blocks out at random, each process others."""
TOLERANCE = 1e-4
"""Largest difference that another order of the sums may make, of the largest answer."""


def connect(model: nn.Module) -> list[str]:
    """Let processes share out the texts that they train on, where the model has ring attention.

    All processes call it together, before the model is wrapped for data parallelism.

    Returns:
        What was done, in words; nothing for a model without a ring.

    Raises:
        UserError: The processes do not make whole rings, or a text can not be shared out in this model.
    """
    sizes = {module.ring_size for module in model.modules() if isinstance(module, RingAttention)}
    if not sizes:
        return []
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return ["ring: one process makes none, and trains on whole texts by blockwise attention"]
    size = sizes.pop() or world
    if world % size:
        raise UserError(
            f"ring_size={size} with {world} processes", where="attention.ring_size", expected=f"a divisor of {world}"
        )
    prove(model)
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    number, rank = divmod(dist.get_rank(), size)
    _attach(model, Ring(zigzag(size), rank, groups[number]))
    rings = f"{world // size} rings" if world > size else "1 ring"
    return [f"ring: {rings} of {size} processes, each with 1/{size} of every text of its ring"]


def ring_size(model: nn.Module) -> int:
    """Processes that train on the same texts; 1 where each has its own."""
    stretches = (module.stretch for module in model.modules() if isinstance(module, RingAttention))
    return next((stretch.ring.size for stretch in stretches if stretch is not None), 1)


def prove(model: Any) -> None:
    """Refuse a model in which tokens meet elsewhere than in attention: try it with its tokens in another order.

    Raises:
        UserError: It answers differently.
    """
    configs = [
        module.config for module in model.modules() if hasattr(module, "config")
    ]  # of a joined model, its halves'
    if skipping := [(name, rate) for config in configs for name in SKIPS if (rate := getattr(config, name, 0))]:
        raise UserError(
            "{}={} with ring attention: processes would wait for blocks that others leave out".format(*skipping[0]),
            where="attention",
            fix="take a checkpoint whose config.json has it at 0",
        )
    ids = torch.arange(7, device=model.device)[None]
    real = (ids > 1).long()
    ids[:, -1] = last_token(model)
    expected, reason = run(model, ids, real)[0], ""
    try:
        with _alone(model):
            difference = float((run(model, ids, real)[0] - expected).abs().max() / expected.abs().max())
    except (ValueError, RuntimeError) as error:
        difference, reason = torch.inf, f": {error}"
    if not difference <= TOLERANCE:
        raise UserError(
            f"{type(model).__name__} answers differently where its blocks see tokens in another order{reason}",
            where="attention",
            expected="for ring attention, blocks in which tokens meet in attention alone",
        )


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Within, one process holds all of a text, its second half first."""
    ring = Ring(((1, 0),))
    handles = _attach(model, ring, always=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, RingAttention):
                module.stretch = None


def _attach(model: nn.Module, ring: Ring, *, always: bool = False) -> list[Any]:
    """Share texts out in every stack, in training mode or ``always``; what takes the hooks off again."""
    stretches: dict[str, Stretch] = {}
    for path, module in model.named_modules():
        if isinstance(variant := getattr(module, CHILD, None), RingAttention):
            variant.stretch = stretches.setdefault(stack_of(path), Stretch(ring))
    handles: list[Any] = []
    for path, stretch in stretches.items():
        blocks = list(model.get_submodule(path).children())
        for number, block in enumerate(blocks):
            enter = partial(_enter, stretch, number == 0, always)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(blocks[-1].register_forward_hook(partial(_leave, stretch)))
    return handles


def _enter(
    stretch: Stretch, first: bool, always: bool, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a block: give it of what it was given that which goes with this process's tokens."""
    names = list(signature(block.forward).parameters)
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    tokens = next(iter(given))
    if first:
        stretch.shards = Shards(stretch.ring, given[tokens].shape[1]) if block.training or always else None
    if (shards := stretch.shards) is None:
        return None
    if first:
        given[tokens] = shards.own(given[tokens], 1)
    for name in BY_TOKEN.keys() & given.keys():
        given[name] = _of_own_tokens(shards, given[name], BY_TOKEN[name])
    if isinstance(mask := given.get(BY_QUERY), LazyMask):
        given[BY_QUERY] = mask.part(slice(0, shards.tokens), slice(0, mask.shape[3]))  # padding alone, for any query
    return tuple(given[name] for name in names[: len(args)]), {name: given[name] for name in kwargs}


def _of_own_tokens(shards: Shards, given: Any, dim: int) -> Any:
    if isinstance(given, tuple):
        return tuple(_of_own_tokens(shards, x, dim) for x in given)
    return shards.own(given, dim) if isinstance(given, Tensor) else given


def _leave(stretch: Stretch, block: nn.Module, args: Any, output: Any) -> Any:
    """After the last block: the tokens of all processes."""
    if (shards := stretch.shards) is None:
        return None
    if isinstance(output, tuple):
        return (shards.whole(output[0]), *output[1:])
    return shards.whole(output)
