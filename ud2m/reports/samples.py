"""The report on samples: one self-contained HTML file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ud2m.evaluation.table import Column, best_cells, format_value, table_columns
from ud2m.files import write_bytes
from ud2m.images import data_url, std_image, std_scale
from ud2m.reports.page import _attributes, _paragraphs, _tag, html_page, text_of

MAX_SAMPLES = 8


MAX_SIDE = 512
"""Larger pictures are shown reduced; the files beside the report keep every pixel."""


_DISPLAY = 256  # CSS pixels, four in a row; smaller pictures are enlarged by a whole factor


_HOLE = 0.85  # light grey leaves the measured pixels readable; black would pass for dark ones


_IMAGE_RANGE = (-0.5, 1.5)  # an observation outside is no image in [0, 1] (a sinogram, say) and is rescaled


@dataclass(frozen=True, eq=False)
class Entry:
    """One image of the report; tensors are images in [0, 1].

    Args:
        name: heading.
        reference: [C, H, W], or None when nobody knows it.
        observation: y [C, h, w]; another size, channel count or range than the image's is scaled to fit.
        samples: [S, C, H, W]; the first `MAX_SAMPLES` are shown.
        mean: [C, H, W].
        std: [C, H, W], in image units; None for a single sample, which has none.
        numbers: scores of this image, keys as in the table.
        note: a remark shown under the heading.
        measured: [h, w], True where y was measured (inpainting); holes are coloured.
    """

    name: str
    reference: Tensor | None
    observation: Tensor
    samples: Tensor
    mean: Tensor
    std: Tensor | None
    numbers: Mapping[str, Any]
    note: str = ""
    measured: Tensor | None = None

    def __post_init__(self):
        shape = tuple(self.mean.shape)
        _require(len(shape) == 3, self.name, "mean", "(C, H, W)", self.mean)
        if self.std is not None:
            _require(tuple(self.std.shape) == shape, self.name, "std", f"{shape}", self.std)
        _require(len(self.samples) > 0, self.name, "samples", "(S >= 1, C, H, W)", self.samples)
        _require(tuple(self.samples.shape[1:]) == shape, self.name, "samples", f"(S, *{shape})", self.samples)
        _require(self.observation.ndim == 3, self.name, "observation", "(C, h, w)", self.observation)
        if self.reference is not None:
            _require(tuple(self.reference.shape) == shape, self.name, "reference", f"{shape}", self.reference)
        if self.measured is not None:
            size = tuple(self.observation.shape[1:])
            _require(tuple(self.measured.shape) == size, self.name, "measured", f"{size}", self.measured)


@dataclass(frozen=True)
class Section:
    """A heading, a text and the images that belong to it; their std maps share one colour scale."""

    title: str
    text: str
    entries: Sequence[Entry] = ()


@dataclass(frozen=True)
class Report:
    """What `write_report` shows. Texts are plain text; blank lines part paragraphs.

    Args:
        title: heading of the page.
        summary: what was done and what came out.
        table: rows of ``metrics.json``.
        settings: nested plain values that made the results.
        sections: the pictures.
    """

    title: str
    summary: str
    table: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    sections: Sequence[Section] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Write the report as one HTML file, atomically.

    Raises:
        OSError: when the place cannot be written or the disk is full.
    """
    write_bytes(path, render(report).encode(errors="replace"))  # file names may hold bytes that are no text


def render(report: Report) -> str:
    """Return the report as one HTML page that loads nothing from anywhere."""
    body = (
        _tag("h1", text_of(report.title))
        + _paragraphs(report.summary)
        + _table(report.table)
        + "".join(_section(section) for section in report.sections)
        + _settings(report.settings)
    )
    return html_page(report.title, _STYLE, body)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = table_columns(rows)
    best = best_cells(rows, columns)
    head = _tag("tr", "".join(_tag("th", text_of(column.heading), scope="col") for column in columns))
    body = "".join(_table_row(index, row, columns, best) for index, row in enumerate(rows))
    table = _tag("table", _tag("thead", head) + _tag("tbody", body))
    box = _tag("div", table, class_="scroll", tabindex="0")
    return _tag("h2", "Results") + box + _legend(columns, has_best=bool(best))


