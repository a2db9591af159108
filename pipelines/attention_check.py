"""``heedful attention check``: which variant goes where in a model, and what it saves there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from attention import VARIANTS
from attention.describing import describe_options, describe_plan, span
from attention.options import ROLES, AnyOptions, Plan
from attention.seam import (
    choose,
    find_sites,
    install,
    refuse_beyond,
    refuse_idle_full,
    refuse_idle_places,
    refuse_mixed,
    refuse_no_place,
    remove,
    stored_plan,
)
from attention.sharing import prove
from attention.variant import Site, Work, all_pairs, refuse_longer
from heedful import UserError
from pipelines import config as configuration
from pipelines.sections import TRANSFER, RunConfig
from sources.assets import ensure
from tasks.positions import max_positions
from training.positions import Wanted, growth
from training.scratch import empty_model

EFFECTIVE = ("attention", "model.revision", "model.trust_remote_code")
"""Settings that matter here."""
UNBOUNDED = 1024
"""Tokens that are counted with where a model sets no bound."""
CONTEXT_PARALLEL = (
    "ring: where several processes train, each holds a part of every text; the pairs are those of all together. "
    "In one process, and in eval mode, it is blockwise attention."
)
WIDTH = 128
"""Of the table where no terminal has one."""


@dataclass(frozen=True)
class Finding:
    """What a plan means at one site.

    Args:
        wanted: What the plan asks for.
        chosen: What the site gets; None where the plan is refused.
        refusal: Why it is.
        parameters: That the variant brings.
        work: Pairs of one head over one text; None where the variant does not say.
        full: Pairs of full attention.
        length: Tokens of the text that was counted.
        kernel_up_to: Keys up to which torch's kernel may take the place of the variant's tiles.
    """

    site: Site
    wanted: AnyOptions
    chosen: AnyOptions | None = None
    refusal: UserError | None = None
    parameters: int = 0
    work: Work | None = None
    full: int = 0
    length: int = 0
    kernel_up_to: int = 0

    @property
    def verdict(self) -> str:
        """What becomes of the plan here."""
        if self.chosen is None:
            return "refused"
        return "full stays" if self.chosen.variant == "full" else "goes in"

    @property
    def reason(self) -> str:
        """Why the plan's variant does not go in; empty where it does, or is full."""
        if self.refusal is not None:
            return "; expected ".join(part for part in (self.refusal.found, self.refusal.expected) if part)
        if self.chosen == self.wanted:
            return ""
        return f"{self.wanted.variant} is for {', '.join(VARIANTS[self.wanted.variant].roles)}"


def check(
    model: str, overrides: Sequence[str] = (), *, length: int | None = None, console: Console | None = None
) -> list[Finding]:
    """Show where a plan goes in, or each variant in its default settings.

    Args:
        model: A folder, an asset or a Hub id; its weights are not read.
        overrides: The plan, as ``finetune`` takes it.
        length: Tokens of the text whose pairs are counted; None takes the model's longest.

    Raises:
        UserError: The plan is refused at some place, or goes in nowhere; the table is shown first.
    """
    config = _settings(model, overrides)
    ensure([model], root=Path.cwd(), say=lambda line: typer.echo(line, err=True))
    given, console = config.attention, console or Console(emoji=False, width=None if sys.stdout.isatty() else WIDTH)
    made = _model(config, length, console)
    if given is not None and given.is_full:  # of a model, too, that takes no variant
        refuse_idle_full(given, made)
        console.print("full attention, as the model has it without a plan")
        return []
    plans = [given] if given is not None else [Plan.model_validate(name) for name in VARIANTS]
    sites = sorted(find_sites(made), key=lambda site: ROLES.index(site.role))
    asked, length = length is not None, length or max_positions(made) or UNBOUNDED
    findings = []
    for plan in plans:
        refuse_idle_places(plan, sites)
        findings += _proved(made, plan, [_find(plan, site, length, asked=asked) for site in sites])
    _show(findings, f"{type(made).__name__}, {length:,} tokens", length, console)
    if given is not None:
        _refuse(given, findings)
        if any(VARIANTS[options.variant].context_parallel for options in given.root.values()):
            console.print(CONTEXT_PARALLEL, highlight=False)
    return findings


def common_path(paths: Sequence[str]) -> str:
    """Dotted paths as one, with a star where they differ."""
    parts = [path.split(".") for path in paths]
    if len({len(part) for part in parts}) > 1:
        return f"{paths[0]} ... {paths[-1]}"
    return ".".join(names[0] if len(set(names)) == 1 else "*" for names in zip(*parts, strict=True))


def _settings(model: str, overrides: Sequence[str]) -> RunConfig:
    for key in (override.partition("=")[0] for override in overrides):
        if key not in EFFECTIVE and (not key.startswith("attention.") or key.startswith(TRANSFER)):
            raise UserError(f"{key!r} has no effect here", expected=f"KEY=VALUE, with one of: {', '.join(EFFECTIVE)}")
    nothing: dict[str, Any] = {"task": "classification", "output_dir": "none", "model": {"name": model}}
    return configuration.override(nothing, overrides, where="the command line")


