"""Settings of every variant to try it with, and what the tests make of them."""

import dataclasses
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from attention import VARIANTS
from attention.masks import LazyMask
from attention.options import Plan
from attention.seam import CHILD, install
from attention.variant import Needs, Site

SAMPLES = {
    "full": [{}],
    "blockwise": [{}],
    "sliding_window": [{"reach": 5}, {"reach": 90}, {"reach": 20, "global_tokens": [0, 3, 4, 70, 149]}],
    "local_global": [{"reach": 9}],
    "block_sparse": [{"block_size": 8}, {"block_size": 16, "window_blocks": 1, "global_blocks": 0, "random_blocks": 2}],
    "strided": [{"stride": 16}, {"stride": 70}],
    "linformer": [{"k": 16}, {"k": 100}],
    "additive": [{}],
    "adaptive_span": [{"max_span": 20, "ramp": 7}, {"max_span": 300}],
    "lsh": [{"cluster_size": 16, "rounds": 3, "buckets": 8}, {"cluster_size": 5, "rounds": 2}],
    "grouped_query": [{"kv_heads": 1}, {"kv_heads": 2}],
    "ring": [{}],
}
NEUTRAL = {
    "full": {},
    "blockwise": {},
    "sliding_window": {"reach": 10_000},
    "local_global": {"reach": 10_000},
    "block_sparse": {"window_blocks": 999},
    "strided": {"stride": 10_000},
    "linformer": {"k": None},
    "adaptive_span": {"max_span": 10_000},
    "lsh": {"cluster_size": 10_000},
    "grouped_query": {"kv_heads": None},
    "ring": {},
}
"""Settings in which a variant is full attention; None is what the model itself has."""
NARROW = {
    "sliding_window": {"reach": 3},
    "local_global": {"reach": 3},
    "block_sparse": {"block_size": 4, "window_blocks": 1, "global_blocks": 1, "random_blocks": 1},
    "strided": {"stride": 5},
    "adaptive_span": {"max_span": 3, "ramp": 2},
    "lsh": {"cluster_size": 3, "rounds": 2, "buckets": 4},
    "grouped_query": {"kv_heads": 1},
}
"""Settings in which a text of some thirty tokens is not seen whole, or not by all heads."""
NEVER_NEUTRAL = ("additive",)
NO_PATTERN = ("full", "linformer", "additive", "adaptive_span", "lsh", "grouped_query", "ring")
"""Those that are no pattern over the engine."""
DECODERS = (
    "blockwise",
    "sliding_window",
    "local_global",
    "block_sparse",
    "strided",
    "additive",
    "adaptive_span",
    "grouped_query",
)
"""Those that give with a cache what they give without; lsh attends to all of a cache, and ring is blockwise here."""
REFUSED = {
    "linformer": ("modernbert", "llama", "gpt2", "mistral", "gemma2", "qwen3", "t5", "mt5"),
    "additive": ("gemma2", "t5", "mt5"),
    "lsh": ("gemma2", "t5", "mt5"),
}
"""Families that ask for what a variant can not do."""


def each_sample():
    return [(name, settings) for name, samples in SAMPLES.items() for settings in samples]


PATTERNS = [(name, settings) for name, settings in each_sample() if name not in NO_PATTERN]


def neutral(name, model):
    """Settings in which a variant is full attention in this model."""
    config = model.config
    own = {
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "k": getattr(config, "max_position_embeddings", None),
    }
    return {key: own[key] if value is None else value for key, value in NEUTRAL[name].items()}


def make(name, settings, *, role="encoder.self", layer=0, positions=4096, tiled=True):
    """A variant for a site of ``make_tensors``; ``tiled`` keeps it from leaving short texts to torch's kernel."""
    options = Plan.model_validate({"variant": name, **settings}).at(role, layer)
    module = torch.nn.Identity()
    module.config = SimpleNamespace(max_position_embeddings=positions)
    variant = VARIANTS[name].load()(options, Site("", role, layer, module, Needs(4, 2, 8)))
    return keep_tiled(variant) if tiled else variant


def swap(model, plan, *, tiled=True, trained=False):
    """Put a plan into a model; ``trained`` moves what it learns away from where it begins."""
    install(model, Plan.model_validate(plan))
    for module in [module.attention_variant for module in model.modules() if hasattr(module, CHILD)]:
        if trained:
            stir(module)
        if tiled:
            keep_tiled(module)


def keep_tiled(variant):
    """Keep a pattern from leaving short texts to torch's kernel."""
    if hasattr(variant, "pattern"):
        variant.pattern = dataclasses.replace(variant.pattern, sdpa_below=0)
    return variant


def counted_pairs(pattern, keys, queries=None):
    """Which pairs a pattern counts, bool [queries, keys]; the queries are the last positions."""
    queries = keys if queries is None else queries
    rule = pattern.rule(keys, torch.device("cpu"))
    q, k = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None, :]
    return torch.ones(queries, keys, dtype=torch.bool) if rule is None else rule(q, k)


def stir(module):
    """Move what variants have learned away from where it begins; the same in each call."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


class Largest(TorchDispatchMode):
    """The most elements that a tensor within has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def make_tensors(rows=2, heads=4, groups=2, queries=150, keys=150, width=8, *, dtype=torch.float64, seed=0):
    """Query, key and value, unit normal, that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (heads // groups, keys), (heads // groups, keys))
    tensors = [torch.randn(rows, *shape, width, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def make_mask(rows=2, queries=150, keys=150, *, causal=False, padding=True, device="cpu"):
    """Decoding with a cache where there are more keys; the first row is padded at its end, the second at its start."""
    real = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if padding:
        real[0, -30:], real[1, :20] = False, False
    rule = causal_mask_function if causal else bidirectional_mask_function
    return LazyMask(
        batch_size=rows,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        mask_function=rule,
        attention_mask=real,
    )
