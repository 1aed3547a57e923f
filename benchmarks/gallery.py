"""Draw the pictures of README and docs/gallery.md: what the shipped models make of test photographs, for each operator.

    python benchmarks/gallery.py [--only NAME ...] [--model FOLDER] [--output docs/images]

Each scene is a piece of ``chelsea`` or ``coffee``, which neither the priors nor the models were trained on, with eight
samples of one seed. ``gallery-NAME.webp`` shows them whole, where the mean errs beside where the samples differ, and
enlarged where they differ most; ``overview.webp`` is README's, with a row for each scene of ``OVERVIEW``.
"""

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ud2m.data.photos import load_photos
from ud2m.files import write_bytes
from ud2m.images import std_image, std_scale
from ud2m.physics import (
    GaussianBlur,
    Inpainting,
    Jpeg,
    MissingBoxes,
    MissingStrokes,
    MotionBlur,
    OperatorFamily,
    SuperResolution,
    measured,
)
from ud2m.physics.problem import Problem
from ud2m.samplers.ud2m import PosteriorSampler

SIDE, NUM_SAMPLES, SEED = 256, 8, 0
DETAIL = 4  # an enlarged detail has a side of SIDE / DETAIL
HOLE = 0.85  # grey of a pixel that was not measured
INCHES, DPI = 1.95, 105  # side of a picture; of the files
QUALITIES, MAX_BYTES = range(72, 20, -2), 130_000  # of the files: the first quality that is small enough
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"


@dataclass(frozen=True)
class Scene:
    """A piece of a test photograph, by its upper left corner, an operator, and the shipped model that restores it."""

    heading: str
    model: str
    operator: OperatorFamily
    photo: str
    top: int
    left: int


SCENES = {
    "gaussian_blur": Scene("deblurring", "photographs_gaussian_blur", GaussianBlur(1.6), "chelsea", 14, 96),
    "motion_blur": Scene("motion blur", "photographs_general", MotionBlur(17), "coffee", 72, 200),
    "super_resolution": Scene(
        "super-resolution x4", "photographs_super_resolution", SuperResolution(4), "coffee", 72, 200
    ),
    "inpainting": Scene("inpainting, 70 %", "photographs_inpainting", Inpainting(0.7), "chelsea", 14, 96),
    "jpeg": Scene("JPEG, quality 10", "photographs_jpeg", Jpeg(10, likelihood="gaussian"), "coffee", 72, 200),
    "strokes": Scene("strokes", "photographs_general", MissingStrokes((0.2, 0.3)), "coffee", 72, 200),
    "boxes": Scene("boxes", "photographs_general", MissingBoxes(0.12, 4), "chelsea", 14, 96),
}
OVERVIEW = ("gaussian_blur", "super_resolution", "inpainting", "jpeg")


@dataclass(frozen=True, eq=False)
class Restored:
    """A scene x0 [3, H, W], its observation as it is shown, and samples [S, 3, H, W]."""

    heading: str
    x0: Tensor
    observation: Tensor
    samples: Tensor

    @property
    def mean(self) -> Tensor:
        """Of the samples."""
        return self.samples.mean(0)

    @property
    def std(self) -> Tensor:
        """Of the samples."""
        return self.samples.std(0)


def restored(scene: Scene, model: str | None = None) -> Restored:
    """Return the scene with its samples, of another model than its own if one is given."""
    sampler = PosteriorSampler.from_pretrained(model or scene.model)
    photo = load_photos("test")[scene.photo]
    x0 = photo[None, :, scene.top : scene.top + SIDE, scene.left : scene.left + SIDE].float() / 255
    observation = Problem(scene.operator, sampler.config.sigma_y, SEED).observe(x0)
    y = observation.y
    samples = sampler.sample(observation, NUM_SAMPLES, torch.Generator().manual_seed(SEED))[0]
    known = measured(observation.physics, y).expand_as(y)[0]
    seen = torch.where(known > 0, y[0], torch.tensor(HOLE)).clamp(0, 1)
    return Restored(scene.heading, x0[0], seen, samples)


