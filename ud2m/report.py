"""Results for readers: one self-contained HTML file, and the same table as plain text for a console."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ud2m.images import data_url, std_image, std_scale
from ud2m.output import write_bytes

MISSING = "–"
MAX_SAMPLES = 8
MAX_SIDE = 512
"""Larger pictures are shown reduced; the files beside the report keep every pixel."""

_DISPLAY = 256  # CSS pixels, four in a row; smaller pictures are enlarged by a whole factor
_HOLE = 0.85  # light grey leaves the measured pixels readable; black would pass for dark ones
_IMAGE_RANGE = (-0.5, 1.5)  # an observation outside is no image in [0, 1] (a sinogram, say) and is rescaled


@dataclass(frozen=True)
class Column:
    """How one key of the rows is shown.

    ``best`` says which value wins: ``max``, ``min``, ``one`` (nearest to 1 as a ratio) or None (no contest).
    A column with ``variants`` also describes keys with a suffix (``lpips_alex``).
    """

    key: str
    heading: str
    meaning: str = ""
    format: str = ".4g"
    best: str | None = None
    variants: bool = False


COLUMNS = (
    Column("method", "Method"),
    Column("data", "Data"),
    Column("size", "Size", "height x width of the images, in pixels"),
    Column("operator", "Operator"),
    Column("sigma_y", "σ_y", "standard deviation of the noise in y; images lie in [0, 1]", "g"),
    Column("nfe", "NFE", "network evaluations for one sample", "g"),
    Column("psnr_mean", "PSNR of mean [dB]", "of the samples' mean, peak 1; higher is better", ".2f", "max"),
    Column("psnr", "PSNR [dB]", "of single samples, peak 1; higher is better", ".2f", "max"),
    Column("ssim_mean", "SSIM of mean", "structural similarity of the mean; 1 is equal", ".3f", "max"),
    Column("ssim", "SSIM", "structural similarity of single samples; 1 is equal", ".3f", "max"),
    Column(
        "lpips_mean",
        "LPIPS of mean",
        "perceptual distance of the mean; lower is better",
        ".3f",
        "min",
        variants=True,
    ),
    Column(
        "lpips",
        "LPIPS",
        "perceptual distance of single samples; lower is better",
        ".3f",
        "min",
        variants=True,
    ),
    Column("lpips_backend", "LPIPS network"),
    Column("dists_mean", "DISTS of mean", "structure and texture distance of the mean; lower is better", ".3f", "min"),
    Column("dists", "DISTS", "structure and texture distance of single samples; lower is better", ".3f", "min"),
    Column("prior_features", "Prior features", "distance in the prior's own features; lower is better", ".3f", "min"),
    Column(
        "frechet",
        "Fréchet distance",
        "between the sets of samples and references; lower is better",
        ".3f",
        "min",
        variants=True,
    ),
    Column("frechet_backend", "Fréchet features"),
    Column("kid", "Kernel distance", "between both sets, unbiased (KID); lower is better", ".4g", "min", variants=True),
    Column("cfid", "CFID", "Fréchet distance given the observation; lower is better", ".3f", "min", variants=True),
    Column("cw2", "Conditional W2", "of Gaussian fits of pixels given y; lower is better", ".4f", "min"),
    Column("cw2_debiased", "Conditional W2, debiased", "0 on average where both laws agree", ".4f"),
    Column("energy", "Energy score", "proper score of the samples together, per pixel; lower is better", ".4f", "min"),
    Column("diversity_lpips", "LPIPS between samples", "of the same observation", ".3f", variants=True),
    Column("diversity", "Std of samples", "root mean square over pixels, image units", ".4f"),
    Column("coverage_50", "Coverage 50 %", "share of true pixels in intervals of about 50 %", ".3f"),
    Column("coverage_80", "Coverage 80 %", "share of true pixels in intervals of about 80 %", ".3f"),
    Column("coverage_90", "Coverage 90 %", "share of true pixels in intervals of about 90 %", ".3f"),
    Column("calibration_error", "Calibration error", "mean distance of coverage from its level", ".3f", "min"),
    Column("sbc_p", "SBC p", "of uniform ranks; small: not calibrated", ".2g"),
    Column("r", "r", "std of the samples / RMSE of their mean; about 1 when calibrated", ".2f", "one"),
    Column(
        "residual",
        "Residual",
        # a check and no contest: every value near 1 is right, and of JPEG files every small one
        "|A x - y| / (σ_y √m); about 1 when x explains y; JPEG: share of changed DCT coefficients",
        ".3g",
    ),
    Column("residual_p", "Residual p", "chi^2 probability of the residual, 0.5 on average when calibrated", ".2f"),
    Column("seconds_per_image", "Time [s]", "seconds of computing for one sample of one image", ".3g"),
    Column("peak_memory", "Memory [MB]", "peak while sampling and scoring: of the GPU, else of the process", ".0f"),
)
SETTING = ("data", "size", "operator", "sigma_y")
"""Keys of a row that say what was measured on: scores compare only where these agree."""
_LPIPS_KEYS = ("lpips", "lpips_mean")
_LPIPS_BACKEND = "lpips_backend"  # a row's word on the network behind them


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
        _tag("h1", _text(report.title))
        + _paragraphs(report.summary)
        + _table(report.table)
        + "".join(_section(section) for section in report.sections)
        + _settings(report.settings)
    )
    return html_page(report.title, _STYLE, body)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as an aligned plain-text table; ``*`` marks the best value of a column."""
    if not rows:
        return "(no results)"
    columns = table_columns(rows)
    best = best_cells(rows, columns)
    lines = [[column.heading for column in columns]]
    for index, row in enumerate(rows):
        lines.append([_console_cell(column, row, (index, column.key) in best) for column in columns])
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    flush_left = [all(_number(row.get(column.key)) is None for row in rows) for column in columns]
    table = [_aligned(line, widths, flush_left) for line in lines]
    table.insert(1, "  ".join("-" * width for width in widths))
    notes = ["* best in its column"] if best else []
    notes += [f"{column.heading}: {column.meaning}" for column in columns if column.meaning]
    return "\n".join([*table, "", *notes])


