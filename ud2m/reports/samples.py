"""The report on samples: tables, and the pictures of each observation, on one page and as files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from ud2m.evaluation.table import format_value, table_columns
from ud2m.images import PixelFormat, write_values
from ud2m.reports.clips import RATE, playing
from ud2m.reports.figures import Picture, figure, observation_figure, shared_scale, std_figure, uncertainty
from ud2m.reports.page import render_page
from ud2m.reports.plots import frame_lines
from ud2m.reports.tables import Rows, found_settings, meanings, page_columns, table_of, verdicts

MAX_SAMPLES = 8
"""Shown of each observation, and half as many of images of more than ``LARGE`` pixels."""
LARGE = 256**2


@dataclass(frozen=True, eq=False)
class Entry:
    """One image of the report; tensors are images in [0, 1].

    Args:
        name: heading.
        reference: [C, H, W], or None where it is unknown.
        observation: y; where it is no image it is shown as ``viewable`` makes it.
        samples: [S, C, H, W]; the first ones are shown.
        mean: [C, H, W].
        std: [C, H, W], in image units; None for a single sample, which has none.
        numbers: scores of this image, keys as in the table.
        note: a remark shown under the heading.
        measured: [h, w], True where y was measured (inpainting); holes are coloured.
        rivals: what other methods made of y, by name, [C, H, W].
        clips: what plays side by side (``ud2m.reports.clips.playing``) where the image is a strip of a video.
        rate: their frames per second.
        curves: numbers over frames: lines by their names, for each title.
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
    rivals: Mapping[str, Tensor] = field(default_factory=dict)
    clips: Mapping[str, Tensor] = field(default_factory=dict)
    rate: float = RATE
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    def __post_init__(self):
        shape, size = tuple(self.mean.shape), tuple(self.observation.shape[1:])
        images = {"std": self.std, "reference": self.reference, **self.rivals}
        known = [(what, image, shape) for what, image in images.items() if image is not None]
        known += [("measured", self.measured, size)] if self.measured is not None else []
        for what, given, wanted, fits in (
            ("mean", self.mean, "(C, H, W)", len(shape) == 3),
            ("samples", self.samples, f"(S >= 1, *{shape})", len(self.samples) > 0 and self.samples[0].shape == shape),
            *((what, given, wanted, given.shape == wanted) for what, given, wanted in known),
        ):
            if not fits:
                got = tuple(given.shape)
                raise ValueError(f"report entry {self.name!r}: {what} must have shape {wanted}, got {got}")


@dataclass(frozen=True)
class Section:
    """A heading, a text and the images that belong to it; their std maps share one colour scale.

    ``further`` are the numbers of images whose pictures lie in folders of their names beside the page, which it links.
    """

    title: str
    text: str
    entries: Sequence[Entry] = ()
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What `samples_page` shows. Texts are plain text; blank lines part paragraphs.

    Args:
        title: heading of the page.
        summary: what was done and what came out.
        table: rows of ``metrics.json``.
        settings: nested plain values that made the results.
        sections: the pictures.
    """

    title: str
    summary: str
    table: Rows
    settings: Mapping[str, Any]
    sections: Sequence[Section] = ()


def samples_page(report: Report) -> str:
    """Return the report as one HTML page that loads nothing from anywhere."""
    columns = page_columns(table_columns(report.table))
    table = table_of(report.table, columns)
    best = ["bold: best in its column, for the same data and operator"] if table.has_bold else []
    notes = [*verdicts(report.table, columns), *best, *meanings(columns), *found_settings(report.table)]
    sections = [_section(section) for section in report.sections]
    return render_page("samples", **vars(report) | {"table": table, "notes": notes, "sections": sections})


def write_pictures(folder: Path, entry: Entry, pixels: PixelFormat | None) -> None:
    """Write ``observation.png``, ``samples/*.png``, ``mean.png`` and ``std.png`` (white is the largest deviation).

    What is no image with 1 or 3 channels in [0, 1], as a sinogram, is written as ``.npy`` too. All but the last have
    the depth and the colour profile of the file that they were made of.

    Args:
        folder: where; made if it is not there.
        entry: what is written.
        pixels: depth and profile of the file that y comes from.
    """
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_values(entry.observation, folder / "observation.png", pixels)
    for k, sample in enumerate(entry.samples):
        write_values(sample, folder / "samples" / f"{k:03d}.png", pixels)
    write_values(entry.mean, folder / "mean.png", pixels)
    deviation = torch.zeros_like(entry.mean) if entry.std is None else entry.std
    write_values(deviation / deviation.max().clamp(min=1e-6), folder / "std.png")


def _section(section: Section) -> dict[str, Any]:
    scale = shared_scale(entry.std for entry in section.entries)
    telling = sorted(section.entries, key=lambda entry: uncertainty(entry.std), reverse=True)
    columns = table_columns(list(section.further.values())) if section.further else []
    further = [
        (name, quote(name), [format_value(column, numbers.get(column.key)) for column in columns])
        for name, numbers in section.further.items()
    ]
    return {
        "title": section.title,
        "text": section.text,
        "entries": [_entry(entry, scale) for entry in telling],
        "headings": [column.heading for column in columns],
        "further": further,
    }


def _entry(entry: Entry, scale: float) -> dict[str, Any]:
    columns = table_columns([entry.numbers])
    shown = entry.samples[: MAX_SAMPLES if entry.mean[0].numel() <= LARGE else MAX_SAMPLES // 2]
    more = len(entry.samples) - len(shown)
    samples = [
        figure(x, f"Sample {k}", f"{entry.name}: sample {k}", kind="sample") for k, x in enumerate(shown, start=1)
    ]
    rivals = [figure(x, name, f"{entry.name}: {name}", kind="derived") for name, x in entry.rivals.items()]
    return {
        "name": entry.name,
        "note": entry.note,
        "numbers": [(column.heading, format_value(column, entry.numbers[column.key])) for column in columns],
        "clips": playing(entry.clips, entry.rate, scale, f"{entry.name}: clips side by side"),
        "curves": [frame_lines(title, lines) for title, lines in entry.curves.items()],
        "strip": [_summary(entry, scale), samples, rivals],
        "rest": f"{more} more samples are in the folder samples/." if more else "",
    }


def _summary(entry: Entry, scale: float) -> list[Picture]:
    count = len(entry.samples)
    mean = f"Mean of {count} sample{'' if count == 1 else 's'}"
    shown = [
        observation_figure(entry.observation, entry.mean.shape, f"{entry.name}: observation", entry.measured),
        figure(entry.mean, mean, f"{entry.name}: mean of the samples", kind="derived"),
    ]
    if entry.reference is not None:
        shown.insert(0, figure(entry.reference, "Reference", f"{entry.name}: reference", kind="known"))
    if entry.std is not None:
        alt = f"{entry.name}: standard deviation of the samples"
        shown.append(std_figure(entry.std, scale, "Standard deviation", alt))
    return shown
