"""Each part of a run, built from its settings. Configuration stops here: what is built takes plain values."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any, cast

import datasets
from accelerate import Accelerator
from accelerate.utils import set_seed
from pyarrow import compute
from torch import nn
from transformers import PreTrainedModel

from attention.describing import describe, describe_plan
from attention.options import ROLES, Role
from attention.seam import refuse_longer_texts, stored_plan
from attention.sharing import connect, ring_size
from heedful import UserError
from pipelines.sections import ModelSection, RunConfig
from sources.audit import Limits
from sources.texts import counted
from tasks import TASKS
from tasks.fitting import check_fit, pad_as
from tasks.positions import check_lengths, max_positions
from tasks.protocol import Task
from training.batches import Batching
from training.configurations import load_config
from training.dropout import use_fast_dropout
from training.embeddings import LEAVES_UNUSED_ROWS, UsedRows, train_used_rows
from training.loop import Schedule, Trainee
from training.lora import add_lora
from training.models import Loaded, load_model, pretrained_hash, swap_attention
from training.optimizer import build_optimizer, build_scheduler, parameter_groups
from training.positions import Wanted
from training.quantization import FourBits, elements, in_four_bits, quantize
from training.scratch import ARCHITECTURE, new_config, new_model
from training.sharding import is_sharded, shard
from training.tokenizers import compare_vocabularies, load_tokenizer
from training.warm_start import join_encoders, joined_config

logger = logging.getLogger("heedful.pipelines.building")

CPU_PASSES = {"overhead": 128, "micro_batch_tokens": 2**11}
"""What one more forward and backward pass costs, in tokens, and how many a pass may have; see ``Batching``."""
ACCELERATOR_PASSES = {"overhead": 8192, "micro_batch_tokens": 2**16}
"""The same on a GPU, which a few hundred tokens leave idle."""


def build_task(config: RunConfig, rows: datasets.Dataset) -> Task:
    """The task, with the labels that its training rows hold and the model's own tokenizer."""
    kind, model = TASKS[config.task].load(), config.model
    tokenizer = load_tokenizer(
        str(model.tokenizer or model.name),
        own=model.init != "scratch" and model.tokenizer is None,
        revision=None if model.tokenizer else model.revision,
        trust_remote_code=model.trust_remote_code,
        **kind.tokenizer_kwargs,
    )
    model_config = load_model_config(config, tokenizer)
    check_fit(config.task, model_config, where=_named(model))
    pad_as(tokenizer, model_config)
    return kind.build(
        tokenizer,
        rows,
        model_config=model_config,
        max_length=model.max_length,
        stride=config.data.stride,
        options=config.options,
    )


def load_model_config(config: RunConfig, tokenizer: Any) -> Any:
    """The configuration that the model will have, with which a wrong setting is found before the data is encoded."""
    model = config.model
    if model.init == "scratch":
        return new_config(model.architecture, tokenizer)
    if model.init == "encoder_decoder":
        return joined_config(str(model.name), tokenizer, **_where(config))
    return load_own_config(config)


def load_own_config(config: RunConfig) -> Any:
    """The configuration of ``model.name``, as it was saved."""
    return load_config(str(config.model.name), **_where(config))


def _named(model: ModelSection) -> str:
    return ARCHITECTURE if model.init == "scratch" else f"model.name: {model.name}"


def audit_limits(config: RunConfig) -> Limits:
    """The thresholds that stop a run."""
    data = config.data
    return Limits(
        max_leak_fraction=data.max_leak_fraction,
        max_duplicate_fraction=data.max_duplicate_fraction,
        max_conflict_fraction=data.max_conflict_fraction,
        max_lost_fraction=data.max_lost_fraction,
    )


