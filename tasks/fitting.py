"""Which kinds of model a task is for, said before anything is read or encoded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from heedful import UserError
from tasks import TASKS, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

EXAMPLES = ("bert", "roberta", "deberta-v2", "modernbert", "gpt2", "llama", "mistral", "qwen3", "t5", "bart")
"""Kinds of checkpoint that messages name where they would do."""

logger = logging.getLogger("heedful.tasks.fitting")


def kind_of(config: PreTrainedConfig) -> Kind | None:
    """What kind of model a configuration is for; None for what transformers itself does not know, or not as text."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    # BERT and its like have a causal head too, and look ahead all the same unless `is_decoder` says otherwise; XLNet
    # has no masked one, and says in `attn_type` that it looks both ways.
    if getattr(config, "attn_type", None) == "bi" or (masked and not getattr(config, "is_decoder", False)):
        return "encoder"
    return "decoder" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None


def misfit(task: str, config: PreTrainedConfig) -> str:
    """Why a task can not be trained on such a model; empty if it can, as far as its configuration tells."""
    kind, entry = kind_of(config), TASKS[task]
    if kind is None:
        return ""
    if kind not in entry.kinds:
        return f"{task} is not for {kind}s"
    head = entry.load().auto_class
    # A task that takes another class for each kind takes its language modelling head, which each kind has.
    if isinstance(head, type) and type(config) not in head._model_mapping:  # type: ignore[attr-defined]
        return f"transformers has no {head.__name__.removeprefix('Auto')} for {config.model_type}"
    return ""


def check_fit(task: str, config: PreTrainedConfig, *, where: str) -> None:
    """Refuse a model that the task is not for.

    Raises:
        UserError: Naming models that the task is for, and tasks that the model is for.
    """
    if not (reason := misfit(task, config)):
        return
    models = [model_type for model_type in EXAMPLES if not misfit(task, CONFIG_MAPPING[model_type]())]
    tasks = [other for other in TASKS if not misfit(other, config)]
    raise UserError(
        f"{config.model_type} is {_article(str(kind_of(config)))}: {reason}",
        where=where,
        expected=f"a model such as {', '.join(models)}",
        fix=f"take such a model, or a task that {config.model_type} is for: {', '.join(tasks)}",
    )


def pad_as(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Pad on the right whatever is for a decoder, as its tasks expect; answers are generated behind prompts anyway.

    Padded on the left GPT-2 would count the positions from the padding, and ``qa`` would put the question behind the
    context, where no token of the context sees it.
    """
    if kind_of(config) == "decoder" and tokenizer.padding_side != "right":
        logger.info("the tokenizer pads on the %s; here it pads on the right", tokenizer.padding_side)
        tokenizer.padding_side = "right"


def require_fast(tokenizer: PreTrainedTokenizerBase, *, fix: str = "use a checkpoint with a tokenizer.json") -> None:
    """Refuse a tokenizer that does not tell where in the text its tokens are, as Marian's and ByT5's.

    Raises:
        UserError: It is a slow one.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__}, a slow tokenizer, which does not tell where in the text its tokens are",
            where="the model's tokenizer",
            expected="a fast tokenizer",
            fix=fix,
        )


def _article(kind: str) -> str:
    return f"{'an' if kind.startswith('e') else 'a'} {kind}"
