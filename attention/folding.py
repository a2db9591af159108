"""Key/value heads that ``grouped_query`` pools, made into a plain model that has no more of them (Ainslie et al., arXiv
2305.13245, section 2.1: each new head's projection is the mean of the projections of its group).
"""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn
from transformers import PreTrainedModel

from attention.options import GroupedQueryOptions
from attention.seam import choose, find_sites, remove, stored_plan
from attention.variant import Site
from heedful import UserError

PROJECTIONS = ("k_proj", "v_proj")
FOLDABLE = "Llama, Mistral, Qwen 2, Gemma 2 or SmolLM"


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model that ``grouped_query`` pools the heads of.

    Args:
        model: Its variants are taken out.

    Returns:
        A model of the same class without variants; its cache holds ``kv_heads`` heads.

    Raises:
        UserError: As ``require_foldable``.
    """
    sites, kept = require_foldable(model)
    remove(model)
    config = deepcopy(model.config)
    config.num_key_value_heads = kept
    weights = model.state_dict()
    for site in sites:
        for name in PROJECTIONS:
            for key in [key for key in weights if key.startswith(f"{site.path}.{name}.")]:
                weights[key] = _pooled(weights[key], site.needs.key_heads, kept)
    plain = type(model)(config)
    plain.load_state_dict(weights)
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain.to(model.device, model.dtype).eval()


def _pooled(projection: Tensor, heads: int, kept: int) -> Tensor:
    """Rows of a weight or a bias, a head after another: the means of as many heads as come to one."""
    return projection.view(kept, heads // kept, -1, *projection.shape[1:]).mean(1).flatten(0, 1)


def require_foldable(model: PreTrainedModel) -> tuple[list[Site], int]:
    """The sites of a model that ``fold`` can fold, and the key/value heads that each keeps.

    Raises:
        UserError: Its plan is not ``grouped_query`` everywhere, its class has no setting for fewer heads, or has
            something between a projection and the attention that is not the same of a mean.
    """
    kind, where = type(model).__name__, str(model.config.name_or_path)
    plan, sites = stored_plan(model), find_sites(model)
    options, *others = {choose(plan, site) for site in sites} if plan is not None else {None}
    if others or not isinstance(options, GroupedQueryOptions):
        raise UserError(
            "a model without grouped_query in all of its layers",
            where=where,
            expected="one that was trained with attention=grouped_query, with as many kv_heads everywhere",
        )
    lacks = _hindrance(model, sites)
    if lacks:
        raise UserError(f"{kind}, {lacks}", where=where, expected=f"a decoder such as {FOLDABLE}")
    return sites, options.kv_heads


def _hindrance(model: PreTrainedModel, sites: list[Site]) -> str:
    """Why a model's heads can not be fewer; empty where they can."""
    if not hasattr(model.config, "num_key_value_heads"):
        return "which has no setting for fewer key/value heads"
    for site in sites:
        if any(not isinstance(getattr(site.module, name, None), nn.Linear) for name in PROJECTIONS):
            return f"which has no {' and '.join(PROJECTIONS)} at {site}"
        if any("norm" in name for name, _ in site.module.named_children()):
            return "which norms its keys: a norm of means is no mean of norms"
    return "which clips its keys" if getattr(model.config, "clip_qkv", None) else ""
