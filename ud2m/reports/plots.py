"""The plots of a board, as plain data: coordinates in a picture of 360 x 228 pixels, axes at its left and bottom."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ud2m.evaluation.table import BOUNDS, Column, format_value
from ud2m.reports.tables import Rows, cell_of

LEFT, RIGHT, TOP, BOTTOM = 56, 346, 20, 190
"""Ends of the axes."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "currentColor")
"""Of Okabe and Ito; the last one is black on white, and white on black."""


@dataclass(frozen=True)
class Tick:
    """A value on an axis: its place there, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A line through points (x, y); pointing at it shows the title."""

    points: Sequence[tuple[float, float]]
    colour: str
    title: str


@dataclass(frozen=True)
class Mark:
    """A numbered dot, and the finite ends of its error bar; pointing at it shows the title."""

    x: float
    y: float
    number: int
    colour: str
    title: str
    bar: Sequence[float] = ()


@dataclass(frozen=True)
class Plot:
    """A plot: what it is called where it is not seen, its title, the axes, and what is drawn."""

    label: str
    title: str
    x_title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark] = ()
    curves: Sequence[Curve] = ()


def colour_of(k: int) -> str:
    """Return the colour of the k-th method."""
    return COLOURS[k % len(COLOURS)]


def scatter(rows: Rows, column: Column, cost: str, cost_name: str) -> Plot | None:
    """Return quality against cost, logarithmic and with intervals, of the methods that evaluate a network.

    Args:
        rows: the methods, numbered from 1.
        column: quality.
        cost: key of the cost.
        cost_name: in words.
    """
    shown = [k for k, row in enumerate(rows) if row["nfe"] > 0 and _finite(row, [column.key])]
    if not shown:
        return None
    costs = [math.log10(rows[k][cost]) for k in shown]
    left, right = min(costs) - 0.15, max(costs) + 0.2
    low, high = _with_margin([y for k in shown for y in _finite(rows[k], [column.key + end for end in ("", *BOUNDS)])])
    across, up = _scale(left, right, LEFT, RIGHT), _scale(low, high, BOTTOM, TOP)
    steps = (1, 2, 5) if right - left < 2 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(left), math.ceil(right)) for step in steps]
    heights = [low + (high - low) * step / 4 for step in range(5)]
    marks = []
    for k in shown:
        row = rows[k]
        title = f"{row['method']}: {cell_of(column, row)} at {row[cost]:g}"
        bar = [up(bound) for bound in _finite(row, [column.key + end for end in BOUNDS])]
        marks.append(Mark(across(math.log10(row[cost])), up(row[column.key]), k + 1, colour_of(k), title, bar))
    return Plot(
        f"{column.heading} against {cost_name}",
        column.heading,
        cost_name,
        [Tick(across(math.log10(tick)), f"{tick:g}") for tick in ticks if left <= math.log10(tick) <= right],
        [Tick(up(height), format_value(column, height)) for height in heights],
        marks,
    )


def calibration(curves: Sequence[tuple[str, Mapping[str, Any]]]) -> Plot | None:
    """Return coverage against its level; the diagonal is a calibrated sampler.

    Args:
        curves: of each method, its name and ``calibration``, pairs (level, coverage), where it was measured.
    """
    if not any("calibration" in curve for _, curve in curves):
        return None
    across, up = _scale(0, 1, LEFT, RIGHT), _scale(0, 1, BOTTOM, TOP)
    lines = [Curve([(LEFT, BOTTOM), (RIGHT, TOP)], "gray", "calibrated")]
    for k, (name, curve) in enumerate(curves):
        points = [(across(level), up(found)) for level, found in curve.get("calibration", [])]
        lines.append(Curve(points, colour_of(k), name))
    return Plot(
        "Coverage of credible intervals against their level",
        "Coverage of credible intervals",
        "level of the interval",
        [Tick(across(tick), f"{tick:g}") for tick in (0, 0.5, 1)],
        [Tick(up(tick), f"{tick:g}") for tick in (0, 0.5, 1)],
        curves=lines,
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the map from values in [low, high] to places from ``start`` to ``end``, to a tenth of a pixel."""
    return lambda value: round(start + (end - start) * (value - low) / (high - low), 1)


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _finite(row: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    """Return the values that are finite numbers."""
    values = [row.get(key) for key in keys]
    return [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