def load_base(config: RunConfig, task: Task) -> Loaded:
    """The model with the task's head; the seed is set anew, so that what is random depends on nothing else."""
    set_seed(config.seed)
    if config.model.init == "scratch":
        loaded = new_model(task.auto_class, config.model.architecture, task.tokenizer, **task.model_kwargs())
        loaded = swap_attention(loaded, config.attention)
    elif config.model.init == "encoder_decoder":
        halves = {"positions": _wanted(config, task), **_where(config)}
        loaded = swap_attention(join_encoders(str(config.model.name), task.tokenizer, **halves), config.attention)
    else:
        loaded = load_model(task.auto_class, **base_of(config, task), **task.model_kwargs())
    loaded = replace(loaded, sha256=pretrained_hash(loaded))  # 4 bits are other numbers
    if (four_bits := four_bits_of(config)) is not None:
        quantize(loaded.model, loaded.new, four_bits)
    if loaded.growth is None and config.model.positions not in ("auto", "refuse"):
        raise UserError(
            f"model.positions={config.model.positions} has no effect: this model has the positions that are wanted",
            fix="leave it out, or say a longer model.max_length",
        )
    check_lengths(loaded.model, task.sequences())
    refuse_longer_texts(loaded.model, _longest(task, loaded.model))
    _raise_tokenizer(task, loaded, config.model.max_length)
    task.prepare_model(loaded.model)
    return loaded


def _raise_tokenizer(task: Task, loaded: Loaded, max_length: int) -> None:
    """Let the limit that is saved with the tokenizer, at which pipelines cut texts off, follow the model's."""
    said = task.tokenizer.model_max_length
    if loaded.growth is None and (said >= max_length or max_positions(loaded.model) is not None):
        return
    if loaded.growth is None:
        logger.info("positions: relative, without an end; the tokenizer's model_max_length was %s", f"{said:,}")
    task.tokenizer.model_max_length = max(said, max_length)


def describe_tokenizer(config: RunConfig, task: Task) -> list[str]:
    """How another tokenizer than the pretrained model's own differs from it."""
    model = config.model
    if model.init == "scratch" or model.tokenizer is None:
        return []
    try:
        own = load_tokenizer(str(model.name), revision=model.revision, trust_remote_code=model.trust_remote_code)
    except UserError:
        return [f"{model.name} has no tokenizer of its own to compare {model.tokenizer} with"]
    return [compare_vocabularies(task.tokenizer, own)]


def base_of(config: RunConfig, task: Task) -> dict[str, Any]:
    """Arguments of ``load_model`` for the run's starting point."""
    model = config.model
    return {
        "name": model.name,
        **_where(config),
        "new_head": model.init == "new_head",
        "tokenizer": task.tokenizer if model.tokenizer else None,
        "attention": config.attention,
        "positions": _wanted(config, task),
    }


def four_bits_of(config: RunConfig) -> FourBits | None:
    """How frozen weights are held; None is fp32."""
    model = config.model
    return FourBits(model.bnb_4bit_quant_type, model.bnb_4bit_use_double_quant) if model.load_in_4bit else None


def _wanted(config: RunConfig, task: Task) -> Wanted | None:
    """The positions that the run needs; None where a model with too few is to be refused."""
    if config.model.positions == "refuse":
        return None
    return Wanted(config.model.max_length, max(_lengths(task)), config.model.positions)


def _lengths(task: Task) -> list[int]:
    """Tokens of each of the longest sequences that the settings allow."""
    return [sum(tokens.values()) for tokens in task.sequences()]


def _longest(task: Task, model: PreTrainedModel) -> dict[Role, int]:
    """Most tokens that each kind of attention meets by the settings."""
    source, *targets = lengths = _lengths(task)
    if not model.config.is_encoder_decoder:
        return dict.fromkeys(ROLES, max(lengths))
    decoded = max(targets, default=source)  # a classifier's decoder reads the source again
    return {"encoder.self": source, "decoder.self": decoded, "cross": source}


def _where(config: RunConfig) -> dict[str, Any]:
    return {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}