def overview_row(scene: Restored) -> dict[str, Tensor]:
    """Return the pictures of a row of the overview by the headings of their columns."""
    return {
        "observation": scene.observation,
        "sample 1": scene.samples[0],
        "sample 2": scene.samples[1],
        f"mean of {NUM_SAMPLES}": scene.mean,
        "where samples differ": std_image(scene.std)[0],
        "reference": scene.x0,
    }


def sheet_rows(scene: Restored) -> list[dict[str, Tensor]]:
    """Return the rows of pictures of a scene's sheet by their headings."""
    scale = std_scale(scene.std)
    detail = most_uncertain(scene.std, scene.x0.shape[1] // DETAIL)
    return [
        {
            "reference": scene.x0,
            "observation": scene.observation,
            "sample 1": scene.samples[0],
            "sample 2": scene.samples[1],
        },
        {
            f"mean of {NUM_SAMPLES}": scene.mean,
            f"std (0 ... {scale:g})": std_image(scene.std, scale)[0],
            "error of the mean": std_image((scene.mean - scene.x0).abs(), scale)[0],
            "sample 1 - sample 2": (0.5 + (scene.samples[0] - scene.samples[1]) / (6 * scale)).clamp(0, 1),
        },
        {"least certain: reference": scene.x0[detail]}
        | {f"sample {k + 1}": scene.samples[k][detail] for k in range(3)},
    ]


def most_uncertain(std: Tensor, side: int) -> tuple[slice, slice, slice]:
    """Return the square of a side in which standard deviations [C, H, W] are largest on average."""
    averages = avg_pool2d(std.mean(0)[None, None], side, stride=1)[0, 0]
    top, left = divmod(int(averages.argmax()), averages.shape[1])
    return slice(None), slice(top, top + side), slice(left, left + side)


def draw(rows: Sequence[tuple[str, Mapping[str, Tensor]]], path: Path, every_row: bool = False) -> None:
    """Write rows of pictures as one, in the format that the name of the file says.

    Args:
        rows: heading, and pictures [3, h, w] by theirs, equally many in each row; small ones show their pixels.
        path: of the file.
        every_row: whether the pictures of all rows have headings, or those of the first one alone.
    """
    width = INCHES * len(rows[0][1]) + 0.25 * bool(rows[0][0])
    size = (width, INCHES * len(rows) + 0.2 * (len(rows) if every_row else 1))
    figure, axes = plt.subplots(len(rows), len(rows[0][1]), figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    for number, (line, (heading, images)) in enumerate(zip(axes, rows, strict=True)):
        for axis, (name, image) in zip(line, images.items(), strict=True):
            shown = image.permute(1, 2, 0).numpy()
            axis.imshow(shown, interpolation="nearest" if len(shown) < SIDE else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if every_row or number == 0:
                axis.set_title(name, fontsize=9, pad=3)
        line[0].set_ylabel(heading, fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, compressed(Image.open(drawn).convert("RGB"), path.suffix[1:]))


def compressed(image: Image.Image, file_format: str) -> bytes:
    """Return a picture in a lossy format, in the best of QUALITIES that needs at most MAX_BYTES, or the lowest."""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, format=file_format, quality=quality, method=6)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue()


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SCENES), default=list(SCENES), help="scenes; default: all")
    parser.add_argument("--model", help="name or export folder that restores all of them; default: a shipped one each")
    parser.add_argument("--output", type=Path, default=FOLDER)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures; that of README where all of its scenes are drawn."""
    options = parser().parse_args(arguments)
    made, folder = {}, options.output
    for name in options.only:
        made[name] = restored(SCENES[name], options.model)
        draw([("", pictures) for pictures in sheet_rows(made[name])], folder / f"gallery-{name}.webp", every_row=True)
        print(folder / f"gallery-{name}.webp")
    if made.keys() >= set(OVERVIEW):
        draw([(made[name].heading, overview_row(made[name])) for name in OVERVIEW], folder / "overview.webp")
        print(folder / "overview.webp")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
