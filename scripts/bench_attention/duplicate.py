"""Which attention can copy: the duplicate task of Reformer (Kitaev et al., arXiv 2001.04451, section 4).

A text is ``0 w 0 w`` with a random word w of 31 signs. A small causal model learns to say the second w, each sign of
which stands 31 tokens after the one that it must find. It can be learned whole or, where no layer's look leads there,
not at all: then one sign in 31 is right by chance. A window that is secretly wider than it says would be seen: these
texts go through the engine's tiles, short as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from attention.options import Plan
from attention.seam import install
from attention.tiled import Tiled
from scripts.bench_attention.subjects import Write, some_of
from scripts.reporting import processor, table, versions, write_page
from tasks.protocol import Batch, Task
from training.loop import Trainee, run_update
from training.optimizer import build_optimizer, build_scheduler, parameter_groups

SIGNS, WORD, ROWS, STEPS = 31, 31, 32, 600
LAYERS = 2


@dataclass(frozen=True)
class Case:
    """An attention, and what it must come to.

    Args:
        learns: Whether some way of its layers leads from a sign to the one that it must find.
    """

    plan: Any
    learns: bool


CASES = {
    "full": Case("full", True),
    "blockwise": Case("blockwise", True),
    "sliding_window, reach 32": Case({"variant": "sliding_window", "reach": 32}, True),
    "sliding_window, reach 8": Case({"variant": "sliding_window", "reach": 8}, False),
    "sliding_window, reach 12, first token global": Case(
        {"variant": "sliding_window", "reach": 12, "global_tokens": [0]}, False
    ),
    "strided, stride 8": Case({"variant": "strided", "stride": 8}, True),
    "lsh, 4 rounds of 16": Case({"variant": "lsh", "cluster_size": 4, "rounds": 4, "buckets": 16}, True),
    "adaptive_span, up to 64": Case({"variant": "adaptive_span", "max_span": 64, "ramp": 16}, True),
    "grouped_query, 1 key/value head": Case({"variant": "grouped_query", "kv_heads": 1}, True),
    "additive": Case("additive", True),
}


@dataclass(frozen=True)
class Duplicate:
    """The task, as far as an update asks for it."""

    name = "duplicate"

    def count(self, batch: Batch) -> Tensor:
        """Signs to be said."""
        return torch.tensor(float(batch["input_ids"].shape[0] * WORD))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed over them."""
        logits_BTV, targets_BT = said(model, batch)
        return cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def said(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits where the second word is to be said, and the word."""
    logits_BTV = model(**batch, use_cache=False).logits[:, -WORD - 1 : -1]
    return logits_BTV, batch["input_ids"][:, -WORD:]


def draw(*seed: int) -> Batch:
    """Texts of ``0 w 0 w``."""
    words = torch.from_numpy(np.random.default_rng(seed).integers(1, SIGNS + 1, (ROWS, WORD)))
    text = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), words], dim=1).repeat(1, 2)
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


def train(plan: Any, *, seed: int, steps: int = STEPS) -> LlamaForCausalLM:
    """A model that has learned the task as far as its attention lets it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=SIGNS + 1, max_position_embeddings=2 * WORD + 2, **sizes))
    install(model, Plan.model_validate(plan))
    for module in model.modules():
        if isinstance(module, Tiled):
            module.pattern = replace(module.pattern, sdpa_below=0)  # type: ignore[type-var]
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0)
    optimizer = build_optimizer("adamw_torch_fused", groups, learning_rate=3e-3, betas=(0.9, 0.98), epsilon=1e-8)
    scheduler = build_scheduler("linear", optimizer, warmup_steps=50, num_training_steps=steps)
    accelerator = Accelerator(cpu=True)
    task = cast(Task, Duplicate())
    trainee = Trainee(accelerator, task, model, accelerator.prepare_optimizer(optimizer), scheduler, 1.0, seed)
    for step in range(steps):
        run_update(trainee, [draw(seed, step)], None, step=step)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Share of signs said right, of texts never seen."""
    with torch.no_grad():
        logits_BTV, targets_BT = said(model, draw(2**32))
    return float((logits_BTV.argmax(-1) == targets_BT).double().mean())


def measure(
    case: Annotated[list[str] | None, some_of(CASES)] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    write: Write = None,
) -> None:
    """Train and score every case, with each seed."""
    torch.set_num_threads(1)
    scores = {name: [accuracy(train(CASES[name].plan, seed=seed)) for seed in range(seeds)] for name in case or CASES}
    rows = [
        [name, "yes" if CASES[name].learns else "no", *(f"{100 * score:.1f} %" for score in scores[name])]
        for name in scores
    ]
    text = (
        f"{LAYERS} layers; a sign stands {WORD} tokens after the one to be found; chance is {100 / SIGNS:.1f} %.\n\n"
        + table(["attention", "can it?", *(f"seed {seed}" for seed in range(seeds))], rows)
    )
    typer.echo(text)
    if write is not None:
        cases = "".join(f" --case '{name}'" for name in case or ())
        command = f'make attention ARGS="duplicate --seeds {seeds}{cases}"'
        facts = {"command": command, "device": processor(), **versions(["torch"])}
        write_page(write / "duplicate.md", "Which attention can copy", facts, text, {"scores": scores})
