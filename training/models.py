"""Load a pretrained model, and refuse what transformers would let pass without a word."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from attention.options import Plan
from attention.seam import CHILD, NAME, PLAN, install, stored_plan, variant_parameters
from heedful import UserError
from sources.files import MANIFEST, fault, leads_out
from sources.texts import counted, first_few, first_line
from training.configurations import load_config, quiet, token_ids
from training.positions import Growth, Wanted, growth

OWN_PLAN, OWN_POSITIONS = "the plan that it was saved with", "the positions that the checkpoint has"
RENAMED = "renamed"
"""Where the report of a loaded model says under which name its checkpoint holds the body, if it is another one."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Loaded:
    """A model with its pretrained weights.

    Args:
        model: In fp32, in eval mode.
        new: Names of the parameters that the checkpoint does not hold: they start at random and must be trained.
        unused: Names of the checkpoint's weights that this model has no place for, such as another task's head.
        growth: How it got more positions than the checkpoint has; None where it has those alone.
        replaced: The checkpoint's own plan, where another took its place.
        sha256: Of what it has from the checkpoint (``pretrained_hash``), where that was asked for.
    """

    model: PreTrainedModel
    new: tuple[str, ...]
    unused: tuple[str, ...]
    growth: Growth | None = None
    replaced: Plan | None = None
    sha256: str = ""


def pretrained_hash(loaded: Loaded) -> str:
    """Hash what the model has from its checkpoint: name, shape and fp32 values of every parameter that is not new.

    It is the same however the checkpoint is cut into files and in whatever type it is stored; 0.15 s for 22.7 M
    parameters.

    Returns:
        The sha256, in hexadecimal.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(loaded.model.named_parameters()):
        if name not in loaded.new:
            found.update(f"{name} {tuple(parameter.shape)}\n".encode())
            found.update(parameter.detach().contiguous().view(-1).numpy().view("u1"))
    return found.hexdigest()


def unread(name: str, *, trust_remote_code: bool) -> list[str]:
    """Name the files of a model's folder, if it is one, that could run code and so are left alone."""
    kinds = PICKLES if trust_remote_code else (*PICKLES, ".py")
    return sorted(path.name for path in Path(name).iterdir() if path.suffix in kinds) if os.path.isdir(name) else []


