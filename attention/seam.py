"""Where the variants go into transformers: one name in its two registries.

The attention function registered here only hands on to the variant, a child of the attention module; the mask function
hands on what a mask would be made of. What transformers would let pass without a word is refused here: a class that
never calls the registry, a call with a setting that no variant honours, a variant that is in place but not called.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils.output_capturing import _active_collector as captured

from attention import VARIANTS
from attention.bias import keep_as_table, keep_as_vector
from attention.masks import LazyMask
from attention.options import EVERYWHERE, AnyOptions, FullOptions, Plan, Role
from attention.scoring import Scoring
from attention.variant import Needs, Site, Variant, refuse_longer
from heedful import UserError

NAME = "heedful"
"""In both registries, and in the config.json of a model that holds variants."""
PLAN = "attention_plan"
"""Where a model's configuration keeps the plan."""
CHILD = "attention_variant"
"""Name of the variant in its attention module."""
CROSS = ("cross", "encdec", "encoder_attn")
"""One of them is in the name of every module that looks at another text: a call does not tell."""
NAMED = "attn_implementation"
"""Where a saved configuration names its attention: transformers reads it, and writes none of its own accord."""
REFUSED = {
    "s_aux": "attention sinks, which no variant has",
    "sinks": "attention sinks, which no variant has",
    "indices": "an index that chooses the keys, which no variant reads",
    "block_indices": "an index that chooses the keys, which no variant reads",
    "cache": "a paged cache, which no variant reads",
    "head_mask": "no variant takes heads out",
    "output_attentions": "no variant makes a table of weights",
}
"""Settings of a call that mean something, and that no variant honours."""
HONOURED = ("scaling", "dropout", "position_bias", "softcap", "is_causal")  # the last where there is no mask
MEANINGLESS = (
    "cache_position",
    "deterministic",
    "encoder_hidden_states",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "return_loss",
    "sliding_window",
    "token_type_ids",
    "use_cache",
)
"""What a model was called with and hands on: it changes no attention, or is in its mask already. Else it is refused."""
DEMANDS = {
    "bias": "adds a bias to its scores",
    "softcap": "caps its scores",
    "rules": "masks more than padding: a window, or what comes later",
}
"""What a site may ask for and some variants can not do, by the name of it in ``Needs`` and in ``VariantEntry``."""
ALTERNATIVES = "BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT, GPT-2, Llama, Mistral, Qwen, T5, BART and their kin"


@dataclass(frozen=True)
class Call:
    """One call of an attention module, as its variant had it and answered it; see ``attention.variant.Variant``."""

    module: nn.Module
    variant: Variant
    query: Tensor
    key: Tensor
    value: Tensor
    mask: LazyMask
    scoring: Scoring
    output: Tensor


_calls: list[Call] | None = None
_as_full = False


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LazyMask | Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every attention module: hands on to the module's variant.

    Args:
        asked: What is ``HONOURED``, and what is ``MEANINGLESS`` here.

    Returns:
        [B, N, H, D], and no weights: a variant has no table of them to give.

    Raises:
        ValueError: The call asks for what no variant does.
    """
    asked["output_attentions"] = asked.get("output_attentions") or _maps_are_captured()
    for name, said in asked.items():
        if name not in HONOURED + MEANINGLESS and said is not None and said is not False:
            raise ValueError(f"{name}: {REFUSED.get(name, 'a setting that no variant is known to honour')}")
    scoring = Scoring(
        asked.get("scaling") or query.shape[-1] ** -0.5,
        asked.get("dropout", 0.0),
        asked.get("position_bias"),
        asked.get("softcap"),
    )
    mask, variant = _lazy(attention_mask, module, query, key, asked.get("is_causal")), _variant_of(module)
    output = variant(query, key, value, mask, scoring)
    if _calls is not None:
        _calls.append(Call(module, variant, query, key, value, mask, scoring, output))
    return output.transpose(1, 2).contiguous(), None


def _mask(**asked: Any) -> LazyMask:
    return LazyMask(**asked)


# A variant is Python that asks for sizes and padding: torch.compile takes the rest of a model, and calls it as it is.
AttentionInterface.register(NAME, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, torch.compiler.disable(_mask))  # type: ignore[no-untyped-call]


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Every place for a variant, in the order in which they run, found by running the model once.

    Raises:
        UserError: The model reads no tokens, has no attention or computes it in its own way, or asks for more than any
            variant does.
    """
    return sites_of(model, _try_out(model))


