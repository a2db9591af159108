"""The one way to load a metric of this project as an `evaluate` module."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import evaluate


@cache
def load_metric(name: str, config_name: str | None = None) -> evaluate.EvaluationModule:
    """Load ``tasks/metrics/<name>/<name>.py`` by its path, so that neither network nor Hub is asked.

    The examples are kept in memory: the cache file of ``evaluate`` is shared by all processes of a machine.

    Args:
        name: Folder of the metric.
        config_name: Which of the metric's variants, if it has several.
    """
    path = Path(__file__).parent / name / f"{name}.py"
    return evaluate.load(str(path), config_name, keep_in_memory=True)