def _model(config: RunConfig, length: int | None, console: Console) -> PreTrainedModel:
    """With random weights, and as many positions as a run would give it. A plan that it holds is said.

    Raises:
        UserError: What the plan has learned is for the positions that the checkpoint has.
    """
    model, given = config.model, config.attention
    make = partial(empty_model, str(model.name), revision=model.revision, trust_remote_code=model.trust_remote_code)
    made = make()
    held = stored_plan(made)
    kept = held if given in (None, held) else None
    if held is not None:
        becomes = "; a run that names no attention keeps it" if kept else ", which this plan replaces"
        console.print(f"the checkpoint holds {describe_plan(held)}{becomes}", highlight=False, markup=False)
    if length is None or (given is not None and given.is_full):
        return made
    try:
        grown = growth(made, Wanted(length, length))
    except UserError as error:
        raise UserError(f"a text of {length:,} tokens", where="--length", expected=error.expected) from error
    if grown is None:
        return made
    if bound := [o.variant for o in (kept.root.values() if kept else ()) if VARIANTS[o.variant].positional]:
        raise UserError(
            f"a text of {length:,} tokens for what {bound[0]} has learned",
            where="attention",
            expected=f"at most {grown.old:,}, the positions that the checkpoint has",
            fix="shorter texts, or another attention",
        )
    console.print(grown.describe(), highlight=False)
    return make(**grown.config)


def _show(findings: Sequence[Finding], title: str, length: int, console: Console) -> None:
    console.print(_table(findings, title))
    for run in _runs(findings):
        if run[0].reason:
            place = span([finding.site for finding in run])
            console.print(f"{place}, {run[0].verdict}: {run[0].reason}", highlight=False, markup=False)
    for name, unit in _units(findings).items():
        console.print(f"{name}, scored: {unit}", highlight=False, markup=False)
    for name, tokens in {f.chosen.variant: f.length for f in findings if f.chosen and f.length < length}.items():
        console.print(f"{name}: counted for {tokens:,} tokens, as many as it takes", highlight=False, markup=False)
    if (kernel := max(finding.kernel_up_to for finding in findings)) >= length:
        console.print(
            f"scored: by the variant's own tiles, as in training with dropout. Up to {kernel:,} tokens, without "
            "dropout, a bias or a soft cap, torch's kernel over all pairs is faster and takes their place.",
            highlight=False,
        )


def _find(plan: Plan, site: Site, length: int, *, asked: bool) -> Finding:
    """Of a variant that does not take the model's longest text, the longest that it takes is counted."""
    wanted, causal = plan.at(site.role, site.layer), site.role == "decoder.self"
    try:
        options = choose(plan, site)
        refuse_beyond([site], [options])
        variant: Any = VARIANTS[options.variant].load()(options, site)
        if asked:
            refuse_longer(variant, length)
        length = min(length, getattr(variant, "longest", length))
    except UserError as error:
        return Finding(site, wanted, refusal=error)
    return Finding(
        site,
        wanted,
        options,
        parameters=sum(parameter.numel() for parameter in variant.parameters()),
        work=variant.work(length, site.needs.heads, causal=causal) if hasattr(variant, "work") else None,
        full=all_pairs(length, causal=causal),
        length=length,
        kernel_up_to=variant.pattern.sdpa_below if hasattr(variant, "pattern") else 0,
    )


def _proved(model: Any, plan: Plan, findings: list[Finding]) -> list[Finding]:
    """The same, with a refusal where a text can not be shared out in this model: it is tried, as before a training."""
    sharing = [found for found in findings if found.chosen and VARIANTS[found.chosen.variant].context_parallel]
    if not sharing or any(found.refusal for found in findings):
        return findings
    try:
        install(model, plan)
        prove(model)
    except UserError as error:
        return [replace(found, chosen=None, refusal=error) if found in sharing else found for found in findings]
    finally:
        remove(model)
    return findings


def _refuse(plan: Plan, findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.refusal is not None:
            raise finding.refusal
    refuse_mixed([f.site for f in findings], [f.chosen for f in findings if f.chosen is not None])
    refuse_no_place(plan, [f.site for f in findings], [f.chosen for f in findings if f.chosen is not None])


def _table(findings: Sequence[Finding], title: str) -> Table:
    table = Table("variant", title=f"attention: {title}")
    for column in ("where", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("modules", overflow="fold")
    for column in ("parameters", "scored", "seen"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in _runs(findings):
        table.add_row(*(Text(cell) for cell in _cells(run)))
    return table


def _units(findings: Sequence[Finding]) -> dict[str, str]:
    """What was counted, of variants that count something else."""
    return {f.chosen.variant: f.work.unit for f in findings if f.chosen and f.work and f.work.unit}


def _runs(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Layers alike."""
    alike = groupby(findings, key=lambda finding: (finding.wanted, finding.verdict, finding.site.role))
    return [list(run) for _, run in alike]


def _cells(run: Sequence[Finding]) -> Iterator[str]:
    """Of layers alike; the fractions are of all pairs that full attention has there."""
    yield describe_options(run[0].wanted, between="\n")
    yield span([finding.site for finding in run])
    yield run[0].verdict
    yield common_path([finding.site.path for finding in run])
    yield f"{sum(finding.parameters for finding in run):,}"
    full, works = sum(finding.full for finding in run), [f.work for f in run if f.work is not None]
    if len(works) < len(run):
        yield from ("-", "-")
        return
    yield f"{sum(work.scored for work in works) / full:.1%}"
    yield f"{sum(work.seen for work in works) / full:.1%}"
