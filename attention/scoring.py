"""How one call makes weights of queries and keys, whatever the variant."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """What transformers says in a call, beside the tensors and the mask.

    Shapes: B rows, H query heads, N queries, M keys.

    Args:
        scaling: Factor of the products.
        dropout: Fraction of the weights that is dropped; 0 in eval mode.
        bias: Added to the scores. Of two dimensions, [H, N + M - 1]: by the key's index less the query's, from
            -(N - 1). Of four: [B or 1, H, N, M].
        softcap: The scores s become softcap * tanh(s / softcap), as in Gemma 2 (arXiv 2408.00118, section 2).
    """

    scaling: float
    dropout: float = 0.0
    bias: Tensor | None = None
    softcap: float | None = None

    def of(self, rows: Tensor, queries: slice, keys: slice) -> Scoring:
        """The same for some rows, and for the queries and keys from some on."""
        if self.bias is None:
            return self
        if self.bias.ndim == 2:  # its first entry is that of the last query and the first key
            return replace(self, bias=self.bias[:, keys.start : self.bias.shape[1] - queries.start])
        bias = self.bias if len(self.bias) == 1 else self.bias[rows]
        return replace(self, bias=bias[:, :, queries, keys])

    def require_plain(self, name: str) -> None:
        """For a variant whose scores nothing may be done to; installed in a model, it is refused before it is called.

        Raises:
            ValueError: There is a bias or a soft cap.
        """
        for what, given in {"a bias": self.bias, "a soft cap": self.softcap}.items():
            if given is not None:
                raise ValueError(f"{name} with {what}, which it does not honour")
