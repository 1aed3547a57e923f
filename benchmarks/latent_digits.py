"""LATINO, LATINO-PRO and their rivals on super-resolved and deblurred digits, judged by an independent classifier.

    python benchmarks/latent_digits.py [--images 200] [--methods ...] [--teacher runs/digits_latent/export]

Every method is tuned on validation digits (``--tune`` of them, by the class accuracy, then the PSNR) over a small grid
and measured on test digits, evenly spaced, with one sample of each. The classifier is a small network trained here on
the 59000 training digits; the class accuracy is the share of samples that it gives the true class, and the Frechet
distance is of its 32 features, between samples and the clean digits. LDPS, PSLD, P2L and TReg walk with the model
before its distillation, ``--teacher``. Classifier and numbers are kept in ``--folder`` as they are measured, and taken
from there. Writes ``docs/results/latent_digits.json``.

With ``--weights`` the weights p(c | y) of the ten prompts that name a digit are measured instead: how often the largest
one is right, and whether it is as sure as that.
"""

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from tqdm import tqdm

from results import store
from ud2m.bars import NetworkEvaluations
from ud2m.data.mnist import NUMBERS, Digits, read_mnist
from ud2m.evaluation.calibration import bootstrap_interval
from ud2m.evaluation.cells import CellStore, Result
from ud2m.evaluation.metrics import psnr
from ud2m.physics import GaussianBlur, OperatorFamily, Problem, SuperResolution
from ud2m.priors.latent import LatentPrior
from ud2m.samplers.base import Sampler
from ud2m.samplers.latent_latino import TIMES, AnnealedSteps, Correction, LatentLatino
from ud2m.samplers.latent_rivals import LatentWalk, Ldps, P2l, Psld, Treg
from ud2m.samplers.latino import PseudoInverse
from ud2m.samplers.latino_pro import LatinoPro, PromptOptimizer
from ud2m.samplers.latino_scores import LatinoScores, PromptWeights

PROMPT = "a photo of a digit"
CLASSES = [f"a photo of the digit {name}" for name in NUMBERS]
PROBLEMS: dict[str, tuple[OperatorFamily, float]] = {
    "super-resolution x8": (SuperResolution(8), 0.02),
    "Gaussian blur, width 3": (GaussianBlur(3.0), 0.02),
}
SIDE, BATCH, FEATURES = 32, 50, 32
TOLD = "LATINO, the right prompt"
SMALL = {"LATINO-PRO, covariance": ("super-resolution x8",)}
"""Methods for a small y alone, and the problems that have one."""
Make = Callable[..., Sampler]
LOW_TIMES = (749, 624, 499, 374, 249, 124, 60, 25)
"""For a start that knows y well, as after a blur."""
WEIGHTS = {"weight": [1.0, 3.0, 10.0]}
RIVALS: dict[str, tuple[type[LatentWalk], int, dict[str, Sequence[Any]]]] = {
    "TReg": (Treg, 200, {"guidance": [1.5, 3.0], "gamma": [100.0, 1e4]}),
    "LDPS": (Ldps, 1000, WEIGHTS),
    "PSLD": (Psld, 1000, WEIGHTS),
    "P2L": (P2l, 1000, WEIGHTS),
}
"""Walks of the model before its distillation, their largest number of steps, and the grids that they are tuned over."""


class Classifier(nn.Module):
    """Classes of digits [B, 1, 32, 32], and the features before them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, len(NUMBERS))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, 10]."""
        return self.head(self.features(x))


