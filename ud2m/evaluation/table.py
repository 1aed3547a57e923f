"""How numbers are shown: the columns of tables, the texts of their cells, and their best values."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from numbers import Real
from typing import Any

MISSING = "–"
BETTER: dict[str | None, str] = {"max": "; higher is better", "min": "; lower is better"}
BOUNDS = ("_low", "_high")
"""Ends of the names of the bounds of an interval."""


@dataclass(frozen=True)
class Column:
    """All that is known of one number, or of another key of the rows: the one record of it.

    Attributes:
        key: name in ``metrics.json``.
        heading: of its column.
        meaning: in words; ``legend`` adds which values are better.
        format: of its values.
        best: which value wins: ``max``, ``min``, ``one`` (nearest to 1 as a ratio) or None (no contest).
        selects: whether checkpoints and settings may be chosen by it.
        variants: whether it also describes keys with a suffix (``lpips_vgg``).
    """

    key: str
    heading: str
    meaning: str = ""
    format: str = ".4g"
    best: str | None = None
    selects: bool = False
    variants: bool = False

    @property
    def legend(self) -> str:
        """What the number means and which values are better; empty where the heading says it."""
        return f"{self.meaning}{BETTER.get(self.best, '')}" if self.meaning else ""

    def quality(self, value: Any) -> float | None:
        """Return a number that is higher for better values; None where there is no value, or no contest."""
        number = number_of(value)
        if self.best is None or number is None or math.isnan(number):
            return None
        if self.best == "one":
            return -abs(math.log(number)) if number > 0 else -math.inf
        return number if self.best == "max" else -number


COLUMNS = (
    Column("method", "Method"),
    Column("data", "Data"),
    Column("size", "Size", "height x width of the images, in pixels; of videos frames before"),
    Column("operator", "Operator"),
    Column("sigma_y", "σ_y", "standard deviation of the noise in y; images lie in [0, 1]", "g"),
    Column("nfe", "NFE", "network evaluations for one sample", "g"),
    Column("psnr_mean", "PSNR of mean [dB]", "of the samples' mean, peak 1", ".2f", "max", selects=True),
    Column("psnr_limit", "PSNR of mean, S → ∞ [dB]", "of the mean of infinitely many", ".2f", "max", selects=True),
    Column("psnr", "PSNR [dB]", "of single samples, peak 1", ".2f", "max", selects=True),
    Column("psnr_motion_mean", "Motion PSNR of mean [dB]", "of differences between frames, of the mean", ".2f", "max"),
    Column("psnr_motion", "Motion PSNR [dB]", "of differences between frames", ".2f", "max"),
    Column("ssim_mean", "SSIM of mean", "structural similarity of the mean, 1 if equal", ".3f", "max", selects=True),
    Column("ssim", "SSIM", "structural similarity of single samples, 1 if equal", ".3f", "max", selects=True),
    Column("lpips_mean", "LPIPS of mean", "perceptual distance of the mean", ".3f", "min", selects=True, variants=True),
    Column(
        "lpips_limit",
        "LPIPS, S → ∞",
        "of the mean of infinitely many samples' features: single samples less half of that between samples",
        ".3f",
        "min",
        selects=True,
        variants=True,
    ),
    Column("lpips", "LPIPS", "perceptual distance of single samples", ".3f", "min", selects=True, variants=True),
    Column("lpips_backend", "LPIPS network"),
    Column("dists_mean", "DISTS of mean", "structure and texture distance of the mean", ".3f", "min", selects=True),
    Column("dists", "DISTS", "structure and texture distance of single samples", ".3f", "min", selects=True),
    Column("prior_features", "Prior features", "distance in the prior's own features", ".3f", "min"),
    Column("frechet", "Fréchet distance", "between the sets of samples and references", ".3f", "min", variants=True),
    Column("frechet_backend", "Fréchet features"),
    Column("kid", "Kernel distance", "between both sets, unbiased (KID)", ".4g", "min", variants=True),
    Column("cfid", "CFID", "Fréchet distance given the observation", ".3f", "min", variants=True),
    Column("cw2", "Conditional W2", "of Gaussian fits of pixels given y", ".4f", "min"),
    Column("cw2_debiased", "Conditional W2, debiased", "0 on average where both laws agree", ".4f"),
    Column("energy", "Energy score", "proper score of the samples together, per pixel", ".4f", "min", selects=True),
    Column("diversity_lpips", "LPIPS between samples", "of the same observation", ".3f", variants=True),
    Column("diversity", "Std of samples", "root mean square over pixels, image units", ".4f"),
    Column("coverage_50", "Coverage 50 %", "share of true pixels in intervals of about 50 %", ".3f"),
    Column("coverage_80", "Coverage 80 %", "share of true pixels in intervals of about 80 %", ".3f"),
    Column("coverage_90", "Coverage 90 %", "share of true pixels in intervals of about 90 %", ".3f"),
    Column("calibration_error", "Calibration error", "mean distance of coverage from its level", ".3f", "min"),
    Column("spatial_error", "Std against error", "distance of std and error by place, octaves", ".2f", "min"),
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
_LPIPS = ("lpips", "lpips_mean", "lpips_limit")
_LPIPS_BACKEND = "lpips_backend"  # a row's word on the network behind them


def meanings(columns: Sequence[Column]) -> list[str]:
    """Return what the columns mean, where their headings do not say it."""
    return [f"{column.heading}: {column.legend}" for column in columns if column.legend]


def table_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns that the rows need: known keys in the order of `COLUMNS`, then unknown ones as met.

    Where all rows agree on ``lpips_backend`` it moves into the headings of the LPIPS columns.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    backends = {row[_LPIPS_BACKEND] for row in rows if row.get(_LPIPS_BACKEND) is not None}
    if len(backends) == 1:
        keys.remove(_LPIPS_BACKEND)
    columns = [column_of(key) for key in sorted(keys, key=_place)]
    network = f" ({backends.pop()})" if len(backends) == 1 else ""
    return [replace(c, heading=c.heading + network) if c.key in _LPIPS else c for c in columns]


def selecting(key: str) -> Column:
    """Return the record of a number that checkpoints or settings are chosen by.

    Raises:
        ValueError: for a number that they cannot be chosen by.
    """
    column = column_of(key)
    if not column.selects:
        names = [column.key for column in COLUMNS if column.selects]
        raise ValueError(f"{key!r} is no number to choose by; take one of {', '.join(names)}")
    return column


def metric_of(key: str) -> str:
    """Return the metric that computes a number: ``psnr`` of ``psnr_mean``, ``lpips_vgg`` of ``lpips_limit_vgg``."""
    return key.replace("_mean", "", 1).replace("lpips_limit", "lpips", 1)


def without_bounds(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the bounds of its intervals."""
    return {key: value for key, value in row.items() if not key.endswith(BOUNDS)}


