"""The pictures of one observation: samples, mean and deviation as files, and the entry of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ud2m.evaluation.scores import Draws, Score
from ud2m.evaluation.table import without_bounds
from ud2m.images import PixelFormat, write_image
from ud2m.physics import Observation, measured, misfit
from ud2m.reports.samples import Entry
from ud2m.samplers.base import Sampler


@dataclass(frozen=True, eq=False)
class Case:
    """One observation to draw samples for.

    Attributes:
        name: of its results.
        observation: of one image.
        noise: level that y has where it is known to be another than sigma_y.
        x0: the clean image [1, C, H, W] if known.
        pixels: of the file that it comes from, and of those that are made of it.
    """

    name: str
    observation: Observation
    noise: float
    x0: Tensor | None = None
    pixels: PixelFormat | None = None


def sample_case(
    sampler: Sampler,
    case: Case,
    num_samples: int,
    seed: int,
    scores: Sequence[Score],
    folder: Path,
) -> Entry:
    """Draw samples for one observation, write its pictures into ``folder`` and return its part of the report.

    Args:
        sampler: draws them.
        case: what is known.
        num_samples: S.
        seed: of the samples.
        scores: fresh ones, which fit the case.
        folder: of the pictures.

    Raises:
        ValueError: with the name of the case, where it cannot be sampled for.
    """
    observation = case.observation
    generator = torch.Generator(observation.y.device).manual_seed(seed)
    try:
        samples = sampler(observation.y, observation.physics, observation.sigma_y, num_samples, generator=generator)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"{case.name}: {error}") from error
    mean, std = samples[0].mean(0), samples[0].std(0) if num_samples > 1 else None
    draws = Draws(samples.mean(1) if case.x0 is None else case.x0, observation, case.noise, samples)
    numbers = numbers_of(draws, scores)
    if case.x0 is None:
        numbers["sigma_y"] = float(observation.sigma_y)
    write_pictures(folder, observation.y[0], samples[0], mean, std, case.pixels)
    mask = measured(observation.physics, observation.y)
    holes = None if bool((mask == 1).all()) else mask.expand_as(observation.y)[0].amax(0) > 0
    note = misfit(observation.physics, numbers["residual"])
    if note:
        tqdm.write(f"{case.name}: {note}")
    reference = None if case.x0 is None else case.x0[0]
    return Entry(case.name, reference, observation.y[0], samples[0], mean, std, numbers, note=note, measured=holes)


@torch.no_grad()
def numbers_of(draws: Draws, scores: Sequence[Score]) -> dict[str, float]:
    """Return the numbers of a batch that are defined for it, without intervals."""
    found: dict[str, float] = {}
    for score in scores:
        score.to(draws.samples.device).add(draws)
        found |= {key: value for key, value in without_bounds(score.numbers()).items() if isinstance(value, float)}
    return found


def write_pictures(
    folder: Path, y: Tensor, samples: Tensor, mean: Tensor, std: Tensor | None, pixels: PixelFormat | None
) -> None:
    """Write ``observation.png``, ``samples/*.png``, ``mean.png`` and ``std.png`` (white is the largest deviation).

    All but the last have the depth and the colour profile of the file that they were made of.

    Args:
        folder: where; made if it is not there.
        y: observation [C, h, w].
        samples: [S, C, H, W].
        mean: [C, H, W].
        std: [C, H, W], or None for a single sample.
        pixels: depth and profile of the file that y comes from.
    """
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_image(y, folder / "observation.png", pixels)
    for k, sample in enumerate(samples):
        write_image(sample, folder / "samples" / f"{k:03d}.png", pixels)
    write_image(mean, folder / "mean.png", pixels)
    deviation = torch.zeros_like(mean) if std is None else std
    write_image(deviation / deviation.max().clamp(min=1e-6), folder / "std.png")