def _try_out(model: PreTrainedModel) -> list[Call]:
    """What a run on a few tokens calls."""
    kind = type(model).__name__
    if model.main_input_name != "input_ids":
        raise UserError(
            f"{kind} reads {model.main_input_name}", where="attention", expected="a model that reads tokens"
        )
    with recorded(model) as calls:
        try:
            _run_once(model)
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise UserError(
                f"{kind}: {error}",
                where="attention",
                expected="a model of which nothing is asked beyond what a variant does",
                fix=f"leave its attention as it is, or take another model: {ALTERNATIVES}",
            ) from error
    if not calls:
        raise UserError(f"{kind} has no attention", where="attention", fix=f"take another model: {ALTERNATIVES}")
    return calls


def sites_of(model: PreTrainedModel, calls: Sequence[Call]) -> list[Site]:
    """The places that were called, in the order of their first call."""
    paths = {module: path for path, module in model.named_modules()}
    counts: dict[Role, int] = {}
    sites = []
    first: dict[nn.Module, Call] = {}
    for call in calls:
        first.setdefault(call.module, call)
    for module, call in first.items():
        role = _role(paths[module], module)
        sites.append(Site(paths[module], role, counts.setdefault(role, 0), module, _needs(call)))
        counts[role] += 1
    return sites


def install(model: PreTrainedModel, plan: Plan) -> None:
    """Put the plan's variants into a model, in place, and prove that each is called.

    Raises:
        UserError: The plan names a place that the model lacks, or asks for more than a variant can do.
    """
    if plan.is_full:
        refuse_idle_full(plan, model)
        remove(model)
        return
    _refuse_maps(model)
    sites = find_sites(model)
    refuse_idle_places(plan, sites)
    chosen = [choose(plan, site) for site in sites]
    refuse_no_place(plan, sites, chosen)
    refuse_beyond(sites, chosen)
    refuse_mixed(sites, chosen)
    made = [VARIANTS[options.variant].load()(options, site) for site, options in zip(sites, chosen, strict=True)]
    for site, variant in zip(sites, made, strict=True):
        site.module.add_module(CHILD, cast(nn.Module, variant).to(model.device, model.dtype))
        keep_as_vector(site.module, variant, cross=site.role == "cross")
    _go_through(model, NAME)
    setattr(model.config, PLAN, plan.stored())
    setattr(model.config, NAMED, NAME)  # read without this project, it is refused in place of running as full attention
    with recorded(model) as calls:  # what fails from here on is no fault of the model's
        _run_once(model)
    called = {call.module for call in calls}
    if silent := [str(site) for site in sites if site.module not in called]:
        raise RuntimeError(f"in place, but not called: {', '.join(silent)}")


def refuse_longer_texts(model: nn.Module, longest: Mapping[Role, int]) -> None:
    """Refuse more tokens than a model's variants take.

    Args:
        longest: Tokens that each kind of attention may meet.

    Raises:
        UserError: As ``attention.variant.refuse_longer``.
    """
    for path, module in model.named_modules():
        if (variant := getattr(module, CHILD, None)) is not None:
            refuse_longer(variant, longest[_role(path, module)])


