"""Tables of measurements, and what they were taken on."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def half_interval95(values: Sequence[float]) -> float | None:
    """Half of the width of Student's interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5)


def interval95(values: Sequence[float]) -> str:
    """The interval in words; nothing for a single value."""
    half = half_interval95(values)
    return "" if half is None else f"95 % interval {mean(values) - half:+.4f} to {mean(values) + half:+.4f}"


def processor() -> str:
    """Its model, and how many of its cores this machine has."""
    info: Mapping[str, str] = {}
    if (path := Path("/proc/cpuinfo")).is_file():
        info = dict(re.findall(r"^(.+?)\s*: (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return f"{info.get('model name', platform.machine())}, {os.cpu_count()} cores"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of the packages that a measurement rests on."""
    return {name: version(name) for name in packages}


def preface(facts: Mapping[str, str]) -> str:
    """The command first, then what else is to be known."""
    return f"`{facts['command']}`. " + ", ".join(f"{k}: {v}" for k, v in facts.items() if k != "command")


def write_page(path: Path, title: str, facts: Mapping[str, str], text: str, raw: Mapping[str, Any]) -> None:
    """A page of Markdown for people, and the raw figures beside it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title}\n\n{preface(facts)}\n\n{text}\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({**facts, **raw}, indent=1) + "\n", encoding="utf-8")


def replace_section(path: Path, name: str, body: str) -> None:
    """Put a text between its markers in a Markdown file, or at the file's end."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = f"{begin}\n{body}\n{end}"
    if begin in text:
        text = re.sub(f"{begin}.*?{end}", lambda _: block, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{block}\n".lstrip()
    path.write_text(text, encoding="utf-8")