def _table_row(index: int, row: Mapping[str, Any], columns: Sequence[Column], best: set[tuple[int, str]]) -> str:
    cells = []
    for column in columns:
        value = row.get(column.key)
        text = text_of(format_value(column, value))
        content = _tag("b", text) if (index, column.key) in best else text
        if column.key == "method":
            cells.append(_tag("th", content, scope="row"))
        else:
            cells.append(_tag("td", content, class_="text" if isinstance(value, str) else "number"))
    return _tag("tr", "".join(cells))


def _legend(columns: Sequence[Column], has_best: bool) -> str:
    items = [_tag("li", f"{_tag('i', text_of(c.heading))}: {text_of(c.meaning)}") for c in columns if c.meaning]
    if has_best:
        items.insert(0, _tag("li", f"{_tag('b', 'Bold')}: best in its column, for the same data and operator"))
    return _tag("ul", "".join(items), class_="legend") if items else ""


def _section(section: Section) -> str:
    scale = max((std_scale(entry.std) for entry in section.entries if entry.std is not None), default=1.0)
    entries = "".join(_entry(entry, scale) for entry in section.entries)
    return _tag("section", _tag("h2", text_of(section.title)) + _paragraphs(section.text) + entries)


def _entry(entry: Entry, scale: float) -> str:
    count = len(entry.samples)
    shown = entry.samples[:MAX_SAMPLES]
    samples = [_picture(x, f"Sample {k}", f"{entry.name}: sample {k}") for k, x in enumerate(shown, start=1)]
    rest = f"{count - len(shown)} more samples are in the folder samples/." if count > len(shown) else ""
    content = (
        _tag("h3", text_of(entry.name))
        + _paragraphs(entry.note)
        + _numbers(entry.numbers)
        + _tag("div", _summary_pictures(entry, scale), class_="pictures")
        + _tag("div", "".join(samples), class_="pictures")
        + _paragraphs(rest)
    )
    return _tag("article", content)


def _summary_pictures(entry: Entry, scale: float) -> str:
    count = len(entry.samples)
    mean = "Mean of 1 sample" if count == 1 else f"Mean of {count} samples"
    parts = []
    if entry.reference is not None:
        parts.append(_picture(entry.reference, "Reference", f"{entry.name}: reference"))
    parts.append(_observation_picture(entry))
    parts.append(_picture(entry.mean, mean, f"{entry.name}: mean of the samples"))
    if entry.std is not None:
        parts.append(_std_picture(entry.std, scale, entry.name))
    return "".join(parts)


def _std_picture(std: Tensor, scale: float, name: str) -> str:
    coloured, _ = std_image(std, scale)
    alt = f"{name}: standard deviation of the samples, brightest where {scale:g} or more"
    return _picture(coloured, "Standard deviation", alt, _colour_bar(scale))


def _observation_picture(entry: Entry) -> str:
    y, remark = viewable(entry.observation)
    if entry.measured is not None:
        y = torch.where(entry.measured.bool().cpu(), y, torch.tensor(_HOLE))
        remark += "; light grey: not measured"
    height, width = entry.mean.shape[1:]
    size = "" if (height, width) == y.shape[1:] else f", {y.shape[2]}×{y.shape[1]} pixels"
    enlarged = width if width % y.shape[2] == 0 else y.shape[2]  # a factor of decimation fills the frame
    display = min(_display_width(width) * enlarged / width, MAX_SIDE)
    return _picture(y, f"Observation y{size}{remark}", f"{entry.name}: observation", display=display)


def viewable(y: Tensor) -> tuple[Tensor, str]:
    """Return an observation as a picture [1 or 3, h, w] in [0, 1], and what was done to it."""
    y = y.detach().float().cpu()
    low, high = float(y.min()), float(y.max())
    if len(y) in (1, 3) and low >= _IMAGE_RANGE[0] and high <= _IMAGE_RANGE[1]:
        return y.clamp(0, 1), ""
    size = y.norm(dim=0, keepdim=True) if len(y) > 1 else y
    low, high = float(size.min()), float(size.max())
    what = "modulus over channels, " if len(y) > 1 else ""
    return (size - low) / max(high - low, 1e-12), f"; {what}black {low:.3g}, white {high:.3g}"


