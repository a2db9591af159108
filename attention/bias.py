"""Biases by position that are kept as a vector: T5's depends on the distance alone (Raffel et al., arXiv 1910.10683).

Shapes: H heads, N queries, M keys; a vector [H, N + M - 1] goes by the key's index less the query's, from -(N - 1).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor


def dense_bias(bias: Tensor, queries: int, keys: int) -> Tensor:
    """[1, H, N, M] of a vector; a table of four dimensions as it is."""
    if bias.ndim == 4:
        return bias
    steps = torch.arange(keys, device=bias.device)[None, :] - torch.arange(queries, device=bias.device)[:, None]
    return bias[None, :, steps + queries - 1]


def bias_between(bias: Tensor, queries: slice, keys: slice, all_queries: int) -> Tensor:
    """That of some queries and keys in a row each, as a view; ``all_queries`` is N."""
    if bias.ndim == 4:
        return bias[:, :, queries, keys]
    return bias[:, keys.start - queries.stop + all_queries : keys.stop - queries.start + all_queries - 1]


def keep_as_vector(module: Any, variant: Any, *, cross: bool) -> None:
    """Let one of T5's attention modules hand on a vector for its bias, where it would fill a table of N x M.

    It is of the whole text where the module sees a part, as its variant says (``text_length``). Its cross-attention has
    none, and would fill a table of zeros.
    """
    if not hasattr(module, "has_relative_attention_bias"):
        return
    if module.has_relative_attention_bias:
        module.compute_bias = partial(_vector, module, variant)
    elif cross:
        module.has_relative_attention_bias, module.compute_bias = True, _none


def keep_as_table(module: Any) -> None:
    """Undo ``keep_as_vector``."""
    own = vars(module).pop("compute_bias", None)
    if own is _none:
        module.has_relative_attention_bias = False


def _vector(
    module: Any, variant: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0
) -> Tensor:
    """As ``compute_bias`` of transformers, [H, N + M - 1]."""
    if (whole := getattr(variant, "text_length", None)) is not None:
        query_length = key_length = whole
    table = module.relative_attention_bias
    distances = torch.arange(1 - query_length, key_length, device=table.weight.device) - past_seen_tokens
    buckets = module._relative_position_bucket(
        distances,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    vector: Tensor = table(buckets).T
    return vector


def _none(*args: Any, **kwargs: Any) -> None:
    return None
