"""How far each variant is from its attention written out: mostly the table of its weights times the values.

What is written out is computed in fp64, of the tensors as they are after rounding to the type that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention

from attention import VARIANTS
from attention.masks import LazyMask
from attention.reference import dense_attention
from attention.scoring import Scoring
from scripts.bench_attention.subjects import HEADS, WIDTH, Write, draw, make_mask, make_variant, settings_of
from scripts.reporting import processor, table, versions, write_page

LENGTH, ROWS, PADDING = 1500, 2, 300
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
COMPARABLE = 1e-9
TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
LEFT_OUT = {"additive": "which would fill a table of N x M x D"}
"""The tests hold it to its formula, of shorter texts."""


def _by_weights(variant: Any, rounded: Sequence[Tensor], mask: LazyMask, scoring: Scoring) -> Attend:
    return lambda q, k, v: variant.weights(q, k, mask, scoring) @ v


def _by_means(variant: Any, rounded: Sequence[Tensor], mask: LazyMask, scoring: Scoring) -> Attend:
    """Full attention over key/value heads that are the means of some."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.view(len(x), variant.kv_heads, -1, *x.shape[2:]).mean(2) for x in (k, v))
        return dense_attention(q, k, v, mask.table(q.device), scoring)

    return attend


def _by_slots(variant: Any, rounded: Sequence[Tensor], mask: LazyMask, scoring: Scoring) -> Attend:
    """Linformer's slots, row by row over its real tokens: each the mean of those at home there, for as many."""

    def of_row(q_HND: Tensor, k_HMD: Tensor, v_HMD: Tensor) -> Tensor:
        home_SM = one_hot(variant.home_L[: k_HMD.shape[1]]).T
        counts_S = home_SM.sum(1).double()
        E_SM, F_SM = ((x[: len(home_SM), : home_SM.shape[1]] / counts_S[:, None]) for x in (variant.E, variant.F))
        scores_HNS = q_HND @ (E_SM @ k_HMD).mT * scoring.scaling + counts_S.log()
        out_HND: Tensor = scores_HNS.softmax(-1) @ (F_SM @ v_HMD)
        return out_HND

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert mask.padding_BM is not None
        lengths = mask.padding_BM.sum(1).tolist()
        return torch.stack([of_row(q[b], k[b, :, :length], v[b, :, :length]) for b, length in enumerate(lengths)])

    return attend


def _by_own_pairs(variant: Any, rounded: Sequence[Tensor], mask: LazyMask, scoring: Scoring) -> Attend:
    """Full attention over the pairs that hashes of tensors so rounded lead to: others where two are near a tie."""
    with torch.no_grad():
        pairs_BHNM = variant.weights(*rounded[:2], mask, scoring) > 0
    return lambda q, k, v: dense_attention(q, k, v, pairs_BHNM, scoring)


WRITTEN_OUT = {"linformer": _by_slots, "lsh": _by_own_pairs, "grouped_query": _by_means}
"""Those whose table of weights is no table of tokens, or is their own work."""


def measure(write: Write = None) -> None:
    """Distances of outputs and gradients, in three types; in bf16 those of torch's kernel over the same pairs too."""
    names = [name for name in VARIANTS if name not in LEFT_OUT]
    reports = [{"variant": name, "type": kind, **distances(name, kind)} for name in names for kind in TYPES]
    text = tables(reports)
    typer.echo(text)
    if write is not None:
        facts = {"command": 'make attention ARGS="exactness"', "device": processor(), **versions(["torch"])}
        write_page(write / "exactness.md", "Exactness", facts, text, {"reports": reports})


def tables(reports: Sequence[dict[str, Any]]) -> str:
    """A row for each variant."""
    of = {(report["variant"], report["type"]): report for report in reports}
    columns = [(kind, what) for kind in TYPES for what in ("output", "gradient")]
    columns += [("bf16", "kernel_output"), ("bf16", "kernel_gradient")]
    rows = [
        [settings_of(name), *(_shown(of[name, kind], of[name, "fp64"], what) for kind, what in columns)]
        for name in dict.fromkeys(report["variant"] for report in reports)
    ]
    header = ["variant", *(f"{kind} {what.replace('kernel_', 'of the kernel, ')}" for kind, what in columns)]
    missing = "; ".join(f"{name}, {why}" for name, why in LEFT_OUT.items())
    return (
        f"{ROWS} texts of {LENGTH:,} tokens, one with {PADDING} of padding, {HEADS} heads of {WIDTH}, unit normal; "
        f"greatest difference. ring is alone here, and so blockwise: `tests/test_attention_ring.py` has it on 2 and 4 "
        f"processes. Left out, and held to their formulas by tests: {missing}.\n\n{table(header, rows)}"
    )


def distances(name: str, kind: str) -> dict[str, float]:
    """The greatest difference of the output, and of the gradients of query, key and value, for both sides."""
    real_BN = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    real_BN[1, LENGTH - PADDING :] = False
    mask, scoring = make_mask(LENGTH, rows=ROWS, real=real_BN), Scoring(WIDTH**-0.5)
    rounded = [tensor.to(TYPES[kind]) for tensor in draw(LENGTH, rows=ROWS)]
    exact = [tensor.double() for tensor in rounded]
    variant: Any = make_variant(name)
    variant.double()
    expected = _learn(WRITTEN_OUT.get(name, _by_weights)(variant, rounded, mask, scoring), exact, real_BN)
    sides: dict[str, Attend] = {"": lambda q, k, v: variant(q, k, v, mask, scoring)}
    if name not in WRITTEN_OUT:
        with torch.no_grad():
            pairs_BHNM = variant.weights(exact[0], exact[1], mask, scoring) > 0
        sides["kernel_"] = lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=pairs_BHNM)
    variant.to(TYPES[kind])
    found: dict[str, float] = {}
    for side, attend in sides.items():
        learned = zip(_learn(attend, rounded, real_BN), expected, strict=True)
        output, *gradients = [float((own.double() - true).abs().max()) for own, true in learned]
        found |= {f"{side}output": output, f"{side}gradient": max(gradients)}
    return found


def _learn(attend: Attend, tensors: Sequence[Tensor], real_BN: Tensor) -> list[Tensor]:
    """The output, and the gradients of query, key and value; of padding nothing is asked."""
    real_B1N1 = real_BN[:, None, :, None]
    of_output = real_B1N1 * draw(LENGTH, rows=ROWS)[0].double()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = attend(*leaves).double() * real_B1N1
    return [output.detach(), *torch.autograd.grad((output * of_output).sum(), leaves)]


def _shown(report: dict[str, Any], exact: dict[str, Any], what: str) -> str:
    """Nothing of the kernel where its mask can not say which pairs count by how much."""
    comparable = not what.startswith("kernel") or exact.get("kernel_output", 1.0) < COMPARABLE
    return f"{report[what]:.0e}" if comparable else ""
