"""Pictures of attention weights: a page that needs nothing but itself, and a figure for a paper.

Shapes: H heads, N queries, M keys.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heedful import UserError

SUFFIXES = (".svg", ".png", ".pdf")
COLUMNS = 4
"""Panels of a figure side by side."""
READABLE = 48
"""Tokens up to which a panel names them."""


@dataclass(frozen=True)
class View:
    """What the tokens at one site look at.

    Args:
        name: Of the site.
        module: Its path in the model.
        variant: Its name, with its settings.
        rows: Tokens that look, N.
        columns: Tokens that are looked at, M.
        heads: Their numbers.
        weights_HNM: From 0 to 1; None of a variant that has no such table.
    """

    name: str
    module: str
    variant: str
    rows: Sequence[str]
    columns: Sequence[str]
    heads: Sequence[int]
    weights_HNM: Tensor | None


def page(title: str, notes: Sequence[str], views: Sequence[View]) -> str:
    """The views as one HTML file, in which nothing of the text is markup."""
    data = json.dumps([_plain(view) for view in views], ensure_ascii=False)
    parts = {
        "TITLE": html.escape(title),
        "NOTES": "".join(f"<p>{html.escape(note)}</p>" for note in notes),
        # Inside of a script element only this sign could end it; in JSON it stands in strings alone.
        "DATA": data.replace("<", "\\u003c"),
        "SCRIPT": SCRIPT,
        "STYLE": STYLE,
    }
    return re.sub(
        "@([A-Z]+)@", lambda found: parts[found[1]], PAGE
    )  # in one pass, so that none is looked for in another


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be drawn.

    Raises:
        UserError: Of a kind that no paper takes, or without matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise UserError("a figure of another kind", where=str(path), expected=f"one of: {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed", where="--figure", fix="pip install 'heedful[figures]'")


def draw_figure(path: Path, views: Sequence[View]) -> None:
    """A panel for each view with weights: the mean of its heads, on one scale.

    Raises:
        UserError: No view has weights.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    means = [(view, view.weights_HNM.detach().mean(0)) for view in views if view.weights_HNM is not None]
    if not means:
        raise UserError("no site has weights to draw", where=str(path))
    columns = min(COLUMNS, len(means))
    rows, top = -(-len(means) // columns), max(float(mean.max()) for _, mean in means)
    # Letters stay letters in a PDF, and a figure drawn twice is the same file.
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "heedful", "font.size": 7}):
        figure = Figure(figsize=(2.6 * columns + 0.6, 2.6 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        image: Any = None
        for (view, mean), panel in zip(means, panels, strict=False):
            image = panel.imshow(mean.numpy(), cmap="Blues", vmin=0, vmax=top)
            panel.set_title(view.name)
            _name(panel, view)
        for panel in list(figure.axes)[len(means) :]:
            panel.set_axis_off()
        figure.colorbar(image, ax=figure.axes, label="weight, mean of heads" if len(views[0].heads) > 1 else "weight")
        figure.savefig(path, dpi=300, metadata=None if path.suffix == ".png" else {_DATE[path.suffix]: None})


_DATE = {".svg": "Date", ".pdf": "CreationDate"}


def _name(panel: Any, view: View) -> None:
    """Tokens along both sides, where there is room."""
    for axis, tokens in ((panel.xaxis, view.columns), (panel.yaxis, view.rows)):
        if len(tokens) > READABLE:
            continue
        axis.set_ticks(range(len(tokens)), tokens, fontsize=max(2.5, min(7, 150 / len(tokens))))
        for label in axis.get_ticklabels():
            label.set_parse_math(False)  # or a token with dollar signs would be a formula
    panel.tick_params(axis="x", rotation=90)


def _plain(view: View) -> dict[str, Any]:
    values = {name: getattr(view, name) for name in ("name", "module", "variant")}
    values |= {name: list(getattr(view, name)) for name in ("rows", "columns", "heads")}
    return values | {"table": None if view.weights_HNM is None else _packed(view.weights_HNM)}


def _packed(weights_HNM: Tensor) -> str:
    """16 bits a weight."""
    if not bool(((weights_HNM >= 0) & (weights_HNM <= 1.001)).all()):
        raise ValueError("weights outside of 0 and 1")
    levels = (weights_HNM.clamp(max=1).double() * 65535).round().to(torch.int32)
    return base64.b64encode(levels.numpy().astype("<u2").tobytes()).decode()


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
<h1>@TITLE@</h1>
@NOTES@
<form>
<label>Place <select id="site"></select></label>
<label>Head <select id="head"></select></label>
<label>View <select id="view"><option value="table">table</option><option value="lines">lines</option></select></label>
</form>
<p id="about"></p>
<p><output id="says">Point at the picture.</output></p>
<div id="frame"><svg id="picture" role="img" aria-label="attention weights"></svg></div>
<p id="scale"><span>0</span><i></i><span id="most"></span></p>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #1c1c1e; --quiet: #6a6a70; --rule: #d4d4d8; --ink: #0b4fa8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --text: #ececee; --quiet: #a0a0a8; --rule: #3c3d42; --ink: #8fc1ff; }
}
body { margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; background: var(--paper); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
#about, #scale { color: var(--quiet); font-size: 13px; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; margin: 1rem 0 .5rem; }
select { font: inherit; max-width: 24rem; }
output { font-variant-numeric: tabular-nums; }
#frame { overflow: auto; width: fit-content; max-width: 100%; max-height: 85vh;
  border: 1px solid var(--rule); border-radius: 6px; }
svg { display: block; margin: 8px; }
svg text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: var(--quiet); white-space: pre; }
svg text.on { fill: var(--text); font-weight: bold; }
svg .box, svg .mark { fill: none; stroke: var(--rule); }
svg .mark { stroke: var(--text); stroke-width: 1.5; }
svg .lines path { fill: none; stroke: var(--ink); stroke-width: 1.5; }
svg .cells path { fill: var(--ink); }
#scale { display: flex; gap: .5rem; align-items: center; }
#scale i { width: 10rem; height: .7rem; border: 1px solid var(--rule);
  background: linear-gradient(to right, transparent, var(--ink)); }
