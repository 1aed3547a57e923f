"""Score methods on the same images, operators and noise."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ud2m.evaluation.cells import Result
from ud2m.evaluation.features import FrechetDistance, LPIPSDistance, available_lpips
from ud2m.evaluation.metrics import psnr, ssim
from ud2m.evaluation.scores import Draws, Score
from ud2m.evaluation.usage import NetworkEvaluations, Stopwatch, peak_memory, reset_peak_memory
from ud2m.physics import DataTerm, residual
from ud2m.physics.problem import Problem

Distance = Callable[[Tensor, Tensor], Tensor]


class Method(Protocol):
    """Anything that draws ``num_samples`` images [B, S, C, H, W] for observations y, e.g. ``PosteriorSampler``."""

    @property
    def __call__(self) -> Callable[..., Tensor]:
        """Draw the samples: (y, physics, sigma_y, num_samples, generator=..., **options) -> [B, S, C, H, W]."""
        ...


@cache
def lpips_if_available(net: str) -> dict[str, Distance]:
    """Return ``{"lpips": distance}`` where the weights of the backbone are in the torch cache, else nothing."""
    return {"lpips": LPIPSDistance(net)} if available_lpips(net) else {}


class Evaluation:
    """Scores of one method, gathered batch by batch.

    Args:
        method: draws samples. problem: how clean images are observed. num_samples: S per observation.
        distances: further distances (samples, reference) -> [B], by the name they get in the row, e.g. ``lpips``.
        frechet: a fresh distance between the sets of samples and of references, if wanted.
        options: passed on to the method, e.g. ``num_steps``.
    """

    def __init__(
        self,
        method: Method,
        problem: Problem,
        num_samples: int = 8,
        distances: Mapping[str, Distance] | None = None,
        frechet: FrechetDistance | None = None,
        **options: Any,
    ):
        self.method, self.problem, self.num_samples = method, problem, num_samples
        self.distances, self.frechet, self.options = dict(distances or {}), frechet, options
        self.count, self.seconds = 0, 0.0
        self.sums: dict[str, float] = {}

    @torch.no_grad()
    def add(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Observe clean images x0 [B, C, H, W], draw and score samples; return y and the samples [B, S, C, H, W]."""
        y, physics = self.problem.observe(x0, self.count)
        generator = self.problem.sampling_generator(self.count, x0.device)
        start = time.perf_counter()
        samples = self.method(y, physics, self.problem.sigma_y, self.num_samples, generator=generator, **self.options)
        self.seconds += time.perf_counter() - start
        self.count += len(x0)
        if self.frechet is not None:
            self.frechet.add(samples, x0)
        for name, value in self._scores(x0, samples, y, physics).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double().sum().item()
        return y, samples

    def row(self) -> dict[str, Any]:
        """Return the means over images: ``psnr_mean`` (of the mean of the samples), ``psnr``, ``ssim`` and distances
        (of single samples), ``residual`` (about 1 when A x explains y), ``r``, ``frechet`` where asked for, and
        ``seconds_per_image`` (one sample).

        r = sqrt((1 + 1/S) variance / |mean - x0|^2) over all pixels is 1 for a calibrated sampler
        (``metrics.calibration_ratio``).
        """
        means: dict[str, Any] = {name: value / self.count for name, value in self.sums.items()}
        variance, error = means.pop("_variance", None), means.pop("_error")
        means["r"] = None if variance is None or not error else ((1 + 1 / self.num_samples) * variance / error) ** 0.5
        used = {name: distance for name, distance in self.distances.items() if name in means}
        means |= {f"{name}_backend": d.name for name, d in used.items() if isinstance(d, LPIPSDistance)}
        if self.frechet is not None:
            means |= {"frechet": self.frechet.value(), "frechet_backend": self.frechet.name}
        means["seconds_per_image"] = self.seconds / (self.count * self.num_samples)
        return means

    def _scores(self, x0: Tensor, samples: Tensor, y: Tensor, physics: DataTerm) -> dict[str, Tensor]:
        mean = samples.mean(1)

        def single(score: Distance) -> Tensor:
            return torch.stack([score(sample, x0) for sample in samples.unbind(1)]).mean(0)

        def fit(sample: Tensor, _: Tensor) -> Tensor:
            return residual(physics, sample, y, self.problem.sigma_y)

        scores = {"psnr_mean": psnr(mean, x0), "psnr": single(psnr), "ssim": single(ssim)}
        scores |= {name: single(distance) for name, distance in self.distances.items() if takes(distance, x0)}
        scores |= {"residual": single(fit), "_error": (mean - x0).square().flatten(1).mean(1)}
        if self.num_samples > 1:
            scores["_variance"] = samples.var(1).flatten(1).mean(1)
        return scores


def takes(distance: Distance, images: Tensor) -> bool:
    """Return whether a distance can judge images of this size; LPIPS is left out where they are too small for it."""
    return min(images.shape[-2:]) >= getattr(distance, "smallest", 1)


def evaluate(method: Method, batches: Iterable[Tensor], problem: Problem, **options: Any) -> dict[str, Any]:
    """Return the scores of a method over batches of clean images; options as for ``Evaluation``."""
    evaluation = Evaluation(method, problem, **options)
    for x0 in batches:
        evaluation.add(x0)
    return evaluation.row()


def measure(
    method: Method,
    problem: Problem,
    batches: Iterable[Tensor],
    scores: Sequence[Score],
    num_samples: int,
    shown: Collection[int] = (),
    advance: Callable[[int], Any] = lambda images: None,
) -> Result:
    """Draw samples for all images and score them.

    Args:
        method: with ``networks``, the modules whose evaluations are counted. problem: how images are observed.
        batches: clean images [B, C, H, W], in the order of their numbers.
        scores: fresh ones. num_samples: S. shown: numbers of the images whose pictures are kept.
        advance: is told how many images were done.
    """
    pictures: dict[int, dict[str, Tensor]] = {}
    first, evaluations, watch = 0, 0, None
    for x0 in batches:
        if watch is None:
            watch = Stopwatch(x0.device)
            reset_peak_memory(x0.device)
            scores = [score.to(x0.device) for score in scores]
        y, physics = problem.observe(x0, first)
        generator = problem.sampling_generator(first, x0.device)
        with NetworkEvaluations(getattr(method, "networks", ())) as counter, watch:
            samples = method(y, physics, problem.sigma_y, num_samples, generator=generator)
        evaluations += counter.count
        noise = problem.sigma_y if problem.noise is None else problem.noise
        for score in scores:
            with torch.no_grad():
                score.add(Draws(x0, y, physics, problem.sigma_y, noise, samples))
        for i in set(shown) & set(range(first, first + len(x0))):
            k = i - first
            pictures[i] = {"x0": x0[k], "y": y[k], "sample": samples[k, 0], "mean": samples[k].mean(0)}
        first += len(x0)
        advance(len(x0))
    if watch is None:
        raise ValueError("there are no images to evaluate")
    row: dict[str, Any] = {"images": first, "samples": num_samples, "nfe": _whole(evaluations / (first * num_samples))}
    curves: dict[str, Any] = {}
    for score in scores:
        row |= score.numbers()
        curves |= score.curves()
    row["seconds_per_image"] = watch.seconds / (first * num_samples)
    row["peak_memory"] = peak_memory(watch.device)
    return Result(row, curves, {i: {k: v.cpu() for k, v in kinds.items()} for i, kinds in pictures.items()})


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
