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
from tables import best_latino, row_of
from ud2m.evaluation.scores import check_scores
from ud2m.physics import Jpeg, Problem
from ud2m.priors.prior import Prior
from ud2m.samplers.base import Sampler
from ud2m.samplers.latino import PseudoInverse

QUALITIES = (10, 30, 70)
SET = "frechet_alex"
SAMPLES = 4


def measure(size: int, limit: int) -> list[dict[str, Any]]:
    """Return the rows: three per quality factor."""
    check_scores([SET], limit, SAMPLES, (3, size, size))
    validation, test = images(size, limit, 8)
    prior, rows = Prior.from_pretrained("photos_prior"), []

    def row(words: str, problem: Problem, method: Sampler, quality: int, **extra: Any) -> None:
        label = f"QF {quality}, {words}"
        scores = row_of(method, problem, test, SAMPLES if method.draws else 1, label, [SET])
        rows.append({"method": f"QF {quality}: {words}"} | scores | extra)

    for quality in QUALITIES:
        decoded = Problem(Jpeg(quality), 0.03)
        row("decoder", decoded, PseudoInverse(), quality)
        rms = 10 ** (-row_of(PseudoInverse(), decoded, validation, 1)["psnr_mean"] / 20)
        for likelihood, factors in {"cell": (1.0,), "gaussian": (0.5, 1.0, 2.0)}.items():
            problem, latino, setting = best_of(
                likelihood, [factor * rms for factor in factors], quality, prior, validation
            )
            extra = {"sigma_y": problem.sigma_y, "setting": setting}
            row(likelihood, problem, latino, quality, **extra)
    return rows


def best_of(
    likelihood: str, sigmas: Sequence[float], quality: int, prior: Prior, validation: Sequence[Tensor]
) -> tuple[Problem, Sampler, str]:
    """Return the assumed noise level, as a problem, and LATINO's setting that reach the highest PSNR of the mean."""
    tried = []
    for sigma_y in sigmas:
        problem = Problem(Jpeg(quality, likelihood=likelihood), sigma_y)
        latino, setting = best_latino(prior, problem, validation)
        reached = row_of(latino, problem, validation, 2)["psnr_mean"]
        tried.append((reached, problem, latino, setting))
    return max(tried, key=lambda trial: trial[0])[1:]


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
