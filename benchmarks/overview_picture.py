"""Draw docs/images/overview.png: what the shipped models make of test photographs, one row per operator.

    python benchmarks/overview_picture.py [--models A B C] [--output docs/images/overview.png]

Columns: reference, observation, three samples, mean and standard deviation of eight samples. The photographs are
128x128 pieces of ``chelsea`` and ``coffee``, which neither the prior nor the models were trained on.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ud2m.data.photos import load_photos
from ud2m.images import std_image
from ud2m.physics import GaussianBlur, Inpainting, OperatorFamily, SuperResolution, measured
from ud2m.physics.problem import Problem
from ud2m.samplers.ud2m import PosteriorSampler

SIDE, NUM_SAMPLES, SHOWN, SEED = 128, 8, 3, 0
HOLE = 0.85  # grey of a pixel that was not measured
STD_SCALE = 0.15
OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "overview.png"


@dataclass(frozen=True)
class Row:
    """One row of the picture: heading, shipped model, operator, test photograph and the corner of the piece of it."""

    heading: str
    model: str
    operator: OperatorFamily
    photo: str
    top: int
    left: int


ROWS = (
    Row("deblurring", "photographs_gaussian_blur", GaussianBlur(1.6), "chelsea", 60, 120),
    Row("super-resolution x4", "photographs_super_resolution", SuperResolution(4), "coffee", 100, 300),
    Row("inpainting, 70 %", "photographs_inpainting", Inpainting(0.7), "chelsea", 150, 150),
)


def piece(row: Row) -> Tensor:
    """Return the piece of the photograph [1, 3, SIDE, SIDE] in [0, 1]."""
    photo = load_photos("test")[row.photo]
    return photo[None, :, row.top : row.top + SIDE, row.left : row.left + SIDE].float() / 255


def pictures(row: Row, model: str) -> dict[str, Tensor]:
    """Return the pictures of a row [C, h, w] by the heading of their column."""
    sampler = PosteriorSampler.from_pretrained(model)
    x0 = piece(row)
    observation = Problem(row.operator, sampler.config.sigma_y, SEED).observe(x0)
    y = observation.y
    samples = sampler.sample(observation, NUM_SAMPLES, torch.Generator().manual_seed(SEED))[0]
    known = measured(observation.physics, y).expand_as(y)[0]
    shown = {"reference": x0[0], "observation": torch.where(known > 0, y[0], torch.tensor(HOLE)).clamp(0, 1)}
    shown |= {f"sample {k + 1}": samples[k] for k in range(SHOWN)}
    deviation, _ = std_image(samples.std(0), STD_SCALE)
    return shown | {"mean of 8": samples.mean(0), f"std (0 ... {STD_SCALE:g})": deviation}


def draw(rows: Sequence[tuple[str, dict[str, Tensor]]], path: Path) -> None:
    """Write the rows (heading, pictures) as one PNG."""
    columns = list(rows[0][1])
    side = 1.55  # inches
    size = (side * len(columns) + 0.3, side * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=9)
    for line, (heading, images) in zip(axes, rows, strict=True):
        for axis, column in zip(line, columns, strict=True):
            axis.imshow(images[column].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(heading, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.model for row in ROWS]
    parser.add_argument("--models", nargs=len(ROWS), default=names, help="names or export folders, one per operator")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    options = parser().parse_args(arguments)
    draw([(row.heading, pictures(row, model)) for row, model in zip(ROWS, options.models, strict=True)], options.output)
    print(options.output)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
