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


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model that ``grouped_query`` pools the heads of.

    Args:
        model: Its variants are taken out.

    Returns:
        A model of the same class without variants; its cache holds ``kv_heads`` heads.

    Raises:
        UserError: Its plan is not ``grouped_query`` everywhere, or its class has no setting for fewer heads.
    """
    sites = find_sites(model)
    options = _options(model, sites)
    _refuse_other_projections(model, sites)
    remove(model)
    config = deepcopy(model.config)
    config.num_key_value_heads = options.kv_heads
    weights = model.state_dict()
    for site in sites:
        for name in PROJECTIONS:
            for key in [key for key in weights if key.startswith(f"{site.path}.{name}.")]:
                weights[key] = _pooled(weights[key], site.needs.key_heads, options.kv_heads)
    plain = type(model)(config)
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain.to(model.device, model.dtype).eval()


def _pooled(projection: Tensor, heads: int, kept: int) -> Tensor:
    """Rows of a weight or a bias, a head after another: the means of as many heads as come to one."""
    return projection.view(kept, heads // kept, -1, *projection.shape[1:]).mean(1).flatten(0, 1)


def _options(model: PreTrainedModel, sites: list[Site]) -> GroupedQueryOptions:
    plan = stored_plan(model)
    (options, *others) = {choose(plan, site) for site in sites} if plan is not None else {None}
    if others or not isinstance(options, GroupedQueryOptions):
        raise UserError(
            "a model without grouped_query in all of its layers",
            where="attention",
            expected="one that was trained with attention=grouped_query, with as many kv_heads everywhere",
        )
    return options


def _refuse_other_projections(model: PreTrainedModel, sites: list[Site]) -> None:
    kind = type(model).__name__
    expected = "a decoder such as Llama, Mistral, Qwen 2 or SmolLM, whose config.json says num_key_value_heads"
    if not hasattr(model.config, "num_key_value_heads"):
        raise UserError(f"{kind}, which has no setting for fewer key/value heads", where="attention", expected=expected)
    for site in sites:
        if any(not isinstance(getattr(site.module, name, None), nn.Linear) for name in PROJECTIONS):
            raise UserError(
                f"{kind} without {' and '.join(PROJECTIONS)} at {site}", where="attention", expected=expected
            )
        if hasattr(site.module, "k_norm"):
            raise UserError(f"{kind}, which norms its keys: a norm of means is no mean of norms", where="attention")
