"""Files and data sets too large to hold, as tables of a few rows each, from any row on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from heedful import UserError
from sources.tables import Table, decode, from_arrow, from_dataset, from_lines, reading_parquet


def jsonl_blocks(path: Path, *, size: int, start: int, encoding: str) -> Iterator[Table]:
    """Read one JSON object a line; see ``sources.tables.read_jsonl``.

    Raises:
        UserError: Also for an encoding whose line ends are not the byte that this splits at.
    """
    if decode(b"{}\n\n", encoding, path) != "{}\n\n":
        raise UserError(
            f"{encoding} in a streamed file", where=str(path), expected="utf-8 or the like", fix="convert the file"
        )
    with path.open("rb") as file:
        numbered = ((n, decode(line, encoding, path, line=n)) for n, line in enumerate(file, start=1))
        filled = islice(((n, line) for n, line in numbered if line.strip()), start, None)
        while lines := list(islice(filled, size)):
            yield from_lines(path, lines)


def parquet_blocks(path: Path, *, size: int, start: int, encoding: str) -> Iterator[Table]:
    """Read a parquet file, which has no text encoding; see ``sources.tables.read_parquet``."""
    with reading_parquet(path), pq.ParquetFile(path) as file:
        ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
        groups = [group for group, end in enumerate(ends) if end > start]
        surplus = start - max((end for end in ends if end <= start), default=0)  # of the first of these groups
        held = pa.Table.from_batches([], file.schema_arrow)
        for batch in file.iter_batches(batch_size=size, row_groups=groups):
            held = pa.concat_tables([held, pa.Table.from_batches([batch.slice(surplus)])])
            surplus = max(0, surplus - len(batch))
            while len(held) >= size:
                yield from_arrow(held.slice(0, size), source=str(path), first=start)
                start, held = start + size, held.slice(size)
        if len(held):
            yield from_arrow(held, source=str(path), first=start)


def hub_blocks(dataset: datasets.IterableDataset, *, source: str, size: int, start: int) -> Iterator[Table]:
    """Read a data set of the Hub as it is downloaded."""
    for columns in dataset.skip(start).iter(batch_size=size):
        part = datasets.Dataset.from_dict(columns, features=dataset.features)
        yield from_dataset(part, source=source, first=start)
        start += len(part)


BLOCK_READERS: dict[str, Callable[..., Iterator[Table]]] = {
    ".jsonl": jsonl_blocks,
    ".ndjson": jsonl_blocks,
    ".parquet": parquet_blocks,
}
