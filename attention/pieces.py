"""Arithmetic of slices with a start, a stop and no step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def merged(pieces: Iterable[slice]) -> tuple[slice, ...]:
    """The same indices in slices that are apart and in order."""
    out: list[slice] = []
    for piece in sorted(pieces, key=lambda p: (p.start, p.stop)):
        if piece.start >= piece.stop:
            continue
        if out and piece.start <= out[-1].stop:
            out[-1] = slice(out[-1].start, max(out[-1].stop, piece.stop))
        else:
            out.append(piece)
    return tuple(out)


def without(whole: slice, taken: Sequence[slice]) -> Iterator[slice]:
    """What of ``whole`` none of ``taken`` holds; these are merged."""
    start = whole.start
    for piece in taken:
        if start < piece.start:
            yield slice(start, min(piece.start, whole.stop))
        start = max(start, piece.stop)
    if start < whole.stop:
        yield slice(start, whole.stop)
