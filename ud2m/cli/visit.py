"""What a visitor of the page of ``ud2m app`` asks for, and gets: a job of ``ud2m sample``."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ud2m.bars import Advance
from ud2m.cli.pages import check_sampling
from ud2m.cli.sample import Case, SamplingRun
from ud2m.cli.words import conf_folder, readable
from ud2m.evaluation.table import format_value, table_columns
from ud2m.files import SETTINGS, parse_json, write_json
from ud2m.images import most_pixels, std_image, viewable, write_image
from ud2m.reports.samples import Entry

GREY = 0.85
"""Of what was not measured, as in the report."""


@dataclass(frozen=True)
class Operator:
    """An operator that the page offers, with the one setting that it asks for.

    Attributes:
        page: of conf/physics; empty: the operator that the model was trained for.
        key: of the setting in that page; empty: none is asked for.
        meaning: of the setting.
        default: of the setting, a number; None: it is a file.
    """

    page: str = ""
    key: str = ""
    meaning: str = ""
    default: float | None = None


MASK = "missing pixels, marked by hand"
OPERATORS = {
    "what the model was trained for": Operator(),
    "Gaussian blur": Operator("gaussian_blur", "operator.width", "standard deviation of the kernel in pixels", 1.6),
    "uniform blur": Operator("uniform_blur", "operator.size", "side of the box in pixels", 9),
    "motion blur, at random": Operator("motion_blur", "operator.size", "side of the kernel in pixels", 17),
    "blur with a kernel of your own": Operator(
        "kernel", "kernel", "kernel: a picture whose grey levels are the weights"
    ),
    MASK: Operator("mask", "mask", "or a mask from a file: white is measured, black is missing"),
    "missing pixels, at random": Operator("inpainting", "operator.missing", "share of pixels that are missing", 0.7),
    "super-resolution": Operator("super_resolution", "operator.factor", "factor", 4),
    "JPEG": Operator("jpeg", "operator.quality", "quality from 1 to 100; a JPEG file brings its own tables", 10),
    "noise alone": Operator("denoising"),
}


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Attributes:
        model: name of a model.
        picture: the file.
        degraded: whether it is the observation itself.
        operator: name in ``OPERATORS``.
        setting: number or file that the operator asks for; None: the default.
        sigma_y: noise level; None: as the model was trained.
        num_samples: S.
        seed: of operator, noise and samples.
    """

    model: str
    picture: Path
    degraded: bool = False
    operator: str = next(iter(OPERATORS))
    setting: float | Path | None = None
    sigma_y: float | Literal["auto"] | None = None
    num_samples: int = 4
    seed: int = 0

    def words(self) -> list[str]:
        """Return the words of ``ud2m sample`` that ask for the same."""
        operator = OPERATORS[self.operator]
        setting = operator.default if self.setting is None else self.setting
        given = {
            "model": self.model,
            "input": self.picture,
            "degraded": str(self.degraded).lower(),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "lpips": "null",  # of a page one expects pictures, and this takes a network of its own
            "physics": operator.page or None,
            f"physics.{operator.key}": setting if operator.key else None,
            "sigma_y": self.sigma_y,
        }
        return [f"{key}={value}" for key, value in given.items() if value is not None]


def without_places(text: str, *files: Any) -> str:
    """Return a text with the names of files alone: where they lie on this machine is not for visitors."""
    for path in files:
        text = text.replace(f"{path.parent}{os.sep}", "") if isinstance(path, Path) else text
    return text


def sampling_settings(request: Request) -> DictConfig:
    """Return the settings of ``ud2m sample`` that a visitor asks for.

    Raises:
        ValueError: as the command, for what is none.
    """
    settings = compose("sample", readable("sample", request.words(), conf_folder()))
    check_sampling(settings)
    return settings


