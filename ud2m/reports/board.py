"""The report on an evaluation: a table that can be sorted, plots, and pictures with a zoom, on one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ud2m.evaluation.cells import Result
from ud2m.evaluation.table import SETTING, by_setting, described_by
from ud2m.images import viewable
from ud2m.reports.figures import Picture, picture
from ud2m.reports.page import render_page
from ud2m.reports.plots import calibration, colour_of, scatter
from ud2m.reports.tables import Rows, caption, difference_table, notes, table_of, visible

COSTS = (("nfe", "network evaluations per sample"), ("seconds_per_image", "seconds per sample"))
PLOTTED = ("psnr_mean", "psnr", "ssim", "lpips", "frechet", "kid", "cfid", "energy")
"""Numbers that are shown against the costs, with their variants."""

_DISPLAY = 200  # CSS pixels: five in a row


@dataclass(frozen=True)
class Board:
    """What is shown.

    Args:
        title: heading.
        rows: of ``metrics.json``.
        results: the cell of each row.
        settings: of the evaluation.
        names: of the shown images, by data set and number.
    """

    title: str
    rows: Rows
    results: Sequence[Result]
    settings: Mapping[str, Any]
    names: Mapping[str, Mapping[int, str]]


def board_page(board: Board) -> str:
    """Return the report as one HTML page that loads nothing from anywhere."""
    differences = difference_table(board.rows)
    return render_page(
        "board",
        title=board.title,
        table=table_of(board.rows, visible(board.rows)),
        notes=["bold: best for the same data and operator", *notes(board.rows)],
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
    plots.append(calibration([(name, result.curves) for name, result in zip(methods, results, strict=True)]))
    names = board.names.get(str(rows[0].get("data")), {})
    words = [f"σ_y = {v:g}" if key == "sigma_y" else str(v) for key, v in zip(SETTING, setting, strict=True)]
    return {
        "heading": ", ".join(words),
        "methods": [{"number": k + 1, "name": name, "colour": colour_of(k)} for k, name in enumerate(methods)],
        "plots": [plot for plot in plots if plot],
        "strips": [
            {"name": names.get(number, number), "figures": _strip(methods, [r.pictures[number] for r in results])}
            for number in results[0].pictures
        ],
    }


def _strip(methods: Sequence[str], pictures: Sequence[Mapping[str, Tensor]]) -> list[Picture]:
    """Return the pictures of one image: what is known of it, and a sample and the mean of each method."""
    shown = [_figure(pictures[0]["x0"], "Reference"), _figure(pictures[0]["y"], "Observation")]
    for method, kinds in zip(methods, pictures, strict=True):
        shown.append(_figure(kinds["sample"], f"{method}: sample"))
        if not torch.equal(kinds["sample"], kinds["mean"]):
            shown.append(_figure(kinds["mean"], f"{method}: mean"))
    return shown


def _figure(image: Tensor, caption: str) -> Picture:
    return picture(viewable(image)[0], caption, caption=caption, display=_DISPLAY)
