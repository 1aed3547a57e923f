"""How well samples stand for a posterior: ranks, coverage, scores, distances and how sure of them one can be."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def ranks(samples: Tensor, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the rank of the truth among S samples, int64 in 0..S, entry by entry.

    Uniform over 0..S where x0 and the samples are draws of one distribution (simulation-based calibration, Talts et
    al., 2018). Ties, as at the limits of clipped images, are broken at random.

    Args:
        samples: [B, S, ...].
        x0: [B, ...].
        generator: breaks ties.

    Raises:
        ValueError: when the shapes do not fit.
    """
    if samples.ndim < 3 or samples.shape[:1] + samples.shape[2:] != x0.shape:
        raise ValueError(f"samples [B, S, ...] must fit x0 [B, ...], got {list(samples.shape)} and {list(x0.shape)}")
    truth = x0.unsqueeze(1)
    below, equal = (samples < truth).sum(1), (samples == truth).sum(1)
    fraction = torch.rand(x0.shape, generator=generator, dtype=torch.float64).to(x0.device)
    return below + (fraction * (equal + 1)).long().clamp(max=equal)


def coverage(rank: Tensor, num_samples: int, level: float) -> tuple[float, float]:
    """Return the share of truths inside the central credible interval, and the share that is right for it.

    Of S samples only intervals between two of them can be judged: the one from rank k to S - k whose share
    (S + 1 - 2 k) / (S + 1) is nearest to ``level`` is taken.

    Raises:
        ValueError: when the level is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of a credible interval must be inside (0, 1), got {level}")
    k = max(0, min(round((1 - level) * (num_samples + 1) / 2), num_samples // 2))
    inside = (rank >= k) & (rank <= num_samples - k)
    return inside.double().mean().item(), (num_samples + 1 - 2 * k) / (num_samples + 1)


def energy_score(samples: Tensor, x0: Tensor) -> Tensor:
    """Return mean_s |x_s - x0| - mean_{s != t} |x_s - x_t| / 2 per image, [B]; lower is better.

    Strictly proper: in expectation the true posterior alone has the lowest score (Gneiting and Raftery, 2007). |.| is
    the Euclidean norm over all pixels.

    Args:
        samples: [B, S, ...], S >= 2.
        x0: [B, ...].

    Raises:
        ValueError: for a single sample.
    """
    count = samples.shape[1]
    if count < 2:
        raise ValueError("the energy score needs at least 2 samples per image")
    flat = samples.flatten(2).double()
    accuracy = (flat - x0.flatten(1).double().unsqueeze(1)).norm(dim=2).mean(1)
    spread = torch.cdist(flat, flat).sum((1, 2)) / (count * (count - 1))
    return accuracy - spread / 2


def wasserstein2(one: Tensor, other: Tensor) -> float:
    """Return the 2-Wasserstein distance between two sets of equally many points [n, ...]: the best matching.

    It is that of the sets, not of the distributions: two sets of draws of one distribution have a distance that falls
    slowly with n, which belongs beside every number (the floor).

    Raises:
        ValueError: when the sets are not of one size.
    """
    if one.shape != other.shape or len(one) < 1:
        raise ValueError(f"two sets of equally many points are needed, got {list(one.shape)} and {list(other.shape)}")
    cost = (torch.cdist(one.flatten(1).double(), other.flatten(1).double()) ** 2).cpu().numpy()
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def gaussian_wasserstein2(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Return the 2-Wasserstein distance between two Gaussians: means [n], covariances [n, n].

    W2^2 = |m - m'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2) (Dowson and Landau, 1982).
    """
    root = _root(covariance)
    cross = _root(root @ other_covariance.double() @ root)
    trace = (covariance.double() + other_covariance.double() - 2 * cross).trace()
    return ((mean - other_mean).double().square().sum() + trace).clamp_min(0).sqrt().item()


