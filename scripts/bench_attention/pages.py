"""Each variant's own row of every measurement, put into its page."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from attention import VARIANTS
from scripts.bench_attention.quality import FULL, differences_of, scores
from scripts.bench_attention.subjects import FOLDER, Write, settings_of, stored
from scripts.reporting import interval95, replace_section, table


def measure(write: Write = None) -> None:
    """Fill in the figures that were measured and written; what was not is left out."""
    write = write or FOLDER
    for name in VARIANTS:
        parts = [part for part in (_measured(name, write), _exactness(name, write), _quality(name, write)) if part]
        replace_section(write / f"{name}.md", "figures", "\n\n".join(parts))


def _measured(name: str, folder: Path) -> str:
    reports = stored(folder / "speed.json")
    rows = [
        [f"{r['length']:,} tokens{', dropout' * bool(r['dropout'])}", f"{r['ratio']:.2f}", f"{r['mib']:,.0f}"]
        for r in reports
        if r["variant"] == name and not r.get("refused")
    ]
    shown = table([settings_of(name), "time, share of torch's kernel's", "memory, MiB"], rows)
    return f"{shown}\n\n[How, and beside the others](speed.md)" if rows else ""


def _exactness(name: str, folder: Path) -> str:
    own = [report for report in stored(folder / "exactness.json") if report["variant"] == name]
    rows = [[report["type"], f"{report['output']:.0e}", f"{report['gradient']:.0e}"] for report in own]
    shown = table(["greatest difference from attention written out", "output", "gradient"], rows)
    return f"{shown}\n\n[How, and beside the others](exactness.md)" if rows else ""


def _quality(name: str, folder: Path) -> str:
    lines = []
    for path in sorted(folder.glob("quality-*.json")):
        reports = stored(path)
        for row, runs in reports.items():
            if row.partition(" ")[0] == name:
                trial, headline = path.stem.removeprefix("quality-"), runs[0]["headline"]
                own, full = (mean(scores(group)) for group in (runs, reports[FULL]))
                between = interval95(differences_of(runs, reports[FULL])) if name != FULL else ""
                beside = f"; difference: {between}" if between else ""
                lines.append(f"- {trial}, {row}: {headline} {own:.4f}, full {full:.4f}{beside}")
    return "\n".join(lines)
