"""Attention written out: the whole table of scores, masked, in a few lines that can be read against the paper.

The tests hold every variant to it; ``full`` goes by it where torch's kernel lacks what a model asks for.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from attention.bias import dense_bias
from attention.scoring import Scoring


def attention_weights(query: Tensor, key: Tensor, allowed: Tensor | None, scoring: Scoring) -> Tensor:
    """Softmax of the scores over the allowed keys, BHNM; zeros where a query sees nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * scoring.scaling
    if (cap := scoring.softcap) is not None:
        scores = cap * torch.tanh(scores / cap)
    if scoring.bias is not None:
        scores = scores + dense_bias(scoring.bias, query.shape[2], key.shape[2])
    return masked_softmax(scores, allowed)


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Over the allowed keys, BHNM; zeros where a query sees nothing. None is all."""
    if allowed is None:
        return scores.softmax(-1)
    blind = ~allowed.any(-1, keepdim=True)  # a softmax over nothing is NaN, and so is its gradient
    return scores.masked_fill(~(allowed | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scoring: Scoring) -> Tensor:
    """BHND of BHND, BKMD and BKMD.

    Args:
        allowed: Bool that broadcasts to BHNM; None is all.
    """
    weights = attention_weights(query, key, allowed, scoring)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return dropout(weights, scoring.dropout, training=scoring.dropout > 0) @ value