def table_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns that the rows need: known keys in the order of `COLUMNS`, then unknown ones as met.

    Where all rows agree on ``lpips_backend`` it moves into the headings of the LPIPS columns.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    backends = {row[_LPIPS_BACKEND] for row in rows if row.get(_LPIPS_BACKEND) is not None}
    if len(backends) == 1:
        keys.remove(_LPIPS_BACKEND)
    rank = {column.key: index for index, column in enumerate(COLUMNS)}
    columns = sorted((_column(key) for key in keys), key=lambda c: rank.get(_base(c.key), len(rank)))
    return [_with_backend(column, backends) for column in columns]


def best_cells(rows: Sequence[Mapping[str, Any]], columns: Iterable[Column]) -> set[tuple[int, str]]:
    """Return (row index, key) of the winners, among rows of the same data, size, operator and noise.

    Values that look equal as shown win together; where there is nothing to compare with, nobody wins.
    """
    best = set()
    for column in columns:
        for group in _comparable(rows):
            scores = {i: _score(column, rows[i].get(column.key)) for i in group}
            valid = {i: score for i, score in scores.items() if score is not None}
            if len(valid) < 2:
                continue
            winner = max(valid, key=lambda i: valid[i])
            shown = format_value(column, rows[winner][column.key])
            best |= {(i, column.key) for i in valid if format_value(column, rows[i][column.key]) == shown}
    return best


def format_value(column: Column, value: Any) -> str:
    """Return the text of one cell; None and NaN are missing and become a dash."""
    number = _number(value)
    if number is None:
        return MISSING if value is None else str(value)
    if math.isnan(number):
        return MISSING
    return str(value) if isinstance(value, int) and column.format.endswith("g") else format(number, column.format)


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _score(column: Column, value: Any) -> float | None:
    number = _number(value)
    if column.best is None or number is None or math.isnan(number):
        return None
    if column.best == "one":
        return -abs(math.log(number)) if number > 0 else -math.inf
    return number if column.best == "max" else -number


