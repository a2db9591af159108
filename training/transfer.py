"""What was put in the place of full attention learns to give what that gave, before a task is learned.

Stage ``layers`` is the attention transfer of LoLCATs (Zhang et al., arXiv 2410.10254): each variant is shown the
queries, keys and values that the unswapped model has at its place, and its parameters alone are trained towards the
output there. Stage ``outputs`` runs the swapped model whole, and trains the attention modules that hold variants
towards the unswapped model's last hidden states, as TinyBERT's are (Jiao et al., arXiv 1909.10351, section 3.1).

The teacher is the same model with ``attention.seam.as_full``. What stage ``outputs`` changes it keeps a copy of, and of
nothing else. With LoRA the adapters are what is changed: no weight moves that training itself would leave frozen, and
its checkpoints out.

Both run in eval mode. Dropout would ask of a variant what no setting of it can give, the teacher's answer under another
mask, and the update would no longer be the same on any number of processes.

Shapes: B examples, T tokens, H heads, N queries, D head size, W values a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from attention import VARIANTS
from attention.options import Role
from attention.seam import CHILD, as_full, choose, find_sites, recorded, stored_plan
from attention.variant import Site
from heedful import NonFiniteLossError, UserError
from tasks import causal
from tasks.batching import IGNORED, model_inputs
from tasks.evaluating import in_eval_mode
from tasks.protocol import Batch, Task
from training.batches import Batching, epochs, examples, micro_batches, rank_share
from training.evaluation import Tick
from training.loop import Trainee, run_update, updates
from training.optimizer import build_optimizer, build_scheduler

Stage = Literal["layers", "outputs"]
BEFORE = "before"
ROUNDING = 1e-4
"""Relative error up to which a variant gives what full attention gives: Adam would make large steps of what is left."""

logger = logging.getLogger("heedful.training.transfer")


@dataclass(frozen=True)
class Course:
    """How much is learned.

    Args:
        stages: In their order.
        steps: Updates in each.
        learning_rate: Of what the variants brought, by AdamW; it falls to 0 by the end of each stage.
        base_learning_rate: The same of all else.
        batching: How features become updates.
    """

    stages: tuple[Stage, ...]
    steps: int
    learning_rate: float
    base_learning_rate: float
    batching: Batching


@dataclass(frozen=True)
class Agreement:
    """How near the swapped model is to the unswapped one, over real tokens.

    Args:
        cosine: Of the last hidden states, the mean; of each half of a model.
        error: Of what the attention at each place gives, in a run of the model as a whole: the norm of the difference
            over the norm of what full attention gives.
    """

    cosine: dict[str, float]
    error: dict[str, float]


def transfer(
    model: PreTrainedModel,
    task: Task,
    features: Any,
    held_out: Any,
    *,
    accelerator: Accelerator,
    course: Course,
    tick: Callable[[str], Tick],
) -> dict[str, Agreement]:
    """Train what stands in the place of full attention, in place.

    Args:
        model: With a plan's variants; LoRA's layers are in it or not. Its parameters are trained that require
            gradients, and require them afterwards.
        features: Encoded rows to learn from.
        held_out: Encoded rows, with targets, that the agreement is measured on.
        tick: For a stage what is told of its progress.

    Returns:
        The agreement before, and after each stage that had something to learn. Alone that before, where there is
        nothing to transfer: the variants give what full attention gives.

    Raises:
        UserError: None of the parameters that the stages would train is trained in this run.
        NonFiniteLossError: A loss became NaN or infinite.
    """
    pupil = _pupil(model.to(accelerator.device))
    stages = _with_something_to_learn(pupil, course.stages)
    found = {BEFORE: agreement(pupil, task, held_out, accelerator, course.batching)}
    if (worst := max(found[BEFORE].error.values())) < ROUNDING:
        logger.info("nothing to transfer: on the held-out rows it gives what full attention gives, within %.1e", worst)
        return found
    for stage in stages:
        if stage == "outputs":
            own = set(pupil.attention) - set(pupil.learned)
            pupil = replace(pupil, start={name: model.get_parameter(name).detach().clone() for name in own})
        _learn(stage, pupil, task, features, accelerator, course, tick(stage))
        accelerator.free_memory()  # which else keeps the optimizer, and a wrapper with room for all gradients
        found[stage] = agreement(pupil, task, held_out, accelerator, course.batching)
    return found


@torch.no_grad()
def agreement(pupil: Pupil, task: Task, features: Any, accelerator: Accelerator, batching: Batching) -> Agreement:
    """Measure it on every feature, in fp32, shared among the ranks; the same result on every rank."""
    names = [*pupil.halves, *map(str, pupil.places)]
    sums_N2 = torch.zeros(len(names), 2, dtype=torch.float64, device=accelerator.device)
    lengths = np.asarray(features["length"])
    whole = np.arange(len(lengths))
    share = rank_share(whole, lengths, rank=accelerator.process_index, world_size=accelerator.num_processes)
    with in_eval_mode(pupil.model):
        for part in micro_batches(share, lengths, batching) if len(share) else []:
            batch = send_to_device(task.collate(examples(features, part)), accelerator.device)
            for name, *pair in _compared(pupil, batch):
                sums_N2[names.index(name)] += torch.stack(pair).double()
    (upper_N, lower_N) = cast(Tensor, accelerator.reduce(sums_N2, "sum")).unbind(-1)
    ratio = dict(zip(names, (upper_N / lower_N.clamp(min=torch.finfo(torch.float64).tiny)).tolist(), strict=True))
    return Agreement(
        {name: ratio[name] for name in pupil.halves}, {str(site): ratio[str(site)] ** 0.5 for site in pupil.places}
    )


@dataclass(frozen=True)
class Pupil:
    """A swapped model, and the teacher in it.

    Args:
        places: Where variants are that do not give what full attention gives.
        learned: Names of the parameters that are trained of these variants.
        attention: Names of those that are trained of the attention modules there, the variants' among them. What
            stands beside a module, as BERT's output layer does, is left as it is.
        halves: What gives last hidden states, in the order in which they run.
        start: Weights by name that the teacher has in the place of the model's.
    """

    model: PreTrainedModel
    places: tuple[Site, ...]
    learned: tuple[str, ...]
    attention: tuple[str, ...]
    halves: dict[str, nn.Module]
    start: dict[str, Tensor] = field(default_factory=dict)

    def layers(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What each variant that learns gives of the teacher's own inputs, what full attention gives of them, BNW each,
        and which queries are real."""
        sites, real = {site.module: site for site in self.places}, real_tokens(batch)
        with torch.no_grad(), as_full(), recorded(self.model) as calls:
            self.states(batch, self.start)
        for call in calls:
            variant = getattr(call.module, CHILD)
            if call.module in sites and any(p.requires_grad for p in variant.parameters()):
                out = variant(call.query, call.key, call.value, call.mask, call.scoring)
                yield _wide(out), _wide(call.output), real[sites[call.module].role]

    def outputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Last hidden states of the model and of its teacher, BTW each, and which tokens are real; of each half."""
        with torch.no_grad(), as_full():
            expected = self.states(batch, self.start)
        return zip(self.states(batch), expected, self.real(batch), strict=True)

    def states(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Last hidden states of each half, BTW; the heads are not run.

        Args:
            weights: In the place of some of the model's.
        """
        states: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            states.append(output[0])
            if len(states) == len(self.halves):
                raise _Enough

        hooks = [half.register_forward_hook(note) for half in self.halves.values()]
        try:
            functional_call(self.model, dict(weights or {}), (), _inputs(self.model, batch))
        except _Enough:
            return states
        finally:
            for hook in hooks:
                hook.remove()
        raise RuntimeError(f"{type(self.model).__name__} ran without {', '.join(self.halves)}")

    def real(self, batch: Batch) -> list[Tensor]:
        """Which tokens of each half are no padding, BT each."""
        return [real_tokens(batch)[role] for role in map(_role_of, self.halves)]


