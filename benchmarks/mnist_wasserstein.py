"""Conditional W2 of super-resolved digits over K modules and N steps, and a picture of what the models draw.

    python benchmarks/mnist_wasserstein.py table [--blocks 1 2 4 8] [--steps 1 2 4 8 16] [--images 1200]
    python benchmarks/mnist_wasserstein.py picture [--blocks 1 8] [--steps 1 16]

The models are the exports of ``experiment=mnist_super_resolution`` in ``--runs`` (``mnist_K1``, ``mnist_K2``, ...;
``bash benchmarks/run_results.sh mnist`` trains them). W2 is the metric ``cw2`` of ``ud2m evaluate`` on 32x32 digits in
[0, 1], one sample of each: digits, samples and y are taken for jointly Gaussian, and W2 is the root of the mean over y
of the squared distance between the Gaussians given y. From so few images it has a bias, which depends on how much the
samples have in common with the digits; ``cw2_debiased`` stands before it. The row "draws of the law" is of draws of
that Gaussian law itself, fitted to other test digits: its debiased distance is 0 but for noise.

Networks are evaluated under bfloat16 autocast, as in training. ``table`` keeps every cell in ``--folder`` and writes
``docs/results/mnist.json``, ``picture`` writes docs/images/mnist.png.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gallery import draw
from results import store
from ud2m.data.mnist import Digits, read_mnist
from ud2m.evaluation.calibration import ConditionalGaussian
from ud2m.evaluation.cells import CellStore, Result
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import ConditionalW2
from ud2m.images import std_image
from ud2m.physics import Observation, Problem, SuperResolution
from ud2m.samplers.base import Sampler
from ud2m.samplers.latino import PseudoInverse
from ud2m.samplers.ud2m import PosteriorSampler

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURE = REPOSITORY / "docs" / "images" / "mnist.png"
PROBLEM = Problem(SuperResolution(4), 0.01)
SIDE, BATCH = 32, 100
SHOWN, SAMPLES, STD_SCALE = (3, 11, 18), 32, 0.5


class InBfloat16(Sampler):
    """A trained model under autocast."""

    def __init__(self, model: Sampler):
        super().__init__(model.networks, model.chunk_size)
        self.model = model

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        with torch.autocast(observation.y.device.type, torch.bfloat16):
            return self.model.draw(observation, streams).float()


class GaussianLaw(Sampler):
    """Draws of the law N of digits given y that is fitted to some digits, with their own residuals.

    Only the first two moments are those of the Gaussian.
    """

    def __init__(self, x0: Tensor, y: Tensor):
        super().__init__()
        rows, seen = x0.flatten(1).double(), y.flatten(1).double()
        self.law = ConditionalGaussian.fit(rows, seen)
        self.residuals = rows - self.law.means(seen)
        self.shape = x0.shape[1:]

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row; those that a study clamps to [0, 1] lose their tails, as a model's do."""
        picks = [int(torch.randint(len(self.residuals), (), generator=stream)) for stream in streams]
        drawn = self.law.means(observation.y.flatten(1).double()) + self.residuals[picks]
        return drawn.unflatten(1, self.shape).to(observation.y.dtype)


