"""What stands where in a model, in words: for the output of a run, and for tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from transformers import PreTrainedModel

from attention import VARIANTS
from attention.options import EVERYWHERE, ROLES, AnyOptions, Plan, Role
from attention.seam import CHILD, choose, find_sites, stored_plan
from attention.variant import Site


def describe(model: PreTrainedModel, longest: Mapping[Role, int] | None = None) -> list[str]:
    """What is in place, a line for each run of layers alike; nothing for a model without variants.

    Args:
        longest: Most tokens that each kind of attention meets in training: what is in vain over so few is said.
    """
    if (plan := stored_plan(model)) is None:
        return []
    lines = []
    in_order = sorted(find_sites(model), key=lambda site: ROLES.index(site.role))
    placed = [(site, choose(plan, site)) for site in in_order]
    for (role, options), run in groupby(placed, key=lambda pair: (pair[0].role, pair[1])):
        sites = [site for site, _ in run]
        lines.append(f"attention: {span(sites)} {describe_options(options)}")
        if longest is not None:
            lines += _in_vain(sites, options, longest[role])
    return lines


def span(sites: Sequence[Site]) -> str:
    """Neighbouring sites of one role as one place."""
    first, last = sites[0], sites[-1]
    return str(first) if first is last else f"{first.role}[{first.layer}-{last.layer}]"


def _in_vain(sites: Sequence[Site], options: AnyOptions, longest: int) -> list[str]:
    """What a plan asks for and gets nowhere, since the texts are short."""
    place = f"! attention: {span(sites)}"
    beyond = [token for token in getattr(options, "global_tokens", ()) if token >= longest]
    lines = [
        f"{place}, global token {token}: no text to learn from has more than {longest:,} tokens" for token in beyond
    ]
    if not VARIANTS[options.variant].exact and all(_is_full(site, longest) for site in sites):
        texts = f"texts of up to {longest:,} tokens, and none to learn from has more"
        lines.append(f"{place} changes nothing: it is full attention over {texts}")
    return lines


def _is_full(site: Site, length: int) -> bool:
    variant = getattr(site.module, CHILD)
    return hasattr(variant, "is_full") and variant.is_full(length, causal=site.role == "decoder.self")


def describe_options(options: AnyOptions, between: str = " ") -> str:
    """A variant's name and its settings."""
    settings = options.model_dump(mode="json")
    return between.join([settings.pop("variant"), *(f"{name}={value}" for name, value in settings.items())])


def describe_plan(plan: Plan) -> str:
    """What stands at each of its places."""
    places = {f"{place}: " if place != EVERYWHERE else "": options for place, options in plan.root.items()}
    return ", ".join(f"{place}{describe_options(options)}" for place, options in places.items())