def variant_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that the variants in a model brought."""
    return [name for name, _ in model.named_parameters() if f".{CHILD}." in name]


def remove(model: PreTrainedModel) -> None:
    """Take all variants out of a model: it answers as it did before, to the bit."""
    if not hasattr(model.config, PLAN) and model.config._attn_implementation != NAME:
        return
    for module in [module for module in model.modules() if hasattr(module, CHILD)]:
        delattr(module, CHILD)
        keep_as_table(module)
    for name in (PLAN, NAMED):
        vars(model.config).pop(name, None)
    _go_through(model, model.get_correct_attn_implementation(None))


def stored_plan(model: PreTrainedModel) -> Plan | None:
    """The plan that a model holds or was saved with.

    Raises:
        UserError: It is one of a later version.
    """
    plain = getattr(model.config, PLAN, None)
    if plain is None:
        return None
    try:
        return Plan.model_validate(plain)
    except ValidationError as error:
        raise UserError(
            f"an attention plan that this version of heedful does not know: {plain}",
            where=f"{model.config.name_or_path}/config.json",
            fix="open it with the version that wrote it",
        ) from error


def choose(plan: Plan, site: Site) -> AnyOptions:
    """What goes to a site: of a short form only what the variant is for, and ``full`` elsewhere.

    Raises:
        UserError: A variant is asked for at a place that it can not serve.
    """
    options = plan.at(site.role, site.layer)
    roles = VARIANTS[options.variant].roles
    if site.role in roles:
        return options
    if plan.is_short:
        return FullOptions()
    raise UserError(
        f"{options.variant} at {site}",
        where="attention",
        expected=f"it at {', '.join(roles)}: elsewhere it has no meaning",
    )


def refuse_idle_places(plan: Plan, sites: Sequence[Site]) -> None:
    """Refuse a plan with a place that the model lacks, or that another hides.

    Raises:
        UserError: Naming it, and the places that there are.
    """
    if idle := plan.idle([(site.role, site.layer) for site in sites]):
        raise UserError(
            f"no such place in this model: {', '.join(idle)}",
            where="attention",
            expected=f"among {', '.join(_summary(sites))}; of two that hold a layer the first decides",
        )


def refuse_idle_full(plan: Plan, model: PreTrainedModel) -> None:
    """Refuse a plan of full attention with such a place; in a model that computes attention in its own way any will do.

    Raises:
        UserError: As ``refuse_idle_places``.
    """
    if not plan.is_short and not _own_ways(model):
        refuse_idle_places(plan, find_sites(model))


def refuse_no_place(plan: Plan, sites: Sequence[Site], chosen: Sequence[AnyOptions]) -> None:
    """Refuse a short plan that changes nothing.

    Raises:
        UserError: Naming the places that its variant is for.
    """
    if all(options.variant == "full" for options in chosen):
        name = plan.root[EVERYWHERE].variant
        raise UserError(
            f"no place for {name} in this model: {', '.join(_summary(sites))}",
            where="attention",
            expected=f"a model with {' or '.join(VARIANTS[name].roles)}",
        )


def refuse_beyond(sites: Sequence[Site], chosen: Sequence[AnyOptions]) -> None:
    """Refuse a variant at a place that asks for what it can not honour.

    Raises:
        UserError: Naming the place, and the variants that can.
    """
    for site, options in zip(sites, chosen, strict=True):
        for name, what in DEMANDS.items():
            if getattr(site.needs, name) and not getattr(VARIANTS[options.variant], name):
                able = [other for other, e in VARIANTS.items() if getattr(e, name) and site.role in e.roles]
                raise UserError(
                    f"{options.variant} at {site}, which {what}",
                    where="attention",
                    expected=f"one of: {', '.join(able)}",
                    fix="or name the places where it is to go, by role and layer",
                )


def refuse_mixed(sites: Sequence[Site], chosen: Sequence[AnyOptions]) -> None:
    """Refuse a plan by which a text would be shared out in some layers of a stack, and not in others.

    Raises:
        UserError: Naming a place where it would be whole.
    """
    own = [(site, VARIANTS[options.variant]) for site, options in zip(sites, chosen, strict=True)]
    parallel = {site.stack for site, entry in own if entry.context_parallel}
    whole = [
        site for site, entry in own if site.role != "cross" and site.stack in parallel and not entry.context_parallel
    ]
    if whole or "" in parallel:
        raise UserError(
            f"ring beside another attention at {whole[0]}" if whole else "ring in layers that stand in no list",
            where="attention",
            expected="it in all layers of a stack: a text is shared out before the first and joined after the last",
        )


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Call]]:
    """Within, every call of a model's attention modules, in order; one without a variant runs as full attention.

    Raises:
        UserError: The model's class computes attention in its own way.
    """
    global _calls
    _refuse_own_ways(model)
    names = [(config, config._attn_implementation) for config in _configs(model)]
    before, _calls = _calls, []
    _go_through(model, NAME)
    try:
        yield _calls
    finally:
        _calls = before
        for config, name in names:
            config._attn_implementation_internal = name


@contextmanager
def as_full() -> Iterator[None]:
    """Within, full attention runs at every site in place of its variant, which stays where it is."""
    global _as_full
    before, _as_full = _as_full, True
    try:
        yield
    finally:
        _as_full = before


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def _go_through(model: PreTrainedModel, name: str) -> None:
    """transformers' own ``set_attn_implementation`` misses the layers of a joined model's encoder: they hold a
    configuration of their own, and would take one kind of mask for another."""
    for config in _configs(model):
        config._attn_implementation_internal = name


def _variant_of(module: nn.Module) -> Variant:
    variant: Variant | None = getattr(module, CHILD, None)
    if variant is not None and not _as_full:
        return variant
    if variant is None and _calls is None:
        raise ValueError(
            f"{type(module).__name__} has no attention variant: open the model with heedful, which puts it in"
        )
    unasked = Needs(0, 0, 0)  # of a site without a variant
    return VARIANTS["full"].load()(FullOptions(), Site("", "encoder.self", 0, module, unasked))


def _maps_are_captured() -> bool:
    """Whether the model was asked for its weights: most models hear it from transformers, and tell no layer."""
    return "attentions" in (captured.get() or ())


def _needs(call: Call) -> Needs:
    bias = call.scoring.bias
    return Needs(
        *(call.query.shape[1], call.key.shape[1], call.query.shape[-1]),
        bias=bias is not None and bool(bias.any()),  # T5's cross-attention adds zeros
        softcap=call.scoring.softcap is not None,
        rules=not call.mask.only_padding,
    )


def _lazy(
    mask: LazyMask | Tensor | None, module: nn.Module, query: Tensor, key: Tensor, causal: bool | None
) -> LazyMask:
    """The mask; of a call without one by what it says of ``is_causal``, or else its module, as transformers has it."""
    if isinstance(mask, LazyMask):
        return mask
    if mask is not None:
        raise ValueError("a mask of four dimensions: a variant takes the model's own mask alone")
    queries, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", False) if causal is None else causal) and queries > 1
    return LazyMask(
        batch_size=query.shape[0],
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries if causal else 0,
        mask_function=causal_mask_function if causal else bidirectional_mask_function,
        allow_is_causal_skip=causal,
        allow_is_bidirectional_skip=True,
    )


def _run_once(model: PreTrainedModel) -> None:
    ids = torch.full((1, 4), last_token(model), device=model.device)
    run(model, ids, torch.ones_like(ids))


def last_token(model: Any) -> int:
    """Of a text to try a model on: what ends texts, of which BART's classifier needs one."""
    end, words = getattr(model.config, "eos_token_id", None), model.get_input_embeddings()
    return end if isinstance(end, int) and end < len(words.weight) else 0


def run(model: Any, ids: Tensor, real: Tensor) -> Any:
    """What a model says of a few tokens, in eval mode.

    Args:
        ids: [B, N]; an encoder-decoder decodes them, too.
        real: [B, N], 0 on padding.
    """
    inputs = {"input_ids": ids, "attention_mask": real}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs)
    finally:
        model.train(training)


def _role(path: str, module: nn.Module) -> Role:
    if any(word in path.lower() for word in CROSS):
        return "cross"
    return "decoder.self" if getattr(module, "is_causal", False) else "encoder.self"


def _own_ways(model: PreTrainedModel) -> list[type[PreTrainedModel]]:
    """Its classes that never ask transformers' registry for an attention."""
    parts = {type(part): part for part in model.modules() if isinstance(part, PreTrainedModel)}
    return [kind for kind in parts if not kind._can_set_attn_implementation()]


def _refuse_own_ways(model: PreTrainedModel) -> None:
    if own := _own_ways(model):
        raise UserError(
            f"{own[0].__name__} computes attention in its own way, and would never call a variant",
            where="attention",
            expected="a model that goes through transformers' AttentionInterface",
            fix=f"leave its attention as it is, or take another model: {ALTERNATIVES}",
        )


def _refuse_maps(model: PreTrainedModel) -> None:
    if any(config.output_attentions for config in _configs(model)):
        raise UserError(
            "output_attentions=True in the model's configuration",
            where="attention",
            expected=f"false: {REFUSED['output_attentions']}",
            fix="`heedful attention show` draws the weights",
        )


def _summary(sites: Sequence[Site]) -> list[str]:
    layers = {site.role: site.layer for site in sites}
    return [f"{role}[0-{last}]" for role, last in layers.items()]