class _Enough(Exception):
    """A forward pass has given what is wanted of it."""


def real_tokens(batch: Batch) -> dict[Role, Tensor]:
    """Which queries of each role are no padding, BN. A decoder whose input the model makes itself of the text has as
    many as that."""
    text_BT = batch["attention_mask"].bool()
    answer_BT = batch["labels"] != IGNORED if "decoder_input_ids" in batch else text_BT
    return {"encoder.self": text_BT, "decoder.self": answer_BT, "cross": answer_BT}


def squared_error(one_BTW: Tensor, other_BTW: Tensor, real_BT: Tensor) -> Tensor:
    """Sum over the real tokens of the mean squared error of each, in fp32."""
    return (one_BTW[real_BT].float() - other_BTW[real_BT].float()).square().mean(-1).sum()


class _Lesson(nn.Module):
    """A stage's summed loss as a forward pass, which data parallelism can wrap. It stays in eval mode."""

    def __init__(self, model: nn.Module, compare: Callable[[Batch], Iterator[tuple[Tensor, Tensor, Tensor]]]) -> None:
        super().__init__()
        self.model, self._compare = model, compare

    def forward(self, batch: Batch) -> Tensor:
        return torch.stack([squared_error(*pair) for pair in self._compare(batch)]).sum()

    def train(self, mode: bool = True) -> _Lesson:
        return super().train(False)


@dataclass(frozen=True)
class _Matching:
    """A task, as far as an update asks for one."""

    pupil: Pupil
    task: Task

    @property
    def collate(self) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """The task's own: a method of this one would take the model along to the processes that load data."""
        return self.task.collate

    def count(self, batch: Batch) -> Tensor:
        """Real tokens."""
        return torch.stack([real_BT.sum() for real_BT in self.pupil.real(batch)]).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(batch)
        return loss


def _pupil(model: PreTrainedModel) -> Pupil:
    plan = stored_plan(model)
    if plan is None:
        raise ValueError("a model without variants")
    sites = find_sites(model)
    places = tuple(site for site in sites if not VARIANTS[choose(plan, site).variant].exact)
    attention = dict.fromkeys(
        f"{site.path}.{name}" for site in places for name, p in site.module.named_parameters() if p.requires_grad
    )
    learned = tuple(name for name in attention if f".{CHILD}." in name)
    return Pupil(model, places, learned, tuple(attention), _halves(model, sites[0].role))


