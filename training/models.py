"""Load a tokenizer and a pretrained model, and refuse what transformers would let pass without a word."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from attention.options import Plan
from attention.seam import install, stored_plan, variant_parameters
from heedful import UserError
from sources.files import MANIFEST, fault, leads_out
from sources.texts import counted
from tasks.saved import model_of_run
from training.positions import Growth, Wanted, growth

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
ARCHITECTURE = "model.architecture"
DECIDED = {"vocab_size", "architectures", "dtype", "num_labels", "id2label", "label2id", "problem_type"}
"""Arguments of a configuration that follow from the tokenizer, the task and the project, as all ``*_token_id`` do."""
MODEL_FOLDER = "a Hugging Face folder with config.json, or a Hub id"


@dataclass(frozen=True)
class Loaded:
    """A model with its pretrained weights.

    Args:
        model: In fp32, in eval mode.
        new: Names of the parameters that the checkpoint does not hold: they start at random and must be trained.
        unused: Names of the checkpoint's weights that this model has no place for, such as another task's head.
        growth: How it got more positions than the checkpoint has; None where it has those alone.
        sha256: Of what it has from the checkpoint (``pretrained_hash``), where that was asked for.
    """

    model: PreTrainedModel
    new: tuple[str, ...]
    unused: tuple[str, ...]
    growth: Growth | None = None
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


def load_tokenizer(
    name: str, *, own: bool = True, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, a fast one where there is one.

    Args:
        own: Whether it is for the model of the same name, and so must fit that model's embeddings.

    Raises:
        UserError: No tokenizer files (transformers 5 hands back one of five tokens), or more
            tokens than the model has embeddings.
    """
    _refuse_absent(name, expected="a folder with a tokenizer, or a Hub id" if not own else MODEL_FOLDER)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code) if own else None
    if os.path.isdir(name) and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"a {'model ' * own}folder without tokenizer files",
            where=name,
            expected=f"one of: {', '.join(TOKENIZER_FILES)}",
            fix="save the model's own tokenizer there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, **kwargs
        )
    except Exception as error:  # of a broken file, whatever Python or the tokenizers library makes of it
        raise UserError(f"no tokenizer could be loaded: {_first_line(error)}", where=name) from error
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if wrong := [template for template in templates if "/" in template or leads_out(template)]:
        raise UserError(  # it would be a file's name, once the model is trained
            f"a chat template with the name {wrong[0]!r}", where=name, expected="a plain name", fix="rename it"
        )
    vocab_size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise UserError(
            f"a tokenizer of {len(tokenizer)} tokens for a model of {vocab_size} embeddings",
            where=name,
            fix="use the tokenizer that the model was trained with",
        )
    return tokenizer


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
    if stored is None or attention not in (None, stored):
        return swap_attention(loaded, attention)
    loaded = swap_attention(loaded, stored)
    return _restore_variants(loaded, partial(_read_tensors, name, revision=revision))


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


def _restore_variants(loaded: Loaded, read: Callable[[Sequence[str]], dict[str, Tensor]]) -> Loaded:
    """Give the variants what they had learned when the model was saved, whatever head it was saved with."""
    prefix = f"{loaded.model.base_model_prefix}."
    names = {name.removeprefix(prefix): name for name in variant_parameters(loaded.model)}
    keys = [key for key in loaded.unused if key.removeprefix(prefix) in names]
    with torch.no_grad():
        for key, tensor in read(keys).items():
            parameter = loaded.model.get_parameter(names[key.removeprefix(prefix)])
            if parameter.shape != tensor.shape:
                raise UserError(
                    f"an attention whose {key} was made for other positions: {tuple(tensor.shape)}",
                    where="model.max_length",
                    expected=str(tuple(parameter.shape)),
                    fix="keep to the positions that the checkpoint has, or take another attention",
                )
            parameter.copy_(tensor)
    restored = {names[key.removeprefix(prefix)] for key in keys}
    return replace(
        loaded,
        new=tuple(name for name in loaded.new if name not in restored),
        unused=tuple(key for key in loaded.unused if key not in keys),
    )


def _read_tensors(name: str, keys: Sequence[str], *, revision: str | None) -> dict[str, Tensor]:
    """Some tensors of a checkpoint in safetensors, in one file or in many."""
    if not keys:
        return {}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    file_of = dict.fromkeys(keys, SAFE_WEIGHTS_NAME)
    if index is not None:
        file_of = {key: json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"][key] for key in keys}
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        with safe_open(cached_file(name, file, revision=revision), framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in keys if file_of[key] == file}
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
                f"{'broken safetensors file' if broken else 'the model could not be loaded'}: {_first_line(error)}",
                where=name,
                fix="fetch it again" if broken else "",
            ) from error
    if info["mismatched_keys"] and not ignore_mismatched_sizes:
        key, held, wanted = min(info["mismatched_keys"])
        raise UserError(
            f"weights of other shapes than config.json says: {key} is {tuple(held)}",
            where=name,
            expected=str(tuple(wanted)),
            fix="fetch it again",
        )
    return model, info


