"""Overlapping windows over a long row, and the one window that speaks for each of its words (or tokens).

Conventions are those of Hugging Face tokenizers: ``max_length`` counts the special tokens, ``stride`` is the number of
tokens that two neighboring windows share. A *unit* is whatever must not be cut: a word, or a single token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from heedful import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Window = tuple[int, int]
"""First unit and one past the last."""


def window_room(tokenizer: PreTrainedTokenizerBase, max_length: int, *, stride: int, pair: bool = False) -> int:
    """Count the tokens of a window that are left for text.

    Raises:
        UserError: Windows of this size and stride would not move forward.
    """
    room: int = max_length - tokenizer.num_special_tokens_to_add(pair=pair)
    if not 0 <= stride < room:
        raise UserError(
            f"stride {stride} with max_length {max_length}, of which {max_length - room} are special tokens",
            where="model.max_length, data.stride",
            expected=f"0 <= stride < {max(room, 0)}, so that each window goes beyond the one before",
            fix="raise model.max_length or lower data.stride",
        )
    return room


def plan_windows(lengths: Sequence[int], *, room: int, stride: int) -> list[Window]:
    """Cut units of the given lengths into windows of at most ``room`` tokens that never cut a unit.

    Neighbors share as many whole units as ``stride`` tokens hold. A unit that alone exceeds ``room`` gets a window of
    its own, which the caller must truncate. With units of one token these are the tokenizer's own overflow windows.

    Args:
        lengths: Tokens of each unit; 0 is allowed.
        room: Tokens of text in a window, see ``window_room``.
        stride: Tokens shared by neighbors at most.

    Returns:
        Windows in order; they cover every unit, and each begins and ends later than the one before.
    """
    ends = np.fromiter(accumulate(lengths, initial=0), dtype=np.int64)  # ends[i]: tokens before unit i
    num_units = len(lengths)
    windows: list[Window] = []
    start = 0
    while True:
        last_fit = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        end = max(last_fit, min(start + 1, num_units))
        windows.append((start, end))
        if end == num_units:
            return windows
        # What is shared must also leave room for the next unit, or the next window would not go beyond this one.
        shared = max(0, min(stride, room - lengths[end]))
        start = int(np.searchsorted(ends, ends[end] - shared, side="left")) if shared else end


def owners(windows: Sequence[Window], num_units: int) -> NDArray[np.int64]:
    """Choose for each unit the window in which it has most context on its poorer side; ties go to the earlier one.

    The edge of the document takes no context away, so it does not count as an edge. (The "max context" rule of
    Devlin et al. 2018, run_squad.py, which lacks that clause.)

    Returns:
        owner_N: index into ``windows`` of each unit.
    """
    owner_N = np.zeros(num_units, dtype=np.int64)
    most_N = np.full(num_units, -1, dtype=np.int64)
    for index, (start, end) in enumerate(windows):
        unit = np.arange(start, end)
        left = unit - start if start > 0 else np.full_like(unit, num_units)
        right = end - 1 - unit if end < num_units else np.full_like(unit, num_units)
        context = np.minimum(left, right)
        better = unit[context > most_N[start:end]]
        most_N[better], owner_N[better] = context[better - start], index
    return owner_N
