"""The page that shows all runs of a sweep: a line each, through its settings to its score."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ud2m.reports.page import render_page
from ud2m.reports.plots import Curve, Tick

WIDTH, HEIGHT, LEFT, TOP = 200, 360, 110, 60
"""Pixels between axes, of an axis, and around."""
COLOURS = ((140, 80, 190), (33, 150, 140), (235, 180, 20))
"""Of the worst, a middling and the best score, on white and on black."""


@dataclass(frozen=True)
class Axis:
    """A vertical axis.

    Attributes:
        name: above it.
        x: its place.
        share: where a value lies on it, 0 at its lower end and 1 at its upper one.
        ticks: the values that are written beside it.
    """

    name: str
    x: int
    share: Callable[[Any], float]
    ticks: Sequence[Tick]


def sweep_page(title: str, rows: Sequence[Mapping[str, Any]], settings: Sequence[str], score: str = "score") -> str:
    """Return a page with parallel coordinates of the runs that have a score.

    Args:
        title: heading.
        rows: one mapping per run, with ``run``, settings as text and ``score``.
        settings: keys of the axes; those with one value over all runs are left out.
        score: key of the last axis.
    """
    done = sorted((row for row in rows if row.get(score) is not None), key=lambda row: row[score])  # the best on top
    varied = [key for key in settings if len({row.get(key) for row in done}) > 1]
    keys = [*varied, score] if done else []
    axes = [_axis(key, LEFT + k * WIDTH, [row.get(key) for row in done]) for k, key in enumerate(keys)]
    failed = len(rows) - len(done)
    return render_page(
        "sweep",
        title=title,
        axes=axes,
        lines=[_line(row, axes) for row in done],
        top=TOP,
        bottom=TOP + HEIGHT,
        width=LEFT + WIDTH * len(axes),
        notes=f"{len(done)} runs" + (f", and {failed} that failed: see sweep.md" if failed else ""),
    )


def _line(row: Mapping[str, Any], axes: Sequence[Axis]) -> Curve:
    shares = [axis.share(row.get(axis.name)) for axis in axes]
    said = ", ".join(f"{axis.name} = {_text(row.get(axis.name))}" for axis in axes)
    points = [(axis.x, _height(share)) for axis, share in zip(axes, shares, strict=True)]
    return Curve(points, _colour(shares[-1]), f"run {row['run']}: {said}")


def _height(share: float) -> float:
    return round(TOP + HEIGHT * (1 - share), 1)


def _axis(name: str, x: int, values: Sequence[Any]) -> Axis:
    numbers = sorted(number for number in map(_number, values) if number is not None)
    if len(numbers) < len(values):
        words = sorted({_text(value) for value in values})
        spread = {word: i / max(1, len(words) - 1) for i, word in enumerate(words)}
        ticks = [Tick(_height(share), word) for word, share in spread.items()]
        return Axis(name, x, lambda value: spread[_text(value)], ticks)
    low, middle, high = numbers[0], numbers[len(numbers) // 2], numbers[-1]
    scale = math.log if low > 0 and high > 50 * low else float  # several orders of magnitude
    span = scale(high) - scale(low)

    def share(value: Any) -> float:
        return (scale(float(value)) - scale(low)) / span if span else 0.5

    return Axis(name, x, share, [Tick(_height(share(n)), _text(n)) for n in sorted({low, middle, high})])


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _colour(share: float) -> str:
    k, part = divmod(min(share, 0.999) * (len(COLOURS) - 1), 1)
    mixed = [round(a + part * (b - a)) for a, b in zip(COLOURS[int(k)], COLOURS[int(k) + 1], strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)
