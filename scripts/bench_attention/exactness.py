"""How far each variant is from attention written out over the same pairs, as the table of its weights times the values.

What is written out is computed in fp64, of the tensors as they are after rounding to the type that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention import VARIANTS
from attention.scoring import Scoring
from scripts.bench_attention.subjects import HEADS, WIDTH, Write, draw, make_mask, make_variant, settings_of
from scripts.reporting import processor, table, versions, write_page

LENGTH, ROWS, PADDING = 1500, 2, 300
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
COMPARABLE = 1e-9
LEFT_OUT = {
    "linformer": "whose weights are those of slots, not of tokens",
    "additive": "whose table of weights is its own work",
    "lsh": "whose table of weights is its own work",
    "grouped_query": "whose values are means, too",
}
"""Without a table that is written out and is the output times the values: the tests hold each to its formula."""
TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


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
    expected = _learn(lambda q, k, v: variant.weights(q, k, mask, scoring) @ v, exact, real_BN)
    with torch.no_grad():
        pairs_BHNM = variant.weights(exact[0], exact[1], mask, scoring) > 0
    variant.to(TYPES[kind])
    sides: dict[str, Attend] = {
        "": lambda q, k, v: variant(q, k, v, mask, scoring),
        "kernel_": lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=pairs_BHNM),
    }
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
    comparable = not what.startswith("kernel") or exact["kernel_output"] < COMPARABLE
    return f"{report[what]:.0e}" if comparable else ""
