"""What a task is. Tasks share functions, not a base class: see ADR 2.

Shapes: B examples in a batch, T tokens. A *row* is what the user gave (a sentence, a question with its context); a
*feature* is what the model sees. A long row becomes several features (windows) that share its ``row`` number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Batch = dict[str, Tensor]
"""Tensors whose first dimension is B."""
Columns = Mapping[str, Sequence[Any]]
"""Rows as columns, the batched form of ``datasets.Dataset.map``; always with the column ``row``."""
Features = dict[str, list[Any]]
"""Encoded rows as columns: ``input_ids``, ``row``, ``length`` and what else ``collate`` needs."""
Rows = Sequence[Mapping[str, Any]]
"""Rows in order; ``rows[i]["row"] == i``. A ``datasets.Dataset`` is one."""
Prediction = Mapping[str, NDArray[Any]]
"""What ``predict`` said of one feature, without the batch dimension."""
Output = dict[str, Any]
"""The answer for one row, ready for JSON."""
LOWER_IS_BETTER = ("perplexity", "mse")
"""Metrics of which the least value is the best; of all others it is the greatest."""
Resample = Callable[[NDArray[np.int64]], dict[str, float]]
"""Metrics over the rows with these indices, repeats allowed (the bootstrap)."""


class Task(Protocol):
    """Rows -> features -> summed loss -> predictions -> outputs -> score. Implementations are frozen dataclasses."""

    name: ClassVar[str]
    tokenizer_kwargs: ClassVar[dict[str, Any]]
    """What the tokenizer must be loaded with for this task."""

    @property
    def auto_class(self) -> type:
        """Of transformers, that loads the model with this task's head. A plain class variable will do."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own. A field of the dataclass."""

    @property
    def headline(self) -> str:
        """The metric that picks the best checkpoint, see ``LOWER_IS_BETTER``. A plain class variable will do."""

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        model_config: PreTrainedConfig,
        max_length: int,
        stride: int,
        options: Any,
    ) -> Self:
        """Make the task from its training rows, which say what labels there are, and for this kind of model.

        Raises:
            UserError: The rows can not train this task (one class only, unknown tags, NaN labels, ...).
        """

    def check(self, rows: Rows, *, where: str) -> None:
        """Refuse rows that this task, as built, can not score (labels unseen in training, broken spans, ...)."""

    def sequences(self) -> list[dict[str, int]]:
        """The longest sequences that the model will see: of each the settings that make it up, with their values."""

    def prepare_model(self, model: nn.Module) -> None:
        """Refuse a model that this task would train wrongly, by trying it out, and tell it what its answers end with.

        Called once, before anything is trained.
        """

    def model_kwargs(self) -> dict[str, Any]:
        """Arguments for ``auto_class.from_pretrained``: ``num_labels``, ``id2label``, ..."""

    def encode(self, rows: Columns, *, training: bool) -> Features:
        """Tokenize. Pure: no state, no randomness. Targets may be absent unless ``training``."""

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad features to a batch; labels are padded with -100.

        Pure as well: what is drawn anew in each epoch follows from the example's ``draw``, the numbers (seed, epoch)
        that the training loop gives each example and evaluation does not, and from its ``row``.
        """

    def count(self, batch: Batch) -> Tensor:
        """Number (or total weight) of the targets in the batch, a float scalar, known before the forward pass."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """SUM of the loss over exactly the targets that ``count`` counts, in fp32."""

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        """What is needed of the model's answer, as small as can be: nothing of size B x T x labels leaves here."""

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        """Join the features of each row into its answer. One output a row, in the order of the rows."""

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        """Metrics, by the field's own libraries."""

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        """The same metrics as a fast function of row indices, for bootstrap intervals."""

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        """What these features lose of their rows: what is cut off at ``max_length``, words without tokens."""
