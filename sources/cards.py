"""The card that stands beside data and models: the Hub's front matter, then origin, counts and terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (float("inf"), "n>1M"))
"""The Hub's words for numbers of rows."""


def _front(folder: Path) -> dict[str, Any]:
    """What the Hub wants to know of data, or of a model where there are no rows."""
    splits = [name for name in ("train", "validation", "test") if (folder / f"{name}.parquet").is_file()]
    if not splits:
        return {"library_name": "transformers"}
    files = [{"split": name, "path": f"{name}.parquet"} for name in splits]
    rows = sum(pq.read_metadata(folder / file["path"]).num_rows for file in files)
    return {
        "size_categories": [next(name for limit, name in _SIZES if rows < limit)],
        "configs": [{"config_name": "default", "data_files": files}],
    }


def write_card(
    name: str,
    folder: Path,
    *,
    origin: str,
    body: str,
    license: str,
    terms: str,
    language: Sequence[str] = ("en",),
    notice: str = "",
) -> None:
    """Write ``README.md`` into the folder of a data set, or of a model, that is whole but for it.

    Args:
        name: What it is called.
        folder: Where it lies.
        origin: What it was made from, a sentence.
        body: What is in it and what was changed on the way.
        license: Its license, as the Hub abbreviates it.
        terms: What its publishers say of its use.
        language: The languages in it, by their codes.
        notice: A line of the publisher that travels with it.
    """
    front = {"pretty_name": name, "license": license, "language": list(language)} | _front(folder)
    heading = "Rows" if "configs" in front else "Weights"
    quoted = f"\n## The publisher's notice\n\n> {notice}\n" if notice else ""
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n{origin}\n"
        f"{quoted}\n## {heading}\n\n{body}\n\n## Terms\n\n{terms}\n",
        encoding="utf-8",
    )