class Visit(SamplingRun):
    """A sampling job that keeps for the page what it writes into files.

    Args:
        request: what is asked for.
        device: where it computes.
        tell: is told how many network evaluations are made, and of how many.
    """

    def __init__(self, request: Request, device: torch.device, tell: Callable[[int, int], Any]):
        self.request, self.tell, self.remark = request, tell, ""
        super().__init__(sampling_settings(request), device)
        self.recorded = parse_json(self.seen(json.dumps(self.recorded)))

    def seen(self, text: str) -> str:
        """Return a text as visitors see it."""
        return without_places(text, self.request.picture, self.request.setting)

    @property
    def measurement(self) -> str:
        """Operator and noise level in words."""
        return self.seen(super().measurement)

    def rehearse(self, case: Case) -> None:
        """Refuse samples that are too large, too: of a small picture for super-resolution."""
        height, width = case.observation.image_shape[1:]
        if height * width > most_pixels():
            raise ValueError(f"{case.name}: samples of {width}x{height} are too large, at most {most_pixels()} pixels")
        super().rehearse(case)

    def advance_of(self, bar: tqdm) -> Advance:
        """Return what tells the bar and the page."""

        def advance(count: int) -> None:
            bar.update(count)
            self.tell(int(bar.n), int(bar.total))

        return advance

    def keep(self, case: Case, place: Path, entry: Entry) -> None:
        """Keep what is shown."""
        self.shown, self.remark = entry, case.remark


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the page shows; pictures are uint8 [H, W, C].

    Attributes:
        pictures: with their captions.
        before_after: y and the mean at the same size, if y is a picture of the same scene.
        text: numbers and remarks, Markdown.
        archive: all results as ``ud2m sample`` writes them.
    """

    pictures: list[tuple[np.ndarray, str]]
    before_after: tuple[np.ndarray, np.ndarray] | None
    text: str
    archive: Path


def outcome(request: Request, device: torch.device, folder: Path, tell: Callable[[int, int], Any]) -> Outcome:
    """Sample for a visitor; the archive is written into a folder.

    Raises:
        ValueError: as ``ud2m sample``, and for samples that are too large for a page.
    """
    try:
        return _outcome(request, device, folder, tell)
    finally:
        gc.collect()  # networks with adapters are parts of cycles: several would be held until Python looks for these


def _outcome(request: Request, device: torch.device, folder: Path, tell: Callable[[int, int], Any]) -> Outcome:
    visit = Visit(request, device, tell)
    visit.check()
    with TemporaryDirectory(dir=folder) as place:
        visit.run(Path(place))
        write_json(Path(place) / SETTINGS, visit.recorded)
        archive = shutil.make_archive(str(folder / f"{request.picture.stem}-samples"), "zip", place)
    entry = visit.shown
    y, mean = observed(entry), shown_levels(entry.mean)
    scenes = [(shown_levels(y), "y"), (mean, "mean")]
    brightest = ""
    if entry.std is not None:
        coloured, scale = std_image(entry.std)
        scenes.append((shown_levels(coloured), "std"))
        brightest = f"std: standard deviation of the samples, brightest where it is {scale:g} or more"
    if entry.reference is not None:
        scenes.append((shown_levels(entry.reference), "clean"))
    samples = [(shown_levels(x), f"sample {k}") for k, x in enumerate(entry.samples, start=1)]
    columns = table_columns([entry.numbers])
    numbers = [f"**{c.heading}** {format_value(c, entry.numbers[c.key])}" for c in columns]
    about = f"{visit.measurement}, seed {request.seed}"
    text = "\n\n".join(filter(None, [" · ".join(numbers), about, brightest, visit.remark, entry.note]))
    before = spread(y, entry.mean.shape[1:])
    return Outcome(scenes + samples, None if before is None else (shown_levels(before), mean), text, Path(archive))


def observed(entry: Entry) -> Tensor:
    """Return y as a picture, with what was not measured in grey."""
    y, _ = viewable(entry.observation)
    return y if entry.measured is None else torch.where(entry.measured.bool().cpu(), y, torch.tensor(GREY))


def spread(y: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor | None:
    """Return y [C, h, w] at the size [H, W] of the samples: enlarged by a whole factor, within a grey border.

    None where it is no picture of the same scene, as a sinogram.
    """
    factor = min(size[0] // y.shape[1], size[1] // y.shape[2])
    if factor < 1:
        return None
    large = y.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    down, right = size[0] - large.shape[1], size[1] - large.shape[2]
    return F.pad(large, (right // 2, right - right // 2, down // 2, down - down // 2), value=GREY)


def shown_levels(image: Tensor) -> np.ndarray:
    """Return an image [C, H, W] as a picture of 8 bits in colour."""
    shown, _ = viewable(image)
    return (255 * shown.expand(3, -1, -1)).round().byte().permute(1, 2, 0).numpy()


def drawn_mask(drawing: dict[str, Any] | None, path: Path) -> Path:
    """Write the mask that a visitor has drawn: what is painted in any layer is missing.

    Args:
        drawing: ``layers``, pictures uint8 [H, W, 4].
        path: of the file.

    Raises:
        ValueError: when nothing is painted.
    """
    painted = [layer[..., 3] > 0 for layer in (drawing or {}).get("layers", ())]
    if not np.any(painted):
        raise ValueError("no pixel is marked as missing: paint over the picture, or give a mask as a file")
    write_image(torch.from_numpy(~np.any(painted, axis=0)).float()[None], path)
    return path