def _picture(image: Tensor, caption: str, alt: str, extra: str = "", display: float | None = None) -> str:
    image = image.detach().float().cpu()
    height, width = image.shape[1:]
    factor = math.ceil(max(height, width) / MAX_SIDE)
    if factor > 1:
        image = interpolate(image[None], scale_factor=1 / factor, mode="area")[0]
        caption += f", reduced to 1/{factor}"
    display = display or _display_width(width)
    style = "crisp" if display >= 1.5 * image.shape[2] else "smooth"
    img = _image(image, alt, style)
    return _tag("figure", img + _tag("figcaption", text_of(caption) + extra), style=f"width: {display:.0f}px")


def _image(image: Tensor, alt: str, style: str) -> str:
    height, width = map(str, image.shape[1:])
    attributes = {"class": style, "width": width, "height": height, "alt": alt, "src": data_url(image)}
    return f"<img{_attributes(attributes)}>"


def _display_width(width: int) -> int:
    return min(width * max(1, _DISPLAY // width), MAX_SIDE)


def _colour_bar(scale: float) -> str:
    colours, _ = std_image(torch.linspace(0, 1, 64).view(1, 1, 64), 1.0)
    bar = _image(colours, f"colours from 0 to {scale:g}", "smooth")
    return _tag("span", "0" + bar + f"≥&nbsp;{scale:g}", class_="bar")


def _numbers(numbers: Mapping[str, Any]) -> str:
    items = [_number_item(column, numbers[column.key]) for column in table_columns([numbers])]
    return _tag("dl", "".join(items), class_="numbers") if items else ""


def _number_item(column: Column, value: Any) -> str:
    return _tag("div", _tag("dt", text_of(column.heading)) + _tag("dd", text_of(format_value(column, value))))


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    text = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
    content = _tag("summary", "Settings") + _tag("pre", text_of(text), class_="scroll", tabindex="0")
    return _tag("details", content)


def _require(condition: bool, name: str, what: str, wanted: str, got: Tensor) -> None:
    if not condition:
        raise ValueError(f"report entry {name!r}: {what} must have shape {wanted}, got {tuple(got.shape)}")


_STYLE = """
:root { --ink: #1b1b1b; --paper: #fff; --soft: #666; --line: #ddd; --tint: #f4f4f4; --shade: #0004; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --soft: #a0a0a0; --line: #3a3a3a; --tint: #222; --shade: #fff4; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 8px 0 12px; }
h2 { font-size: 1.25rem; margin: 36px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 24px 0 6px; }
p { margin: 8px 0; max-width: 75ch; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
/* a shadow at the right edge says that there is more; its cover scrolls along and hides it at the end */
div.scroll { background:
  linear-gradient(var(--paper), var(--paper)) right / 24px 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
thead th { font-size: 0.85rem; color: var(--soft); line-height: 1.25; }
tbody th, .text, thead th:first-child { text-align: left; }
tbody th { font-weight: normal; min-width: 9em; }
th:first-child { position: sticky; left: 0; background: var(--paper); padding-left: 0; }
.legend { columns: 2 24em; margin: 8px 0; padding-left: 18px; color: var(--soft); font-size: 0.85rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0 16px; }
figure { margin: 0; max-width: 100%; }
img { display: block; width: 100%; height: auto; background: var(--tint); }
.crisp { image-rendering: pixelated; }
figcaption { font-size: 0.8rem; color: var(--soft); line-height: 1.3; padding-top: 4px; }
.bar { display: flex; align-items: center; gap: 6px; }
.bar img { flex: 1; height: 8px; min-width: 0; }
.numbers { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 4px 0 8px; font-size: 0.9rem; }
.numbers div { display: flex; gap: 6px; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
details { margin: 36px 0; border-top: 1px solid var(--line); padding-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--tint); padding: 12px; font-size: 0.8rem; }
@media (max-width: 700px) {
  figure { max-width: calc(50% - 6px); }
  table { font-size: 0.9rem; }
  th, td { padding: 6px 7px; }
  tbody th { min-width: 7.5em; }
}
"""
