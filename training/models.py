"""Load a tokenizer and a pretrained model, and refuse what transformers would let pass without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from heedful import UserError
from training.checkpoints import MANIFEST, fault

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
MODEL_FOLDER = "a Hugging Face folder with config.json, or a Hub id"


@dataclass(frozen=True)
class Loaded:
    """A model with its pretrained weights.

    Args:
        model: In fp32, in eval mode.
        new: Names of the parameters that the checkpoint does not hold: they start at random and must be trained.
        unused: Names of the checkpoint's weights that this model has no place for, such as another task's head.
    """

    model: PreTrainedModel
    new: tuple[str, ...]
    unused: tuple[str, ...]


def load_tokenizer(
    name: str, *, own: bool = True, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer.

    Args:
        own: Whether it is for the model of the same name, and so must fit that model's embeddings.

    Raises:
        UserError: No tokenizer files (transformers 5 hands back one of five tokens), no fast tokenizer, or more
            tokens than the model has embeddings.
    """
    _refuse_absent(name, expected="a folder with a tokenizer, or a Hub id" if not own else MODEL_FOLDER)
    config = _load_config(name, revision=revision, trust_remote_code=trust_remote_code) if own else None
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
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
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"no tokenizer could be loaded: {_first_line(error)}", where=name) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} has no fast version", where=name, expected="a tokenizer.json, for offsets"
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
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Loaded:
    """Load ``name`` as ``auto_class`` in fp32 from safetensors.

    Args:
        new_head: Start the rows of the head's labels anew, whatever head the checkpoint has, instead of refusing one.
        kwargs: The task's: ``num_labels``, ``id2label``, ...

    Raises:
        UserError: No such model, broken weights, NaN in the weights, or a head for other labels.
    """
    if (Path(name) / MANIFEST).is_file() and (reason := fault(Path(name))):
        raise UserError(f"broken model folder: {reason}", where=name, fix="fetch or train it again")
    config = _load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    if not new_head:
        _refuse_other_labels(config, auto_class, name, kwargs)
    with _quiet():
        try:
            model, info = auto_class.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=new_head,
                output_loading_info=True,
                **kwargs,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"the model could not be loaded: {_first_line(error)}", where=name) from error
        except Exception as error:  # safetensors raises its own SafetensorError, a plain Exception
            if type(error).__name__ != "SafetensorError":
                raise
            raise UserError(
                f"broken safetensors file: {_first_line(error)}", where=name, fix="fetch it again"
            ) from error
    if broken := [key for key, p in model.named_parameters() if not torch.isfinite(p).all()]:
        raise UserError(f"NaN or infinite weights: {', '.join(broken[:3])}", where=name, fix="fetch or train it again")
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    renewed = _renew_labels(model) if new_head else []
    new = tuple(sorted({*info["missing_keys"], *mismatched, *renewed}))
    return Loaded(model.eval(), new, tuple(sorted(info["unexpected_keys"])))


def check_length(model: nn.Module, max_length: int, *, where: str = "model.max_length") -> None:
    """Refuse windows longer than the model has positions for.

    Raises:
        UserError: Torch would only say that an index is out of range, in the middle of a run.
    """
    limit = max_positions(model)
    if limit is not None and max_length > limit:
        raise UserError(
            f"{where}={max_length}", expected=f"at most {limit}, the positions of this model", fix=f"{where}={limit}"
        )


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence that the model can encode, special tokens included; None where nothing bounds it."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1, so its table of 514 rows serves 512 tokens.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    return None if getattr(config, "relative_attention", False) else getattr(config, "max_position_embeddings", None)


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively; elsewhere bf16 on a CPU is emulated and several times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))


def _load_config(name: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    _refuse_absent(name, expected=MODEL_FOLDER)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"no model configuration could be loaded: {_first_line(error)}",
            where=name,
            expected=MODEL_FOLDER,
        ) from error


def _refuse_absent(name: str, *, expected: str) -> None:
    """What looks like a path and is none must not be asked for on the Hub."""
    if name.startswith((".", "/", "~", "assets/", "runs/")) and not Path(name).is_dir():
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
            f"a head for {len(stored)} labels: {_some(stored.values())}",
            where=name,
            expected=f"{len(labels)} labels as in the data, in this order: {_some(labels.values())}",
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


def _some(labels: Any) -> str:
    shown = [str(label) for label in labels]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class _quiet:
    """Hush transformers' load report: what it says of missing and unused weights is in ``Loaded``."""

    def __enter__(self) -> None:
        self._verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        logging.set_verbosity(self._verbosity)