def adapt(config: RunConfig, task: Task, loaded: Loaded, features: datasets.Dataset) -> nn.Module:
    """The model as it will be trained: whole, or frozen with an adapter."""
    use_fast_dropout(loaded.model)
    if config.train.activation_checkpointing:
        loaded.model.activation_checkpointing_enable({"use_reentrant": False})
    if config.lora.r is None:
        # Its table of all rows would stand whole on each process, sharded or not; a stream's later words are not known.
        plain = config.distributed == "ddp" and config.train.weight_decay == 0 and not config.data.streaming
        if plain and config.train.optim in LEAVES_UNUSED_ROWS:
            train_used_rows(loaded.model, features, padding=task.tokenizer.pad_token_id or 0)
        return cast(nn.Module, loaded.model)
    return cast(nn.Module, add_lora(loaded.model, loaded.new, **config.lora.model_dump()))


def describe_precision(config: RunConfig, accelerator: Accelerator) -> list[str]:
    """Say what is computed in, where it is not fp32, and where the saved model is scored otherwise for it."""
    if accelerator.mixed_precision == "no":
        return []
    lines = [f"computed in {accelerator.mixed_precision}; train.bf16=false computes in fp32"]
    if config.model.load_in_4bit:
        lines.append("scored in 4 bits with the adapter beside them: merged, as in model/, bf16 rounds otherwise")
    return lines


def describe_model(config: RunConfig, task: Task, loaded: Loaded, model: nn.Module, features: datasets.Dataset) -> str:
    """What is trained, what starts at random, what of the checkpoint is not used, where other attention is."""
    words = loaded.model.get_input_embeddings()
    unused = words.table_VD.numel() - words.weight.numel() if isinstance(words, UsedRows) else 0
    total = elements(model.parameters()) + unused
    held = elements(p for p in model.parameters() if in_four_bits(p))
    trained = elements(p for p in model.parameters() if p.requires_grad)
    four_bits = f"{held:,} in 4 bits, " if held else ""
    lines = [f"model: {type(loaded.model).__name__}, {total:,} parameters, {four_bits}{trained:,} trained"]
    if isinstance(words, UsedRows):
        lines.append(f"word embeddings: the {len(words.used_U):,} of {len(words.slot_V):,} rows that occur are trained")
    if len(loaded.new) == len(list(loaded.model.parameters())):
        ids = {n: i for n, i in sorted(loaded.model.config.to_dict().items()) if n.endswith("_token_id")}
        lines.append("from scratch: every weight starts at random")
        lines.append(f"of the tokenizer: vocab_size {loaded.model.config.vocab_size:,}, {_listed_ids(ids)}")
    elif loaded.new:
        lines.append(f"new, not in the checkpoint: {', '.join(_across_layers(loaded.new))}")
    if loaded.unused:
        lines.append(f"in the checkpoint, not used: {', '.join(_across_layers(loaded.unused))}")
    if loaded.growth is not None:
        lines.append(loaded.growth.describe())
    if loaded.replaced is not None:
        lines.append(f"attention: {describe_plan(loaded.replaced)} of the checkpoint was taken out")
    if stored_plan(loaded.model) is None:
        return "\n".join(lines)
    longest = _longest(task, loaded.model)
    if not config.data.streaming:  # of a stream longer ones may yet come
        longest = {role: min(tokens, _longest_text(features)) for role, tokens in longest.items()}
    return "\n".join([*lines, *describe(loaded.model, longest)])


def _longest_text(features: datasets.Dataset) -> int:
    """In tokens; positions are counted in each text of a row that holds several."""
    if "position_ids" not in features.column_names:
        return int(compute.max(features.data.column("length")).as_py())
    return 1 + int(compute.max(compute.list_flatten(features.data.column("position_ids"))).as_py())


def _across_layers(names: Sequence[str]) -> list[str]:
    """Names of parameters, with one entry for all layers that have the same: ``layer.[0-5].bias``."""
    layers: dict[str, list[int]] = {}
    for name in names:
        pattern, found = re.sub(r"\.\d+\.", ".{}.", name, count=1), re.search(r"\.(\d+)\.", name)
        layers.setdefault(pattern, []).extend([int(found[1])] if found else [])
    return [pattern.replace("{}", _numbers(sorted(of))) for pattern, of in layers.items()]