@dataclass(frozen=True)
class ConditionalGaussian:
    """x given y as N(mean + (y - mean_y) gain, covariance), in the convention of rows."""

    mean: Tensor
    mean_y: Tensor
    gain: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> "ConditionalGaussian":
        """Return the law of rows x [n, F] given y [n, G], taken for jointly Gaussian."""
        mean, mean_y = x.mean(0), y.mean(0)
        x, y, scale = x - mean, y - mean_y, 1 / (len(x) - 1)
        gain = torch.linalg.pinv(scale * y.T @ y, hermitian=True) @ (scale * y.T @ x)
        residual = x - y @ gain
        return cls(mean, mean_y, gain, scale * residual.T @ residual)

    def means(self, y: Tensor) -> Tensor:
        """Return the means given rows y."""
        return self.mean + (y - self.mean_y) @ self.gain

    def distance(self, other: "ConditionalGaussian", y: Tensor) -> float:
        """Return the mean over rows y of the squared 2-Wasserstein distance between both laws given y."""
        shift = self.means(y) - other.means(y)
        zero = torch.zeros_like(self.mean)
        spread = gaussian_wasserstein2(zero, self.covariance, zero, other.covariance)
        return shift.square().sum(1).mean().item() + spread**2


def conditional_frechet(x: Tensor, drawn: Tensor, y: Tensor) -> float:
    """Return the conditional Fréchet distance (CFID) of features of truths, samples and observations, each [n, F].

    (x, y) and (drawn, y) are taken for jointly Gaussian; it is then the mean over y of the squared 2-Wasserstein
    distance between the conditional Gaussians (Soloveitchik et al., "Conditional Frechet Inception Distance", 2021,
    arXiv 2103.11521; used by pcaGAN, Bendel et al., NeurIPS 2024):

    |m_x - m_d|^2 + tr((C_xy - C_dy) C_yy^+ (C_yx - C_yd)) + tr(P + Q - 2 (P^1/2 Q P^1/2)^1/2), with the conditional
    covariances P = C_xx - C_xy C_yy^+ C_yx, and Q of the samples.

    Raises:
        ValueError: when the three do not have one row for each of at least 2 images.
    """
    x, drawn, y = _rows(x, drawn, y)
    return ConditionalGaussian.fit(x, y).distance(ConditionalGaussian.fit(drawn, y), y)


def debiased_conditional_frechet(x: Tensor, drawn: Tensor, y: Tensor) -> float:
    """Return the same without the bias of finite sets, 0 on average where the laws agree; it can be negative.

    The images are parted into those of even and odd number, and the distances D between laws fitted to different halves
    give D(x, drawn') / 2 + D(x', drawn) / 2 - D(x, x') / 2 - D(drawn, drawn') / 2, as in Sinkhorn divergences (Feydy et
    al., AISTATS 2019).
    """
    x, drawn, y = _rows(x, drawn, y)
    (first, second), (ours, theirs) = ([ConditionalGaussian.fit(z[k::2], y[k::2]) for k in (0, 1)] for z in (x, drawn))
    between = first.distance(theirs, y) + second.distance(ours, y)
    return (between - first.distance(second, y) - ours.distance(theirs, y)) / 2


def signed_root(value: float) -> float:
    """Return sqrt(|value|) with the sign of the value: the length of a debiased squared distance."""
    return math.copysign(abs(value) ** 0.5, value)


def _rows(x: Tensor, drawn: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not len(x) == len(drawn) == len(y) or len(x) < 2 or x.shape != drawn.shape:
        raise ValueError(
            f"truths, samples and observations need a row for each image, got {list(x.shape)}, {list(drawn.shape)} and "
            f"{list(y.shape)}"
        )
    return x.double().flatten(1), drawn.double().flatten(1), y.double().flatten(1)


def residual_p_value(residual: Tensor, count: int | Tensor) -> Tensor:
    """Return the probability that noise alone makes a residual |A x - y| / (sigma_y sqrt(m)) at least as large, [B].

    m residual^2 is chi^2 distributed with m = ``count`` degrees of freedom where x is the truth, or a draw of the exact
    posterior, and p then uniform. ``count`` is a number or [B].
    """
    half = torch.as_tensor(count, dtype=torch.float64, device=residual.device) / 2
    return torch.special.gammaincc(half, half * residual.double().square())


def bootstrap_interval(
    values: Tensor,
    level: float = 0.95,
    repeats: int = 2000,
    generator: torch.Generator | None = None,
    of: Callable[[Tensor], Tensor] = lambda means: means,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of one value per image [B].

    Args:
        values: [B], or [B, F] for a function of several means.
        level: of the interval.
        repeats: draws of B images.
        generator: draws them.
        of: number whose interval it is, from the means, [repeats] or [repeats, F] -> [repeats].

    Raises:
        ValueError: for fewer than two images.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs one value for each of at least 2 images, got {list(values.shape)}")
    picks = torch.randint(len(values), (repeats, len(values)), generator=generator)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(of(values.double().cpu()[picks].mean(1)), tails).tolist()
    return low, high


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