def digits(root: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return so many test digits, evenly spaced, and all others, [n, 1, 32, 32]."""
    test = Digits(read_mnist(root, train=False).data, SIDE, "test")
    if not 2 <= count <= len(test) // 2:
        raise ValueError(f"images must lie in 2..{len(test) // 2}, got {count}")
    chosen = {k * len(test) // count for k in range(count)}
    parts = ([test[k] for k in range(len(test)) if (k in chosen) == wanted] for wanted in (True, False))
    first, others = (torch.stack(part) for part in parts)
    return first, others


class Study:
    """What is measured on the digits, each cell once."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.images, self.others = digits(options.root, options.images)
        self.cells = CellStore(options.folder / "cells")

    def cell(self, make: Callable[[], Sampler], **settings: Any) -> Mapping[str, Any]:
        """Return the numbers of a method, measured unless they are there."""
        full = {"images": len(self.images), "problem": str(PROBLEM), **settings}
        result = self.cells.load(full)
        if result is None:
            row = measure(make(), PROBLEM, self.images.split(BATCH), [ConditionalW2()], 1).row
            result = Result(row, {}, {})
            self.cells.save(full, result)
        print(settings, text(result.row), flush=True)
        return result.row

    def model(self, blocks: int, steps: int) -> Mapping[str, Any]:
        """Return the numbers of a trained model."""
        trained = model_of(self.options, blocks, steps)
        return self.cell(lambda: InBfloat16(trained), model=trained.fingerprint, steps=steps)

    def law(self) -> GaussianLaw:
        """Return the draws that the floor is made of."""
        return GaussianLaw(self.others, PROBLEM.observe(self.others).y)

    def rows(self) -> list[dict[str, str]]:
        """Return a row for each K with a column for each N, and two rows to compare with."""
        options = self.options
        alone = {
            "draws of the law": self.cell(self.law, method="law"),
            "A^dagger y": self.cell(PseudoInverse, method="pinv"),
        }
        rows = [
            {"method": f"K = {blocks}"} | {f"N = {steps}": text(self.model(blocks, steps)) for steps in options.steps}
            for blocks in options.blocks
        ]
        first = f"N = {options.steps[0]}"
        return [*rows, *({"method": name, first: text(row)} for name, row in alone.items())]


def text(row: Mapping[str, Any]) -> str:
    """Return W2 without the bias, and as it is with its interval."""
    return f"{row['cw2_debiased']:.2f} ({row['cw2']:.2f} [{row['cw2_low']:.2f}, {row['cw2_high']:.2f}])"


def model_of(options: argparse.Namespace, blocks: int, steps: int) -> PosteriorSampler:
    """Return the trained model of K modules with N steps."""
    return PosteriorSampler.from_pretrained(options.runs / f"mnist_K{blocks}" / "export", num_steps=steps)


def pictures(x0: Tensor, model: Sampler, first: int) -> dict[str, Tensor]:
    """Return what a model makes of one digit [1, 1, H, W], the ``first``-th of its set, by heading."""
    observation = PROBLEM.observe(x0, first)
    samples = model.sample(observation, SAMPLES, PROBLEM.sampling_generator(first))[0]
    shown = {"reference": x0[0], "observed": observation.y[0].clamp(0, 1)}
    shown |= {f"sample {k + 1}": samples[k] for k in range(4)}
    deviation, _ = std_image(samples.std(0), STD_SCALE)
    shown |= {f"mean of {SAMPLES}": samples.mean(0), f"std (0 ... {STD_SCALE:g})": deviation}
    return {name: image.expand(3, -1, -1) for name, image in shown.items()}


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("action", choices=("table", "picture"))
    found.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8], help="K")
    found.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="N")
    found.add_argument("--images", type=int, default=1200, help="test digits, evenly spaced over all")
    found.add_argument("--root", type=Path, default=Path("data/mnist"), help="holds MNIST/raw")
    found.add_argument("--runs", type=Path, default=Path("runs/results"))
    found.add_argument("--folder", type=Path, default=Path("results/mnist"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store the table, or draw the picture."""
    options = parser().parse_args(arguments)
    if options.action == "table":
        study = Study(options)
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        command = shlex.join(["python", *sys.argv])
        print(store("mnist", command, config | {"precision": "bfloat16 autocast"}, study.rows()))
        return
    images, _ = digits(options.root, 20)
    lines = []
    for blocks, steps in zip(options.blocks, options.steps, strict=True):
        model = model_of(options, blocks, steps)
        lines += [(f"K = {blocks}, N = {steps}", pictures(images[k : k + 1], model, k)) for k in SHOWN]
    draw(lines, PICTURE)
    print(PICTURE.relative_to(REPOSITORY))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
