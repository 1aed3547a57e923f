"""One self-contained page that shows all runs of a sweep: a line each, through its settings to its score."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP = 200, 360, 110, 60
"""Pixels between axes, of an axis, and around."""
COLOURS = ((68, 1, 84), (33, 145, 140), (253, 231, 37))
"""Of the worst, a middling and the best score."""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 2em; }}
polyline {{ fill: none; stroke-width: 2; opacity: 0.8; }}
polyline:hover {{ stroke-width: 6; opacity: 1; }}
text {{ font-size: 12px; }}
</style></head><body><h1>{title}</h1>
<p>One line per run, from its settings to its score (the higher, the brighter). Point at a line to see its run.</p>
{svg}
<p>{notes}</p></body></html>
"""


def page(title: str, rows: Sequence[Mapping[str, Any]], settings: Sequence[str], score: str = "score") -> str:
    """Return HTML with parallel coordinates of the runs that have a score.

    Args:
        title: heading. rows: one mapping per run, with ``run``, settings as text and ``score``.
        settings: keys of the axes; those with one value over all runs are left out.
    """
    done = [row for row in rows if row.get(score) is not None]
    varied = [key for key in settings if len({row.get(key) for row in done}) > 1]
    failed = len(rows) - len(done)
    notes = f"{len(done)} runs" + (f", and {failed} that failed: see sweep.md" if failed else "")
    svg = _svg(done, [*varied, score], score) if done else ""
    return PAGE.format(title=html.escape(title), svg=svg, notes=notes)


def _svg(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], score: str) -> str:
    axes = {key: _axis([row.get(key) for row in rows]) for key in keys}
    place = {key: LEFT + i * WIDTH for i, key in enumerate(keys)}
    bottom = TOP + HEIGHT
    parts = []
    for row in sorted(rows, key=lambda row: row[score]):  # the best on top
        height = {key: bottom - HEIGHT * axes[key][0](row.get(key)) for key in keys}
        points = " ".join(f"{place[key]},{height[key]:.1f}" for key in keys)
        said = html.escape(f"run {row['run']}: " + ", ".join(f"{key} = {_text(row.get(key))}" for key in keys))
        colour = _colour(axes[score][0](row[score]))
        parts.append(f'<polyline points="{points}" stroke="{colour}"><title>{said}</title></polyline>')
    for key in keys:
        x = place[key]
        parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="#444"/>')
        parts.append(f'<text x="{x}" y="{TOP - 20}" text-anchor="middle">{html.escape(key)}</text>')
        for label, position in axes[key][1]:
            y = bottom - HEIGHT * position
            parts.append(f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{html.escape(label)}</text>')
    size = f'width="{LEFT + WIDTH * len(keys)}" height="{bottom + 30}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>"


Axis = tuple[Callable[[Any], float], list[tuple[str, float]]]


def _axis(values: Sequence[Any]) -> Axis:
    """Return where a value lies on an axis, in [0, 1], and labels there."""
    numbers = sorted(number for number in map(_number, values) if number is not None)
    if len(numbers) < len(values):
        names = sorted({_text(value) for value in values})
        spread = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
        return (lambda value: spread[_text(value)]), list(spread.items())
    low, middle, high = numbers[0], numbers[len(numbers) // 2], numbers[-1]
    scale = math.log if low > 0 and high > 50 * low else float  # several orders of magnitude
    span = scale(high) - scale(low)

    def where(value: Any) -> float:
        return (scale(float(value)) - scale(low)) / span if span else 0.5

    return where, [(_text(number), where(number)) for number in sorted({low, middle, high})]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _colour(position: float) -> str:
    k, part = divmod(min(position, 0.999) * (len(COLOURS) - 1), 1)
    mixed = [round(a + part * (b - a)) for a, b in zip(COLOURS[int(k)], COLOURS[int(k) + 1], strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)