def load_model(
    auto_class: Any,
    name: str,
    *,
    new_head: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    attention: Plan | None = None,
    positions: Wanted | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Loaded:
    """Load ``name`` as ``auto_class`` in fp32 from safetensors.

    Args:
        new_head: Start the rows of the head's labels anew, whatever head the checkpoint has, instead of refusing one.
        tokenizer: Another one than the model's own: the embeddings grow to its size and count as new.
        attention: Another plan than the checkpoint's own, which most have none of: its variants start anew.
        positions: How many positions it needs; a learned table that grows counts as new. None leaves it as it is.
        kwargs: The task's: ``num_labels``, ``id2label``, ...

    Raises:
        UserError: No such model, broken weights, NaN in the weights, a head for other labels, a tokenizer with
            other ids for the model's special tokens, or a model that can have no more positions.
    """
    if os.path.isfile(Path(name) / MANIFEST) and (reason := fault(Path(name))):
        raise UserError(f"broken model folder: {reason}", where=name, fix="fetch or train it again")
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_no_weights(name)
    if not new_head:
        _refuse_other_labels(config, auto_class, name, kwargs)
    if tokenizer is not None:
        _refuse_other_ids(config, tokenizer)
    load = partial(
        _with_its_body,
        auto_class,
        name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=new_head,
        **kwargs,
    )
    model, info = load()
    grown = growth(model, positions) if positions is not None else None
    if grown is not None:
        del model  # or both would have to fit into memory
        model, info = _grow(load, grown, info)
    _refuse_random_body(model, info, name)
    if broken := [key for key, p in model.named_parameters() if not torch.isfinite(p).all()]:
        raise UserError(f"NaN or infinite weights: {', '.join(broken[:3])}", where=name, fix="fetch or train it again")
    mismatched = _mismatched(info) - (grown.computed.keys() if grown is not None else set())
    renewed = _renew_labels(model) if new_head else []
    renewed += _fit_embeddings(model, tokenizer) if tokenizer is not None else []
    new = tuple(sorted({*info["missing_keys"], *mismatched, *renewed}))
    _rest_the_pooler(model)
    loaded = Loaded(model.eval(), new, tuple(sorted(info["unexpected_keys"])), grown)
    stored = stored_plan(model)
    if attention not in (None, stored):
        return replace(swap_attention(loaded, attention), replaced=stored)
    read = partial(_read_tensors, name, body=info.get(RENAMED), own=_body(model), revision=revision)
    loaded = _restore_variants(swap_attention(loaded, stored), name, read)
    _refuse_other_variants(loaded, name)
    return loaded


def _rest_the_pooler(model: PreTrainedModel) -> None:
    """A joined model's encoder has one that takes no part in the loss: data parallelism would wait for its gradient."""
    if isinstance(model, EncoderDecoderModel) and (pooler := getattr(model.encoder, "pooler", None)) is not None:
        pooler.requires_grad_(False)


def swap_attention(loaded: Loaded, plan: Plan | None) -> Loaded:
    """Put the plan's variants into the model, in place; what they learn starts anew.

    Raises:
        UserError: As ``attention.seam.install``.
    """
    if plan is None:
        return loaded
    install(loaded.model, plan)
    return replace(loaded, new=tuple(sorted({*loaded.new, *variant_parameters(loaded.model)})))


def _restore_variants(loaded: Loaded, name: str, read: Callable[[Sequence[str]], dict[str, Tensor]]) -> Loaded:
    """Give the variants what they had learned when the model was saved, whatever head it was saved with."""
    prefix = f"{loaded.model.base_model_prefix}."
    names = {name.removeprefix(prefix): name for name in variant_parameters(loaded.model)}
    keys = [key for key in loaded.unused if key.removeprefix(prefix) in names]
    with torch.no_grad():
        for key, tensor in read(keys).items():
            parameter = loaded.model.get_parameter(names[key.removeprefix(prefix)])
            if parameter.shape != tensor.shape:
                grown = loaded.growth is not None
                raise UserError(
                    f"an attention whose {key} is {tuple(tensor.shape)}",
                    where="model.max_length" if grown else f"{name}/config.json: {PLAN}",
                    expected=str(tuple(parameter.shape)),
                    fix=f"keep to {OWN_POSITIONS if grown else OWN_PLAN}, or take another attention",
                )
            parameter.copy_(tensor)
    restored = {names[key.removeprefix(prefix)] for key in keys}
    return replace(
        loaded,
        new=tuple(name for name in loaded.new if name not in restored),
        unused=tuple(key for key in loaded.unused if key not in keys),
    )


def _refuse_other_variants(loaded: Loaded, name: str) -> None:
    """What variants had learned would be dropped without a word, or start anew, where config.json was changed since."""
    learned = [key for key in loaded.unused if f".{CHILD}." in key]
    lacking = set(variant_parameters(loaded.model)) & set(loaded.new)
    where, fix = f"{name}/config.json", f"put {OWN_PLAN} back, or train it with another: attention=full takes it out"
    if loaded.model.config._attn_implementation == NAME and stored_plan(loaded.model) is None:
        raise UserError(f"{NAME}'s attention, and no {PLAN}", where=where, fix=fix)
    if learned or lacking:
        raise UserError(
            f"weights of attention variants: {first_few(learned) or 'none'}",
            where=where,
            expected=f"as the {PLAN} has them: {first_few(sorted(lacking)) or 'none'}",
            fix=fix,
        )


def _read_tensors(
    name: str, keys: Sequence[str], *, body: str | None, own: str, revision: str | None
) -> dict[str, Tensor]:
    """Some tensors of a checkpoint in safetensors, in one file or in many.

    Args:
        body: The name under which the file holds what the model has under ``own``; None for the same.
    """
    if not keys:
        return {}
    held = {key: key if body is None else f"{body}.{key.removeprefix(own)}" for key in keys}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    file_of = dict.fromkeys(keys, SAFE_WEIGHTS_NAME)
    if index is not None:
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        file_of = {key: files[held[key]] for key in keys}
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        with safe_open(cached_file(name, file, revision=revision), framework="pt") as opened:
            tensors |= {key: opened.get_tensor(held[key]) for key in keys if file_of[key] == file}
    return tensors


def _from_pretrained(
    auto_class: Any, name: str, *, ignore_mismatched_sizes: bool, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    as_it_is = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with quiet():
        try:
            # Other sizes are refused below: transformers names them in the report alone, which is hushed.
            model, info = auto_class.from_pretrained(name, ignore_mismatched_sizes=True, **as_it_is, **kwargs)
        except Exception as error:  # of a broken file, whatever Python or safetensors makes of it
            broken = type(error).__name__ == "SafetensorError"
            raise UserError(
                f"{'broken safetensors file' if broken else 'the model could not be loaded'}: {first_line(error)}",
                where=name,
                fix="fetch it again" if broken else "",
            ) from error
    if info["mismatched_keys"] and not ignore_mismatched_sizes:
        key, held, wanted = min(info["mismatched_keys"])
        raise UserError(
            f"weights of other shapes than config.json says: {key} is {tuple(held)}",
            where=name,
            expected=str(tuple(wanted)),
            fix="model.init=new_head, if it is the head of another task; else fetch it again",
        )
    return model, info


def _with_its_body(auto_class: Any, name: str, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and with it the checkpoint's body, under whatever name it is held."""
    model, info = _from_pretrained(auto_class, name, **kwargs)
    if (prefix := _other_prefix(model, info)) is None:
        return model, info
    model, info = _from_pretrained(auto_class, name, key_mapping={rf"^{prefix}\.": _body(model)}, **kwargs)
    info[RENAMED] = prefix
    # Or save_pretrained would write the checkpoint's names, and from_pretrained lose the trained body as well.
    model._weight_conversions = None
    return model, info


def _grow(
    load: Callable[..., tuple[PreTrainedModel, dict[str, Any]]], grown: Growth, before: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model once more, of the new size."""
    model, info = load(**{**grown.config, "ignore_mismatched_sizes": True})
    if others := _mismatched(info) - _mismatched(before) - grown.tables.keys() - grown.computed.keys():
        raise UserError(
            f"more positions, with which {first_few(sorted(others))} would grow too",
            where="model.max_length",
            fix=f"model.max_length={grown.old}",
        )
    grown.fill(model)
    return model, info


def _mismatched(info: Mapping[str, Any]) -> set[str]:
    return {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}


def _other_prefix(model: PreTrainedModel, info: Mapping[str, Any]) -> str | None:
    """The name under which the checkpoint holds the body that this class looks for under another one.

    Llama's and Qwen's for question answering say ``transformer`` where every checkpoint of theirs says ``model``:
    transformers would load none of it, and start at random.
    """
    own = _body(model)
    wanted = {key.removeprefix(own) for key in info["missing_keys"] if key.startswith(own)}
    prefixes = {key.partition(".")[0] for key in info["unexpected_keys"]}
    held = (p for p in prefixes if wanted and {f"{p}.{key}" for key in wanted} <= set(info["unexpected_keys"]))
    return next(held, None)


def _body(model: PreTrainedModel) -> str:
    """How the names of a model's body begin: with nothing, where it has no head."""
    own = f"{model.base_model_prefix}."
    return own if any(name.startswith(own) for name, _ in model.named_parameters()) else ""


def _refuse_random_body(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> None:
    """A checkpoint of which nothing fits would be trained from scratch, and called pretrained."""
    body = {key for key, _ in model.named_parameters() if key.startswith(_body(model))}
    if body and body <= set(info["missing_keys"]):
        unused = first_few(sorted(info["unexpected_keys"])[:3])
        raise UserError(
            f"weights of which {type(model).__name__} has a place for none: {unused}",
            where=name,
            expected=f"such as {min(body)}",
            fix="fetch it again, or look what model its config.json should name",
        )


def _refuse_no_weights(name: str) -> None:
    index = Path(name) / SAFE_WEIGHTS_INDEX_NAME
    if os.path.isfile(index) and (elsewhere := [file for file in _files_of(index) if leads_out(file)]):
        raise UserError(
            f"an index that names {elsewhere[0]}",
            where=str(index),
            expected="files of the folder that it lies in",
            fix="fetch the model again, from where you trust it",
        )
    if os.path.isfile(Path(name) / "adapter_config.json"):  # transformers would load its base, from wherever it says
        raise UserError(
            "a folder with an adapter",
            where=name,
            expected="a whole model",
            fix="merge the adapter: MODEL.merge_and_unload()",
        )
    if os.path.isdir(name) and not any(Path(name).glob("*.safetensors")):
        raise UserError(
            "a model folder without safetensors, the only weights that are read",
            where=name,
            expected="model.safetensors, or its parts with their index",
            fix="give the folder that the model was saved to, or save it there again: MODEL.save_pretrained(FOLDER)",
        )


def _files_of(index: Path) -> list[str]:
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"broken index: {first_line(error)}", where=str(index), fix="fetch it again") from error


def _refuse_other_labels(config: PreTrainedConfig, auto_class: Any, name: str, wanted: Mapping[str, Any]) -> None:
    """A head for other labels, or for the same ones in another order, must not be trained on as if it fitted."""
    labels = wanted.get("id2label")
    heads = auto_class._model_mapping.get(type(config), None)
    names = {head.__name__ for head in (heads if isinstance(heads, tuple) else (heads,)) if head is not None}
    if labels is None or not names & set(config.architectures or ()):
        return
    stored = {int(i): label for i, label in config.id2label.items()}
    unnamed = all(label == f"LABEL_{i}" for i, label in stored.items())
    if len(stored) != len(labels) or (stored != labels and not unnamed):
        raise UserError(
            f"a head for {counted(len(stored), 'labels')}: {first_few(stored.values())}",
            where=name,
            expected=f"{counted(len(labels), 'labels')} as in the data, in this order: {first_few(labels.values())}",
            fix="model.init=new_head starts a fresh head on this checkpoint's body",
        )


def _renew_labels(model: PreTrainedModel) -> list[str]:
    """Draw the rows of the head anew, one a label: transformers keeps those of other labels if their number fits."""
    body, fresh = f"{model.base_model_prefix}.", type(model)(model.config)
    rows = {n: p for n, p in model.named_parameters() if not n.startswith(body) and len(p) == model.config.num_labels}
    with torch.no_grad():
        for name, parameter in rows.items():
            parameter.copy_(fresh.get_parameter(name))
    return list(rows)


def _refuse_other_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The former padding's row would get no gradient, RoBERTa's positions would shift, decoding would end elsewhere."""
    own = config.to_dict()
    for name, i in token_ids(config, tokenizer).items():
        kept = own.get(name)
        if None not in (kept, i) and i not in (kept if isinstance(kept, list) else [kept]):
            raise UserError(
                f"{name} {i}", where="model.tokenizer", expected=f"{own[name]}, as the model was trained with"
            )


def _fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give every token of another tokenizer a row, new ones around the mean of the old; name what must be trained."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with quiet():
            model.resize_token_embeddings(len(tokenizer))
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    held = {id(p) for table in tables for p in table.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in held]
