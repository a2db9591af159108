"""LoRA (Hu et al., 2021) with nothing left untrained or unsaved.

PEFT trains and saves a new head only under the names ``classifier``, ``score`` and ``qa_outputs``; heads and poolers
of other names (BART, DeBERTa's pooler) stay random after a reload. Here the list comes from the checkpoint itself:
whatever it did not hold is trained in full and saved with the adapter.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attention.seam import CHILD, stored_plan
from heedful import UserError
from sources.files import write_json

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base.json"
"""Beside an adapter: the hash of the weights that it was trained on, which PEFT neither writes nor asks for."""
OTHER_ATTENTION = "LORA over an attention of heedful's: take the merged model/ that was saved beside this adapter/"

# PEFT 0.21 asks each model for an attribute that transformers 5.23 has renamed; nothing of it concerns the user.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
# It fears for tied weights in copied modules, which are tied again here.
warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)


def add_lora(
    model: PreTrainedModel,
    new: Sequence[str],
    *,
    r: int,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> PeftModel:
    """Wrap ``model`` so that the adapter and every parameter in ``new`` are trained, and nothing else of its body.

    Args:
        new: Parameters that the checkpoint did not hold.
        lora_alpha: None is 2 r.
        target_modules: Names as PEFT takes them; None adapts all linear layers inside the blocks.

    Raises:
        UserError: The model has no such module, or PEFT can not tell its new ones from pretrained ones.
    """
    _refuse_absent(model, target_modules or ())
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha or 2 * r,
        lora_dropout=lora_dropout,
        target_modules=list(target_modules) if target_modules else block_linears(model),
        modules_to_save=owners(_once(model, new)),
        use_dora=use_dora,
        use_rslora=use_rslora,
        ensure_weight_tying=_ties_new_embeddings(model, new),
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            str(error).splitlines()[0], where="lora.target_modules", fix="leave it out to adapt all blocks"
        ) from error
    _share_again(wrapped, new)
    named = wrapped.named_parameters(remove_duplicate=False)
    trained = {_plain(name) for name, p in named if p.requires_grad and "lora_" not in name}
    if missed := set(new) - trained:
        raise UserError(
            f"new parameters that LoRA can neither train nor save: {', '.join(sorted(missed))}",
            where="lora",
            expected="new parameters in modules of their own, not shared with others",
            fix="leave out lora.r to train the whole model",
        )
    # PEFT goes by the ends of names, so a new head called `dense` would free every pretrained layer of that name.
    if freed := sorted(n for n in trained - set(new) if n.startswith(f"{model.base_model_prefix}.")):
        raise UserError(
            f"the new {', '.join(owners(new))} would free pretrained layers: {', '.join(freed[:3])}",
            where="lora",
            expected="a head whose name does not end that of a pretrained layer",
            fix="leave out lora.r to train the whole model",
        )
    return wrapped


def save_adapter(model: PeftModel, folder: Path, *, base: str) -> None:
    """Save what was trained, and what it was trained on; over another attention as a kind that PEFT does not know.

    PEFT puts an adapter on any model of the same shapes. On the model that this one's base was made of, it would run
    with full attention, and nobody would know.

    Args:
        base: ``training.models.pretrained_hash`` of the base.
    """
    model.save_pretrained(folder)
    write_json(folder / BASE, {"sha256": base})
    if stored_plan(model.get_base_model()) is not None:
        path = folder / ADAPTER_CONFIG
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"peft_type": OTHER_ATTENTION})


def open_adapter(model: PreTrainedModel, folder: Path, *, base: str) -> PeftModel:
    """Put a saved adapter on the base that it was trained on, with that one's attention.

    Args:
        base: ``training.models.pretrained_hash`` of that base, taken before anything was done to it.

    Raises:
        UserError: It is another base, if only by one number, or the adapter does not say which it was.
    """
    if not (folder / BASE).is_file():
        raise UserError("an adapter that does not say what it was trained on", where=str(folder), expected=BASE)
    trained_on = json.loads((folder / BASE).read_text(encoding="utf-8"))["sha256"]
    if base != trained_on:
        raise UserError(
            f"an adapter of another base: the weights of this one have the sha256 {base[:12]}...",
            where=str(folder),
            expected=f"{trained_on[:12]}..., as {BASE} says",
            fix="open it on the base that it was trained on, or take the merged model/ beside it",
        )
    values = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {"peft_type": PeftType.LORA}
    return PeftModel.from_pretrained(model, folder, config=LoraConfig.from_peft_type(**values))


@contextmanager
def adapter_merged(model: nn.Module) -> Iterator[None]:
    """Within, an adapter is in its base's weights; after, they are to the bit what they were.

    Takes as much memory again as the layers that are adapted. Where some are held in 4 bits, which have no room for the
    sum, all stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    if not all(weight.is_floating_point() for weight in weights):
        yield
        return
    before = [weight.data for weight in weights]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # into a new tensor, since PEFT takes out again not quite what it put in
        yield
    finally:
        for layer, weight, data in zip(layers, weights, before, strict=True):
            if layer.merged:
                layer.unmerge()
            weight.data = data


