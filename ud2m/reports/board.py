"""Results of an evaluation for readers: Markdown, LaTeX, and an HTML file with a sortable table, plots and zoom."""

import html
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ud2m.evaluation.cells import Result
from ud2m.evaluation.differences import DIFFERENCE, REFERENCE, difference_rows, excludes_zero
from ud2m.evaluation.table import SETTING, Column, best_cells, format_value, markdown_line, table_columns
from ud2m.images import data_url
from ud2m.reports.page import html_page
from ud2m.reports.samples import viewable

HIDDEN = ("_low", "_high", "_nominal", "_backend", DIFFERENCE)


CONSTANT = (*SETTING, "images", "samples", "seed")


QUALITY = ("psnr_mean", "psnr", "ssim", "lpips", "energy", "frechet", "kid", "cfid")


COSTS = (("nfe", "network evaluations per sample"), ("seconds_per_image", "seconds per sample"))


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")  # Okabe and Ito


LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "σ_y": r"$\sigma_y$"}


LATEX |= {c: f"\\{c}" for c in "&%$#_{}"} | {"é": r"\'e", "–": "--", "†": r"$\dagger$"}


Rows = Sequence[Mapping[str, Any]]


Bold = Collection[tuple[int, str]]
"""Cells in bold type: index of the row, and key of the column."""


@dataclass(frozen=True)
class Board:
    """What is shown.

    Args:
        title: heading. rows: of ``metrics.json``. results: the cell of each row. settings: of the evaluation.
        names: of the shown images, by data set and number.
    """

    title: str
    rows: Rows
    results: Sequence[Result]
    settings: Mapping[str, Any]
    names: Mapping[str, Mapping[int, str]]


def visible(rows: Rows) -> list[Column]:
    """Return the columns of a table: not the bounds of intervals, nor what is the same number everywhere."""
    keys = [key for row in rows for key in row]
    constant = {key for key in CONSTANT if len({row.get(key) for row in rows}) == 1}
    constant |= {key for key in keys if key.endswith(HIDDEN) or key == REFERENCE}
    columns = table_columns([{k: v for k, v in row.items() if k not in constant} for row in rows])
    leading = [column for key in (*SETTING, "method") for column in columns if column.key == key]
    return [*leading, *(column for column in columns if column not in leading)]


def notes(rows: Rows) -> list[str]:
    """Return what belongs beside the numbers: meanings, and what ``circumstances`` returns."""
    meanings = [f"{column.heading}: {column.meaning}" for column in visible(rows) if column.meaning]
    return [*meanings, *circumstances(rows)]


def circumstances(rows: Rows) -> list[str]:
    """Return the networks of the metrics, the right values of what has one, and the size of the evaluation."""
    backends = {(k.removesuffix("_backend"), v) for row in rows for k, v in row.items() if k.endswith("_backend")}
    found = [f"{name}: network {backend}" for name, backend in sorted(backends)]
    nominal = {(k.removesuffix("_nominal"), v) for row in rows for k, v in row.items() if k.endswith("_nominal")}
    found += [f"{name}: {value:.3g} is right" for name, value in sorted(nominal)]
    same = {key: {row.get(key) for row in rows} for key in CONSTANT}
    sizes = ", ".join(f"{key} {next(iter(values))}" for key, values in same.items() if len(values) == 1)
    return [*found, *([sizes] if sizes else []), "in brackets: 95 % bootstrap interval over images"]


def cell_text(column: Column, row: Mapping[str, Any]) -> str:
    """Return a value with its interval, e.g. ``31.20 [30.90, 31.52]``."""
    text = format_value(column, row.get(column.key))
    low, high = row.get(f"{column.key}_low"), row.get(f"{column.key}_high")
    if low is None or high is None:
        return text
    return f"{text} [{format_value(column, low)}, {format_value(column, high)}]"


def markdown(rows: Rows) -> str:
    """Return the rows as Markdown: the table, its notes, and the differences from a reference if there are any."""
    parts = [markdown_table(rows), "", *(f"- {note}" for note in notes(rows)), *markdown_differences(rows)]
    return "\n".join(parts) + "\n"


