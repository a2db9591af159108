"""``heedful attention convert``: a model trained with ``grouped_query`` as a plain one with fewer key/value heads."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from attention.folding import fold, require_foldable
from heedful import UserError
from pipelines.inference import model_folder
from pipelines.preparation import build_accelerator, build_console, tell
from sources.files import write_whole
from tasks.protocol import Batch
from tasks.saved import load_task
from training.configurations import quiet
from training.export import MERGE_TOLERANCE, answers, difference, write_model
from training.models import load_model
from training.tokenizers import load_tokenizer

TOKENS = 24
"""Of the rows that the two are compared on."""


def convert(checkpoint: str, out: Path, *, console: Console | None = None) -> None:
    """Write the plain model, once it is seen to answer as the one that pools.

    Args:
        checkpoint: A run or its model folder.
        out: A new folder.

    Raises:
        UserError: The folder is there, the model is not such a one, or the plain one answers otherwise.
    """
    console = build_console(build_accelerator(bf16=False), console)
    if out.exists() or not out.absolute().parent.is_dir():
        raise UserError(
            "a folder that is there" if out.exists() else "no such folder", where=str(out), expected="a new one"
        )
    folder = model_folder(checkpoint)
    _refuse_strange_run(out, folder)
    task = load_task(folder, load_tokenizer(str(folder)))
    with quiet():
        model = load_model(task.auto_class, str(folder), **task.model_kwargs()).model
    require_foldable(model)  # first: others read other inputs
    probes = _probes(model)
    before, heads, size = answers(model, *probes), model.config.num_key_value_heads, model.num_parameters()
    plain = fold(model)

    def fill(aside: Path) -> None:
        write_model(plain, task, aside)
        with quiet():
            apart = difference(before, answers(load_model(task.auto_class, str(aside)).model, *probes))
        if not apart <= MERGE_TOLERANCE:  # NaN too
            raise UserError(f"the plain model answers otherwise, by {apart:.1e}", where=checkpoint)
        tell(console, f"logits within {apart:.1e} of those of the model that pools its heads, in fp32")

    write_whole(out, fill)
    tell(console, f"key/value heads: {heads} -> {plain.config.num_key_value_heads}, in the cache of a text too")
    tell(console, f"parameters: {size:,} -> {plain.num_parameters():,}")
    tell(console, f"model   {out}: plain transformers opens it")


def _refuse_strange_run(out: Path, model: Path) -> None:
    """Beside the configuration of a run, the model would be taken for that run's: its figures, data and terms."""
    parent = out.absolute().parent
    known = (parent / "config.yaml").is_file() or (parent / "config.json").is_file() or parent.name == "checkpoints"
    if known and parent.resolve() != model.resolve().parent:
        raise UserError(
            "a folder of another run, or within a model",
            where=str(out),
            expected=f"one in {model.parent}, beside the model, or one that belongs to no run",
        )


def _probes(model: PreTrainedModel) -> list[Batch]:
    """Two rows, of which one is padded behind (what padding in front says means nothing), and one row."""
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % model.get_input_embeddings().num_embeddings
    real = torch.ones_like(ids)
    real[1, TOKENS // 2 :] = 0
    return [{"input_ids": ids, "attention_mask": real}, {"input_ids": ids[:1]}]
