"""How sure a metric is, given the size of the split it was measured on.

Shapes: N rows, R resamples.
"""

from __future__ import annotations

import numpy as np

from tasks.protocol import Resample


def bootstrap(
    resample: Resample, num_rows: int, *, num_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over rows (Efron & Tibshirani 1993, chapter 13).

    It tells of the chance in the choice of the rows, not of that in training (seeds). A metric that is undefined (NaN)
    in some resamples is described by the others.

    Args:
        resample: Metrics over the rows with given indices, see ``Task.resample``.
        num_rows: N.
        num_resamples: R.
        seed: Of the draws, apart from every other random state.
        level: Probability that the interval is meant to cover.

    Returns:
        ``{"<metric>_ci95": (low, high)}``, the number being the level in percent.
    """
    generator = np.random.default_rng(seed)
    draws = [resample(generator.integers(num_rows, size=num_rows)) for _ in range(num_resamples)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {name: np.nanquantile([draw[name] for draw in draws], tails) for name in draws[0]}
    return {f"{name}_ci{level:.0%}".rstrip("%"): (float(low), float(high)) for name, (low, high) in intervals.items()}