def markdown_table(rows: Rows) -> str:
    """Return the rows as a Markdown table, the best value of a column, operator and data set in bold."""
    columns = visible(rows)
    return _markdown_table(rows, columns, best_cells(rows, columns))


def markdown_differences(rows: Rows) -> list[str]:
    """Return the differences from the reference as a Markdown table with its caption; nothing where there are none."""
    table = differences(rows)
    return ["", caption(rows), "", _markdown_table(*table)] if table else []


def _markdown_table(rows: Rows, columns: Sequence[Column], bold: Bold) -> str:
    lines = [markdown_line(column.heading for column in columns)]
    lines.append(markdown_line("---" if _is_text(rows, column) else "---:" for column in columns))
    for index, row in enumerate(rows):
        cells = [(cell_text(column, row), (index, column.key) in bold) for column in columns]
        lines.append(markdown_line(f"**{text}**" if strong else text for text, strong in cells))
    return "\n".join(lines)


def differences(rows: Rows) -> tuple[Rows, Sequence[Column], Bold] | None:
    """Return the table of differences from the reference if there is one; bold: the interval does not contain 0.

    Numbers have their sign, and one decimal more than in the table of the rows themselves.
    """
    found = difference_rows(rows)
    if not found:
        return None
    columns = [
        column if column.key in ("method", "nfe", *SETTING) else replace(column, format=_finer(column.format))
        for column in visible(found)
    ]
    return found, columns, {(i, c.key) for i, row in enumerate(found) for c in columns if excludes_zero(row, c.key)}


def _finer(text: str) -> str:
    """Return ``.2f`` as ``+.3f``; other formats get a sign alone."""
    return "+" + re.sub(r"[.](\d)f", lambda found: f".{int(found[1]) + 1}f", text)


def caption(rows: Rows) -> str:
    """Return what a table of differences shows."""
    return (
        f"Differences from {rows[0][REFERENCE]}, paired by image; in brackets: 95 % bootstrap interval over images; "
        "bold: it does not contain 0."
    )


def latex(rows: Rows) -> str:
    """Return the rows as a LaTeX table (booktabs), intervals in small print, and one of the differences."""
    columns, compared = visible(rows), differences(rows)
    lines = [r"% \usepackage{booktabs}", *_latex_table(rows, columns, best_cells(rows, columns))]
    lines += [f"% {note}" for note in notes(rows)]
    if compared:
        lines += ["", f"% {caption(rows)}", *_latex_table(*compared)]
    return "\n".join(lines) + "\n"


