"""The report on an evaluation: a table that can be sorted, plots, and pictures with a zoom, on one page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ud2m.evaluation.cells import Result
from ud2m.evaluation.table import SETTING, by_setting, described_by
from ud2m.reports.clips import RATE, playing, still
from ud2m.reports.figures import Picture, figure, observation_figure, shared_scale, std_figure, uncertainty
from ud2m.reports.page import render_page
from ud2m.reports.plots import calibration, colour_of, reliability, scatter
from ud2m.reports.tables import (
    Rows,
    caption,
    difference_table,
    found_settings,
    notes,
    page_columns,
    table_of,
    visible,
)

COSTS = (("nfe", "network evaluations per sample"), ("seconds_per_image", "seconds per sample"))
PLOTTED = ("psnr_mean", "psnr", "ssim", "lpips", "frechet", "kid", "cfid", "energy")
"""Numbers that are shown against the costs, with their variants."""


@dataclass(frozen=True)
class Board:
    """What is shown.

    Args:
        title: heading.
        rows: of ``metrics.json``.
        results: the cell of each row.
        settings: of the evaluation.
        names: of the shown images, by data set and number.
        operators: what each is with its parameters, by the names that rows call them by.
    """

    title: str
    rows: Rows
    results: Sequence[Result]
    settings: Mapping[str, Any]
    names: Mapping[str, Mapping[int, str]]
    operators: Mapping[str, str]


def board_page(board: Board) -> str:
    """Return the report as one HTML page that loads nothing from anywhere."""
    differences = difference_table(board.rows)
    return render_page(
        "board",
        title=board.title,
        table=table_of(board.rows, page_columns(visible(board.rows))),
        notes=["bold: best for the same data and operator", *notes(board.rows), *found_settings(board.rows)],
        differences=differences,
        caption=caption(board.rows) if differences else "",
        sections=[_section(board, setting, indices) for setting, indices in by_setting(board.rows).items()],
        settings=board.settings,
    )


def _section(board: Board, setting: tuple[Any, ...], indices: Sequence[int]) -> dict[str, Any]:
    rows, results = [board.rows[i] for i in indices], [board.results[i] for i in indices]
    methods = [str(row["method"]) for row in rows]
    plotted = [column for column in visible(rows) if described_by(column.key) in PLOTTED]
    plots = [scatter(rows, column, *cost) for column in plotted for cost in COSTS]
    curves = [(name, result.curves) for name, result in zip(methods, results, strict=True)]
    plots += [calibration(curves), reliability(curves)]
    scale = shared_scale(kinds.get("std") for result in results for kinds in result.pictures.values())
    words = [f"σ_y = {v:g}" if key == "sigma_y" else str(v) for key, v in zip(SETTING, setting, strict=True)]
    return {
        "heading": ", ".join(words),
        "operator": board.operators.get(str(rows[0].get("operator")), ""),
        "methods": [{"number": k + 1, "name": name, "colour": colour_of(k)} for k, name in enumerate(methods)],
        "plots": [plot for plot in plots if plot],
        "strips": list(_strips(methods, results, board.names.get(str(rows[0].get("data")), {}), scale)),
    }


def _strips(
    methods: Sequence[str], results: Sequence[Result], names: Mapping[int, str], scale: float
) -> Iterator[dict[str, Any]]:
    """Yield the pictures of each image, the most uncertain first: what is known of it, and what methods made of it."""

    def uncertain(number: int) -> float:
        return uncertainty(*(result.pictures[number].get("std") for result in results))

    for number in sorted(results[0].pictures, key=uncertain, reverse=True):
        name = str(names.get(number, number))
        shown = [result.pictures[number] for result in results]
        x0, y = (shown[0][kind] for kind in ("x0", "y"))
        reference = figure(still(x0), "Reference", f"{name}: reference", kind="known")
        seen = still(y, None if y.ndim == 3 else x0.shape[1])
        rows = [[reference, observation_figure(seen, still(x0).shape, f"{name}: observation")]]
        rows += [
            _made(method, f"{name}: {method}", {kind: still(image) for kind, image in kinds.items()}, scale)
            for method, kinds in zip(methods, shown, strict=True)
        ]
        samples = {method: kinds["sample"] for method, kinds in zip(methods, shown, strict=True)}
        clips = {} if x0.ndim == 3 else {"Reference": x0, "Observation y": y, **samples}
        yield {"name": name, "rows": rows, "clips": playing(clips, RATE, scale, f"{name}: clips side by side")}


def _made(method: str, about: str, kinds: Mapping[str, Tensor], scale: float) -> list[Picture]:
    """Return a sample of a method, and the mean and the standard deviation of all where they differ."""
    shown = [figure(kinds["sample"], f"{method}: sample", f"{about}, sample", kind="sample")]
    if not torch.equal(kinds["sample"], kinds["mean"]):
        shown.append(figure(kinds["mean"], f"{method}: mean", f"{about}, mean of the samples", kind="derived"))
    if "std" in kinds:
        alt = f"{about}, standard deviation of the samples"
        shown.append(std_figure(kinds["std"], scale, f"{method}: standard deviation", alt))
    return shown
