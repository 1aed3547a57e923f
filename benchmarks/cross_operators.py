"""Try models on operators that they were trained for and on others, and tell them wrong things.

    python benchmarks/cross_operators.py table [--models NAME...] [--size 32] [--images 57]
    python benchmarks/cross_operators.py misspecified [--model NAME] [--size 32] [--images 57]

``table`` writes ``docs/results/cross_operators.json``: a row per model, a column per operator and noise level, and in
each cell PSNR of the mean of 8 samples, LPIPS (alex) and residual of single ones. LATINO's setting is searched for
each column on validation images. ``misspecified`` writes ``docs/results/misspecified.json``: the model is told another
noise level or another kernel than the observation has; the residual is the one that a user sees, from what was told.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from results import store
from tables import best_latino, row_of
from ud2m.data import PhotoData
from ud2m.physics import (
    Denoising,
    GaussianBlur,
    Inpainting,
    MotionBlur,
    Observation,
    OperatorFamily,
    Problem,
    SuperResolution,
    UniformBlur,
    residual,
)
from ud2m.priors.prior import Prior
from ud2m.samplers.base import Sampler
from ud2m.samplers.latino import PseudoInverse
from ud2m.samplers.ud2m import PosteriorSampler

MODELS = ("photos_gaussian_blur", "photos_super_resolution", "photos_inpainting", "photos_general")
SAMPLES = 8

PROBLEMS = {
    "Gaussian blur, 0.01": Problem(GaussianBlur(1.6), 0.01),
    "SR x4, 0.01": Problem(SuperResolution(4), 0.01),
    "inpainting 70 %, 0.01": Problem(Inpainting(0.7), 0.01),
    "anisotropic blur, 0.03": Problem(GaussianBlur([2.4, 0.8], angle=30), 0.03),
    "box blur 5, 0.02": Problem(UniformBlur(5), 0.02),
    "denoising, 0.1": Problem(Denoising(), 0.1),
    "motion blur (held out), 0.01": Problem(MotionBlur(), 0.01),
    "Gaussian blur, 0.2 (held out)": Problem(GaussianBlur(1.6), 0.2),
}
"""Columns: operator and sigma_y. The general model trains on sigma_y in [0.005, 0.1] and on no motion blur."""


class Told(Sampler):
    """A sampler that is told ``factor`` times the noise level, or the operator ``family`` in place of the true one."""

    def __init__(self, sampler: Sampler, factor: float = 1.0, family: OperatorFamily | None = None):
        super().__init__(sampler.networks, sampler.chunk_size)
        self.sampler, self.factor, self.family = sampler, factor, family
        self.residuals: list[Tensor] = []

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Draw samples, and keep the residual of what was told."""
        y, physics, told = observation.y, observation.physics, self.factor * observation.sigma_y
        believed = physics if self.family is None else self.family.draw(len(y), (y.shape[1], y.shape[2], y.shape[3]))
        samples = self.sampler.draw(Observation(y, believed, told), streams)
        self.residuals.append(residual(believed, samples.clamp(0, 1), y, told))
        return samples

    def residual(self) -> float:
        """Return the mean residual of all samples."""
        return torch.cat(self.residuals).mean().item()


def images(size: int, limit: int, validation: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return validation and test batches of the photographs."""
    data = PhotoData(
        channels=3, crop_size=size, batch_size=16, samples_per_epoch=1, test_limit=limit, val_limit=validation
    )
    return list(data.val_dataloader()), list(data.test_dataloader())


def cell(row: Mapping[str, Any]) -> str:
    """Return PSNR / LPIPS / residual as one text."""
    lpips = f"{row['lpips']:.3f}" if "lpips" in row else "–"
    return f"{row['psnr_mean']:.2f} / {lpips} / {row['residual']:.2f}"


def table(names: Sequence[str], size: int, limit: int) -> list[dict[str, Any]]:
    """Return a row per method with a cell per problem."""
    validation, test = images(size, limit, 16)
    samplers = {name: PosteriorSampler.from_pretrained(name) for name in names}
    prior = Prior.from_pretrained("photos_prior")
    rows: dict[str, dict[str, Any]] = {}
    for label, problem in PROBLEMS.items():
        latino, _ = best_latino(prior, problem, validation)
        methods: dict[str, Sampler] = {**samplers, "LATINO, best PSNR": latino, "A^dagger y": PseudoInverse()}
        for name, method in methods.items():
            scores = row_of(method, problem, test, SAMPLES, f"{name}: {label}")
            rows.setdefault(name, {"method": name})[label] = cell(scores)
    return list(rows.values())


def misspecified(name: str, size: int, limit: int) -> list[dict[str, Any]]:
    """Return a row per wrong thing that the model is told, for Gaussian deblurring of width 1.6 at sigma_y = 0.01."""
    sampler, (_, test) = PosteriorSampler.from_pretrained(name), images(size, limit, 1)
    problem = Problem(GaussianBlur(1.6), 0.01)
    tellings = {f"sigma_y x {factor:g}": Told(sampler, factor) for factor in (0.5, 1.0, 2.0)}
    tellings |= {f"width x {f:g}": Told(sampler, family=GaussianBlur(1.6 * f)) for f in (0.8, 0.9, 1.1, 1.2)}
    rows = []
    for words, told in tellings.items():
        scores = row_of(told, problem, test, SAMPLES, words)
        rows.append({"method": words} | scores | {"residual": told.residual()})
    return rows


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    tabling = commands.add_parser("table", help="models on many operators")
    tabling.add_argument("--models", nargs="+", default=list(MODELS))
    telling = commands.add_parser("misspecified", help="a wrong noise level or kernel")
    telling.add_argument("--model", default="photos_gaussian_blur")
    for command in (tabling, telling):
        command.add_argument("--size", type=int, default=32)
        command.add_argument("--images", type=int, default=57, help="test pieces, evenly spaced over all")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store one of the two tables."""
    options = parser().parse_args(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = " ".join(["python benchmarks/cross_operators.py", *words])
    config = {"samples": SAMPLES, "size": options.size, "images": options.images}
    torch.manual_seed(0)
    if options.action == "table":
        rows = table(options.models, options.size, options.images)
        path = store("cross_operators", command, config, rows)
    else:
        rows = misspecified(options.model, options.size, options.images)
        path = store("misspecified", command, config | {"model": options.model}, rows)
    print(f"wrote {path}; python benchmarks/results.py render puts it into the documents")


if __name__ == "__main__":
    main()
