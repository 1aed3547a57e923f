"""What an evaluation measures: each score gathers batches of one method and returns numbers with their intervals.

Definitions with their sources: docs/evaluation.md.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import scipy.stats
import torch
from deepinv.physics import LinearPhysics
from torch import Tensor, nn
from torchmetrics.image.kid import poly_mmd

from ud2m.evaluation.calibration import (
    bootstrap_interval,
    conditional_frechet,
    coverage,
    debiased_conditional_frechet,
    energy_score,
    gaussian_wasserstein2,
    ranks,
    residual_p_value,
    signed_root,
)
from ud2m.evaluation.features import (
    BACKBONES,
    INCEPTION,
    NETS,
    BackboneFeatures,
    DISTSDistance,
    InceptionFeatures,
    check_weights,
    lpips_distance,
)
from ud2m.evaluation.metrics import (
    SSIM_WINDOW,
    calibration_ratio,
    frames_of,
    over_frames,
    psnr,
    psnr_limit,
    spread_and_error,
    ssim,
)
from ud2m.names import unknown
from ud2m.physics import Observation, measured, residual

Numbers = dict[str, Any]
DEFAULT_NET = "alex"
"""Backbone of the metric ``lpips``, the one that the field reports; others stand in the name."""
LEVELS = (0.5, 0.8, 0.9)
"""Nominal coverages of the credible intervals that are reported by name."""
SMALLEST_KID = 50
"""Images below which the kernel distance is mostly noise."""
DIRECTIONS = 3
"""Projections onto white noise whose ranks are tested, beside the mean."""
DEVIATIONS = tuple(2.0 ** (k / 2) for k in range(-20, -1))
"""Edges of the bins of standard deviations that errors are compared in, in image units: half octaves."""
PER_BIN = 5
"""Images per possible rank that the chi^2 test of the ranks needs (Cochran's rule)."""
VALUES = "_values"
"""End of the names of lists of values per image."""
RESAMPLED = 100
"""Bootstrap repeats of distances between sets of features."""
RESAMPLED_WIDE = 20
"""The same with thousands of numbers per image, where each costs seconds."""
FRECHET_VIDEO, TRIPLE = "frechet_video", 3
"""The distance between sets of so many frames that follow one another."""


@dataclass(frozen=True, eq=False)
class Draws:
    """One batch: clean images or videos, their observations, and samples.

    Attributes:
        x0: clean images [B, C, H, W], or videos [B, C, T, H, W].
        observation: of them.
        noise: level that y really has, image units.
        samples: [B, S, C, H, W] or [B, S, C, T, H, W].
    """

    x0: Tensor
    observation: Observation
    noise: float
    samples: Tensor

    def each(self, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the mean over single samples of a distance to x0, [B]."""
        return torch.stack([distance(sample, self.x0) for sample in self.samples.unbind(1)]).mean(0)


def frames_in(size: Sequence[int]) -> int:
    """Return the frames of a video (C, T, H, W); 1 of an image (C, H, W)."""
    return size[1] if len(size) == 4 else 1


def what_it_is(size: Sequence[int]) -> str:
    """Return a size in words."""
    what = f"{size[-2]}x{size[-1]} images"
    return what if len(size) == 3 else f"videos of {size[1]} {what}"


def triples_of(videos: Tensor) -> Tensor:
    """Return the three frames that begin at each but the last two, as the colours of [B (T - 2), 3, H, W], in grey."""
    return videos.mean(1).unfold(1, TRIPLE, 1).movedim(-1, 2).flatten(0, 1)


class Score(ABC):
    """Gathers one or more numbers of a sampler.

    ``modules`` are the networks that it judges with, ``smallest`` is the side of images in pixels below which there is
    no number, ``least`` the number of samples of each observation that are needed, ``channels`` those that images may
    have; any, where it is empty, and ``frames`` those that a video has at least; pictures have one.
    """

    modules: tuple[nn.Module, ...] = ()
    smallest: int = 1
    least: int = 1
    channels: tuple[int, ...] = ()
    frames: int = 1

    def __init__(self) -> None:
        self.gathered: dict[str, list[Tensor]] = {}

    def to(self, device: torch.device | str) -> "Score":
        """Move the networks to where the images are."""
        for module in self.modules:
            module.to(device)
        return self

    def check(self, images: int, samples: int, size: Sequence[int]) -> None:
        """Raise ValueError where so many images, with so many samples each, give no number with an interval.

        ``size`` is (C, H, W), or (C, T, H, W) of videos.
        """
        if min(size[-2:]) < self.smallest:
            raise ValueError(f"it needs images of at least {self.smallest} pixels a side, got {size[-2]}x{size[-1]}")
        if frames_in(size) < self.frames:
            raise ValueError(f"it needs videos of at least {self.frames} frames, got {what_it_is(size)}")
        if self.channels and size[0] not in self.channels:
            raise ValueError(f"it needs images of {' or '.join(map(str, self.channels))} channels, got {size[0]}")
        if samples < self.least:
            raise ValueError(f"it needs num_samples of at least {self.least}, got {samples}")
        if images < 2:
            raise ValueError(f"its interval needs at least 2 images, got {images}")

    @abstractmethod
    def values(self, draws: Draws) -> Mapping[str, Tensor]:
        """Return what is gathered of one batch: a row for each image, by name, [B, ...]."""

    def add(self, draws: Draws) -> None:
        """Take one batch."""
        for name, rows in self.values(draws).items():
            self.gathered.setdefault(name, []).append(rows.cpu().double())

    @property
    def rows(self) -> dict[str, Tensor]:
        """What was gathered of all images, in their order, float64 on the CPU."""
        return {name: torch.cat(parts) for name, parts in self.gathered.items()}

    @abstractmethod
    def numbers(self) -> Numbers:
        """Return the numbers by name; ``NAME_low`` and ``NAME_high`` bound a 95 % interval over images."""

    def curves(self) -> dict[str, list[Any]]:
        """Return what is more than one number, for the report and the file of the cell."""
        return {}


class PerImage(Score):
    """Means over images of values per image, with percentile bootstrap intervals.

    Args:
        values: Draws -> {name: [B]}.
        smallest: see ``Score``.
        least: see ``Score``.
        backend: written beside the numbers, by the name of the key.
        modules: see ``Score``.
        channels: see ``Score``.
        frames: see ``Score``.
    """

    def __init__(
        self,
        values: Callable[[Draws], Mapping[str, Tensor]],
        smallest: int = 1,
        least: int = 1,
        backend: Mapping[str, str] | None = None,
        modules: Sequence[nn.Module] = (),
        channels: Sequence[int] = (),
        frames: int = 1,
    ):
        super().__init__()
        self.of, self.smallest, self.least, self.backend = values, smallest, least, dict(backend or {})
        self.modules, self.channels, self.frames = tuple(modules), tuple(channels), frames

    def values(self, draws: Draws) -> Mapping[str, Tensor]:
        """Return the values of one batch."""
        return self.of(draws)

    def numbers(self) -> Numbers:
        """Return the means over images."""
        found: Numbers = {}
        for name, values in self.rows.items():
            found |= with_interval(name, values)
        return found | self.backend

    def curves(self) -> dict[str, list[Any]]:
        """Return the values of all images, in their order: differences between methods are paired by image."""
        return {f"{name}{VALUES}": values.tolist() for name, values in self.rows.items()}


def with_interval(name: str, values: Tensor, of: Callable[[Tensor], Tensor] = lambda means: means) -> Numbers:
    """Return the mean of values [n] and its interval, which is None for one value, or infinite ones (equal images).

    Or a function of several means of values [n, F]: ``of`` takes [..., F] to [...].
    """
    defined = len(values) > 1 and bool(values.isfinite().all())
    low, high = bootstrap_interval(values, generator=_seeded(), of=of) if defined else (None, None)
    return {name: of(values.mean(0)).item(), f"{name}_low": low, f"{name}_high": high}


def with_spread(name: str, distance: Callable[..., float], sets: Sequence[Tensor], repeats: int) -> Numbers:
    """Return a distance between sets with a row for each image, and an interval of 1.96 bootstrap deviations.

    Drawing images twice makes these distances larger; so percentiles would miss the number itself.
    """
    value, count, generator = distance(*sets), len(sets[0]), _seeded()
    picks = [torch.randint(count, (count,), generator=generator) for _ in range(repeats)]
    found = torch.tensor([distance(*(rows[pick] for rows in sets)) for pick in picks], dtype=torch.float64)
    spread = 1.96 * found.std().item()
    return {name: value, f"{name}_low": value - spread, f"{name}_high": value + spread}


def of_mean_and_samples(
    name: str, distance: Callable[[Tensor, Tensor], Tensor], suffix: str = ""
) -> Callable[[Draws], dict[str, Tensor]]:
    """Return the values of a distance (samples, references) -> [B], of the samples' mean and of single samples."""
    return lambda draws: {
        f"{name}_mean{suffix}": distance(draws.samples.mean(1), draws.x0),
        f"{name}{suffix}": draws.each(distance),
    }


def _diversity(draws: Draws) -> dict[str, Tensor]:
    return {"diversity": draws.samples.var(1).flatten(1).mean(1).sqrt()}


def _psnr_limit(draws: Draws) -> dict[str, Tensor]:
    return {"psnr_limit": psnr_limit(draws.samples.double(), draws.x0.double())}


def _energy(draws: Draws) -> dict[str, Tensor]:
    return {"energy": energy_score(draws.samples, draws.x0) / draws.x0[0].numel() ** 0.5}


def _residual(draws: Draws) -> dict[str, Tensor]:
    def fit(sample: Tensor, _: Tensor) -> Tensor:
        return residual(physics, sample, y, sigma_y)

    y, physics, sigma_y = draws.observation.y, draws.observation.physics, draws.observation.sigma_y
    found = {"residual": draws.each(fit)}
    # the law is known where the noise is Gaussian and has the level that samplers were told
    if isinstance(physics, LinearPhysics) and bool((sigma_y == draws.noise).all()):
        count = measured(physics, y).expand_as(y).flatten(1).sum(1)
        found["residual_p"] = draws.each(lambda sample, _: residual_p_value(fit(sample, _), count))
    return found


class Ratio(Score):
    """r over all images together (``metrics.calibration_ratio``)."""

    least = 2

    def values(self, draws: Draws) -> dict[str, Tensor]:
        """Return spread and error of each image."""
        return {"r": torch.stack(spread_and_error(draws.samples.double(), draws.x0.double()), 1)}

    def numbers(self) -> Numbers:
        """Return r; None where all means are exact."""
        rows = self.rows["r"]
        if not rows[:, 1].sum() > 0:
            return {"r": None}
        found = with_interval("r", rows, lambda means: (means[..., 0] / means[..., 1]).sqrt())
        return found | {"r": calibration_ratio(*rows.unbind(1))}


class Coverage(Score):
    """Share of pixels of the truth inside central credible intervals, and the curve of that over all levels.

    Of S samples, the interval from rank k to S - k covers (S + 1 - 2 k) / (S + 1) when they are calibrated, k = 1, 2,
    ...; a level of ``LEVELS`` is reported under the nearest of these, with it beside. ``calibration_error`` is the mean
    distance of the curve from the diagonal.
    """

    least = 13

    @property
    def count(self) -> int:
        """S."""
        return int(self.rows["samples"][0])

    def check(self, images: int, samples: int, size: Sequence[int]) -> None:
        """Raise ValueError where no interval of S samples is near to the highest level."""
        if samples < self.least:
            raise ValueError(
                f"intervals of {100 * LEVELS[-1]:.0f} % need at least {self.least} samples per observation (19 are "
                f"best), got {samples}"
            )
        super().check(images, samples, size)

    def values(self, draws: Draws) -> dict[str, Tensor]:
        """Return the share of covered pixels of each image, for each level."""
        count = draws.samples.shape[1]
        rank = ranks(draws.samples, draws.x0, _seeded()).flatten(1)
        inside = [((rank >= k) & (rank <= count - k)).double().mean(1) for k in range(1, (count - 1) // 2 + 1)]
        return {"inside": torch.stack(inside, 1), "samples": torch.full((len(rank),), count)}

    def nominal(self) -> list[float]:
        """Return the coverages that a calibrated sampler has, falling."""
        return [(self.count + 1 - 2 * k) / (self.count + 1) for k in range(1, (self.count - 1) // 2 + 1)]

    def numbers(self) -> Numbers:
        """Return the coverages of ``LEVELS`` and the error of the curve."""
        inside, nominal = self.rows["inside"], self.nominal()
        found: Numbers = {}
        for level in LEVELS:
            name, (_, right) = f"coverage_{100 * level:.0f}", coverage(torch.zeros(1), self.count, level)
            found |= with_interval(name, inside[:, nominal.index(right)]) | {f"{name}_nominal": right}
        error = (inside.mean(0) - torch.tensor(nominal, dtype=torch.float64)).abs().mean().item()
        return found | {"calibration_error": error}

    def curves(self) -> dict[str, list[Any]]:
        """Return pairs of nominal and found coverage."""
        found = self.rows["inside"].mean(0).tolist()
        return {"calibration": [list(pair) for pair in zip(self.nominal(), found, strict=True)]}


class Spatial(Score):
    """Whether the samples' standard deviation says how far their mean errs, place by place: error against it, in bins.

    Pixels are binned by the standard deviation s of their samples. For a calibrated sampler the truth is one more draw,
    so that the squared error of the mean of S samples is (1 + 1/S) s^2 on average: the error of a bin is freed of that
    factor. ``spatial_error`` is |log2(error / s)| of the bins, weighted by their pixels: 0 where s is right everywhere,
    1 where it is wrong by a factor of two. Few samples bin by chance: low s are too low, and high ones too high.
    """

    least = 8

    def values(self, draws: Draws) -> dict[str, Tensor]:
        """Return pixels, mean variance and mean squared error of each bin, over all pixels of an image."""
        variance = draws.samples.double().var(1).flatten(1)
        error = (draws.samples.double().mean(1) - draws.x0).square().flatten(1)
        place = torch.bucketize(variance.sqrt(), torch.tensor(DEVIATIONS, dtype=torch.float64, device=variance.device))
        parts = torch.stack([torch.ones_like(variance), variance, error * self.freed(draws.samples.shape[1])], 1)
        sums = parts.new_zeros(*parts.shape[:2], len(DEVIATIONS) + 1)
        return {"bins": sums.scatter_add_(2, place.unsqueeze(1).expand_as(parts), parts) / variance.shape[1]}

    @staticmethod
    def freed(count: int) -> float:
        """Return the factor that frees squared errors of the mean of so many samples of their number."""
        return count / (count + 1)

    def numbers(self) -> Numbers:
        """Return ``spatial_error``."""
        return with_interval("spatial_error", self.rows["bins"].flatten(1), self._distance)

    def curves(self) -> dict[str, list[Any]]:
        """Return standard deviation, error and share of the pixels, of each bin that holds a thousandth of them."""
        share, variance, error = self.rows["bins"].mean(0)
        kept = share > 1e-3
        found = torch.stack([(variance / share).sqrt(), (error / share).sqrt(), share], 1)[kept]
        return {"spatial": found.tolist()}

    @staticmethod
    def _distance(means: Tensor) -> Tensor:
        share, variance, error = means.unflatten(-1, (3, -1)).unbind(-2)
        filled = (variance > 0) & (error > 0)
        octaves = torch.where(filled, error / variance, 1).log2().abs() / 2
        return (share * octaves).sum(-1)


class Ranks(Score):
    """Simulation-based calibration (Talts et al., 2018) of a few numbers of each image: their ranks and a chi^2 test.

    The numbers are the mean of the image and ``DIRECTIONS`` products with fixed white noise. ``sbc_p`` is the smallest
    of the tests' p-values times their number (Bonferroni), at most 1: small for a sampler that is not calibrated.
    """

    least = 2

    def check(self, images: int, samples: int, size: Sequence[int]) -> None:
        """Raise ValueError where the expected counts of the test are below 5."""
        if images < PER_BIN * (samples + 1):
            raise ValueError(
                f"ranks of {samples} samples need at least {PER_BIN * (samples + 1)} images for their test, got "
                f"{images}; take fewer samples or more images"
            )

    def values(self, draws: Draws) -> dict[str, Tensor]:
        """Return the ranks of each image, as rows of zeros with a one at the rank."""
        size = draws.x0[0].numel()
        noise = torch.randn(DIRECTIONS, size, generator=_seeded()).to(draws.x0)
        basis = torch.cat([torch.ones_like(noise[:1]) / size, noise / size**0.5])
        samples, truth = draws.samples.flatten(2) @ basis.T, draws.x0.flatten(1) @ basis.T
        return {"ranks": nn.functional.one_hot(ranks(samples, truth, _seeded()), samples.shape[1] + 1)}

    def numbers(self) -> Numbers:
        """Return ``sbc_p``."""
        tests = [scipy.stats.chisquare(row).pvalue for row in self.curves()["ranks"]]
        return {"sbc_p": min(1.0, float(min(tests)) * len(tests))}

    def curves(self) -> dict[str, list[Any]]:
        """Return the counts of ranks 0..S, a list for each number."""
        return {"ranks": self.rows["ranks"].sum(0).long().tolist()}


class FeatureDistances(Score):
    """Distances between the sets of samples and of references, in the features of a backbone.

    Of videos the sets are those of all frames; for ``frechet_video`` of all three frames that follow one another, as
    red, green and blue of one picture, so that their features depend on motion.

    Args:
        net: of ``ud2m.evaluation.features.NETS``.
        kind: ``frechet`` (Heusel et al., 2017), ``frechet_video``, ``kid`` (Binkowski et al., 2018) or ``cfid``
            (Soloveitchik et al., 2021).
        patch: images are cut into patches of this side first; 0: they are taken whole.
    """

    def __init__(self, net: str, kind: str, patch: int = 0):
        super().__init__()
        check_weights(net)
        self.features = InceptionFeatures() if net == INCEPTION else BackboneFeatures(net)
        self.kind, self.patch = kind, patch
        self.modules = (self.features,)
        self.repeats = RESAMPLED_WIDE if net == INCEPTION else RESAMPLED
        self.name = f"{kind}_{net}" + (f"_{patch}" if patch else "")
        self.frames = TRIPLE if kind == FRECHET_VIDEO else 1
        self.backend = self.features.name
        self.backend += ", 3 frames as colours" if kind == FRECHET_VIDEO else ""
        self.backend += f", {patch}x{patch}" if patch else ""

    def check(self, images: int, samples: int, size: Sequence[int]) -> None:
        """Raise ValueError where the number of images does not carry the distance."""
        height, width = size[-2:]
        if self.patch and (height % self.patch or width % self.patch):
            raise ValueError(f"patches of {self.patch} do not divide images of {height}x{width}")
        if min(height, width) < self.features.smallest or 0 < self.patch < self.features.smallest:
            raise ValueError(f"it needs images and patches of at least {self.features.smallest} pixels a side")
        frames = frames_in(size)
        if frames < self.frames or (self.kind == "cfid" and len(size) == 4):
            needed = "pictures" if self.kind == "cfid" else f"videos of at least {self.frames} frames"
            raise ValueError(f"it needs {needed}, got {what_it_is(size)}")
        count = images * (frames - self.frames + 1) * (height * width // self.patch**2 if self.patch else 1)
        width = self.features.num_features
        least = {"kid": SMALLEST_KID, "cfid": 2 * width + 1}.get(self.kind, width + 1)
        if count < least:
            raise ValueError(
                f"in {width} features it needs at least {least} {self._items(size)}, got {count}; "
                "take more images or smaller pieces"
            )

    def values(self, draws: Draws) -> dict[str, Tensor]:
        """Return the features of truths, samples and, where the distance is conditional, of A^dagger y as a picture."""
        drawn = torch.stack([self._features(sample) for sample in draws.samples.unbind(1)], 1)
        found = {"truth": self._features(draws.x0), "drawn": drawn}
        if self.kind == "cfid":
            given = draws.observation
            found["seen"] = self._features(given.physics.A_dagger(given.y).clamp(0, 1))
        return found

    def numbers(self) -> Numbers:
        """Return the distance with its interval."""
        found = with_spread(self.name, self._distance, list(self.rows.values()), self.repeats)
        return found | {f"{self.name}_backend": self.backend}

    def _items(self, size: Sequence[int]) -> str:
        if self.patch:
            return "patches"
        return "images" if len(size) == 3 else "frames" if self.frames == 1 else f"sets of {self.frames} frames"

    def _features(self, images: Tensor) -> Tensor:
        if images.ndim == 5:
            parts = triples_of(images) if self.kind == FRECHET_VIDEO else frames_of(images)
            return self._features(parts).unflatten(0, (len(images), -1)).flatten(1, -2)
        if not self.patch:
            return self.features(images)
        images = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch).permute(0, 2, 3, 1, 4, 5)
        features = self.features(images.flatten(0, 2).contiguous())
        return features.unflatten(0, (len(images), -1))

    def _distance(self, truth: Tensor, drawn: Tensor, *seen: Tensor) -> float:
        if self.kind == "cfid":
            # one sample of each observation: pairs (sample, observation) are then independent over images
            return conditional_frechet(truth, drawn[:, 0], *seen)
        real, fake = truth.flatten(0, -2), drawn.flatten(0, -2)
        if self.kind == "kid":
            return float(poly_mmd(real, fake))
        return gaussian_wasserstein2(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov()) ** 2


class ConditionalW2(Score):
    """Root of the mean over y of the squared W2 between Gaussians of pixels given y (``conditional_frechet``).

    Truths, one sample of each observation, and y are taken for jointly Gaussian, as pcaGAN does on such data.
    """

    def check(self, images: int, samples: int, size: Sequence[int]) -> None:
        """Raise ValueError for fewer images than the covariances need."""
        least = 2 * math.prod(size) + 1
        if images < least:
            raise ValueError(
                f"covariances of the pixels of {what_it_is(size)} given y need at least {least} images, got "
                f"{images}; take more images or smaller ones"
            )

    def values(self, draws: Draws) -> dict[str, Tensor]:
        """Return the pixels of truth, sample and observation."""
        parts = {"truth": draws.x0, "drawn": draws.samples[:, 0], "seen": draws.observation.y}
        return {name: images.flatten(1) for name, images in parts.items()}

    def numbers(self) -> Numbers:
        """Return ``cw2`` in image units (norm over pixels), with an interval of 1.96 bootstrap deviations.

        ``cw2_debiased`` is the signed root of ``debiased_conditional_frechet``.
        """
        sets = list(self.rows.values())
        found = with_spread("cw2", lambda *s: max(0.0, conditional_frechet(*s)) ** 0.5, sets, RESAMPLED_WIDE)
        return found | {"cw2_debiased": signed_root(debiased_conditional_frechet(*sets))}


def lpips_score(net: str) -> PerImage:
    """Return LPIPS of the mean, of single samples, between samples (diversity), and freed of spread, with a backbone.

    LPIPS is a squared distance of features, so that a single sample pays for the spread as in its PSNR. Freed of it,
    E d(x, x0) - E d(x, x') / 2 = d(E f(x), f(x0)), it is that of the mean of infinitely many samples' features
    (``lpips_limit``), estimated without bias from two samples or more.
    """
    check_weights(net)
    network = lpips_distance(net)
    distance = over_frames(network)
    suffix = "" if net == DEFAULT_NET else f"_{net}"
    against_truth = of_mean_and_samples("lpips", distance, suffix)

    def values(draws: Draws) -> dict[str, Tensor]:
        found = against_truth(draws)
        if draws.samples.shape[1] > 1:
            pairs = pairwise(draws.samples.unbind(1))
            between = torch.stack([distance(a, b) for a, b in pairs]).mean(0)
            found |= {
                f"diversity_lpips{suffix}": between,
                f"lpips_limit{suffix}": found[f"lpips{suffix}"] - between / 2,
            }
        return found

    backend = {f"lpips{suffix}_backend": network.name}
    return PerImage(values, network.smallest, backend=backend, modules=[network], channels=(1, 3))


def dists_score() -> PerImage:
    """Return DISTS of the mean and of single samples."""
    distance = DISTSDistance()
    values = of_mean_and_samples("dists", over_frames(distance))
    backend = {"dists_backend": distance.name}
    return PerImage(values, distance.smallest, backend=backend, modules=[distance], channels=(1, 3))


def distance_score(name: str, distance: Callable[[Tensor, Tensor], Tensor]) -> PerImage:
    """Return a score of single samples by a distance (samples, references) -> [B], as one of a prior's features."""
    modules = [distance] if isinstance(distance, nn.Module) else []
    return PerImage(lambda draws: {name: draws.each(distance)}, modules=modules)


def motion_score() -> PerImage:
    """Return the PSNR of the differences between frames of videos: of the mean, and of single samples."""
    return PerImage(of_mean_and_samples("psnr_motion", lambda x, x0: psnr(x.diff(dim=2), x0.diff(dim=2))), frames=2)


def fvmd_score() -> Score:
    """Refuse FVMD (Liu et al., 2024), in one line: no tracker of points is at hand, with which it is defined.

    Raises:
        FileNotFoundError: always.
    """
    raise FileNotFoundError(
        "it follows points by the tracker PIPs++, whose code and weights are not here; frechet_video_alex depends on "
        "motion too"
    )


def lpips_metric(net: str) -> str:
    """Return the name of the metric with a backbone: ``lpips`` is that of AlexNet."""
    return "lpips" if net == DEFAULT_NET else f"lpips_{net}"


SCORES: dict[str, Callable[[], Score]] = {
    "psnr": lambda: PerImage(of_mean_and_samples("psnr", over_frames(psnr))),
    "psnr_limit": lambda: PerImage(_psnr_limit, least=2),
    "ssim": lambda: PerImage(of_mean_and_samples("ssim", over_frames(ssim)), smallest=SSIM_WINDOW),
    "residual": lambda: PerImage(_residual),
    "diversity": lambda: PerImage(_diversity, least=2),
    "energy": lambda: PerImage(_energy, least=2),
    "r": Ratio,
    "coverage": Coverage,
    "spatial": Spatial,
    "sbc": Ranks,
    "cw2": ConditionalW2,
    "dists": dists_score,
    "psnr_motion": motion_score,
    "fvmd": fvmd_score,
    **{lpips_metric(net): lambda net=net: lpips_score(net) for net in BACKBONES},  # type: ignore[misc]
}


SETS = ("frechet", FRECHET_VIDEO, "kid", "cfid")
_OF_SETS = re.compile(rf"(?!cfid_\w+_\d)(?P<kind>{'|'.join(SETS)})_(?P<net>{'|'.join(NETS)})(?:_(?P<side>[1-9]\d*))?")


def build_score(name: str) -> Score:
    """Return a fresh score by its name: one of ``SCORES``, or of ``SETS`` with ``_NET`` (``_SIDE``).

    Raises:
        ValueError: for an unknown name, or without the package of its network.
        FileNotFoundError: when the weights of its network are not in the torch cache.
    """
    of_sets = _OF_SETS.fullmatch(name)
    if name not in SCORES and of_sets is None:
        raise ValueError(
            f"{unknown('metric', name, SCORES)}, and with one of the networks {', '.join(NETS)}: "
            f"{', '.join(f'{kind}_NET' for kind in SETS)}, of patches e.g. frechet_alex_64"
        )
    try:
        if of_sets:
            return FeatureDistances(of_sets["net"], of_sets["kind"], int(of_sets["side"] or 0))
        return SCORES[name]()
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"the metric {name} cannot be computed: {error}; or leave it out") from error


def fitting_scores(names: Sequence[str], samples: int, size: Sequence[int]) -> list[Score]:
    """Return fresh scores for so many samples of images (C, H, W) or videos (C, T, H, W) that these allow.

    Left out too are those whose weights are not in the torch cache.

    Raises:
        ValueError: for an unknown name.
    """
    found = []
    for name in names:
        with suppress(FileNotFoundError):
            found.append(build_score(name))
    return [
        score
        for score in found
        if min(size[-2:]) >= score.smallest
        and frames_in(size) >= score.frames
        and samples >= score.least
        and (not score.channels or size[0] in score.channels)
    ]


def left_out(names: Sequence[str]) -> list[str]:
    """Return why ``fitting_scores`` leaves out those whose weights are missing."""
    reasons = []
    for name in names:
        try:
            build_score(name)
        except FileNotFoundError as error:
            reasons.append(f"without {name}: {error}")
    return reasons


def check_scores(names: Sequence[str], images: int, samples: int, size: tuple[int, ...]) -> None:
    """Raise ValueError or FileNotFoundError now for a metric that could not be computed at the end."""
    for name in names:
        score = build_score(name)
        try:
            score.check(images, samples, size)
        except ValueError as error:
            raise ValueError(f"the metric {name}: {error}") from error


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
