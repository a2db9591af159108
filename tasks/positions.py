"""How long a text a model can take, asked before it is found out in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from heedful import UserError


def check_lengths(model: nn.Module, sequences: Iterable[Mapping[str, int]]) -> None:
    """Refuse more tokens than the model has positions for.

    Args:
        sequences: See ``Task.sequences``.

    Raises:
        UserError: Torch would only say that an index is out of range, or go on beyond what was ever trained.
    """
    for tokens in sequences:
        _check(model, tokens)


def _check(model: nn.Module, tokens: Mapping[str, int]) -> None:
    limit, total = max_positions(model), sum(tokens.values())
    if limit is None or total <= limit:
        return
    first, *others = tokens
    room = limit - sum(tokens[name] for name in others)
    raise UserError(
        " + ".join(f"{name}={value}" for name, value in tokens.items()),
        expected=f"at most {limit}, the positions of this model",
        fix=f"{first}={room}" if room > 0 else f"lower {' and '.join(tokens)}",
    )


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence that the model can encode, special tokens included; None where nothing bounds it."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1, so its table of 514 rows serves 512 tokens.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    endless = getattr(config, "relative_attention", False) or getattr(config, "alibi", False)
    return None if endless else getattr(config, "max_position_embeddings", None)
