"""QLoRA (Dettmers et al., arXiv 2305.14314, section 3): the frozen linear layers in 4 bits, by bitsandbytes.

They are quantized here rather than by transformers as it loads, which would quantize new heads too, and hide NaN from
the checks of a checkpoint. Always on the CPU, so that the codes are the same on every device. See ADR 17.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attention.seam import last_token, run
from heedful import UserError
from training.lora import linears_of_blocks, owners

try:
    import bitsandbytes as bnb
except ImportError:  # an extra
    bnb = None

ROUNDING = 1e-3
"""Largest relative change of the logits between a layer in 4 bits and one of the same weights in fp32."""
WHERE = "model.load_in_4bit"


@dataclass(frozen=True)
class FourBits:
    """How weights are held; as in transformers' BitsAndBytesConfig, there with the prefix ``bnb_4bit_``.

    Args:
        quant_type: The 16 values that a weight may have, times the largest of its 64 neighbours: ``nf4``, the
            quantiles of a normal distribution, or ``fp4``, floats.
        use_double_quant: Hold those largest values in 8 bits (section 3, "Double Quantization").
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    use_double_quant: bool = False


class FourBitLinear(nn.Linear):
    """A frozen linear layer in 4 bits.

    bitsandbytes' own repacks its weights in eval mode on CPUs with bf16, after which it passes no gradient on, and
    rounds its bias for good to the precision that it computes in.
    """

    weight: Any

    def __init__(self, layer: nn.Linear | Conv1D, four_bits: FourBits) -> None:
        transposed = isinstance(layer, Conv1D)
        weight = layer.weight.detach().T.contiguous() if transposed else layer.weight.detach()
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.transposed = transposed
        self.weight = bnb.nn.Params4bit(
            weight, compress_statistics=four_bits.use_double_quant, quant_type=four_bits.quant_type
        ).to(weight.device)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """As a linear layer, under autocast in its dtype."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias: Tensor | None = self.bias
        bias = None if bias is None else bias.to(dtype)
        out: Tensor = bnb.matmul_4bit(input.to(dtype), self.weight, quant_state=self.weight.quant_state, bias=bias)
        return out

    def dequantized(self) -> nn.Linear:
        """A layer in fp32, with the weights that this one computes with."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


def quantize(model: PreTrainedModel, new: Sequence[str], four_bits: FourBits) -> None:
    """Hold the linear layers inside the numbered blocks in 4 bits, in place, and prove that the model calls them.

    Those stay as they are that the checkpoint does not hold, and those that the model's class keeps in fp32, as T5's
    ``wo``.

    Args:
        new: Parameters that the checkpoint did not hold.

    Raises:
        UserError: bitsandbytes is not installed, there are no such layers, or the model's class reads their weights.
    """
    if bnb is None:
        raise UserError("bitsandbytes is not installed", where=WHERE, fix="pip install 'heedful[qlora]'")
    held = {name: FourBitLinear(layer, four_bits) for name, layer in _to_quantize(model, new).items()}
    if not held:
        raise UserError("no pretrained linear layers inside numbered blocks", where=WHERE, fix="leave it out")
    for name, layer in held.items():  # the same function twice: first with the rounded weights in fp32
        model.set_submodule(name, layer.dequantized())
    rounded = _answer(model)
    for name, layer in held.items():
        model.set_submodule(name, layer)
    difference = float((_answer(model) - rounded).abs().max() / rounded.abs().max().clamp(min=1e-6))
    if not difference < ROUNDING:
        raise UserError(
            f"{type(model).__name__} reads weights of its linear layers by itself: in 4 bits its logits change by "
            f"{difference:.1e} of the largest",
            where=WHERE,
            expected="a model that does no more than call them",
            fix="leave it out: lora.r alone keeps the weights in fp32",
        )


def merge(adapter: PeftModel) -> nn.Module:
    """Merge LoRA into the weights that the layers in 4 bits compute with, in place and in fp32: what was trained.

    PEFT would quantize the sum anew, which is another function.
    """
    held = {name: layer for name, layer in adapter.named_modules() if isinstance(layer, FourBitLinear)}
    for name, layer in held.items():
        adapter.set_submodule(name, layer.dequantized())
    model: nn.Module = adapter.merge_and_unload()
    for name in (name for name, layer in held.items() if layer.transposed):
        path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        model.set_submodule(path, _as_conv1d(model.get_submodule(path)))
    return model


def in_four_bits(parameter: Tensor) -> bool:
    """Whether a parameter is held so, two numbers in each of its bytes."""
    return getattr(parameter, "quant_state", None) is not None


def elements(parameters: Iterable[Any]) -> int:
    """How many numbers they hold."""
    return sum(p.quant_state.shape.numel() if in_four_bits(p) else p.numel() for p in parameters)


def scales(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """What parameters in 4 bits hold beside their codes."""
    for state in (getattr(parameter, "quant_state", None) for parameter in parameters):
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = state.state2


def _as_conv1d(layer: Any) -> Conv1D:
    conv1d = Conv1D(layer.out_features, layer.in_features)
    conv1d.weight, conv1d.bias = nn.Parameter(layer.weight.T.contiguous()), layer.bias
    return conv1d


def _to_quantize(model: PreTrainedModel, new: Sequence[str]) -> dict[str, nn.Linear | Conv1D]:
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return {
        name: layer
        for name, layer in linears_of_blocks(model).items()
        # Other classes may compute in another way.
        if type(layer) in (nn.Linear, Conv1D)
        and name not in owners(new)
        and not any(f".{part}." in f".{name}.weight." for part in kept)
    }


def _answer(model: Any) -> Tensor:
    ids = torch.full((1, 4), last_token(model), device=model.device)
    answer: Tensor = run(model, ids, torch.ones_like(ids))[0]
    return answer