def best_cells(rows: Sequence[Mapping[str, Any]], columns: Iterable[Column]) -> set[tuple[int, str]]:
    """Return (row index, key) of the winners, among rows of the same data, size, operator and noise.

    Values that look equal as shown win together; where there is nothing to compare with, none does.
    """
    best = set()
    for column, group in product(columns, by_setting(rows).values()):
        scores = {i: column.quality(rows[i].get(column.key)) for i in group}
        valid = {i: score for i, score in scores.items() if score is not None}
        if len(valid) > 1:
            winner = max(valid, key=lambda i: valid[i])
            shown = format_value(column, rows[winner][column.key])
            best |= {(i, column.key) for i in valid if format_value(column, rows[i][column.key]) == shown}
    return best


def format_value(column: Column, value: Any) -> str:
    """Return the text of one cell; None and NaN are missing and become a dash."""
    number = number_of(value)
    if number is None:
        return MISSING if value is None else str(value)
    if math.isnan(number):
        return MISSING
    return str(value) if isinstance(value, int) and column.format.endswith("g") else format(number, column.format)


def number_of(value: Any) -> float | None:
    """Return a number, or a tensor of one, as a float; None for anything else."""
    if getattr(value, "numel", lambda: 0)() == 1:  # a tensor, of which commands know nothing before PyTorch is imported
        return float(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def setting_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a row was measured on: its values of ``SETTING``."""
    return tuple(row.get(key) for key in SETTING)


def by_setting(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[int]]:
    """Return the numbers of the rows that compare with one another, by what they were measured on."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(setting_of(row), []).append(index)
    return groups


def column_of(key: str) -> Column:
    """Return the record of a key: that of ``COLUMNS``, with its suffix in the heading, or a plain one."""
    place = _place(key)
    if place == len(COLUMNS):
        return Column(key, key.replace("_", " "))
    described, suffix = COLUMNS[place], key[len(COLUMNS[place].key) + 1 :]
    return replace(described, key=key, heading=f"{described.heading} ({suffix})") if suffix else described


def described_by(key: str) -> str | None:
    """Return the key in ``COLUMNS`` of what describes a key: ``lpips`` of ``lpips_vgg``; None where nothing does."""
    place = _place(key)
    return COLUMNS[place].key if place < len(COLUMNS) else None


def _place(key: str) -> int:
    """Return which of COLUMNS describes a key: its own record, or that of the longest key that it is a variant of."""
    known = [k for k, c in enumerate(COLUMNS) if key == c.key or (c.variants and key.startswith(c.key + "_"))]
    return max(known, key=lambda k: len(COLUMNS[k].key), default=len(COLUMNS))


def markdown_line(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table; a bar would begin a new cell, and a new line end the table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