def _halves(model: PreTrainedModel, role: Role) -> dict[str, nn.Module]:
    if model.config.is_encoder_decoder:
        return {"encoder": model.get_encoder(), "decoder": model.get_decoder().base_model}
    return {role.partition(".")[0]: model.base_model}


def _with_something_to_learn(pupil: Pupil, stages: Sequence[Stage]) -> list[Stage]:
    """The stages, without ``layers`` where the variants have no parameters."""
    trained = {"layers": pupil.learned, "outputs": pupil.attention}
    left = [stage for stage in stages if trained[stage]]
    if not left:
        raise UserError(
            f"no parameter that stage {' or '.join(stages)} could train",
            where="attention.transfer",
            expected="a variant with parameters of its own, or attention modules that the run trains",
            fix="leave attention.transfer out, or let lora.target_modules have attention's projections",
        )
    if "layers" in stages and "layers" not in left:
        logger.info("attention.transfer: these variants have no parameters of their own, so stage layers is left out")
    return left


def _learn(
    stage: Stage, pupil: Pupil, task: Task, features: Any, accelerator: Accelerator, course: Course, tick: Tick
) -> None:
    trained, compare = {
        "layers": (pupil.learned, pupil.layers),
        "outputs": (pupil.attention, pupil.outputs),
    }[stage]
    with _training_alone(pupil.model, trained):
        optimizer = build_optimizer(
            "adamw_torch_fused",
            _groups(pupil, trained, course),
            learning_rate=course.learning_rate,
            betas=(0.9, 0.999),
            epsilon=1e-8,
        )
        trainee = Trainee(
            accelerator,
            cast(Task, _Matching(pupil, task)),
            accelerator.prepare_model(_Lesson(pupil.model, compare)),
            accelerator.prepare_optimizer(optimizer),
            build_scheduler("linear", optimizer, warmup_steps=0, num_training_steps=course.steps),
            max_grad_norm=0.0,  # it would join the places, which in stage layers have nothing to do with each other
            seed=course.batching.seed,
        )
        blocks = epochs(features, course.batching, step=0)
        for step, (block, _, micro) in enumerate(
            updates(trainee, blocks, course.batching, start=0, stop=course.steps), start=1
        ):
            _update(stage, trainee, micro, block.features, step=step - 1)
            tick(step, course.steps)


def _groups(pupil: Pupil, trained: Sequence[str], course: Course) -> list[dict[str, Any]]:
    """What the variants brought is far from where it must be, and what is pretrained near: each has its own rate."""
    own, base = set(pupil.learned), course.base_learning_rate
    groups = [
        {"params": [pupil.model.get_parameter(name) for name in trained if name in own], "weight_decay": 0.0},
        {"params": [pupil.model.get_parameter(n) for n in trained if n not in own], "weight_decay": 0.0, "lr": base},
    ]
    return [group for group in groups if group["params"]]


def _update(stage: Stage, trainee: Trainee, micro: list[Batch], features: Any, *, step: int) -> None:
    try:
        run_update(trainee, micro, features, step=step)
    except NonFiniteLossError as error:
        error.where = f"attention.transfer, stage {stage}, {error.where}"
        error.fix = "look at these rows; try a smaller attention.transfer.learning_rate"
        raise


@contextmanager
def _training_alone(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within, these parameters require gradients and no others do."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {model.get_parameter(name) for name in names}
    for parameter in before:
        parameter.requires_grad_(parameter in chosen)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _compared(pupil: Pupil, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each half the sum of the cosines and their number; of each place the squared difference, and the square of
    what full attention gives."""
    with as_full(), recorded(pupil.model) as theirs:
        expected = pupil.states(batch, pupil.start)
    with recorded(pupil.model) as ours:
        states = pupil.states(batch)
    for name, one, other, real_BT in zip(pupil.halves, states, expected, pupil.real(batch), strict=True):
        yield name, cosine_similarity(one[real_BT], other[real_BT], dim=-1).sum(), real_BT.sum()
    sites, real = {site.module: site for site in pupil.places}, real_tokens(batch)
    for call, full in zip(ours, theirs, strict=True):
        if (site := sites.get(call.module)) is not None:
            given, wanted = (_wide(made.output)[real[site.role]].float() for made in (call, full))
            yield str(site), (given - wanted).square().sum(), wanted.square().sum()


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """As the tasks feed a model."""
    inputs = causal.inputs(batch) if "position_ids" in batch else model_inputs(batch)
    return inputs | ({"use_cache": False} if "use_cache" in signature(model.forward).parameters else {})


def _role_of(half: str) -> Role:
    return "encoder.self" if half == "encoder" else "decoder.self"


def _wide(output_BHND: Tensor) -> Tensor:
    """All heads of a token side by side, BNW."""
    return output_BHND.transpose(1, 2).flatten(2)
