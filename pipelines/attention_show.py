"""``heedful attention show``: which token of a text attends to which, at each site and in each head of a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from attention.describing import describe_options
from attention.seam import Call, choose, recorded, sites_of, stored_plan
from attention.variant import Site
from heedful import UserError
from pipelines.attention_pictures import View, check_figure, draw_figure, page
from pipelines.inference import model_folder
from pipelines.preparation import build_accelerator, build_console, tell
from sources.files import writing
from sources.texts import counted
from tasks.positions import max_positions
from tasks.saved import FILE, load_task
from training.configurations import load_config, quiet
from training.models import load_model
from training.tokenizers import load_tokenizer

SHOWN = 128
"""Tokens of each side in the picture."""
LONGEST = 1024
"""Tokens of a text that is run for a picture."""
GENERATED = 64
"""Tokens that an encoder-decoder answers with."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def show(
    checkpoint: str,
    text: str,
    *,
    out: Path,
    figure: Path | None = None,
    layer: int | None = None,
    head: int | None = None,
    console: Console | None = None,
) -> None:
    """Run a model on a text, and draw the weights of its attention.

    Args:
        checkpoint: A run, a model folder or a Hub id.
        out: The page.
        figure: A drawing for a paper as well, of all that is in the page.
        layer: Of each role this one alone.
        head: Of each layer this one alone.

    Raises:
        UserError: The text is empty or too long, the model computes attention in its own way, or there is no such
            layer, head or folder.
    """
    console = build_console(build_accelerator(bf16=False), console)
    _refuse_no_file(out)
    if out.suffix != ".html":
        raise UserError("a page of another kind", where=f"--out {out}", expected="a name that ends with .html")
    if figure is not None:
        _refuse_no_file(figure)
        check_figure(figure)
    with quiet():
        tokenizer, model = _open(checkpoint)
        inputs = _encode(tokenizer, model, text)
        calls, ids = _run(model, inputs)
    tokens = {side: _pieces(tokenizer, row) for side, row in ids.items()}
    views = _views(model, calls, tokens, layer, head)
    blank = sum(view.weights_HNM is None for view in views)
    without = f" ({blank} of them without a table of weights that could be drawn)" if blank else ""
    with writing(out):
        out.write_text(page(f"Attention of {checkpoint}", _notes(text, tokens), views), encoding="utf-8")
    tell(console, f"{out}: {counted(len(views), 'places')}{without}, {_counted(tokens)}")
    if figure is not None:
        with writing(figure):
            draw_figure(figure, views)
        tell(console, str(figure))


def _refuse_no_file(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "a folder" if path.is_dir() else "no such folder"
        raise UserError(what, where=str(path), expected="a file in a folder that is there")


def _open(checkpoint: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """With the head of its task, where a task is saved with it; else the body, or what answers for an
    encoder-decoder."""
    name = str(model_folder(checkpoint)) if Path(checkpoint).is_dir() else checkpoint
    tokenizer = load_tokenizer(name)
    if (Path(name) / FILE).is_file():
        task = load_task(Path(name), tokenizer)
        return tokenizer, load_model(task.auto_class, name, **task.model_kwargs()).model
    kind = AutoModelForSeq2SeqLM if load_config(name).is_encoder_decoder else AutoModel
    return tokenizer, load_model(kind, name).model


def _encode(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, text: str) -> dict[str, Tensor]:
    encoded = tokenizer(text, return_tensors="pt")
    length, limit = encoded["input_ids"].shape[1], min(LONGEST, max_positions(model) or LONGEST)
    if not text.strip() or not length:
        raise UserError("the text is empty", expected="a text of at least one token")
    if length > limit:
        raise UserError(f"a text of {length:,} tokens", expected=f"at most {limit:,}", fix="show a part of it")
    known = inspect.signature(model.forward).parameters
    return {name: encoded[name] for name in INPUTS if name in encoded and name in known}


@torch.no_grad()
def _run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[list[Call], dict[str, Tensor]]:
    """What the attention is called with; and the ids of the text, and of what the decoder of two halves reads."""
    ids = {"text": inputs["input_ids"][0]}
    if model.config.is_encoder_decoder:
        if model.can_generate():
            room = min(GENERATED, (max_positions(model) or SHOWN) - 1)
            answer = model.generate(**inputs, max_new_tokens=room, do_sample=False)
            inputs["decoder_input_ids"] = answer[:, : max(1, answer.shape[1] - 1)]  # the last is read by nobody
        model.get_decoder().register_forward_pre_hook(  # other heads make its input themselves
            lambda module, args, kwargs: ids.update(answer=kwargs["input_ids"][0]), with_kwargs=True
        )
    with recorded(model) as calls:
        model(**inputs)
    return calls, ids


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """Each token as it reads; where alone it reads as nothing, its name in the vocabulary, or its id if it has none."""
    pieces = []
    for i in ids.tolist():
        read, name = tokenizer.decode([i]).strip(), tokenizer.convert_ids_to_tokens(i)
        pieces.append(read if read and "\ufffd" not in read else name or f"id {i}")
    return pieces


def _views(
    model: PreTrainedModel,
    calls: Sequence[Call],
    tokens: dict[str, list[str]],
    layer: int | None,
    head: int | None,
) -> list[View]:
    sites = {site.module: site for site in sites_of(model, calls)}
    wanted = [call for call in calls if layer in (None, sites[call.module].layer)]
    if not wanted:
        last = max(site.layer for site in sites.values())
        raise UserError(f"no layer {layer}", where="--layer", expected=f"0 to {last}")
    fewest = min(call.query.shape[1] for call in wanted)
    if head is not None and head >= fewest:
        raise UserError(f"no head {head}", where="--head", expected=f"0 to {fewest - 1}")
    seen: dict[Any, int] = {}
    views = []
    for call in wanted:
        site = sites[call.module]
        seen[site] = seen.get(site, 0) + 1
        again = f", call {seen[site]}" if seen[site] > 1 else ""  # of a layer that is used several times, as ALBERT's
        views.append(_view(model, call, site, f"{site}{again}", tokens, head))
    return views


def _view(
    model: PreTrainedModel, call: Call, site: Site, name: str, tokens: dict[str, list[str]], head: int | None
) -> View:
    heads = list(range(call.query.shape[1])) if head is None else [head]
    weights = getattr(call.variant, "weights", None)
    table = None
    if weights is not None:
        table = weights(call.query, call.key, call.mask, call.scoring)[0, heads, :SHOWN, :SHOWN].clone()
    rows = "answer" if model.config.is_encoder_decoder and site.role != "encoder.self" else "text"
    columns = rows if site.role != "cross" else "text"
    return View(name, site.path, _variant(model, site), tokens[rows][:SHOWN], tokens[columns][:SHOWN], heads, table)


def _variant(model: PreTrainedModel, site: Site) -> str:
    plan = stored_plan(model)
    return "full" if plan is None else describe_options(choose(plan, site))


def _counted(tokens: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(pieces)} tokens of the {side}" for side, pieces in tokens.items())


def _notes(text: str, tokens: dict[str, list[str]]) -> list[str]:
    notes = [text if len(text) <= 500 else f"{text[:500]} ..."]
    if "answer" in tokens:
        notes.append(f"The decoder reads: {' '.join(tokens['answer'])}")
    for side, pieces in tokens.items():
        if len(pieces) > SHOWN:
            notes.append(
                f"The first {SHOWN} of {len(pieces)} tokens of the {side} are shown; weights on others are not, and "
                "so a row may hold less than 1."
            )
    return notes