def _comparable(rows: Sequence[Mapping[str, Any]]) -> Iterable[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(str([row.get(key) for key in SETTING]), []).append(index)
    return groups.values()


def _base(key: str) -> str:
    """Return the key that describes ``key`` in COLUMNS: itself, or the longest that it is a variant of."""
    known = [c.key for c in COLUMNS if key == c.key or (c.variants and key.startswith(c.key + "_"))]
    return max(known, key=len, default=key)


def _column(key: str) -> Column:
    base = _base(key)
    described = next((column for column in COLUMNS if column.key == base), None)
    if described is None:
        return Column(key, key.replace("_", " "))
    if key == base:
        return described
    return replace(described, key=key, heading=f"{described.heading} ({key[len(base) + 1 :]})")


def _with_backend(column: Column, backends: set[str]) -> Column:
    if len(backends) != 1 or column.key not in _LPIPS_KEYS:
        return column
    (name,) = backends
    return replace(column, heading=f"{column.heading} ({name})")


def _console_cell(column: Column, row: Mapping[str, Any], is_best: bool) -> str:
    text = format_value(column, row.get(column.key))
    room = " " if column.best else ""  # keeps the decimal points of marked and unmarked values in line
    return "".join(c if c.isprintable() else " " for c in text) + ("*" if is_best else room)


def _aligned(cells: Sequence[str], widths: Sequence[int], flush_left: Sequence[bool]) -> str:
    columns = zip(cells, widths, flush_left, strict=True)
    return "  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in columns).rstrip()


def _text(value: Any) -> str:
    return html.escape(str(value))


def _tag(name: str, content: str, **attributes: str) -> str:
    """Return an element; ``content`` is HTML already, attribute values are plain text (``class_``: class)."""
    return f"<{name}{_attributes(attributes)}>{content}</{name}>"


def _attributes(attributes: Mapping[str, str]) -> str:
    return "".join(f' {key.rstrip("_")}="{_text(value)}"' for key, value in attributes.items())


def _paragraphs(text: str) -> str:
    return "".join(_tag("p", _text(part)) for part in text.split("\n\n") if part.strip())


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = table_columns(rows)
    best = best_cells(rows, columns)
    head = _tag("tr", "".join(_tag("th", _text(column.heading), scope="col") for column in columns))
    body = "".join(_table_row(index, row, columns, best) for index, row in enumerate(rows))
    table = _tag("table", _tag("thead", head) + _tag("tbody", body))
    box = _tag("div", table, class_="scroll", tabindex="0")
    return _tag("h2", "Results") + box + _legend(columns, has_best=bool(best))


def _table_row(index: int, row: Mapping[str, Any], columns: Sequence[Column], best: set[tuple[int, str]]) -> str:
    cells = []
    for column in columns:
        value = row.get(column.key)
        text = _text(format_value(column, value))
        content = _tag("b", text) if (index, column.key) in best else text
        if column.key == "method":
            cells.append(_tag("th", content, scope="row"))
        else:
            cells.append(_tag("td", content, class_="text" if isinstance(value, str) else "number"))
    return _tag("tr", "".join(cells))


def _legend(columns: Sequence[Column], has_best: bool) -> str:
    items = [_tag("li", f"{_tag('i', _text(c.heading))}: {_text(c.meaning)}") for c in columns if c.meaning]
    if has_best:
        items.insert(0, _tag("li", f"{_tag('b', 'Bold')}: best in its column, for the same data and operator"))
    return _tag("ul", "".join(items), class_="legend") if items else ""


def _section(section: Section) -> str:
    scale = max((std_scale(entry.std) for entry in section.entries if entry.std is not None), default=1.0)
    entries = "".join(_entry(entry, scale) for entry in section.entries)
    return _tag("section", _tag("h2", _text(section.title)) + _paragraphs(section.text) + entries)


def _entry(entry: Entry, scale: float) -> str:
    count = len(entry.samples)
    shown = entry.samples[:MAX_SAMPLES]
    samples = [_picture(x, f"Sample {k}", f"{entry.name}: sample {k}") for k, x in enumerate(shown, start=1)]
    rest = f"{count - len(shown)} more samples are in the folder samples/." if count > len(shown) else ""
    content = (
        _tag("h3", _text(entry.name))
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
    return _tag("figure", img + _tag("figcaption", _text(caption) + extra), style=f"width: {display:.0f}px")


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
    return _tag("div", _tag("dt", _text(column.heading)) + _tag("dd", _text(format_value(column, value))))


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    text = json.dumps(settings, indent=2, ensure_ascii=False, default=str)
    content = _tag("summary", "Settings") + _tag("pre", _text(text), class_="scroll", tabindex="0")
    return _tag("details", content)


def markdown_line(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table; a bar would begin a new cell, and a new line end the table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def html_page(title: str, style: str, body: str, script: str = "") -> str:
    """Return a page that loads nothing, and runs nothing but ``script``; ``body`` is HTML, ``title`` text."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        policy, script = f"{policy}; script-src 'unsafe-inline'", f"<script>{script}</script>\n"
    return _PAGE.format(policy=policy, title=_text(title), style=style, body=body, script=script)


def _require(condition: bool, name: str, what: str, wanted: str, got: Tensor) -> None:
    if not condition:
        raise ValueError(f"report entry {name!r}: {what} must have shape {wanted}, got {tuple(got.shape)}")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>{body}</main>
{script}</body>
</html>
"""

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
