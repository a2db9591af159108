"""What a run says of its model: read once, for the card and for the question whether it may be published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from heedful import UserError
from sources.readers import HUB_ID, is_local
from tasks.saved import read as read_task


@dataclass(frozen=True)
class Source:
    """Where rows or a base model come from, as others may know it.

    Args:
        name: Without a path of this machine.
        hub_id: Its name on the Hub; None where it is not from there.
        license: As the Hub abbreviates it; None where it is not known.
        terms: What its publishers say, in words.
        restricted: Whether they stand against publishing what was trained on it.
        language: Of an asset.
    """

    name: str
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    license: str | None = None
    terms: str = ""
    notice: str = ""
    restricted: bool = False
    language: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """A model, and the run that it is of; of a model without its run the dicts are empty."""

    model: Path
    adapter: Path | None
    task: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    metrics: dict[str, Any]
    audit: dict[str, Any]
    baselines: dict[str, Any]
    architecture: dict[str, Any]
    """config.json."""

    @property
    def has_run(self) -> bool:
        """Whether it is known what the model learned from."""
        return bool(self.config and self.manifest)

    @property
    def data(self) -> dict[str, Source]:
        """By split."""
        given = self.config.get("data") or {}
        return {s: self._source(given[s]) for s in ("train", "validation", "test") if given.get(s)}

    @property
    def base(self) -> Source | None:
        """The pretrained model; None of one that started at random."""
        given = self.config.get("model") or {}
        if given.get("init") == "scratch" or not given.get("name"):
            return None
        found = self._source(given["name"])
        return found if found.hub_id is None else replace(found, revision=given.get("revision"))

    @property
    def inherited(self) -> list[Source]:
        """The other assets behind the model: of its tokenizer, and of the runs that its base model comes from."""
        named = {source.name for source in (self.base, *self.data.values()) if source is not None}
        return [_of_asset(asset) for asset in self.manifest.get("assets", []) if asset["name"] not in named]

    @property
    def restricted(self) -> list[dict[str, Any]]:
        """The assets whose terms stand against publishing."""
        return [asset for asset in self.manifest.get("assets", []) if asset.get("restricted")]

    def _source(self, given: str) -> Source:
        path = Path(given)
        for asset in self.manifest.get("assets", []):
            if "assets" in path.parts and asset["name"] in path.parts:
                return _of_asset(asset)
        if self._is_local(given):
            card = next((p / "README.md" for p in (path, path.parent) if (p / "README.md").is_file()), None)
            return Source(path.name if path.name != "model" else path.parent.name, **_of_card(card))
        if named := HUB_ID.fullmatch(given):
            return Source(named["name"], named["name"], named["config"], named["revision"], named["split"])
        return Source(given, given)

    def _is_local(self, given: str) -> bool:
        """As the run found it: what is here by now, and what is not, says nothing. An older run did not write it."""
        if (local := self.manifest.get("local")) is not None:
            return given in local
        folders = (".", "/", "~", "assets/", "runs/", "data/")
        return is_local(given) or given.startswith(folders) or given.partition("@")[0].count("/") != 1


def _of_asset(asset: Mapping[str, Any]) -> Source:
    known = {name: asset[name] for name in ("license", "terms", "notice", "restricted") if name in asset}
    return Source(asset["name"], asset.get("hub_id") or None, language=tuple(asset.get("language", ())), **known)


def _of_card(card: Path | None) -> dict[str, Any]:
    """License and languages by a card's front matter."""
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card else None
    front = yaml.safe_load(found[1]) if found else {}
    languages = front.get("language") or ()
    known = (languages,) if isinstance(languages, str) else tuple(languages)
    return {
        "license": front.get("license"),
        "language": known,
        "terms": f"see {card.parent.name}/README.md" if card and front else "",
    }


def read(checkpoint: str) -> Facts:
    """Read a model folder, and the run around it.

    Args:
        checkpoint: ``runs/ner`` or ``runs/ner/model``.

    Raises:
        UserError: There is no model of heedful's there.
    """
    path = Path(checkpoint)
    model = path / "model" if (path / "model").is_dir() else path
    if not model.is_dir():
        raise UserError("no such checkpoint", where=checkpoint, expected="a model folder, such as runs/ner/model")
    task, run = read_task(model)["task"], model.resolve().parent
    config = yaml.safe_load(_text(run / "config.yaml")) or {}
    if config.get("task") != task:  # a folder that happens to lie beside another's configuration
        return Facts(model, None, task, {}, {}, {}, {}, {}, _json(model / "config.json"))
    adapter = run / "adapter" if (run / "adapter").is_dir() else None
    manifest, metrics, audit, baselines = (
        _json(run / f"{n}.json") for n in ("manifest", "metrics", "audit", "baselines")
    )
    return Facts(model, adapter, task, config, manifest, metrics, audit, baselines, _json(model / "config.json"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_text(path) or "{}")  # type: ignore[no-any-return]
