"""Make data/tatoeba-en-es, the beginning of each split of the asset of that name.

    python -m scripts.build_tatoeba        # from the folder of heedful

The asset's order is that of a hash, so its beginning is a fair sample, and the small splits lie within the large.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from sources.assets import Asset, ensure, load_table
from sources.cards import write_card
from sources.conversions import write_splits

NAME = "tatoeba-en-es"
ROWS = {"train": 18_000, "validation": 1_000, "test": 1_000}


def build(asset: Asset, folder: Path, target: Path) -> None:
    """Cut the asset in ``folder`` down and write what is left, with its card, into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    tables = {split: pq.read_table(folder / f"{split}.parquet").slice(0, rows) for split, rows in ROWS.items()}
    counts = write_splits({split: table.to_pydict() for split, table in tables.items()}, target)
    write_card(
        asset.name,
        target,
        origin=f"Made by `python -m scripts.build_tatoeba` from the asset {asset.name}, which heedful makes from "
        f"{asset.file} ({asset.pin}, sha256 `{asset.sha256}`).",
        body=f"{counts}\n\nThe first rows of each split of the asset, nothing changed: pairs of sentences in the order "
        "of a hash of the English one, with no English sentence in two splits (case and punctuation apart). "
        "`make assets TASK=translation` fetches them all. Columns: `source`, English; `target`, Spanish; "
        "`attribution`, the line's license and the numbers and authors of both sentences.",
        license=asset.license,
        terms=asset.terms,
        language=asset.language,
    )


if __name__ == "__main__":
    (fetched,) = ensure([f"assets/{NAME}"], root=Path.cwd(), say=print)
    build(load_table(Path("assets.yaml"))[NAME], fetched, Path("data") / NAME)
