"""What a model says of itself before its weights are read: its configuration, and the ids of its tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from heedful import UserError
from sources.texts import first_line
from tasks.saved import model_of_run

MODEL_FOLDER = "a Hugging Face folder with config.json, or a Hub id"


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **changed: Any
) -> PreTrainedConfig:
    """Load a model's configuration.

    Args:
        changed: What it shall say otherwise.

    Raises:
        UserError: No such folder or model.
    """
    refuse_absent(name, expected=MODEL_FOLDER)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, **changed)
    except Exception as error:  # of a broken file, whatever Python or transformers makes of it
        raise UserError(
            f"no model configuration could be loaded: {first_line(error)}",
            where=name,
            expected=MODEL_FOLDER,
            fix=model_of_run(Path(name)),
        ) from error


def refuse_absent(name: str, *, expected: str) -> None:
    """What looks like a path and is none must not be asked for on the Hub.

    Raises:
        UserError: There is no such folder.
    """
    if name.startswith((".", "/", "~", "assets/", "runs/")) and not os.path.isdir(name):
        raise UserError("no such model folder", where=name, expected=expected)


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


class quiet:
    """Hush transformers' load report: what it says of missing and unused weights is in ``Loaded``."""

    def __enter__(self) -> None:
        self._verbosity = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *exc: object) -> None:
        logging.set_verbosity(self._verbosity)
