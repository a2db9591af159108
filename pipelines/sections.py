"""Every setting of a run and its default, and which of them do not go together.

Names follow TrainingArguments and PEFT's LoraConfig wherever those have one. No torch is imported.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from attention import is_exact
from attention.options import Plan
from tasks.options import Options, Settings

TRANSFER = "attention.transfer"


class Section(Settings):
    """A part of the configuration with a name of its own."""


class ModelSection(Section):
    """Which pretrained model, and how much text it sees."""

    name: str | None = None
    """A folder, an asset (``assets/...``) or a Hub id."""
    revision: str | None = None
    max_length: int = Field(default=128, ge=8)
    """Tokens in one window, special tokens included. More than the model has positions for: see ``positions``."""
    positions: Literal["auto", "tile", "interpolate", "yarn", "linear", "refuse"] = "auto"
    """How a pretrained model gets more of them: ``tile`` and ``interpolate`` are for tables, ``yarn`` and ``linear``
    for rotary ones; auto takes the first that is for the model. See docs/attention.md."""
    init: Literal["pretrained", "new_head", "encoder_decoder", "scratch"] = "pretrained"
    """``new_head`` starts a fresh head; ``pretrained`` keeps the checkpoint's and refuses one for other labels;
    ``encoder_decoder`` makes one of an encoder used twice, with new cross-attention and a new head;
    ``scratch`` draws every weight at random and takes only the tokenizer from elsewhere."""
    tokenizer: str | None = None
    """A folder or Hub id with another tokenizer than that of ``name``."""
    architecture: dict[str, Any] = Field(default={})
    """With ``scratch``: ``model_type`` and arguments of its configuration class in transformers."""
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    """Hold the linear layers of the blocks, which LoRA freezes, in 4 bits (QLoRA). Names as in BitsAndBytesConfig."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    """Hold the scales of the 4 bits in 8 bits."""

    @field_validator("architecture")
    @classmethod
    def _exponents_are_numbers(cls, values: dict[str, Any]) -> dict[str, Any]:
        """YAML 1.1 reads ``1e-6`` as text."""
        exponent = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
        return {k: float(v) if isinstance(v, str) and exponent.fullmatch(v) else v for k, v in values.items()}

    @field_validator("positions", mode="before")
    @classmethod
    def _no_dynamic(cls, value: Any) -> Any:
        if value == "dynamic":
            raise ValueError(
                "not built, since its frequencies follow the longest text so far: an update would depend on how "
                "examples are put into batches, and an answer on what came before it. Take yarn or linear"
            )
        return value

    @model_validator(mode="after")
    def _four_bits_are_asked_for(self) -> ModelSection:
        kind, double = self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant
        if not self.load_in_4bit and (kind, double) != ("nf4", False):
            raise ValueError("model.bnb_4bit_* has no effect without model.load_in_4bit=true")
        return self

    @model_validator(mode="after")
    def _says_what_to_start_from(self) -> ModelSection:
        if self.init != "scratch":
            if self.name is None:
                raise ValueError("model.name is required and not given, unless model.init=scratch")
            if self.init == "encoder_decoder" and self.tokenizer is not None:
                raise ValueError(
                    "model.init=encoder_decoder keeps the tokenizer of model.name: leave out model.tokenizer"
                )
            if self.architecture:
                raise ValueError(
                    f"model.architecture has no effect with model.init={self.init}: say model.init=scratch"
                )
        elif self.positions not in ("auto", "refuse"):
            raise ValueError(
                f"model.positions={self.positions} has no effect with model.init=scratch: "
                "say how many there are in model.architecture"
            )
        elif "model_type" not in self.architecture:
            raise ValueError("model.init=scratch needs model.architecture.model_type, e.g. bert or t5")
        elif (self.name is None) == (self.tokenizer is None):
            raise ValueError(
                "model.init=scratch takes its tokenizer from model.tokenizer or model.name: give one of them"
            )
        return self


class DataSection(Section):
    """Where the rows are. Each split is a file, a folder or ``hub-id:split``."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    columns: dict[str, str] = Field(default={})
    """Maps a task's column to the user's, e.g. ``data.columns.text=review``."""
    max_train_samples: int | None = Field(default=None, ge=1)
    max_eval_samples: int | None = Field(default=None, ge=1)
    streaming: bool = False
    """Read train a block at a time, for data too large to hold; see docs/data.md."""
    buffer_size: int = Field(default=10_000, ge=1)
    """Rows of a stream that are read, checked and shuffled together."""
    stride: int = Field(default=32, ge=0)
    """Tokens that neighbouring windows of a long document share."""
    delimiter: str | None = Field(default=None, min_length=1)
    """Between the cells of a csv or tsv file; null is a comma, or a tab."""
    encoding: str = "utf-8"
    quotes: bool = True
    """Whether ``"`` encloses cells."""
    label_separator: str | None = Field(default=None, min_length=1)
    """Splits one cell into several labels, e.g. ``|``."""
    max_leak_fraction: float | None = Field(default=None, ge=0, le=1)
    """The run stops when more of the validation or test rows than this stand in train too."""
    max_duplicate_fraction: float | None = Field(default=None, ge=0, le=1)
    max_conflict_fraction: float | None = Field(default=None, ge=0, le=1)
    max_lost_fraction: float | None = Field(default=None, ge=0, le=1)
    """The run stops when more of the tokens or answers than this are cut off."""

    @model_validator(mode="after")
    def _streams_are_read_in_turn(self) -> DataSection:
        if self.streaming and self.max_train_samples is not None:
            raise ValueError("max_train_samples draws from all rows, which streaming never sees: use train.max_steps")
        if not self.streaming and self.buffer_size != type(self).model_fields["buffer_size"].default:
            raise ValueError("buffer_size has no effect without data.streaming=true")
        return self