def _with_its_body(auto_class: Any, name: str, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and with it the checkpoint's body, under whatever name it is held."""
    model, info = _from_pretrained(auto_class, name, **kwargs)
    if (prefix := _other_prefix(model, info)) is None:
        return model, info
    mapping = {rf"^{prefix}\.": f"{model.base_model_prefix}."}
    model, info = _from_pretrained(auto_class, name, key_mapping=mapping, **kwargs)
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
            f"more positions, with which {_some(sorted(others))} would grow too",
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
    own = f"{model.base_model_prefix}."
    wanted = {key.removeprefix(own) for key in info["missing_keys"] if key.startswith(own)}
    prefixes = {key.partition(".")[0] for key in info["unexpected_keys"]}
    held = (p for p in prefixes if wanted and {f"{p}.{key}" for key in wanted} <= set(info["unexpected_keys"]))
    return next(held, None)


def _refuse_random_body(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> None:
    """A checkpoint of which nothing fits would be trained from scratch, and called pretrained."""
    body = {key for key, _ in model.named_parameters() if key.startswith(f"{model.base_model_prefix}.")}
    if body and body <= set(info["missing_keys"]):
        unused = _some(sorted(info["unexpected_keys"])[:3])
        raise UserError(
            f"weights of which {type(model).__name__} has a place for none: {unused}",
            where=name,
            expected=f"such as {min(body)}",
            fix="fetch it again, or look what model its config.json should name",
        )


def new_model(
    auto_class: Any, architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> Loaded:
    """Make a model of random weights for ``auto_class``, in fp32; every parameter is new.

    Args:
        architecture: ``model_type`` and arguments of its configuration class.
        tokenizer: Decides ``vocab_size`` and every token id: the class's defaults are those of another tokenizer.
        kwargs: The task's: ``num_labels``, ``id2label``, ...

    Raises:
        UserError: As ``new_config``; or sizes that do not go together, or no such head for this ``model_type``.
    """
    model = _from_config(auto_class.from_config, new_config(architecture, tokenizer, **kwargs), where=ARCHITECTURE)
    return Loaded(model, tuple(sorted(name for name, _ in model.named_parameters())), ())


def empty_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make the model that ``name`` describes, without a head, from its configuration alone: its weights are random.

    Raises:
        UserError: No such model, or none that transformers can make.
    """
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModel  # which knows no joined encoders
    return _from_config(partial(kind.from_config, trust_remote_code=trust_remote_code), config, where=name)


def _from_config(make: Callable[..., Any], config: PreTrainedConfig, *, where: str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = make(config, dtype=torch.float32)
    except Exception as error:  # whatever its class makes of sizes that do not go together
        raise UserError(f"the model could not be made: {_first_line(error)}", where=where) from error
    return model.eval()


def new_config(architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedConfig:
    """Make the configuration of a model that fits the tokenizer; see ``new_model``.

    Raises:
        UserError: An unknown ``model_type`` or argument (transformers would keep it and use it for nothing), one that
            the tokenizer or the task decides, or a value of another type.
    """
    values = dict(architecture)
    config_class = _config_class(values.pop("model_type"))
    fields = {field.name for field in dataclasses.fields(config_class)}
    decided = {name for name in fields if name.endswith("_token_id")} | DECIDED | kwargs.keys()
    # T5's class reads tie_word_embeddings without naming it among its arguments.
    known = sorted((fields | config_class.attribute_map.keys() | {"tie_word_embeddings"}) - decided)
    for key in values:
        if key in decided:
            raise UserError(
                f"{key}={values[key]!r}",
                where=f"{ARCHITECTURE}.{key}",
                expected="what the tokenizer and the task decide",
            )
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            raise UserError(
                f"unknown key {key!r} for {config_class.__name__}",
                where=f"{ARCHITECTURE}.{key}",
                expected=f"one of: {', '.join(known)}",
                fix=f"did you mean {near[0]}?" if near else "",
            )
    ids = token_ids(config_class(), tokenizer)
    try:
        return config_class(**{**values, "vocab_size": len(tokenizer), **ids, **kwargs})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(
            " ".join(str(error).split()), where=ARCHITECTURE, expected=f"arguments of {config_class.__name__}"
        ) from error


def token_ids(default: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Every token id of a configuration, as this tokenizer has it.

    Args:
        default: The class's own defaults. Where they use one id twice, so shall the result: BART begins to decode with
            its end of text and forces it at the end, T5 and Marian begin with padding.
    """
    of = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": _first_given(tokenizer.eos_token_id, tokenizer.sep_token_id),
        "bos_token_id": _first_given(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "sep_token_id": _first_given(tokenizer.sep_token_id, tokenizer.eos_token_id),
        "cls_token_id": _first_given(tokenizer.cls_token_id, tokenizer.bos_token_id),
        "mask_token_id": tokenizer.mask_token_id,
        "unk_token_id": tokenizer.unk_token_id,
    }
    stored = {name: value for name, value in default.to_dict().items() if name.endswith("_token_id")}
    if default.is_encoder_decoder and stored.get("decoder_start_token_id") is None:
        stored["decoder_start_token_id"] = default.pad_token_id  # T5's, whose configuration class leaves it out
    main = ("pad_token_id", "eos_token_id", "bos_token_id")
    copied = {
        name: next((of[role] for role in main if value is not None and stored.get(role) == value), None)
        for name, value in stored.items()
        if name not in of
    }
    return {name: of[name] for name in main} | {name: of[name] for name in stored if name in of} | copied


def _first_given(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


def _config_class(model_type: Any) -> type[PreTrainedConfig]:
    if model_type not in CONFIG_MAPPING:
        near = get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        raise UserError(
            f"unknown model_type {model_type!r}",
            where=f"{ARCHITECTURE}.model_type",
            expected="one that transformers knows, e.g. bert, distilbert, t5, bart, gpt2",
            fix=f"did you mean {near[0]}?" if near else "",
        )
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    if config_class.sub_configs or "vocab_size" not in {field.name for field in dataclasses.fields(config_class)}:
        raise UserError(
            f"model_type {model_type!r}, which is composed of other models or has no vocabulary",
            where=f"{ARCHITECTURE}.model_type",
            expected="a single model of text, e.g. bert, distilbert, t5, bart, gpt2",
        )
    return config_class


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively; elsewhere bf16 on a CPU is emulated and several times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's configuration.

    Raises:
        UserError: No such folder or model.
    """
    _refuse_absent(name, expected=MODEL_FOLDER)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a broken file, whatever Python or transformers makes of it
        raise UserError(
            f"no model configuration could be loaded: {_first_line(error)}",
            where=name,
            expected=MODEL_FOLDER,
            fix=model_of_run(Path(name)),
        ) from error


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
        raise UserError(f"broken index: {_first_line(error)}", where=str(index), fix="fetch it again") from error


def _refuse_absent(name: str, *, expected: str) -> None:
    """What looks like a path and is none must not be asked for on the Hub."""
    if name.startswith((".", "/", "~", "assets/", "runs/")) and not os.path.isdir(name):
        raise UserError("no such model folder", where=name, expected=expected)


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
            f"a head for {counted(len(stored), 'labels')}: {_some(stored.values())}",
            where=name,
            expected=f"{counted(len(labels), 'labels')} as in the data, in this order: {_some(labels.values())}",
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


def compare_vocabularies(tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> str:
    """Say how a tokenizer differs from the model's own: tokens without a trained row, and those with another's."""
    vocabulary, trained = tokenizer.get_vocab(), {i: token for token, i in own.get_vocab().items()}
    by_id = sorted((i, token) for token, i in vocabulary.items())
    new = [token for i, token in by_id if i not in trained]
    moved = [token for i, token in by_id if i in trained and trained[i] != token]
    said = [f"{len(new):,} new: {_some(new)}"] if new else []
    said += [f"{len(moved):,} begin with the embedding of another token: {_some(moved)}"] if moved else []
    return f"of the tokenizer's {len(tokenizer):,} tokens " + (" and ".join(said) or "all are the model's own")


def _some(labels: Any) -> str:
    shown = [str(label) for label in labels]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def _first_line(error: Exception) -> str:
    said = " ".join(str(error).split(":\n")).strip().splitlines()[:1]
    in_words = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return said[0] if said and in_words else ": ".join([type(error).__name__, *said])


class quiet:
    """Hush transformers' load report: what it says of missing and unused weights is in ``Loaded``."""

    def __enter__(self) -> None:
        self._verbosity = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *exc: object) -> None:
        logging.set_verbosity(self._verbosity)