def _latex_table(rows: Rows, columns: Sequence[Column], bold: Bold) -> list[str]:
    lines = [
        rf"\begin{{tabular}}{{{''.join('l' if _is_text(rows, column) else 'r' for column in columns)}}}",
        r"\toprule",
        " & ".join(escape(column.heading) for column in columns) + r" \\",
        r"\midrule",
    ]
    before: Any = None
    for index, row in enumerate(rows):
        group = [row.get(key) for key in SETTING]
        if before not in (None, group):
            lines.append(r"\midrule")
        before = group
        cells = []
        for column in columns:
            text, _, interval = (
                cell_text(column, row).partition(" [")
                if not _is_text(rows, column)
                else (str(row.get(column.key, "–")), "", "")
            )
            value = escape(text)
            value = rf"\textbf{{{value}}}" if (index, column.key) in bold else value
            cells.append(f"{value} {{\\scriptsize [{interval}}}" if interval else value)
        lines.append(" & ".join(cells) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def escape(text: str) -> str:
    """Return plain text for LaTeX."""
    if "σ_y" in text:
        return LATEX["σ_y"].join(escape(part) for part in text.split("σ_y"))
    return "".join(LATEX.get(character, character) for character in text)


def render(board: Board) -> str:
    """Return the report as one HTML page that loads nothing from anywhere."""
    body = f"<h1>{_text(board.title)}</h1>" + _table(board.rows)
    for setting, indices in _groups(board.rows).items():
        heading = ", ".join(f"{value}" if key != "sigma_y" else f"σ_y = {value:g}" for key, value in setting)
        body += f"<section><h2>{_text(heading)}</h2>{_plots(board, indices)}{_pictures(board, indices)}</section>"
    settings = json.dumps(board.settings, indent=2, ensure_ascii=False, default=str)
    body += f"<details><summary>Settings</summary><pre class=scroll tabindex=0>{_text(settings)}</pre></details>"
    return html_page(board.title, _STYLE, body, _SCRIPT)


def _groups(rows: Rows) -> dict[tuple[tuple[str, Any], ...], list[int]]:
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(tuple((key, row.get(key)) for key in SETTING), []).append(index)
    return groups


def _table(rows: Rows) -> str:
    columns, compared = visible(rows), differences(rows)
    legend = "".join(f"<li>{_text(note)}</li>" for note in ["bold: best for the same data and operator", *notes(rows)])
    table = _html_table(rows, columns, best_cells(rows, columns))
    body = f"<p>Click a heading to sort.</p>{table}<ul class=legend>{legend}</ul>"
    if compared:
        body += f"<p>{_text(caption(rows))}</p>{_html_table(*compared)}"
    return body


def _html_table(rows: Rows, columns: Sequence[Column], bold: Bold) -> str:
    kinds = {column.key: "text" if _is_text(rows, column) else "number" for column in columns}
    head = "".join(
        f'<th scope=col class={kinds[column.key]} title="{_text(column.meaning)}">'
        f"<button type=button>{_text(column.heading)}</button></th>"
        for column in columns
    )
    body = ""
    for index, row in enumerate(rows):
        cells = ""
        for column in columns:
            value = row.get(column.key)
            text, _, interval = cell_text(column, row).partition(" [")
            shown = f"<b>{_text(text)}</b>" if (index, column.key) in bold else _text(text)
            shown += f"<small>[{_text(interval)}</small>" if interval else ""
            key = "" if value is None else value
            cells += f'<td class={kinds[column.key]} data-value="{_text(key)}">{shown}</td>'
        body += f"<tr>{cells}</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll tabindex=0>{table}</div>"


# --- plots -------------------------------------------------------------------------------------------------------


def _plots(board: Board, indices: Sequence[int]) -> str:
    rows = [board.rows[i] for i in indices]
    columns = [c for c in table_columns(rows) if not c.key.endswith(HIDDEN) and c.best and _family(c.key)]
    shown: dict[str, Column] = {}
    for column in columns:
        shown.setdefault(_family(column.key), column)
    plots = "".join(_scatter(rows, column, cost, name) for column in shown.values() for cost, name in COSTS)
    plots += _calibration([(board.rows[i]["method"], board.results[i].curves) for i in indices])
    names = "".join(
        f"<li><span class=dot style='background:{_colour(k)}'></span>{k + 1} {_text(row['method'])}</li>"
        for k, row in enumerate(rows)
    )
    hint = "<p>Methods without network evaluations are in the table alone.</p>" if plots else ""
    return f"<ul class=keys>{names}</ul><div class=plots>{plots}</div>{hint}"


def _family(key: str) -> str:
    """Return which quality a column shows; of SSIM and LPIPS that of single samples is plotted."""
    if key.startswith(("ssim_mean", "lpips_mean")):
        return ""
    return next((name for name in QUALITY if key == name or key.startswith(f"{name}_")), "")


def _scatter(rows: Rows, column: Column, cost: str, cost_name: str) -> str:
    """Return quality against cost, logarithmic and with intervals, of the methods that evaluate a network."""
    points = [(k, row[cost], row[column.key]) for k, row in enumerate(rows) if _finite(row.get(column.key))]
    points = [(k, x, y) for k, x, y in points if rows[k]["nfe"] > 0]
    if not points:
        return ""
    left, right = (math.log10(end(x for _, x, _ in points)) for end in (min, max))
    left, right = left - 0.15, right + 0.2
    bounds = [rows[k].get(f"{column.key}{end}") for k, _, _ in points for end in ("_low", "_high")]
    values = [y for _, _, y in points] + [b for b in bounds if _finite(b)]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return 56 + 290 * (math.log10(x) - left) / (right - left), 190 - 170 * (y - low) / (high - low)

    parts = [_frame(column.heading)]
    steps = (1, 2, 5) if right - left < 2 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(left), math.ceil(right)) for step in steps]
    for tick in ticks:
        if left <= math.log10(tick) <= right:
            x, _ = at(tick, low)
            parts.append(f"<line class=grid x1={x:.1f} y1=20 x2={x:.1f} y2=190 />")
            parts.append(f"<text x={x:.1f} y=206 text-anchor=middle>{tick:g}</text>")
    for step in range(5):
        y = low + (high - low) * step / 4
        parts.append(f"<text x=50 y={at(1, y)[1] + 4:.1f} text-anchor=end>{format_value(column, y)}</text>")
    for k, x, y in points:
        px, py = at(x, y)
        bottom, top = (rows[k].get(f"{column.key}{end}") for end in ("_low", "_high"))
        if bottom is not None and top is not None:
            bar = f"x1={px:.1f} y1={at(x, bottom)[1]:.1f} x2={px:.1f} y2={at(x, top)[1]:.1f}"
            parts.append(f"<line {bar} stroke='{_colour(k)}' />")
        title = f"{rows[k]['method']}: {cell_text(column, rows[k])} at {x:g}"
        parts.append(
            f"<g><title>{_text(title)}</title><circle cx={px:.1f} cy={py:.1f} r=5 fill='{_colour(k)}' />"
            f"<text x={px + 7:.1f} y={py - 5:.1f}>{k + 1}</text></g>"
        )
    parts.append(f"<text x=201 y=222 text-anchor=middle>{_text(cost_name)}</text>")
    return _svg(parts, f"{column.heading} against {cost_name}")


