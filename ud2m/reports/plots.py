"""The plots of a board, as plain data: coordinates in a picture of 360 x 228 pixels, axes at its left and bottom.

A plot has titles, ticks (place, text), curves (points, colour, title) and marks (x, y, finite ends of the error bar,
number, colour, title). Pointing at a curve or a mark shows its title.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ud2m.evaluation.table import BOUNDS, Column, format_value
from ud2m.reports.tables import Rows, cell_of

LEFT, RIGHT, TOP, BOTTOM = 56, 346, 20, 190
"""Ends of the axes."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "currentColor")
"""Of Okabe and Ito; the last one is black on white, and white on black."""


def colour_of(k: int) -> str:
    """Return the colour of the k-th method."""
    return COLOURS[k % len(COLOURS)]


def scatter(rows: Rows, column: Column, cost: str, cost_name: str) -> dict[str, Any] | None:
    """Return quality against cost, logarithmic and with intervals, of the methods that evaluate a network.

    Args:
        rows: the methods, numbered from 1.
        column: quality.
        cost: key of the cost.
        cost_name: in words.
    """
    keys = [column.key + end for end in ("", *BOUNDS)]
    shown = {k: _finite(row, keys) for k, row in enumerate(rows) if row["nfe"] > 0 and _finite(row, keys[:1])}
    if not shown:
        return None
    costs = [math.log10(rows[k][cost]) for k in shown]
    left, right = min(costs) - 0.15, max(costs) + 0.2
    values = [value for found in shown.values() for value in found]
    margin = 0.08 * (max(values) - min(values)) or 0.5
    low, high = min(values) - margin, max(values) + margin
    across, up = _scale(left, right, LEFT, RIGHT), _scale(low, high, BOTTOM, TOP)
    steps = (1, 2, 5) if right - left < 2 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(left), math.ceil(right)) for step in steps]
    marks = []
    for k, (value, *bounds) in shown.items():
        title = f"{rows[k]['method']}: {cell_of(column, rows[k])} at {rows[k][cost]:g}"
        bar = [up(bound) for bound in bounds]
        marks.append((across(math.log10(rows[k][cost])), up(value), bar, k + 1, colour_of(k), title))
    return {
        "title": column.heading,
        "x_title": cost_name,
        "x_ticks": [(across(math.log10(tick)), f"{tick:g}") for tick in ticks if left <= math.log10(tick) <= right],
        "y_ticks": [(up(height), format_value(column, height)) for height in np.linspace(low, high, 5).tolist()],
        "curves": [],
        "marks": marks,
    }


def calibration(curves: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Return coverage against its level; the diagonal is a calibrated sampler.

    Args:
        curves: of each method, its name and ``calibration``, pairs (level, coverage), where it was measured.
    """
    if not any("calibration" in curve for _, curve in curves):
        return None
    across, up = _scale(0, 1, LEFT, RIGHT), _scale(0, 1, BOTTOM, TOP)
    lines = [
        ([(across(level), up(found)) for level, found in curve.get("calibration", [])], colour_of(k), name)
        for k, (name, curve) in enumerate(curves)
    ]
    return {
        "title": "Coverage of credible intervals",
        "x_title": "level of the interval",
        "x_ticks": [(across(tick), f"{tick:g}") for tick in (0, 0.5, 1)],
        "y_ticks": [(up(tick), f"{tick:g}") for tick in (0, 0.5, 1)],
        "curves": [([(LEFT, BOTTOM), (RIGHT, TOP)], "gray", "calibrated"), *lines],
        "marks": [],
    }


def reliability(curves: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Return the error of the mean against the samples' standard deviation, both logarithmic; the diagonal is right.

    Args:
        curves: of each method, its name and ``spatial``, triples (deviation, error, share), where it was measured.
    """
    found = [[(d, e) for d, e, _ in curve.get("spatial", []) if d > 0 and e > 0] for _, curve in curves]
    ends = [value for points in found for point in points for value in point]
    if not ends:
        return None
    low, high = math.log10(min(ends)) - 0.05, math.log10(max(ends)) + 0.05
    across, up = _scale(low, high, LEFT, RIGHT), _scale(low, high, BOTTOM, TOP)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high)) for step in (1, 3)]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return {
        "title": "Error of the mean",
        "x_title": "standard deviation of the samples",
        "x_ticks": [(across(math.log10(tick)), f"{tick:g}") for tick in ticks],
        "y_ticks": [(up(math.log10(tick)), f"{tick:g}") for tick in ticks],
        "curves": [
            ([(LEFT, BOTTOM), (RIGHT, TOP)], "gray", "calibrated"),
            *(
                ([(across(math.log10(d)), up(math.log10(e))) for d, e in points], colour_of(k), name)
                for k, (points, (name, _)) in enumerate(zip(found, curves, strict=True))
            ),
        ],
        "marks": [],
    }


def frame_lines(title: str, lines: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return lines of numbers, from 0 on, over the frames that they belong to, by their names."""
    high = max((value for values in lines.values() for value in values), default=0) or 1.0
    last = max(len(values) for values in lines.values())
    across, up = _scale(1, max(last, 2), LEFT, RIGHT), _scale(0, 1.05 * high, BOTTOM, TOP)
    return {
        "title": title,
        "x_title": "frame",
        "x_ticks": [(across(tick), f"{tick:g}") for tick in dict.fromkeys((1, (last + 1) // 2, last))],
        "y_ticks": [(up(tick), f"{tick:.3g}") for tick in (0, high / 2, high)],
        "curves": [
            ([(across(k), up(value)) for k, value in enumerate(values, start=1)], colour_of(number), name)
            for number, (name, values) in enumerate(lines.items())
        ],
        "marks": [],
    }


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the map from values in [low, high] to places from ``start`` to ``end``, to a tenth of a pixel."""
    return lambda value: round(start + (end - start) * (value - low) / (high - low), 1)


def _finite(row: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    """Return the values that are finite numbers."""
    values = [row.get(key) for key in keys]
    return [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