def _numbers(layers: Sequence[int]) -> str:
    if len(layers) < 2:
        return "".join(map(str, layers))
    together = layers[-1] - layers[0] == len(layers) - 1
    return f"[{layers[0]}-{layers[-1]}]" if together else f"[{','.join(map(str, layers))}]"


def _listed_ids(ids: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in ids.items() if value is not None)


def distribute(config: RunConfig, model: nn.Module, accelerator: Accelerator) -> list[str]:
    """Share out texts, and shard the model where that is asked for; say so. It must come before the optimizer.

    Raises:
        UserError: As ``attention.sharing.connect``; or the micro-batches do not fit the rings.
    """
    said = connect(model)
    _check_micro_batches(config, accelerator.num_processes // ring_size(model))
    if config.distributed == "ddp":
        return said
    if accelerator.num_processes == 1:
        return [*said, "distributed=fsdp2: one process shares with none, and trains as ever"]
    return [*said, shard(model, accelerator)]


def build_batching(config: RunConfig, accelerator: Accelerator) -> Batching:
    """How features become updates.

    Raises:
        UserError: Micro-batch, accumulation and processes do not multiply to the batch size.
    """
    train, processes = config.train, accelerator.num_processes
    if config.attention is not None:
        _check_micro_batches(config, config.attention.data_parallel_size(processes))
    elif processes == 1:  # several may make rings, which a checkpoint's own plan says: see ``distribute``
        _check_micro_batches(config, 1)
    return Batching(
        batch_size=train.batch_size,
        seed=config.seed,
        strategy=train.train_sampling_strategy,
        micro_batch_size=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        num_workers=train.dataloader_num_workers,
        **(CPU_PASSES if accelerator.device.type == "cpu" else ACCELERATOR_PASSES),
    )


def _check_micro_batches(config: RunConfig, replicas: int) -> None:
    """Of processes, or of rings of them."""
    train = config.train
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if micro and accumulation and micro * accumulation * replicas != train.batch_size:
        raise UserError(
            f"{micro} x {accumulation} x {counted(replicas, 'processes')} with examples of their own = "
            f"{counted(micro * accumulation * replicas, 'examples')} a step",
            where="train.per_device_train_batch_size, train.gradient_accumulation_steps",
            expected=f"train.batch_size={train.batch_size}, which is decided first",
            fix="leave one of the two out: it follows from the others",
        )


def build_schedule(config: RunConfig, task: Task, steps_per_epoch: int, *, validated: bool) -> Schedule:
    """What happens when; without validation rows nothing is evaluated and the last model is the result."""
    train = config.train
    every = {"epoch": steps_per_epoch, "no": None}
    return Schedule(
        total_steps=train.max_steps or ceil(train.num_train_epochs * steps_per_epoch),
        headline=train.metric_for_best_model or task.headline,
        eval_every=every.get(train.eval_strategy, train.eval_steps) if validated else None,
        save_every=every.get(train.save_strategy, train.save_steps),
        keep=train.save_total_limit,
        patience=train.early_stopping_patience,
        threshold=train.early_stopping_threshold,
    )


def build_trainee(
    config: RunConfig, task: Task, model: nn.Module, accelerator: Accelerator, *, total_steps: int
) -> Trainee:
    """Optimizer and schedule; accelerate prepares all but the schedule, which it would step once a rank."""
    train = config.train
    optimizer = build_optimizer(
        train.optim,
        parameter_groups(model.named_parameters(), weight_decay=train.weight_decay),
        learning_rate=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
    )
    scheduler = build_scheduler(
        train.lr_scheduler_type,
        optimizer,
        warmup_steps=train.warmup_steps,
        num_training_steps=total_steps,
        decay_steps=0.2 if train.decay_steps is None else train.decay_steps,
    )
    model = accelerator.prepare_model(model, evaluation_mode=is_sharded(model))  # which wraps in autocast alone
    prepared = accelerator.prepare_optimizer(optimizer)
    return Trainee(accelerator, task, model, prepared, scheduler, train.max_grad_norm, config.seed)