def _calibration(curves: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return coverage against its level; the diagonal is a calibrated sampler."""
    if not any("calibration" in curve for _, curve in curves):
        return ""
    parts = [_frame("Coverage of credible intervals"), "<line class=grid x1=56 y1=190 x2=346 y2=20 />"]
    for k, (name, curve) in enumerate(curves):
        pairs = curve.get("calibration", [])
        line = " ".join(f"{56 + 290 * level:.1f},{190 - 170 * found:.1f}" for level, found in pairs)
        parts.append(f"<g><title>{_text(name)}</title><polyline points='{line}' stroke='{_colour(k)}' /></g>")
    for tick in (0, 0.5, 1):
        parts.append(f"<text x={56 + 290 * tick} y=206 text-anchor=middle>{tick:g}</text>")
        parts.append(f"<text x=50 y={194 - 170 * tick} text-anchor=end>{tick:g}</text>")
    parts.append("<text x=201 y=222 text-anchor=middle>level of the interval</text>")
    return _svg(parts, "Coverage of credible intervals against their level")


def _frame(title: str) -> str:
    return (
        f"<text x=201 y=13 text-anchor=middle class=title>{_text(title)}</text><path class=axis d='M56 20V190H346' />"
    )


def _svg(parts: Sequence[str], label: str) -> str:
    return f"<svg viewBox='0 0 360 228' role=img aria-label=\"{_text(label)}\">{''.join(parts)}</svg>"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


# --- pictures ----------------------------------------------------------------------------------------------------


def _pictures(board: Board, indices: Sequence[int]) -> str:
    names = board.names.get(str(board.rows[indices[0]].get("data")), {})
    strips = []
    for number in board.results[indices[0]].pictures:
        shown = [(board.rows[i]["method"], board.results[i].pictures[number]) for i in indices]
        first = shown[0][1]
        frames = [_picture(first["x0"], "Reference"), _picture(viewable(first["y"])[0], "Observation")]
        for name, kinds in shown:
            frames.append(_picture(kinds["sample"], f"{name}: sample"))
            if not torch.equal(kinds["sample"], kinds["mean"]):
                frames.append(_picture(kinds["mean"], f"{name}: mean"))
        strips.append(f"<h3>{_text(names.get(number, number))}</h3><div class=strip>{''.join(frames)}</div>")
    if not strips:
        return ""
    buttons = "".join(f"<button type=button data-zoom={z}>{z}×</button>" for z in (2, 4, 8))
    hint = "Point at a picture to see the same place of all in its row enlarged."
    return f"<div class=zoom>{hint} Enlarge {buttons}</div>{''.join(strips)}"


def _picture(image: Tensor, caption: str) -> str:
    height, width = image.shape[1:]
    img = f'<img width={width} height={height} alt="{_text(caption)}" src="{data_url(image.float().clamp(0, 1))}">'
    return f"<figure><div class=frame>{img}</div><figcaption>{_text(caption)}</figcaption></figure>"


def _is_text(rows: Rows, column: Column) -> bool:
    return any(isinstance(row.get(column.key), str) for row in rows)


def _text(value: Any) -> str:
    return html.escape(str(value))


_STYLE = """
:root { --ink: #1b1b1b; --paper: #fff; --soft: #666; --line: #ddd; --tint: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --soft: #a0a0a0; --line: #3a3a3a; --tint: #222; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 8px 0 12px; }
h2 { font-size: 1.25rem; margin: 36px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 20px 0 6px; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
.text { text-align: left; }
td small { display: block; color: var(--soft); white-space: nowrap; }
th button { font: inherit; font-size: 0.85rem; color: var(--soft); background: none; border: 0; padding: 0;
  text-align: inherit; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
.legend { columns: 2 24em; margin: 8px 0; padding-left: 18px; color: var(--soft); font-size: 0.85rem; }
.keys { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; font-size: 0.9rem; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.plots { display: flex; flex-wrap: wrap; gap: 16px; }
svg { width: 360px; max-width: 100%; font-size: 11px; }
svg text { fill: var(--ink); }
.title { font-weight: 600; }
.axis { fill: none; stroke: var(--soft); }
.grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; }
.zoom { margin: 16px 0 0; color: var(--soft); font-size: 0.9rem; }
.zoom button { font: inherit; margin-left: 4px; cursor: pointer; }
.zoom button[aria-pressed=true] { font-weight: 700; }
.strip { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 200px; max-width: calc(50% - 5px); }
.frame { overflow: hidden; aspect-ratio: auto; }
.frame img { display: block; width: 100%; height: auto; background: var(--tint); image-rendering: pixelated; }
figcaption { font-size: 0.8rem; color: var(--soft); line-height: 1.3; padding-top: 4px; }
details { margin: 36px 0; border-top: 1px solid var(--line); padding-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--tint); padding: 12px; font-size: 0.8rem; }
"""


_SCRIPT = """
const sortable = table => table.querySelectorAll('th').forEach((head, column) => {
  const compare = (a, b) => {
    const [x, y] = [a, b].map(row => row.cells[column].dataset.value);
    if (x === '' || y === '') return (x === '') - (y === '');  // what is missing stays last
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return head.getAttribute('aria-sort') === 'descending' ? -order : order;
  };
  head.querySelector('button').addEventListener('click', () => {
    const falling = head.getAttribute('aria-sort') === 'ascending';
    table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
});
document.querySelectorAll('table').forEach(sortable);
let factor = 4;
const buttons = document.querySelectorAll('[data-zoom]');
const choose = value => {
  factor = value;
  buttons.forEach(b => b.setAttribute('aria-pressed', Number(b.dataset.zoom) === value));
};
buttons.forEach(button => button.addEventListener('click', () => choose(Number(button.dataset.zoom))));
choose(factor);
document.querySelectorAll('.strip').forEach(strip => {
  const images = strip.querySelectorAll('img');
  strip.addEventListener('pointermove', event => {
    const frame = event.target.closest('.frame');
    if (!frame) return;
    const box = frame.getBoundingClientRect();
    const share = (position, start, length) => Math.min(100, Math.max(0, 100 * (position - start) / length));
    const x = share(event.clientX, box.left, box.width), y = share(event.clientY, box.top, box.height);
    images.forEach(image => {
      image.style.transformOrigin = `${x}% ${y}%`;
      image.style.transform = `scale(${factor})`;
    });
  });
  strip.addEventListener('pointerleave', () => images.forEach(image => { image.style.transform = ''; }));
});
"""
