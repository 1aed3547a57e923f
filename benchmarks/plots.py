"""Draw the figures of the documents from the stored results in docs/results.

    python benchmarks/plots.py [--output docs/images]

``tradeoff.png``: PSNR against LPIPS of single samples and of means (``tradeoff``); ``evaluations.png``: LPIPS against
network evaluations (``photographs_rivals``, ``photographs_bridges``, and hollow ``photographs_few``), which a sample's
time is proportional to;
``spatial.png``: the error of the mean against the samples' standard deviation, in bins of pixels (``calibration``).
"""

import argparse
import io
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results import load
from ud2m.files import write_bytes
from ud2m.reports.plots import COLOURS, colour_of

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
Rows = Sequence[Mapping[str, Any]]
Point = tuple[float, float, str]
"""LPIPS, PSNR, and a label."""


def by_operator(name: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of a stored result by their operators.

    Raises:
        FileNotFoundError: when it was not measured yet.
    """
    content = load(name)
    if content is None:
        raise FileNotFoundError(f"docs/results/{name}.json does not exist; bash benchmarks/run_results.sh {name}")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        found.setdefault(row["operator"], []).append(row)
    return found


def single(row: Mapping[str, Any], label: str) -> Point:
    """Return LPIPS and PSNR of single samples."""
    return row["lpips"], row["psnr"], label


def mean(row: Mapping[str, Any], label: str) -> Point:
    """Return those of the mean."""
    return row["lpips_mean"], row["psnr_mean"], label


def means_of_samples(rows: Rows) -> list[Point]:
    """Return our single sample and means of more and more samples."""
    ours = sorted((row for row in rows if row["method"].startswith("UD2M mean")), key=lambda row: row["samples"])
    return [single(ours[-1], "S = 1"), *(mean(row, f"{row['samples']}") for row in ours)]


def step_scales(rows: Rows) -> list[Point]:
    """Return our single samples of smaller and larger steps."""
    scales = {float(row["method"].split()[-1]): row for row in rows if row["method"].startswith("UD2M step scale")}
    scales[1.0] = max((row for row in rows if row["method"].startswith("UD2M mean")), key=lambda row: row["samples"])
    return [single(row, f"{scale:g}") for scale, row in sorted(scales.items())]


def rivals(rows: Rows) -> Iterator[tuple[str, list[tuple[Point, Point]]]]:
    """Yield the name of each other method, and a single sample and the mean of two for each of its settings."""
    for name in dict.fromkeys(row["method"].split()[0] for row in rows):
        if name != "UD2M":
            yield name, [(single(row, ""), mean(row, "")) for row in rows if row["method"].split()[0] == name]


def draw_tradeoff(operators: Mapping[str, Rows]) -> Figure:
    """Return a panel per operator: PSNR (up) against LPIPS (to the left is better)."""
    figure, axes = panels(operators)
    for axis, rows in zip(axes, operators.values(), strict=True):
        curve(axis, means_of_samples(rows), COLOURS[0], "UD2M: mean of S samples")
        curve(axis, step_scales(rows), COLOURS[5], "UD2M: one sample, by step_scale")
        for colour, (name, settings) in zip((COLOURS[1], COLOURS[2], COLOURS[3]), rivals(rows), strict=False):
            for k, (one, two) in enumerate(settings):
                axis.plot([one[0], two[0]], [one[1], two[1]], color=colour, linewidth=0.8)
                axis.plot(*one[:2], "s", color=colour, label="" if k else f"{name}: one sample, by setting")
                axis.plot(*two[:2], "s", color=colour, fillstyle="none", label="" if k else f"{name}: mean of two")
        ours = [*means_of_samples(rows), *step_scales(rows)]
        bottom = min(y for _, y, _ in ours) - 0.5  # what fails would leave no room for the others
        highest = max(x for one in rivals(rows) for points in one[1] for x, y, _ in points if y > bottom)
        axis.set(xlim=(None, highest + 0.02), ylim=(bottom, None), xlabel="LPIPS (less is better)")
    axes[0].set_ylabel("PSNR [dB] (more is better)")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(operators) - 1, fontsize=7
    )
    return figure


def relative_lpips(rows: Rows) -> list[tuple[str, float, float]]:
    """Return each method's name, network evaluations, and LPIPS over that of the row it is compared with.

    Rows of other pictures can then share a figure. Of a method's rows the one that is tuned by LPIPS is taken.
    """
    one = next(row["lpips"] for row in rows if row["method"] == row["reference"])
    chosen = [row for row in rows if not row["method"].endswith("best PSNR")]
    return [(row["method"], row["nfe"], row["lpips"] / one) for row in chosen]


def draw_evaluations(tables: Sequence[Mapping[str, Rows]], ours: Mapping[str, Rows]) -> Figure:
    """Return a panel per operator: LPIPS over that of the shipped model against network evaluations for one sample.

    Args:
        tables: rows of all methods by operator.
        ours: rows of our models in other numbers of modules and steps, of some of these operators.
    """
    points = {
        operator: list({point[0]: point for table in tables for point in relative_lpips(table[operator])}.values())
        for operator in tables[0]
    }
    figure, axes = panels(points)
    methods = list(dict.fromkeys(point[0] for found in points.values() for point in found))
    for axis, (operator, found) in zip(axes, points.items(), strict=True):
        for name, evaluations, ratio in found:
            colour = ink(methods.index(name))
            marker = "*" if name.startswith("UD2M") else "o"
            axis.plot(evaluations, ratio, marker, color=colour, label=name, markersize=8)
        for k, (_, evaluations, ratio) in enumerate(relative_lpips(ours[operator]) if operator in ours else ()):
            label = "" if k else "UD2M, other modules and steps"
            axis.plot(evaluations, ratio, "*", color=COLOURS[0], fillstyle="none", label=label, markersize=8)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlim=(0.8, 125), xlabel="network evaluations for a sample")
        axis.set_xticks([1, 2, 4, 9, 20, 100], labels=["1", "2", "4", "9", "20", "100"], minor=False)
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel("LPIPS over that of UD2M (less is better)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def draw_spatial(rows: Rows) -> Figure:
    """Return the error of the mean against the samples' standard deviation, a line per operator.

    A point is a bin of pixels, and the larger the more pixels it holds.
    """
    figure, (axis,) = panels(["error of the mean, by place"])
    ends = [value for row in rows for triple in row["spatial"] for value in triple[:2]]
    axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color="gray", label="calibrated")
    for k, row in enumerate(rows):
        deviations, errors, shares = zip(*row["spatial"], strict=True)
        colour = ink(k)
        axis.plot(deviations, errors, color=colour, linewidth=1, label=row["operator"].replace("_", " "))
        axis.scatter(deviations, errors, s=[200 * share for share in shares], color=colour)
    axis.set(xscale="log", yscale="log", xlabel="standard deviation of the samples", ylabel="error of their mean (RMS)")
    axis.legend(fontsize=7)
    return figure


def fewer() -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of ``photographs_few`` that are ours."""
    return {
        operator: [row for row in rows if row["method"].startswith("K =")]
        for operator, rows in by_operator("photographs_few").items()
    }


def ink(k: int) -> str:
    """Return the colour of the k-th curve as matplotlib takes it, which has no colour of the page's text."""
    return colour_of(k).replace("currentColor", "black")


def panels(operators: Collection[str]) -> tuple[Figure, list[Axes]]:
    """Return an empty panel for each operator, side by side."""
    figure, axes = plt.subplots(
        1, len(operators), figsize=(3.6 * len(operators), 3.8), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], operators, strict=True):
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    return figure, list(axes[0])


def curve(axis: Axes, points: Sequence[Point], colour: str, label: str) -> None:
    """Draw points with their labels and the line through them."""
    axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=colour, label=label, zorder=3)
    for x, y, text in points:
        axis.annotate(text, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7, color=colour)


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figures."""
    options = parser().parse_args(arguments)
    for name, drawn in {
        "tradeoff": draw_tradeoff(by_operator("tradeoff")),
        "spatial": draw_spatial([row for rows in by_operator("calibration").values() for row in rows]),
        "evaluations": draw_evaluations(
            [by_operator("photographs_rivals"), by_operator("photographs_bridges")], fewer()
        ),
    }.items():
        content = io.BytesIO()
        drawn.savefig(content, format="png", dpi=110, metadata={"Software": None})
        plt.close(drawn)
        options.output.mkdir(parents=True, exist_ok=True)
        write_bytes(options.output / f"{name}.png", content.getvalue())
        print(options.output / f"{name}.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
