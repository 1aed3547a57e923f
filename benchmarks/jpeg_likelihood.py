"""JPEG by the quantisation cell and by the Gaussian surrogate, zero-shot, each at its best setting.

    python benchmarks/jpeg_likelihood.py [--size 32] [--images 342]

Writes ``docs/results/jpeg.json``: per quality factor the decoder alone, and LATINO with the shipped prior and either
data term. Levels and widths of both, and the noise level that the surrogate assumes (0.5, 1 or 2 times the rms error of
the decoded validation pictures), are searched on validation images by the PSNR of the mean. The Fréchet distance is in
the features of AlexNet, since Inception's need thousands of images.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cross_operators import images
from results import store
from ud2m.evaluation.comparison import score, search_latino
from ud2m.evaluation.features import FrechetDistance
from ud2m.evaluation.measure import lpips_if_available
from ud2m.physics import Jpeg
from ud2m.physics.problem import Problem
from ud2m.priors.prior import Prior
from ud2m.samplers.latino import Latino, LatinoSetting, pseudo_inverse

QUALITIES = (10, 30, 70)
SAMPLES = 4


def measure(size: int, limit: int) -> list[dict[str, Any]]:
    """Return the rows: three per quality factor."""
    FrechetDistance().check(limit)
    validation, test = images(size, limit, 8)
    prior, distances, rows = Prior.from_pretrained("photos_prior"), lpips_if_available("alex"), []

    def row(words: str, problem: Problem, method: Any, quality: int, **extra: Any) -> None:
        label = f"QF {quality}, {words}"
        scores = score(method, problem, test, SAMPLES, distances, label, frechet=FrechetDistance())
        rows.append({"method": f"QF {quality}: {words}", "nfe": getattr(method, "nfe", 0)} | scores | extra)

    for quality in QUALITIES:
        decoded = Problem(Jpeg(quality), 0.03)
        row("decoder", decoded, pseudo_inverse, quality)
        rms = 10 ** (-score(pseudo_inverse, decoded, validation, 1, {})["psnr_mean"] / 20)
        for likelihood, factors in {"cell": (1.0,), "gaussian": (0.5, 1.0, 2.0)}.items():
            problem, setting = best_of(likelihood, [factor * rms for factor in factors], quality, prior, validation)
            extra = {"sigma_y": problem.sigma_y, "setting": setting.describe()}
            row(likelihood, problem, Latino(prior, setting), quality, **extra)
    return rows


def best_of(
    likelihood: str, sigmas: Sequence[float], quality: int, prior: Prior, validation: Sequence[Tensor]
) -> tuple[Problem, LatinoSetting]:
    """Return the assumed noise level, as a problem, and LATINO's setting that reach the highest PSNR of the mean."""
    tried = []
    for sigma_y in sigmas:
        problem = Problem(Jpeg(quality, likelihood=likelihood), sigma_y)
        setting = search_latino(prior, problem, validation, {})["PSNR"]
        reached = score(Latino(prior, setting), problem, validation, 2, {})["psnr_mean"]
        tried.append((reached, problem, setting))
    _, problem, setting = max(tried, key=lambda trial: trial[0])
    return problem, setting


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=342, help="test pieces, evenly spaced over all")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store."""
    options = parser().parse_args(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    rows = measure(options.size, options.images)
    command = " ".join(["python benchmarks/jpeg_likelihood.py", *words])
    path = store("jpeg", command, {"samples": SAMPLES, "size": options.size, "images": options.images}, rows)
    print(f"wrote {path}; python benchmarks/results.py render puts it into the documents")


if __name__ == "__main__":
    main()
