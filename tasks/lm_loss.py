"""Cross-entropy over a vocabulary, of the labelled positions only and in chunks.

The logits of a whole batch never exist at once: SmolLM2's vocabulary of 49,152 turns 1,024 tokens into 200 MB of fp32,
and their softmax and gradient into as much again. Where the logits are the head's output and nothing else, the head is
left out of the model's forward pass and applied chunk by chunk here, each recomputed in the backward pass (Chen et al.
2016, https://arxiv.org/abs/1604.06174). A soft cap (Gemma 2) is left out with the head and put on each chunk. Where the
model does more to its logits (BART adds a bias) they are taken as they come, which is said of a large vocabulary. Which
it is, is tried out on the model itself.

Shapes: B examples, T tokens, D hidden size, V vocabulary, N labelled positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from heedful import UserError
from sources.texts import counted
from tasks.batching import IGNORED
from tasks.evaluating import in_eval_mode
from tasks.protocol import Batch, Output

CHUNK = 2**24
"""Logits in a chunk: 64 MiB in fp32."""
LARGE = 2**15
"""Tokens of a vocabulary from which on it matters."""
CAP = "final_logit_softcapping"
"""Of a configuration: the largest size of a logit, which tanh bends it to."""

logger = logging.getLogger("heedful.tasks.lm_loss")

_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def summed_loss(
    model: nn.Module, inputs: Mapping[str, Any], labels_BT: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Sum of the cross-entropy over the positions whose label is not -100, in fp32; see ``token_losses``."""
    return token_losses(model, inputs, labels_BT, label_smoothing=label_smoothing).sum()


def token_losses(
    model: nn.Module, inputs: Mapping[str, Any], labels_BT: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each labelled position (N), in the order of ``labels_BT[labels_BT != -100]``.

    Args:
        model: A model with a language modelling head, possibly wrapped for data parallelism.
        inputs: What its forward takes: tensors whose first dimension is B, and flags.
        labels_BT: Of the logits at the same position: shift them for a causal model (``next_tokens``).
        label_smoothing: As in ``torch.nn.functional.cross_entropy``.
    """
    keep_BT = labels_BT != IGNORED
    labels_N = labels_BT[keep_BT]
    losses = partial(cross_entropy, reduction="none", label_smoothing=label_smoothing)
    head = _head(model)
    if not _is_plain(model, head, inputs):
        return losses(model(**inputs).logits[keep_BT].float(), labels_N)
    with _left_out(_bare(model), head) as cap:
        hidden_ND = model(**inputs).logits[keep_BT]
    rows = max(1, CHUNK // head.weight.shape[0])

    def chunk(hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        return losses(_capped(head(hidden_CD), cap).float(), labels_C)

    if len(labels_N) <= rows:
        return chunk(hidden_ND, labels_N)
    pairs = zip(torch.split(hidden_ND, rows), torch.split(labels_N, rows), strict=True)
    return torch.cat([cast(Tensor, checkpoint(chunk, *pair, use_reentrant=False)) for pair in pairs])


def likelihoods(model: nn.Module, inputs: Mapping[str, Any], labels_BT: Tensor) -> Batch:
    """Summed loss of each row in nats, ``nll`` (B), and over how many labels, ``tokens`` (B)."""
    counts_B = (labels_BT != IGNORED).sum(dim=1)
    sums_B = torch.zeros(len(counts_B), dtype=torch.float64, device=labels_BT.device)
    if counts_B.any():
        losses_N = token_losses(model, inputs, labels_BT).double()
        sums_B.index_add_(0, torch.repeat_interleave(counts_B), losses_N)
    return {"nll": sums_B, "tokens": counts_B}


def scored(outputs: Sequence[Output]) -> tuple[list[float], list[int]]:
    """``nll`` and ``tokens`` of each row's answer.

    Raises:
        UserError: There is no token to score in all of them.
    """
    nlls, tokens = ([output.get(name, 0) for output in outputs] for name in ("nll", "tokens"))
    if not sum(tokens):
        where = counted(len(outputs), "rows")
        raise UserError("no token to score", where=where, expected="texts, or prompts with answers")
    return nlls, tokens


def next_tokens(labels_BT: Tensor) -> Tensor:
    """Labels of a causal model: at each position the token after it."""
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def _bare(model: nn.Module) -> nn.Module:
    return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model


def _head(model: nn.Module) -> nn.Linear:
    return _bare(model).get_output_embeddings()  # type: ignore[operator,no-any-return]


def _is_plain(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> bool:
    """Whether the logits are ``head(hidden)``, perhaps capped, found out once a model with the first example."""
    if head not in _plain_heads:
        first = {n: v[:1] if isinstance(v, Tensor) else v for n, v in inputs.items()}
        _plain_heads[head] = _try_out(_bare(model), head, first)
        if not _plain_heads[head] and (size := head.weight.shape[0]) >= LARGE:
            logger.warning(
                "! this model changes its logits: those of %s tokens are held at once, not in chunks", f"{size:,}"
            )
    return _plain_heads[head]


@torch.no_grad()
def _try_out(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> bool:
    try:
        with in_eval_mode(model):
            logits = model(**inputs).logits
            with _left_out(model, head) as cap:
                hidden = model(**inputs).logits
        return hidden.shape[-1] == head.weight.shape[1] and torch.equal(_capped(head(hidden), cap), logits)
    except RuntimeError:  # shapes that no longer fit: a bias of the size of the vocabulary, say
        if isinstance(model, FSDPModule):
            model.reset_iter_state()
        return False
    finally:
        # Or the first update takes the weights that were cast here: gradients of tied ones would add up in another
        # order than in later updates, and a resumed run, which begins with such an update, would differ in a last bit.
        torch.clear_autocast_cache()


@contextmanager
def _left_out(model: nn.Module, head: nn.Module) -> Iterator[float | None]:
    """Within, the head hands its input on, uncapped; yields the cap. Its parameters stay, under their names."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    cap = getattr(config, CAP, None)
    head.forward = lambda hidden: hidden
    if cap is not None:
        setattr(config, CAP, None)
    try:
        yield cap
    finally:
        del head.forward
        if cap is not None:
            setattr(config, CAP, cap)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap
