"""Settings of the attention variants, and the plan that says which goes where. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_serializer, model_validator

Role = Literal["encoder.self", "decoder.self", "cross"]
ROLES: tuple[Role, ...] = ("encoder.self", "decoder.self", "cross")
EVERYWHERE = "*"
"""The place of a plan's short form: every site that the variant is for."""
LARGEST = 2**20
"""Of what settings count: longer texts than that, in tokens, no model has."""
_PLACE = re.compile(r"(encoder\.self|decoder\.self|cross)(\[\d+(-\d+)?(,\d+(-\d+)?)*\])?")
_PLACES = f"A place is {', '.join(ROLES)}, or some layers, as cross[0,2-5], in one key: attention={{cross: blockwise}}"


class VariantOptions(BaseModel):
    """Frozen; an unknown key is a fault, and so is true for 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FullOptions(VariantOptions):
    """Every token sees every other, by torch's own kernel."""

    variant: Literal["full"] = "full"


class BlockwiseOptions(VariantOptions):
    """Exactly as full, one tile at a time."""

    variant: Literal["blockwise"]


class SlidingWindowOptions(VariantOptions):
    """A token sees its neighbours."""

    variant: Literal["sliding_window"]
    reach: int = Field(default=128, ge=1, le=LARGEST)
    """How far to each side."""
    global_tokens: tuple[Annotated[int, Field(ge=0, le=LARGEST, strict=True)], ...] = Field(default=(), strict=False)
    """Positions that see all and are seen by all, such as 0 for [CLS]."""


class LocalGlobalOptions(VariantOptions):
    """Layers with a window, and every few layers one without."""

    variant: Literal["local_global"]
    reach: int = Field(default=128, ge=1, le=LARGEST)
    global_every: int = Field(default=2, ge=2, le=LARGEST)
    """The last of every so many layers is full."""


class BlockSparseOptions(VariantOptions):
    """Blocks of tokens see neighbouring blocks, the first blocks, and a few drawn at random."""

    variant: Literal["block_sparse"]
    block_size: int = Field(default=64, ge=1, le=LARGEST)
    window_blocks: int = Field(default=3, ge=1, le=LARGEST)
    """Blocks in the window, the own one included; an odd number."""
    global_blocks: int = Field(default=2, ge=0, le=LARGEST)
    random_blocks: int = Field(default=3, ge=0, le=4096)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _window_has_a_middle(self) -> BlockSparseOptions:
        if self.window_blocks % 2 == 0:
            raise ValueError(f"window_blocks={self.window_blocks}: an odd number, as many blocks to each side")
        return self


class StridedOptions(VariantOptions):
    """A token sees its neighbours, and from there every token at a multiple of the stride."""

    variant: Literal["strided"]
    stride: int = Field(default=64, ge=2, le=LARGEST)


class LinformerOptions(VariantOptions):
    """Keys and values are projected along the text to a number of slots that does not grow with it."""

    variant: Literal["linformer"]
    k: int = Field(default=128, ge=1, le=LARGEST)
    """Slots; as many as the model has positions, and it is full attention."""


class AdditiveOptions(VariantOptions):
    """A small network scores each pair, in place of a product."""

    variant: Literal["additive"]


class AdaptiveSpanOptions(VariantOptions):
    """Each head learns how far it looks."""

    variant: Literal["adaptive_span"]
    max_span: int = Field(default=1024, ge=1, le=LARGEST)
    """As far as any head may look, and all do at first."""
    ramp: int = Field(default=32, ge=2, le=LARGEST)
    """Tokens over which the weights fade beyond the span; with fewer than two a span could lie where none feels it."""


class LshOptions(VariantOptions):
    """A query sees the keys that its hash leads to."""

    variant: Literal["lsh"]
    cluster_size: int = Field(default=128, ge=1, le=LARGEST)
    """Keys that a query sees in each round."""
    rounds: int = Field(default=4, ge=1, le=64)
    buckets: int = Field(default=32, ge=2, le=64, multiple_of=2)
    """Values of a hash: directions and their opposites. More than that find little more, and cost their square."""
    seed: int = Field(default=0, ge=0, lt=2**32)


class GroupedQueryOptions(VariantOptions):
    """Several key/value heads are taken as one, their mean."""

    variant: Literal["grouped_query"]
    kv_heads: int = Field(default=1, ge=1, le=LARGEST)
    """How many are left; a divisor of the model's."""


class RingOptions(VariantOptions):
    """Exactly as full, over a text that several processes hold together while they train."""

    variant: Literal["ring"]
    ring_size: int | None = Field(default=None, ge=2, le=LARGEST)
    """Processes that hold a text together; all of them where it is None."""


AnyOptions = (
    FullOptions
    | BlockwiseOptions
    | SlidingWindowOptions
    | LocalGlobalOptions
    | BlockSparseOptions
    | StridedOptions
    | LinformerOptions
    | AdditiveOptions
    | AdaptiveSpanOptions
    | LshOptions
    | GroupedQueryOptions
    | RingOptions
)

OPTIONS: Mapping[str, type[VariantOptions]] = {
    get_args(kind.model_fields["variant"].annotation)[0]: kind for kind in get_args(AnyOptions)
}
"""Each variant's settings."""
_VARIANTS = f"The variants: {', '.join(OPTIONS)}"


def settings_of(variant: str) -> list[str]:
    """Names of its settings."""
    return [name for name in OPTIONS[variant].model_fields if name != "variant"]


class Plan(RootModel[dict[str, Annotated[AnyOptions, Field(discriminator="variant")]]]):
    """Which variant goes where: the first place that fits a site decides, and ``full`` is everywhere else.

    A place is ``encoder.self``, ``decoder.self`` or ``cross``, with layers where it is for some of them:
    ``encoder.self[0,2-5]``. The short form, one variant alone, is for every site that the variant can serve.
    """

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = _from_list(value)
        if isinstance(value, str) or (isinstance(value, dict) and "variant" in value):
            value = {EVERYWHERE: value}
        if not isinstance(value, dict) or not value:
            raise ValueError(f"neither a variant nor places: {value!r}. {_VARIANTS}")
        if EVERYWHERE in value and len(value) > 1:
            raise ValueError(f"{EVERYWHERE!r} beside other places. {_PLACES}")
        return {place: _named(place, v) for place, v in value.items()}

    @model_validator(mode="after")
    def _rings_are_alike(self) -> Plan:
        sizes = {options.ring_size for options in self.root.values() if isinstance(options, RingOptions)}
        if len(sizes) > 1:
            raise ValueError(f"ring_size={' and '.join(map(str, sizes))}: one number, since a ring shares its examples")
        return self

    def __eq__(self, other: object) -> bool:
        """In the same order too: the first place that fits decides."""
        return isinstance(other, Plan) and self.stored() == other.stored()

    @model_serializer(mode="plain")
    def _shortest(self) -> Any:
        plain = {place: options.model_dump(mode="json") for place, options in self.root.items()}
        return plain[EVERYWHERE] if list(plain) == [EVERYWHERE] else plain

    def stored(self) -> Any:
        """As JSON whose keys may be sorted, which transformers does: the places in a list, in their order."""
        plain = self.model_dump(mode="json")
        return plain if self.is_short else [{"place": place, **options} for place, options in plain.items()]

    @property
    def is_full(self) -> bool:
        """Whether it leaves the model as it is."""
        return all(options.variant == "full" for options in self.root.values())

    @property
    def is_short(self) -> bool:
        """Whether one variant is to go wherever it can."""
        return EVERYWHERE in self.root

    def data_parallel_size(self, processes: int) -> int:
        """How many of so many processes train on examples of their own: one of each ring, and else all."""
        sizes = [options.ring_size or processes for options in self.root.values() if isinstance(options, RingOptions)]
        return processes // min(sizes[0], processes) if sizes else processes

    def at(self, role: Role, layer: int) -> AnyOptions:
        """What goes to one site."""
        place = self._place(role, layer)
        return FullOptions() if place is None else self.root[place]

    def idle(self, sites: list[tuple[Role, int]]) -> list[str]:
        """Places that decide for no site of a model, or name a layer that it lacks.

        It lacks them all, or a place before them takes all of theirs.
        """
        deciding, counts = {self._place(*site) for site in sites}, Counter[str](role for role, _ in sites)
        places = [place for place in self.root if place != EVERYWHERE]
        return [p for p in places if p not in deciding or _last_layer(p) >= counts[p.partition("[")[0]]]

    def _place(self, role: Role, layer: int) -> str | None:
        return next((p for p in self.root if p == EVERYWHERE or _is_at(p, role, layer)), None)


def _from_list(value: list[Any]) -> Any:
    """The places of a list as ``Plan.stored`` makes one; any other list as it is."""
    if not value or not all(isinstance(entry, dict) and isinstance(entry.get("place"), str) for entry in value):
        return value
    places = {entry["place"]: {k: v for k, v in entry.items() if k != "place"} for entry in value}
    if len(places) < len(value):
        raise ValueError("a place that is given twice")
    return places


def _named(place: Any, value: Any) -> Any:
    """What stands at a place of a plan, as settings with their variant.

    Raises:
        ValueError: It is no place, or no variant is named that there is; pydantic would speak of tags.
    """
    if owners := [name for name in OPTIONS if place in settings_of(name)]:
        raise ValueError(
            f"no variant is named, and {place!r} is of {', '.join(owners)}: say attention={owners[0]} first"
        )
    known = place == EVERYWHERE or (isinstance(place, str) and _PLACE.fullmatch(place))
    if not known or any(first > last for first, last in _layers(place)):
        raise ValueError(f"{place!r} is no place. {_PLACES}")
    if isinstance(value, VariantOptions):
        return value
    where = "" if place == EVERYWHERE else f" at {place}"
    options = {"variant": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or "variant" not in options:
        raise ValueError(f"no variant is named{where}: {value!r}. {_VARIANTS}")
    if not isinstance(name := options["variant"], str) or name not in OPTIONS:
        near = difflib.get_close_matches(str(name), OPTIONS, n=1)
        raise ValueError(f"no such variant{where}: {name!r}. {f'Did you mean {near[0]}? ' if near else ''}{_VARIANTS}")
    return options


def _is_at(place: str, role: str, layer: int) -> bool:
    runs = _layers(place)
    return place.partition("[")[0] == role and (not runs or any(first <= layer <= last for first, last in runs))


def _last_layer(place: str) -> int:
    return max((last for _, last in _layers(place)), default=-1)


def _layers(place: str) -> list[tuple[int, int]]:
    """The first and last of each run of layers that a place names; none where it is for all."""
    runs = [run.partition("-") for run in place.partition("[")[2].rstrip("]").split(",") if run]
    return [(int(first), int(last or first)) for first, _, last in runs]
