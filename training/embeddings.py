"""Train only the rows of the word embeddings that the training data holds.

A row whose token never occurs gets no gradient, and AdamW without weight decay (or SGD) never moves it. So the update
is the same, element for element, while gradient, optimizer state and gradient norm shrink from the vocabulary to what
of it is used: CoNLL-2003 uses 14,097 of MiniLM's 30,522 rows; of a multilingual 250,000 one language uses few.

Shapes: V tokens in the vocabulary, U of them used, D embedding size.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

LEAVES_UNUSED_ROWS = ("adamw_torch_fused", "adamw_torch", "sgd")
"""Optimizers that work element by element; Adafactor's statistics run over whole rows and columns."""


class UsedRows(nn.Module):
    """An embedding of which only the rows ``used_U`` are parameters.

    In training mode it looks up nothing else; in eval mode every token has its row, trained or not.
    """

    table_VD: Tensor
    slot_V: Tensor
    used_U: Tensor

    def __init__(self, whole: nn.Embedding, used_U: Tensor) -> None:
        super().__init__()
        slot_V = torch.full((whole.num_embeddings,), -1)
        slot_V[used_U] = torch.arange(len(used_U))
        self.padding_idx = whole.padding_idx
        self._padding_slot = None if whole.padding_idx is None else int(slot_V[whole.padding_idx])
        self.weight = nn.Parameter(whole.weight.detach()[used_U].clone())
        # Not saved: both follow from the pretrained weights and the data.
        self.register_buffer("table_VD", whole.weight.detach(), persistent=False)
        self.register_buffer("slot_V", slot_V, persistent=False)
        self.register_buffer("used_U", used_U, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up; shape of the ids plus D."""
        if not self.training:
            return embedding(input_ids, self.table_VD)
        return embedding(self.slot_V[input_ids], self.weight, padding_idx=self._padding_slot)

    @torch.no_grad()
    def train(self, mode: bool = True) -> Self:
        """Put the trained rows into the whole table when evaluation begins."""
        if not mode:
            self.table_VD[self.used_U] = self.weight
        return super().train(mode)


def train_used_rows(model: PreTrainedModel, features: Any, *, padding: int) -> None:
    """Replace the model's word embeddings by ``UsedRows``, unless another layer shares them or tokens are predicted.

    Args:
        features: The training features (``datasets.Dataset``), whose ``input_ids`` are all that the model will see.
        padding: The id that batches are padded with.
    """
    whole = model.get_input_embeddings()
    if type(whole) is not nn.Embedding or whole.max_norm is not None:
        return
    if model.get_output_embeddings() is not None:  # a masked language model is shown tokens that its rows lack
        return
    parameters = [p for module in model.modules() for p in module._parameters.values()]
    if sum(p is whole.weight for p in parameters) > 1:  # tied to an output layer, which reaches every row
        return
    ids = features.data.column("input_ids").combine_chunks().flatten().to_numpy()
    own_padding = padding if whole.padding_idx is None else whole.padding_idx
    used_U = np.union1d(ids, [padding, own_padding])
    model.set_input_embeddings(UsedRows(whole, torch.from_numpy(used_U)))


def restore_embeddings(model: nn.Module) -> None:
    """Put an ordinary embedding with the trained rows back; nothing to do where there was no ``UsedRows``."""
    if not isinstance(model, PreTrainedModel) or not isinstance(used := model.get_input_embeddings(), UsedRows):
        return
    used.eval()
    rows, width = used.table_VD.shape
    whole = nn.Embedding(rows, width, padding_idx=used.padding_idx, _weight=used.table_VD)
    model.set_input_embeddings(whole)