class TrainSection(Section):
    """How it is learned."""

    batch_size: int = Field(default=32, ge=1)
    """Examples per optimizer step, over all ranks and micro-batches."""
    per_device_train_batch_size: int | None = Field(default=None, ge=1)
    """Largest micro-batch; null lets the lengths decide. It never changes the update."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    """Micro-batches per rank and step; null lets the lengths decide. It never changes the update."""
    per_device_eval_batch_size: int = Field(default=64, ge=1)
    num_train_epochs: float = Field(default=3.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Overrides ``num_train_epochs``."""
    train_sampling_strategy: Literal["random", "group_by_length", "sequential"] = "random"
    learning_rate: float = Field(default=5e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Never applied to biases and norms."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=True)
    """0 does not clip."""
    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"] = "adamw_torch_fused"
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "linear"
    warmup_steps: float = Field(default=0.0, ge=0)
    """Below 1 a share of all steps, else a number of steps."""
    decay_steps: float | None = Field(default=None, gt=0)
    """Steps of decay at the end of ``warmup_stable_decay``, counted as ``warmup_steps`` are; null is a fifth of all."""
    bf16: bool | Literal["auto"] = "auto"
    """bf16 autocast; ``auto`` uses it where the hardware multiplies bf16 natively."""
    activation_checkpointing: bool = False
    logging_steps: int = Field(default=25, ge=1)
    eval_strategy: Literal["epoch", "steps", "no"] = "epoch"
    eval_steps: int | None = Field(default=None, ge=1)
    eval_on_start: bool = False
    """Score the model before training too, on validation and test, to show what training changed."""
    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept, the newest ones and the best."""
    metric_for_best_model: str | None = None
    """null takes the task's headline metric. Greater is better, but for perplexity and mse."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Evaluations without a better score before the run stops."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    dataloader_num_workers: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _steps_imply_their_strategy(cls, values: Any) -> Any:
        """``train.eval_steps=50`` alone means what it says: evaluate every 50 steps."""
        if isinstance(values, dict):
            values = dict(values)
            for verb in ("eval", "save"):
                if values.get(f"{verb}_steps") is not None:
                    values.setdefault(f"{verb}_strategy", "steps")
                if values.get(f"{verb}_strategy") is False:  # YAML 1.1 reads a bare `no` as false
                    values[f"{verb}_strategy"] = "no"
        return values

    @model_validator(mode="after")
    def _strategies_agree(self) -> TrainSection:
        for verb in ("eval", "save"):
            strategy, steps = getattr(self, f"{verb}_strategy"), getattr(self, f"{verb}_steps")
            if (strategy == "steps") != (steps is not None):
                raise ValueError(f"{verb}_strategy={strategy} does not go with {verb}_steps={steps}")
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs an eval_strategy")
        if self.decay_steps is not None and self.lr_scheduler_type != "warmup_stable_decay":
            raise ValueError(
                f"decay_steps has no effect with lr_scheduler_type={self.lr_scheduler_type}, "
                "only with warmup_stable_decay"
            )
        return self


def _refuse_without(section: Section, switch: str, name: str) -> None:
    """Refuse settings of a section that is not switched on."""
    # By value, not by model_fields_set: a resolved configuration writes every default out.
    fields = type(section).model_fields
    changed = sorted(n for n, field in fields.items() if getattr(section, n) != field.default)
    if getattr(section, switch) is None and changed:
        raise ValueError(f"{name}.{switch} is not set, so {changed} would have no effect")


class LoraSection(Section):
    """LoRA (Hu et al., 2021), on when ``r`` is given. Names as in PEFT's LoraConfig."""

    r: int | None = Field(default=None, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    """null is 2 x r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | None = None
    """null finds the linear layers inside the encoder or decoder blocks."""
    use_dora: bool = False
    use_rslora: bool = False

    @model_validator(mode="after")
    def _settings_need_r(self) -> LoraSection:
        _refuse_without(self, "r", "lora")
        return self


class TransferSection(Section):
    """Recovery of what other attention costs, before the task is learned; on when ``steps`` is given. See
    ``training.transfer``."""

    steps: int | None = Field(default=None, ge=1)
    """Updates in each stage."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Of what the variants bring; what else is trained learns at ``train.learning_rate``."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per update, over all ranks and micro-batches."""
    stages: Literal["both", "layers", "outputs"] = "both"
    """``layers`` trains what the variants bring, place by place; ``outputs`` their attention modules, by the model's
    last hidden states."""

    @model_validator(mode="after")
    def _settings_need_steps(self) -> TransferSection:
        _refuse_without(self, "steps", "attention.transfer")
        return self


class TrackingSection(Section):
    """Where the figures go beside history.jsonl; see docs/tracking.md."""

    wandb: Literal["off", "offline", "online"] = "off"
    tensorboard: bool = False
    trackio: bool = False
    project: str = "heedful"
    """What wandb and trackio put the run under; there it has the name of its folder."""

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, values: Any) -> Any:
        """YAML 1.1 reads a bare ``off`` as false."""
        if isinstance(values, dict) and values.get("wandb") is False:
            values = {**values, "wandb": "off"}
        return values

    @property
    def trackers(self) -> dict[str, str]:
        """What is switched on, and how."""
        modes: dict[str, str] = {
            "wandb": self.wandb,
            "tensorboard": "offline" if self.tensorboard else "off",
            "trackio": "offline" if self.trackio else "off",
        }
        return {name: mode for name, mode in modes.items() if mode != "off"}


class RunConfig(Section):
    """One run, whole."""

    task: str
    output_dir: str
    resume: str = "none"
    """auto | none | PATH of a checkpoint."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    model: ModelSection
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    lora: LoraSection = LoraSection()
    attention: Plan | None = None
    """Which variant goes where; null leaves it as the checkpoint has it: full, but where it was saved with a plan."""
    transfer: TransferSection = Field(default=TransferSection(), validation_alias=TRANSFER)
    """Stands beside the plan in ``attention``, which is stored with the model and does not hold it."""
    distributed: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share the work: each with the whole model, or each with a part of it; see
    ``training.sharding``."""
    tracking: TrackingSection = TrackingSection()
    options: SerializeAsAny[Options]
    """The task's own settings; in YAML this section carries the task's name."""

    @model_validator(mode="before")
    @classmethod
    def _transfer_stands_in_attention(cls, values: Any) -> Any:
        attention = values.get("attention") if isinstance(values, dict) else None
        if not isinstance(attention, dict) or "transfer" not in attention:
            return values
        plan = {key: value for key, value in attention.items() if key != "transfer"}
        return {**values, "attention": plan or None, TRANSFER: attention["transfer"] or {}}

    @field_validator("distributed", mode="before")
    @classmethod
    def _no_deepspeed(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("deepspeed"):
            raise ValueError(
                "not built, since DeepSpeed's engine counts micro-batches, clips and steps by itself. "
                "distributed=fsdp2 shards all that ZeRO-3 does"
            )
        return value

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it would stand in YAML, every default written out."""
        values = self.model_dump(mode="json")
        values[self.task], transfer = values.pop("options"), values.pop("transfer")
        if self.attention is not None:
            values["attention"] |= {"transfer": transfer}
        return values


def contradictions(config: RunConfig) -> list[str]:
    """What of one section does not go with what another says, a line each."""
    faults = []
    if config.model.init in ("scratch", "encoder_decoder") and config.lora.r is not None:
        faults.append(
            f"lora.r: LoRA would freeze weights that model.init={config.model.init} draws at random: leave one out"
        )
    if config.distributed == "fsdp2" and config.train.optim == "adafactor":
        faults.append(
            "train.optim='adafactor': its means over rows and columns need whole matrices, which distributed=fsdp2 "
            "cuts up: use adamw_torch_fused"
        )
    return faults + _faults_of_four_bits(config) + _faults_of_streaming(config) + _faults_of_transfer(config)


def _faults_of_four_bits(config: RunConfig) -> list[str]:
    """Weights in 4 bits can not be trained, only what is beside them."""
    model, name = config.model, "model.load_in_4bit"
    if not model.load_in_4bit:
        return []
    if model.init in ("scratch", "encoder_decoder"):
        return [f"{name}: weights in 4 bits are not trained, and model.init={model.init} draws new ones: leave it out"]
    faults = []
    if config.lora.r is None:
        faults.append(f"{name}: weights in 4 bits are not trained: say what is, lora.r=16")
    if config.distributed == "fsdp2":
        faults.append(f"{name}: distributed=fsdp2 cuts weights into rows, which packed ones do not have: use ddp")
    return faults


def _faults_of_streaming(config: RunConfig) -> list[str]:
    """A stream's end is not known, so nothing can be counted from it."""
    train = config.train
    if not config.data.streaming:
        return []
    lacking = [f"train.{verb}_steps=N" for verb in ("eval", "save") if getattr(train, f"{verb}_strategy") == "epoch"]
    never = ", or train.eval_strategy=no train.save_strategy=no" if lacking else ""
    lacking += ["train.max_steps=N"] if train.max_steps is None else []
    return [f"data.streaming: a stream's length is not known: say {' '.join(lacking)}{never}"] if lacking else []


def _faults_of_transfer(config: RunConfig) -> list[str]:
    """It needs something to learn, and something to learn it from."""
    if config.transfer.steps is None:
        return []
    if config.attention is None:
        return [f"{TRANSFER}: no attention is named that could learn: say attention=linformer, or another"]
    if is_exact(config.attention):
        return [f"{TRANSFER}: nothing to transfer, since this attention gives what full attention gives"]
    if config.model.init == "scratch":
        return [f"{TRANSFER}: a model with model.init=scratch has learned nothing that could be transferred"]
    return []