def digits(root: Path, train: bool, picked: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return some digits [n, 1, 32, 32] and their classes [n]."""
    mnist = read_mnist(root, train=train)
    images = Digits(mnist.data, SIDE, "train" if train else "test")
    return torch.stack([images[k] for k in picked]), mnist.targets[list(picked)]


def trained_classifier(root: Path, file: Path) -> Classifier:
    """Return the classifier, trained for two passes over the training digits unless its file is there."""
    torch.manual_seed(0)
    model = Classifier()
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    images, labels = digits(root, True, range(59000))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.cat([torch.randperm(len(images)) for _ in range(2)]).split(100)
    for batch in tqdm(order, desc="classifier"):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def frechet(x: Tensor, y: Tensor) -> float:
    """Return the Frechet distance of two sets of features [n, d]."""
    means, covariances = [f.mean(0) for f in (x, y)], [f.T.cov() for f in (x, y)]
    root = torch.from_numpy(sqrtm((covariances[0] @ covariances[1]).double().numpy()).real)
    return ((means[0] - means[1]).square().sum() + (covariances[0] + covariances[1]).trace() - 2 * root.trace()).item()


def methods(
    prior: LatentPrior, teacher: LatentPrior | None, steps: int
) -> dict[str, tuple[Make, dict[str, Sequence[Any]]]]:
    """Return what makes each method, with the grid that it is tuned over."""
    width = {"width": [0.5, 1.0, 2.0, 4.0]}

    def latino(width: float = 1.0, times: Sequence[int] = TIMES, **correction: Any) -> Sampler:
        steps, corrected = AnnealedSteps(width), Correction(**correction)
        return LatentLatino(prior, PROMPT, times, steps, chunk_size=BATCH, correction=corrected)

    def pro(width: float = 1.0, rate: float = 0.2, gradient: str = "likelihood", **options: Any) -> Sampler:
        optimizer = PromptOptimizer(gradient, rate=rate)
        return LatinoPro(prior, PROMPT, optimizer, steps=AnnealedSteps(width), chunk_size=BATCH, **options)

    def scores(width: float = 1.0, pairs: int = 20, times: Sequence[int] = TIMES, **correction: Any) -> Sampler:
        steps, corrected = AnnealedSteps(width), Correction(**correction)
        return LatinoScores(prior, PROMPT, (), pairs, times, steps, chunk_size=BATCH, correction=corrected)

    both = {"width": [2.0], "rate": [0.5, 1.5]}
    once = {"width": [1.0, 2.0], "rate": [1.0]}
    often = {"width": [0.5, 1.0], "rate": [0.25, 0.5], "times": [TIMES, LOW_TIMES]}
    found: dict[str, tuple[Make, dict[str, Sequence[Any]]]] = {
        "A^dagger y": (PseudoInverse, {}),
        "LATINO": (latino, width),
        "LATINO, corrected": (partial(latino, evaluations=1), once),
        "LATINO, corrected 8 times": (partial(latino, evaluations=8), often),
        "LATINO-PRO": (pro, both),
        "LATINO-PRO, covariance": (partial(pro, gradient="covariance", correction=Correction(1)), both),
        "LATINO-PRO, simplex": (lambda **o: pro(candidates=CLASSES, **o), both),
        "LATINO-PRO, scores": (scores, {"width": [2.0]}),
        **{f"LATINO-PRO, scores of {n} pairs": (partial(scores, pairs=n), {"width": [2.0]}) for n in (3, 80)},
        "LATINO-PRO, scores of 3 pairs, corrected": (partial(scores, pairs=3, evaluations=1), once),
        **{
            f"LATINO-PRO, scores of {n} pairs, corrected 8 times": (partial(scores, pairs=n, evaluations=8), often)
            for n in (3, 80)
        },
        "LATINO-PRO, transition": (lambda **o: pro(gradient="transition", **o), both),
    }
    if teacher is not None:
        for name, (kind, longest, grid) in RIVALS.items():
            count = min(steps, longest)
            found[name] = (
                lambda kind=kind, count=count, **o: kind(teacher, PROMPT, count, chunk_size=BATCH, **o),
                grid,
            )
    return found


class Bench:
    """Measures samplers on digits."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.classifier = trained_classifier(options.root, options.folder / "classifier.pt")
        self.test = digits(options.root, False, [k * 10000 // options.images for k in range(options.images)])
        self.validation = digits(options.root, True, [59000 + k * 1000 // options.tune for k in range(options.tune)])
        self.cells = CellStore(options.folder)

    @torch.no_grad()
    def numbers(self, sampler: Sampler, problem: Problem, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return PSNR and class of every image, and the means of all that is measured."""
        start, samples = time.perf_counter(), []
        with NetworkEvaluations(sampler.networks) as counter:
            for first in range(0, len(images), BATCH):
                observation = problem.observe(images[first : first + BATCH], first)
                generator = problem.sampling_generator(first)
                samples.append(sampler.sample(observation, 1, generator)[:, 0])
        seconds = time.perf_counter() - start
        drawn = torch.cat(samples)
        right = (self.classifier(drawn).argmax(1) == labels).float()
        features = [self.classifier.features(x) for x in (drawn, images)]
        return {
            "psnr": psnr(drawn, images),
            "right": right,
            "frechet": frechet(*features) if len(images) > 1 else math.nan,
            "nfe": counter.count / len(images),
            "seconds": seconds / len(images),
        }

    def best(self, make: Make, grid: Mapping[str, Sequence[Any]], problem: Problem) -> dict[str, Any]:
        """Return the setting with the highest class accuracy on validation digits, then PSNR."""

        def score(setting: dict[str, Any]) -> tuple[float, float]:
            found = self.numbers(make(**setting), problem, *self.validation)
            return found["right"].mean().item(), found["psnr"].mean().item()

        settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        return settings[0] if len(settings) == 1 else max(settings, key=score)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each method and problem; differences are from LATINO, paired by image."""
        prior = LatentPrior.from_pretrained(self.options.pipeline)
        teacher = None if self.options.teacher is None else LatentPrior.from_pretrained(self.options.teacher)
        known, rows = methods(prior, teacher, self.options.steps), []
        unknown = set(self.options.methods or ()) - known.keys()
        if unknown:
            raise ValueError(f"no method {', '.join(unknown)}; there are {', '.join(known)}")
        for name in self.options.problems or PROBLEMS:
            problem, reference = Problem(*PROBLEMS[name]), None
            for method in self.options.methods or known:
                if method in SMALL and name not in SMALL[method]:
                    continue
                make, grid = known[method]
                walks = {"teacher": teacher.fingerprint, "steps": self.options.steps} if method in RIVALS else {}
                settings = {"problem": name, "method": method, "grid": grid, "prior": prior.fingerprint, **walks}
                found = self.kept(settings, partial(self.tuned, make, grid, problem))
                reference = found if method == "LATINO" else reference
                rows.append({"problem": name, "method": method, **row_of(found, reference)})
                print(rows[-1], flush=True)
            settings = {"problem": name, "method": TOLD, "prior": prior.fingerprint}
            found = self.kept(settings, partial(self.told, prior, problem))
            rows.append({"problem": name, "method": TOLD, **row_of(found, None)})
        return rows

    def kept(self, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what was measured with these settings before, or measure and keep it."""
        settings = {**settings, "images": self.options.images, "tune": self.options.tune}
        known = self.cells.load(settings)
        if known is None:
            found = measure()
            curves = {key: value.tolist() for key, value in found.items() if isinstance(value, Tensor)}
            known = Result({key: value for key, value in found.items() if key not in curves}, curves, {})
            self.cells.save(settings, known)
        return {**known.row, **{key: torch.tensor(values) for key, values in known.curves.items()}}

    def tuned(self, make: Make, grid: Mapping[str, Sequence[Any]], problem: Problem) -> dict[str, Any]:
        """Return the numbers on test digits with the setting that is best on validation digits."""
        setting = self.best(make, grid, problem)
        return {**self.numbers(make(**setting), problem, *self.test), "setting": str(setting)}

    def told(self, prior: LatentPrior, problem: Problem) -> dict[str, Any]:
        """Return the numbers of LATINO with the prompt that names each digit, which nobody knows: a bound."""
        images, labels = self.test
        parts = []
        for label in range(len(NUMBERS)):
            chosen = labels == label
            sampler = LatentLatino(prior, CLASSES[label], chunk_size=BATCH)
            parts.append(self.numbers(sampler, problem, images[chosen], labels[chosen]))
        joined = {key: torch.cat([part[key] for part in parts]) for key in ("psnr", "right")}
        return {**joined, "nfe": parts[0]["nfe"], "seconds": parts[0]["seconds"]}

    @torch.no_grad()
    def weights(self) -> list[dict[str, Any]]:
        """Return a row for each problem and way to find p(c | y) of the prompts that name a digit."""
        prior, (images, labels) = LatentPrior.from_pretrained(self.options.pipeline), self.test
        samplers = {pairs: LatinoScores(prior, PROMPT, CLASSES, pairs, chunk_size=BATCH) for pairs in PAIRS}
        rows: list[dict[str, Any]] = []
        streams = [torch.Generator().manual_seed(k) for k in range(ENUMERATED)]
        enumerated = [
            samplers[PAIRS[0]].from_prior(prior.encode_prompt(text).expand(ENUMERATED), (SIDE, SIDE), streams)
            for text in CLASSES
        ]
        for name in self.options.problems or PROBLEMS:
            family, sigma_y = PROBLEMS[name]
            observation = Problem(family, sigma_y).observe(images)
            y, A = observation.y.flatten(1).double(), family.draw(1, (1, SIDE, SIDE)).A
            level, found = torch.tensor(sigma_y).double(), dict[str, Tensor]()
            for pairs, sampler in samplers.items():
                drawn = sampler.candidate_images(observation)
                parts = PromptWeights(torch.stack([A(x).flatten(1) for x in drawn]).double(), level)
                found[f"scores, {pairs} pairs"] = parts(y)
                found[f"scores, {pairs} pairs, not tempered"] = parts.densities(y).softmax(1)
            exact = kernel_weights(torch.stack([A(x).flatten(1) for x in enumerated]).double(), y, level)
            found[f"enumerated, {ENUMERATED} draws"] = exact
            rows += [{"problem": name, "weights": key, **reliability(w, labels, exact)} for key, w in found.items()]
        return rows


PAIRS, ENUMERATED = (20, 80), 300
"""Pairs and single images drawn with each prompt."""
BINS = (0.0, 0.5, 0.8, 0.95, 1.0)


def kernel_weights(measured: Tensor, y: Tensor, sigma_y: Tensor) -> Tensor:
    """Return p(c | y) [N, P] for y [N, m], p(y | c) the mean of N(y; A u, s^2) over the draws [P, n, m] of a prompt.

    s is the width, from sigma_y on, with the highest mean likelihood of each draw, with noise, under the others.
    """
    noise = sigma_y * torch.randn(measured.shape, generator=torch.Generator().manual_seed(0)).double()
    own = torch.cdist(measured + noise, measured).square()
    own.diagonal(dim1=1, dim2=2).fill_(torch.inf)

    def likelihood(s: Tensor) -> float:
        return (torch.logsumexp(-own / (2 * s**2), 2) - measured.shape[2] * s.log()).mean().item()

    width = max((sigma_y * 2 ** (k / 4) for k in range(25)), key=likelihood)
    return torch.logsumexp(-torch.cdist(y, measured).square() / (2 * width**2), 2).T.softmax(1)


def reliability(weights: Tensor, labels: Tensor, exact: Tensor) -> dict[str, Any]:
    """Return how often the largest weight is right, and how sure the weights are; ``exact``: to compare with."""
    largest, named = weights.max(1)
    right = (named == labels).float()
    row = {
        "right": mean_text(right, ".3f"),
        "largest weight": f"{largest.mean():.3f}",
        "log loss": f"{-weights.gather(1, labels.unsqueeze(1)).clamp(min=1e-12).log().mean():.3f}",
        "distance from enumerated": f"{(weights - exact).abs().sum(1).mean() / 2:.3f}",
    }
    for low, high in itertools.pairwise(BINS):
        chosen = (largest > low) & (largest <= high)
        said = f"{right[chosen].mean():.2f} at {largest[chosen].mean():.2f}, {int(chosen.sum())}"
        row[f"{low:g} to {high:g}"] = said if chosen.any() else "–"
    return row


def row_of(found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the numbers of the table."""
    row = {
        "NFE": round(found["nfe"], 2),
        "class": mean_text(found["right"], ".3f"),
        "PSNR": mean_text(found["psnr"], ".2f"),
        "Frechet": None if "frechet" not in found else f"{found['frechet']:.2f}",
        "seconds": f"{found['seconds']:.3f}",
        "setting": found.get("setting"),
    }
    if reference is not None and reference is not found:
        row["class - LATINO"] = mean_text(found["right"] - reference["right"], "+.3f")
        row["PSNR - LATINO"] = mean_text(found["psnr"] - reference["psnr"], "+.2f")
    return row


def mean_text(values: Tensor, form: str) -> str:
    """Return a mean with its bootstrap interval of 95 %."""
    low, high = bootstrap_interval(values, generator=torch.Generator().manual_seed(0))
    return f"{values.mean().item():{form}} [{low:{form}}, {high:{form}}]"


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--name", default="latent_digits", help="of the stored result")
    found.add_argument("--pipeline", default="digits", help="the distilled one")
    found.add_argument("--teacher", default=None, help="the one before distillation, for LDPS, PSLD, P2L and TReg")
    found.add_argument("--steps", type=int, default=1000, help="of LDPS, PSLD and P2L; TReg has 200 at most")
    found.add_argument("--images", type=int, default=200, help="test digits, evenly spaced over all")
    found.add_argument("--tune", type=int, default=50, help="validation digits")
    found.add_argument("--weights", action="store_true", help="measure the weights of the prompts")
    found.add_argument("--methods", nargs="+", help="all by default")
    found.add_argument("--problems", nargs="+", choices=list(PROBLEMS), help="all by default")
    found.add_argument("--root", type=Path, default=Path("data/mnist"), help="holds MNIST/raw")
    found.add_argument("--folder", type=Path, default=Path("results/latent_digits"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store the table."""
    options = parser().parse_args(arguments)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    bench = Bench(options)
    rows = bench.weights() if options.weights else bench.rows()
    print(store(options.name, shlex.join(["python", *sys.argv]), config, rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
