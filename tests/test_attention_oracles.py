"""Against windows that others wrote: models of transformers that have one of their own.

Each is compared with a plain model of the same weights, into which a plan puts the window.
"""

import pytest
import torch
from attention_samples import swap
from tiny_families import COMMON, NO_DROPOUT, SIZES, make_model
from transformers import AutoModel, LongformerConfig, LongformerModel, RobertaConfig, RobertaModel

REACH = 6


def make_inputs():
    """Two texts of 48 tokens, the second of which has 43: where padding sees padding alone, Longformer learns NaN."""
    ids = torch.randint(5, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[1, 43:] = 0
    return {"input_ids": ids.masked_fill(real == 0, 1), "attention_mask": real}


def learn(model, inputs):
    """Its answers for real tokens, and what they teach."""
    out = model(**inputs)[0][inputs["attention_mask"].bool()]
    model.zero_grad()
    out.pow(3).mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def as_longformer(plain):
    """The same weights, and so for tokens that see all and are seen by all, for which Longformer holds them twice."""
    config = plain.config.to_dict() | {"attention_window": 2 * REACH}
    longformer = LongformerModel(LongformerConfig(**config), add_pooling_layer=False)
    weights = plain.state_dict()
    longformer.load_state_dict({name: weights[name.replace("_global", "")] for name in longformer.state_dict()})
    return longformer.to(plain.dtype)


def added_up(gradients):
    """Those of what Longformer holds twice."""
    summed = {}
    for name, gradient in gradients.items():
        own = name.replace("_global", "")
        summed[own] = summed.get(own, 0) + gradient
    return summed


@pytest.mark.parametrize("global_tokens", [[], [0], [0, 7, 29]])
@pytest.mark.parametrize("training", [True, False])
def test_longformer(global_tokens, training):
    """Its softmax is in fp32, whatever the model is in."""
    torch.manual_seed(0)
    sizes = COMMON | SIZES | NO_DROPOUT | {"max_position_embeddings": 80, "pad_token_id": 1}
    plain = RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False).double().train(training)
    longformer, inputs = as_longformer(plain).train(training), make_inputs()
    marked = torch.zeros_like(inputs["input_ids"])
    marked[:, global_tokens] = 1
    theirs, expected = learn(longformer, inputs | {"global_attention_mask": marked})
    swap(plain, {"variant": "sliding_window", "reach": REACH, "global_tokens": global_tokens})
    ours, gradients = learn(plain, inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for name, gradient in added_up(expected).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)


WINDOWED = {
    "mistral": ({"sliding_window": REACH + 1}, {"sliding_window": None}, {"variant": "sliding_window", "reach": REACH}),
    "gemma2": (
        {"sliding_window": REACH + 1, "layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention", "full_attention"]},
        {"variant": "local_global", "reach": REACH},
    ),
    "modernbert": (
        {"local_attention": 2 * REACH, "layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention", "full_attention"]},
        {"encoder.self[1]": {"variant": "sliding_window", "reach": REACH}},
    ),
}
"""Families with a window: with it, without it, and the plan for it. Each counts its width in its own way."""


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("training", [True, False])
def test_the_window_of(family, training):
    with_window, without, plan = WINDOWED[family]
    same = NO_DROPOUT | {"attn_implementation": "eager"}
    if family == "modernbert":
        same["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
        }
    theirs, plain = (
        make_model(family, AutoModel, **same, **window).train(training) for window in (with_window, without)
    )
    unwindowed, _ = learn(plain, make_inputs())
    expected, teaching = learn(theirs, make_inputs())
    swap(plain, plan)
    ours, gradients = learn(plain, make_inputs())
    assert float((unwindowed - expected).abs().max()) > 1e-3, "the window changes something"
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    for name, gradient in teaching.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5)