[hidden] { display: none !important; }
"""

SCRIPT = """
"use strict";
const by = (id) => document.getElementById(id);
const sites = JSON.parse(by("data").textContent), svg = by("picture");
const LEVELS = 48, FAINT = 0.05, LETTER = 7.4, LONGEST = 18;
let shown = null;  // what the picture shows: tokens, weights, and where its cells lie

function make(name, attributes, parent, text) {
  const node = document.createElementNS(svg.namespaceURI, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function cut(token) {
  const letters = Array.from(token);
  return letters.length > LONGEST ? letters.slice(0, LONGEST - 1).join("") + "\\u2026" : token;
}

function width(tokens) {
  return 14 + LETTER * Math.max(...tokens.map((token) => Array.from(cut(token)).length));
}

function option(select, value, text) {
  const node = document.createElement("option");
  node.value = value;
  node.textContent = text;
  select.appendChild(node);
}

function weights(site, head) {
  const bytes = Uint8Array.from(atob(site.table), (letter) => letter.charCodeAt(0));
  const levels = new Uint16Array(bytes.buffer), size = site.rows.length * site.columns.length;
  const sum = new Float64Array(size);
  const chosen = head === "mean" ? site.heads.map((_, i) => i) : [Number(head)];
  for (const h of chosen) for (let i = 0; i < size; i++) sum[i] += levels[h * size + i] / 65535 / chosen.length;
  return sum;
}

// One path for each shade: thousands of elements would be slow.
function paths(parent, attribute, draw, keep) {
  const parts = Array.from({ length: LEVELS + 1 }, () => []);
  const m = shown.columns.length;
  shown.weights.forEach((weight, i) => {
    const row = Math.floor(i / m), column = i % m, level = Math.round(weight / shown.most * LEVELS);
    if (level > 0 && keep(weight, row, column)) parts[level].push(draw(row, column));
  });
  parts.forEach((part, level) => {
    if (part.length) make("path", { d: part.join(""), [attribute]: level / LEVELS }, parent);
  });
}

function table() {
  const n = shown.rows.length, m = shown.columns.length;
  const size = Math.max(13, Math.min(28, Math.floor(680 / Math.max(n, m))));
  const left = width(shown.rows), top = width(shown.columns);
  resize(left + m * size + 2, top + n * size + 2);
  shown.names = [
    shown.rows.map((token, i) => make("text",
      { x: left - 6, y: top + (i + 0.5) * size + 4, "text-anchor": "end" }, svg, cut(token))),
    shown.columns.map((token, i) => make("text",
      { transform: `translate(${left + (i + 0.5) * size + 4} ${top - 6}) rotate(-90)` }, svg, cut(token))),
  ];
  make("rect", { class: "box", x: left, y: top, width: m * size, height: n * size }, svg);
  const cells = make("g", { class: "cells" }, svg);
  paths(cells, "fill-opacity",
    (row, column) => `M${left + column * size} ${top + row * size}h${size}v${size}h${-size}z`, () => true);
  const mark = make("rect", { class: "mark", width: size, height: size, visibility: "hidden" }, svg);
  shown.point = (x, y) => {
    const column = Math.floor((x - left) / size), row = Math.floor((y - top) / size);
    const inside = column >= 0 && row >= 0 && column < m && row < n;
    mark.setAttribute("visibility", inside ? "visible" : "hidden");
    mark.setAttribute("x", left + column * size);
    mark.setAttribute("y", top + row * size);
    light(inside ? [row] : [], inside ? [column] : []);
    if (inside) say(row, column);
  };
}

function lines() {
  const n = shown.rows.length, m = shown.columns.length, step = 19;
  const left = width(shown.rows), right = left + 260;
  resize(right + width(shown.columns), Math.max(n, m) * step + 4);
  const at = (i) => (i + 0.5) * step;
  shown.names = [
    shown.rows.map((token, i) => make("text", { x: left - 6, y: at(i) + 4, "text-anchor": "end" }, svg, cut(token))),
    shown.columns.map((token, i) => make("text", { x: right + 6, y: at(i) + 4 }, svg, cut(token))),
  ];
  const group = make("g", { class: "lines" }, svg);
  let before = null;
  const draw = (row, column) => {
    if (before === `${row} ${column}`) return;
    before = `${row} ${column}`;
    group.replaceChildren();
    paths(group, "stroke-opacity", (r, c) => `M${left} ${at(r)}L${right} ${at(c)}`, (weight, r, c) =>
      row === null && column === null ? weight >= FAINT * shown.most : r === row || c === column);
  };
  draw(null, null);
  shown.point = (x, y) => {
    const i = Math.floor(y / step);
    const row = x < left && i >= 0 && i < n ? i : null, column = x > right && i >= 0 && i < m ? i : null;
    draw(row, column);
    light(row === null ? [] : [row], column === null ? [] : [column]);
    if (row !== null) strongest(row, true);
    if (column !== null) strongest(column, false);
  };
}

function light(rows, columns) {
  [rows, columns].forEach((on, side) =>
    shown.names[side].forEach((name, i) => name.classList.toggle("on", on.includes(i))));
}

const quoted = (tokens, i) => `\\u201c${tokens[i]}\\u201d (${i + 1})`;

function say(row, column) {
  const weight = shown.weights[row * shown.columns.length + column];
  by("says").textContent = `${quoted(shown.rows, row)} \\u2192 ${quoted(shown.columns, column)}: ${weight.toFixed(4)}`;
}

function strongest(i, looks) {
  const m = shown.columns.length, others = looks ? shown.columns : shown.rows;
  const found = others.map((_, j) => [looks ? shown.weights[i * m + j] : shown.weights[j * m + i], j]);
  const named = found.sort((a, b) => b[0] - a[0]).slice(0, 3).map(([w, j]) => `${quoted(others, j)} ${w.toFixed(4)}`);
  by("says").textContent = quoted(looks ? shown.rows : shown.columns, i) +
    (looks ? " looks most at " : " is looked at most by ") + named.join(", ");
}

function resize(w, h) {
  svg.setAttribute("width", Math.ceil(w));
  svg.setAttribute("height", Math.ceil(h));
  svg.setAttribute("viewBox", `0 0 ${Math.ceil(w)} ${Math.ceil(h)}`);
}

function show() {
  const site = sites[by("site").value], drawn = site.table !== null;
  by("about").textContent = `${site.module}: ${site.variant}. ` + (drawn
    ? "Rows, or the left side, look; columns, or the right side, are looked at."
    : "This variant has no table of weights from token to token: there is nothing to draw.");
  for (const id of ["frame", "scale", "says"]) by(id).hidden = !drawn;
  svg.replaceChildren();
  if (!drawn) return;
  shown = { rows: site.rows, columns: site.columns, weights: weights(site, by("head").value) };
  shown.most = Math.max(shown.weights.reduce((a, b) => Math.max(a, b), 0), 1e-9);
  by("most").textContent = shown.most.toFixed(4);
  by("says").textContent = by("view").value === "table" ? "Point at the picture."
    : "Point at a token; till then lines below a twentieth of the strongest are left out.";
  (by("view").value === "table" ? table : lines)();
}

function heads() {
  const select = by("head"), before = select.value, site = sites[by("site").value];
  select.replaceChildren();
  if (site.heads.length > 1) option(select, "mean", "mean of all");
  site.heads.forEach((head, i) => option(select, i, head));
  if (Array.from(select.options).some((o) => o.value === before)) select.value = before;
}

svg.addEventListener("pointermove", (event) => {
  const box = svg.getBoundingClientRect();
  if (shown) shown.point(event.clientX - box.left, event.clientY - box.top);
});
sites.forEach((site, i) => option(by("site"), i, site.name));
by("site").addEventListener("change", () => { heads(); show(); });
for (const id of ["head", "view"]) by(id).addEventListener("change", show);
heads();
show();
"""
