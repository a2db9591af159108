"""``heedful push``: show what would go to a hub and on which terms, and send it once that is agreed to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from heedful import UserError
from hub import cards, facts
from hub.facts import Facts
from hub.push import Parcel, destination, pack
from pipelines.preparation import open_console, tell
from sources.texts import counted


def push(
    checkpoint: str,
    target: str,
    *,
    private: bool = False,
    tag: str | None = None,
    accept_terms: bool = False,
    yes: bool = False,
    ask: Callable[[], bool] | None = None,
    console: Console | None = None,
) -> str | None:
    """Compare a model with what a hub has of it, show the difference, and send it in one commit.

    Args:
        checkpoint: A run or its model folder.
        target: owner/name, or file:///folder.
        private: Make the repository private; one that is there must be.
        tag: A name for the commit that stays.
        accept_terms: Publish what was trained on data whose terms stand against it, or are not known.
        yes: Send without asking.
        ask: Whether to send; None where nobody is there to say so, and then nothing is sent.

    Returns:
        The commit, or the version of a folder; None where nothing was sent.

    Raises:
        UserError: It can not go, or not on these terms.
    """
    console = open_console(console)
    known, place = facts.read(checkpoint), destination(target, private=private)
    _check_terms(known, accept_terms)
    name = target.rstrip("/").rpartition("/")[2]
    with TemporaryDirectory() as staging:
        parcel = pack(known, name, hub_id=None if target.startswith("file:") else target, staging=Path(staging))
        states = place.compare(parcel.files)
        _show(console, place.where, known, parcel, states)
        is_there = set(states.values()) == {"same"}
        if is_there and tag is None:
            tell(console, "it is all there already: nothing to send")
            return None
        if not (yes or (ask is not None and ask())):
            tell(console, "nothing was sent" + ("" if ask else "; --yes sends it"))
            return None
        commit = place.send(parcel.files, tag=tag, message=f"heedful: {known.task}")
    done = "nothing sent, since it is all there already" if is_there else "sent, and compared with what is there now"
    tell(console, f"{done}: {place.where}, {commit}" + (f", tag {tag}" if tag else ""))
    return commit


def on_terminal() -> Callable[[], bool] | None:
    """Ask whoever sits there; None where nobody does."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return lambda: input("send it? [y/N] ").strip().lower() in ("y", "yes")


def _check_terms(known: Facts, accepted: bool) -> None:
    if accepted:
        return
    if not known.has_run:
        raise UserError(
            "a model without its run: nobody can tell what it was trained on",
            where=str(known.model),
            expected="the model in its run, such as runs/ner/model",
            fix="--accept-terms, if you know and may publish it",
        )
    if known.restricted:
        found = "; ".join(f"{a['name']}: {a.get('notice') or a['terms']}" for a in known.restricted)
        raise UserError(
            f"terms that stand against publishing what was trained on it: {found}",
            where=f"{known.model}, by the run's manifest.json",
            fix="--accept-terms, if you may all the same; the card will say them",
        )


def _show(console: Console, where: str, known: Facts, parcel: Parcel, states: Mapping[str, str]) -> None:
    sizes = {name: path.stat().st_size for name, path in parcel.files.items()}
    tell(console, f"{known.model} -> {where}", f"license: {cards.license_of(known) or 'not known'}")
    for split, source in known.data.items():
        tell(console, f"data, {split}: {source.name}, license {source.license or 'not known: yours to look up'}")
    table = Table("file", "bytes", "there")
    for name, state in states.items():
        table.add_row(name, f"{sizes[name]:,}" if name in sizes else "", state)
    console.print(table)
    differing = [name for name, state in states.items() if state != "same"]
    volume = sum(sizes.get(name, 0) for name in differing)
    stays = f"; not for others, and left out: {', '.join(parcel.stays)}" if parcel.stays else ""
    tell(console, f"{len(differing)} of {counted(len(states), 'files')} to send, {volume:,} bytes{stays}")
    if "adapter/adapter_config.json" in parcel.files and known.base is not None and known.base.hub_id is None:
        tell(console, f"! adapter/ names its base model {known.base.name}, which is no name on the Hub")