def _refuse_absent(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """PEFT would adapt those of the names that it finds, and say nothing of the others."""
    names = [name for name, _ in model.named_modules()]
    if absent := [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]:
        raise UserError(
            f"{type(model).__name__} has no module {', '.join(map(repr, absent))}",
            where="lora.target_modules",
            expected=f"such as {', '.join(_ends(model)[:8])}",
            fix="leave it out to adapt all blocks",
        )


def _ties_new_embeddings(model: PreTrainedModel, new: Sequence[str]) -> bool:
    """Whether the output layer shares new word embeddings: PEFT would train a copy and leave it the old ones."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not words.weight:
        return False
    return any(model.get_parameter(name) is words.weight for name in new)


def _once(model: nn.Module, new: Sequence[str]) -> list[str]:
    """One name, the innermost, of each new parameter: the bias of BERT's decoder is that of its predictions too."""
    names = {id(model.get_parameter(name)): name for name in sorted(new, key=lambda name: name.count("."))}
    return list(names.values())


def _share_again(wrapped: PeftModel, new: Sequence[str]) -> None:
    """Tie again what PEFT's copies of modules tore apart.

    A head for tokens shares its matrix with the embeddings, which stay frozen: PEFT would train and merge a second one.
    """
    modules = dict(wrapped.named_modules())
    wrappers = {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    for name, wrapper in wrappers.items():
        copy = wrapper.modules_to_save["default"]
        outside = {other: module for other, module in modules.items() if not other.startswith(f"{name}.")}
        for key, shared in wrapper.original_module.named_parameters(recurse=False):
            places = [
                (o, m, k) for o, m in outside.items() for k, p in m.named_parameters(recurse=False) if p is shared
            ]
            names = [f"{name}.{key}", *(f"{other}.{other_key}" for other, _, other_key in places)]
            if places and not {_plain(n).replace(".original_module", "") for n in names} & set(new):
                setattr(copy, key, shared)
            for other, module, other_key in places:
                if f"{_plain(other)}.{other_key}" in new:
                    setattr(module, other_key, getattr(copy, key))


def block_linears(model: nn.Module) -> str:
    """A pattern for the linear layers inside the numbered blocks of the model, as PEFT's ``target_modules`` takes it.

    Heads and poolers stand outside the blocks, whatever they are called.
    """
    names = _ends(model)
    if not names:
        raise UserError(
            "no linear layers inside numbered blocks", where="lora", fix="name them: lora.target_modules=[...]"
        )
    # lsh has a child called as BERT's layers are: what an attention variant brings is trained whole, and not adapted.
    return rf"(?!.*\.{CHILD}\.).*\.\d+\..*?({'|'.join(map(re.escape, names))})"


def linears_of_blocks(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers inside the numbered blocks, by name."""
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Linear | Conv1D) and re.search(r"\.\d+\.", n)}


def _ends(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in linears_of_blocks(model)})


def owners(parameters: Sequence[str]) -> list[str]:
    """The modules that hold these parameters."""
    return sorted({name.rpartition(".")[0] for name in parameters})


def _plain(name: str) -> str:
    """A PEFT parameter's name in the model it wraps."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
