"""The page that shows all runs of a sweep: a line each, through its settings to its score."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, to_hex

from ud2m.reports.page import render_page

WIDTH, HEIGHT, LEFT, TOP = 200, 360, 110, 60
"""Pixels between axes, of an axis, and around."""
COLOURS = LinearSegmentedColormap.from_list("scores", ["#8c50be", "#21968c", "#ebb414"])
"""Of the worst, a middling and the best score, on white and on black."""
SCORE = "score"


def sweep_page(title: str, rows: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> str:
    """Return a page with parallel coordinates of the runs that have a score.

    Args:
        title: heading.
        rows: one mapping per run, with ``run``, settings as text and ``score``.
        settings: keys of the axes; those with one value over all runs are left out.
    """
    done = sorted((row for row in rows if row.get(SCORE) is not None), key=lambda row: row[SCORE])  # the best on top
    varied = [key for key in settings if len({row.get(key) for row in done}) > 1]
    keys = [*varied, SCORE] if done else []
    heights, axes = [], []
    for k, key in enumerate(keys):
        along, ticks = _axis([row.get(key) for row in done])
        heights.append(along)
        axes.append({"name": key, "x": LEFT + k * WIDTH, "ticks": ticks})
    lines = []
    for row, ys in zip(done, zip(*heights, strict=True), strict=True):
        said = ", ".join(f"{key} = {_text(row.get(key))}" for key in keys)
        points = [(axis["x"], y) for axis, y in zip(axes, ys, strict=True)]
        lines.append((points, to_hex(COLOURS(1 - (ys[-1] - TOP) / HEIGHT)), f"run {row['run']}: {said}"))
    failed = len(rows) - len(done)
    return render_page(
        "sweep",
        title=title,
        axes=axes,
        lines=lines,
        top=TOP,
        bottom=TOP + HEIGHT,
        width=LEFT + WIDTH * len(axes),
        notes=f"{len(done)} runs" + (f", and {failed} that failed: see sweep.md" if failed else ""),
    )


def _axis(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the heights of values, and ticks: the lowest, a middling and the highest number, or all words in order."""
    numbers = [number for number in map(_number, values) if number is not None]
    if len(numbers) < len(values):
        texts = [_text(value) for value in values]
        words = sorted(set(texts))
        places = {word: _height(i / max(1, len(words) - 1)) for i, word in enumerate(words)}
        return [places[text] for text in texts], [(y, word) for word, y in places.items()]
    scale = math.log if min(numbers) > 0 and max(numbers) > 50 * min(numbers) else float  # several orders of magnitude
    low, high = scale(min(numbers)), scale(max(numbers))
    heights = [_height((scale(number) - low) / (high - low) if high > low else 0.5) for number in numbers]
    ordered = sorted(zip(heights, numbers, strict=True))
    return heights, [(y, _text(n)) for y, n in sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})]


def _height(share: float) -> float:
    return round(TOP + HEIGHT * (1 - share), 1)


def _number(value: Any) -> float | None:
    with suppress(TypeError, ValueError):
        if math.isfinite(float(value)):
            return float(value)
    return None


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
