"""The terms of the generator's loss: functions of the network's outputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

from ud2m.numbers import is_number

# Added to squared norms: the root gets a gradient at 0. sqrt(1e-8) = 1e-4 is far below any noise level in
# use, and the energy score stays proper, since sqrt(|d|^2 + c) is, like |d|, conditionally negative definite
# (Micchelli, 1986).
ROOT_EPS = 1e-8
Features = Callable[[Tensor], Sequence[Tensor]]


class NonFiniteLossError(RuntimeError):
    """A loss term became nan or infinite; ``term`` is its name."""

    def __init__(self, term: str, value: Tensor):
        super().__init__(f"the loss term '{term}' is {value.item():g}")
        self.term = term


@dataclass(frozen=True)
class Prediction:
    """What the network made of one batch: M outputs per sample with independent inner noise.

    Args:
        x0: clean images [B, C, H, W].
        outputs: the network's [B, M, C, H, W] for the same (x_sigma, sigma, y).
        sigma: noise levels [B] of x_sigma, image units.
        condition: y brought to image size, [B, C', H, W].

    Raises:
        ValueError: when the shapes do not fit together.
    """

    x0: Tensor
    outputs: Tensor
    sigma: Tensor
    condition: Tensor

    def __post_init__(self) -> None:
        x0, outputs = self.x0.shape, self.outputs.shape
        if len(outputs) != 5 or (outputs[0], *outputs[2:]) != tuple(x0):
            raise ValueError(
                f"outputs must be [B, M, C, H, W] for x0 [B, C, H, W], got {tuple(outputs)} and {tuple(x0)}"
            )
        if self.sigma.shape != x0[:1] or self.condition.shape[0] != x0[0]:
            raise ValueError(
                f"sigma must be [B] and the condition [B, ...] with B = {x0[0]}, "
                f"got {tuple(self.sigma.shape)} and {tuple(self.condition.shape)}"
            )

    @property
    def flat_outputs(self) -> Tensor:
        """All outputs as one batch [B M, C, H, W], sample by sample."""
        return self.outputs.flatten(0, 1)

    def repeat(self, x: Tensor) -> Tensor:
        """Return x [B, ...] repeated to stand beside ``flat_outputs``."""
        return x.repeat_interleave(self.outputs.shape[1], dim=0)


class LossTerm(nn.Module):
    """A term of the generator loss: ``forward(prediction) -> scalar``, averaged over samples and outputs.

    ``num_outputs`` is the M it needs. A term that needs the prior's features or the discriminator has an
    argument of that name (``features``, ``discriminator``), which ``build_generator_loss`` fills.
    """

    num_outputs: int = 1


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    # |eps - eps_hat|^2 = |x0 - x0_hat|^2 / sigma^2, "L2 on eps": small noise weighs up to 10^4 times more.
    "epsilon": lambda sigma: sigma**-2,
    # (sigma^2 + s^2) / (sigma s)^2, s = 0.25 the std of the data (Karras et al., 2022: 0.5 in [-1, 1]).
    "edm": lambda sigma: sigma**-2 + 0.25**-2,
}


class L2(LossTerm):
    """weight(sigma) |x0 - L|^2 / (C H W), in x0 space. Its minimiser is the posterior mean, not a sample.

    Args:
        weighting: ``constant`` (1), ``epsilon`` (1 / sigma^2) or ``edm`` (1 / sigma^2 + 1 / 0.25^2).
    """

    def __init__(self, weighting: str = "constant"):
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r} of the L2 term; allowed: {', '.join(WEIGHTINGS)}")
        self.weight = WEIGHTINGS[weighting]

    def forward(self, prediction: Prediction) -> Tensor:
        """Return the weighted mean squared error."""
        squares = (prediction.x0.unsqueeze(1) - prediction.outputs).square().flatten(1).mean(1)
        return (self.weight(prediction.sigma) * squares).mean()


class MeanL2(LossTerm):
    """Unbiased estimate of |x0 - E L|^2 / (C H W): the error of the outputs' *mean*, blind to their spread.

    mean_{m != m'} (x0 - L_m) . (x0 - L_m'), whose expectation is |x0 - E L|^2, since the outputs are independent given
    (x_sigma, y). It is the energy score with squared norms: it asks for the posterior mean, as ``L2`` does, and unlike
    ``L2`` does not pay for narrower samples.

    Args:
        num_outputs: M >= 2.
    """

    def __init__(self, num_outputs: int = 2):
        super().__init__()
        if num_outputs < 2:
            raise ValueError(f"the error of the mean needs num_outputs >= 2, got {num_outputs}")
        self.num_outputs = num_outputs

    def forward(self, prediction: Prediction) -> Tensor:
        """Return the estimate; it can be negative."""
        error = prediction.x0.unsqueeze(1) - prediction.outputs
        count = error.shape[1]
        return ((error.sum(1).square() - error.square().sum(1)) / (count * (count - 1))).mean()


class Perceptual(LossTerm):
    """Mean of a perceptual distance between outputs and x0 [UD2M: LPIPS].

    Args:
        distance: module (x [N, C, H, W], reference [N, C, H, W]) -> [N], e.g. ``FeatureDistance`` here or
            ``LPIPSDistance`` of ``ud2m.evaluation.metrics``.
    """

    def __init__(self, distance: nn.Module):
        super().__init__()
        self.distance = distance

    def forward(self, prediction: Prediction) -> Tensor:
        """Return the mean distance over samples and outputs."""
        return self.distance(prediction.flat_outputs, prediction.repeat(prediction.x0)).mean()


class FeatureDistance(nn.Module):
    """LPIPS (Zhang et al., 2018) without its learned linear layers, in given features f_l.

    sum_l w_l mean over locations of |f_l(x) / |f_l(x)| - f_l(r) / |f_l(r)||^2, norms over channels.

    Args:
        features: images [N, C, H, W] -> list of [N, c_l, h_l, w_l], e.g. the frozen prior's encoder.
        weights: w_l, one per layer; all 1 unless given.

    Raises:
        ValueError: in ``forward``, when the number of weights is not that of the layers.
    """

    def __init__(self, features: Features, weights: Sequence[float] | None = None):
        super().__init__()
        self.features, self.weights = features, weights

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """Return the distance [N] of each image to its reference."""
        ours, theirs = unit_features(self.features, x), unit_features(self.features, reference)
        weights = [1.0] * len(ours) if self.weights is None else self.weights
        if len(weights) != len(ours):
            raise ValueError(f"{len(weights)} feature weights for {len(ours)} layers; give one per layer or null")
        layers = zip(weights, ours, theirs, strict=True)
        return torch.stack([w * (a - b).square().sum(1).mean((1, 2)) for w, a, b in layers]).sum(0)


class EnergyScore(LossTerm):
    """Energy score of the M outputs (Gneiting and Raftery, 2007; De Bortoli et al., 2025, arXiv 2502.02483).

    Mean over patches of mean_m |x0 - L_m| - spread / 2 mean_{m != m'} |L_m - L_m'|, with Euclidean norms
    divided by sqrt(number of entries). For ``spread = 1`` it is strictly proper: the only minimiser draws
    every patch from p(x0 | x_sigma, y). With less the samples shrink towards the centre, for an isotropic
    Gaussian posterior to the standard deviation ``spread / sqrt(2 - spread^2)`` times the true one (0.57 for
    0.7); 0 gives the spatial median.

    Patches overlap by half (stride ``patch_size // 2``), so no seam is free of the score; at the right and
    lower border of sizes that do not divide they are cut, and the norm counts the entries that are left.

    Args:
        patch_size: side of the patches in pixels; larger ones see more of the joint law, more noisily.
        spread: weight of the second term, 0 <= spread < sqrt(2) (beyond, infinite spread would win).
        num_outputs: M >= 2.
    """

    def __init__(self, patch_size: int = 8, spread: float = 1.0, num_outputs: int = 2):
        super().__init__()
        _check_energy(patch_size, spread, num_outputs)
        self.patch_size, self.spread, self.num_outputs = patch_size, spread, num_outputs

    def forward(self, prediction: Prediction) -> Tensor:
        """Return the score, in image units."""
        height, width = prediction.x0.shape[2:]
        if min(height, width) < self.patch_size:
            raise ValueError(f"patches of the energy score ({self.patch_size}) exceed the image, {height}x{width}")
        # |d|^2 / C, for the average over the patch to be the mean square of all its entries.
        scale = prediction.x0.shape[1] ** -0.5
        return patch_energy(scale * prediction.x0, scale * prediction.outputs, self.patch_size, self.spread)


class PriorFeatures(nn.Module):
    """The given features, those of the frozen prior: the choice of ``conf/loss/features`` without a network of its own.

    Args:
        features: images [N, C, H, W] -> list of [N, c_l, h_l, w_l].
    """

    def __init__(self, features: Features):
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps."""
        return list(self.features(images))


class FeatureEnergyScore(LossTerm):
    """Energy score of the unit-normalised feature vectors of the outputs, summed over layers.

    Like ``EnergyScore``, with patches of features f_l / |f_l| in place of patches of pixels: a proper score
    of what the features see, which asks for outputs that look clean *and* spread as the posterior does.
    Features do not determine an image, so this term alone does not either.

    Args:
        features: images [N, C, H, W] -> list of [N, c_l, h_l, w_l], of the prior or of ``LPIPSFeatures``.
        patch_size: side of the patches in locations of each layer (at most the layer's size).
        spread: weight of the second term, see ``EnergyScore``.
        num_outputs: M >= 2.
    """

    def __init__(self, features: Features, patch_size: int = 1, spread: float = 1.0, num_outputs: int = 2):
        super().__init__()
        _check_energy(patch_size, spread, num_outputs)
        self.features, self.num_outputs = features, num_outputs
        self.patch_size, self.spread = patch_size, spread

    def forward(self, prediction: Prediction) -> Tensor:
        """Return the score; one location's distances are chords of the unit sphere, at most 2."""
        targets = unit_features(self.features, prediction.x0)
        outputs = unit_features(self.features, prediction.flat_outputs)
        batch = prediction.outputs.shape[:2]
        layers = [
            patch_energy(target, output.unflatten(0, batch), self.patch_size, self.spread)
            for target, output in zip(targets, outputs, strict=True)
        ]
        return torch.stack(layers).sum()


def patch_energy(target: Tensor, outputs: Tensor, patch_size: int, spread: float) -> Tensor:
    """Return the mean over patches of mean_m |t - o_m| - spread / 2 mean_{m != m'} |o_m - o_m'|.

    The norm of a patch is the root of the average over its locations of the square summed over channels.

    Args:
        target: [B, C, H, W].
        outputs: [B, M, C, H, W], M >= 2.
        patch_size: at most H and W count.
        spread: weight of the second term.
    """
    first, second = torch.combinations(torch.arange(outputs.shape[1], device=outputs.device)).T
    error = _mean_patch_norm(target.unsqueeze(1) - outputs, patch_size)
    return error - spread / 2 * _mean_patch_norm(outputs[:, first] - outputs[:, second], patch_size)


def unit_features(features: Features, x: Tensor) -> list[Tensor]:
    """Return the feature maps of x [N, C, H, W], each vector of channels divided by its norm."""
    return [normalize(_full(f), dim=1, eps=1e-4) for f in features(x)]


def _mean_patch_norm(difference: Tensor, patch_size: int) -> Tensor:
    squares = difference.square().sum(2)  # [B, pairs, H, W]
    kernel = [min(patch_size, side) for side in squares.shape[2:]]
    # Averages over windows equal unfolding into patches, without ever holding the patches.
    stride = max(1, patch_size // 2)
    means = avg_pool2d(squares, kernel, stride, ceil_mode=True, count_include_pad=False)
    return (means + ROOT_EPS).sqrt().mean()


def _full(x: Tensor) -> Tensor:
    """Return what a network made under autocast in float32, other dtypes as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _finite(name: str, value: Tensor) -> Tensor:
    if not torch.isfinite(value):
        raise NonFiniteLossError(name, value.detach())
    return value


def _check_weight(name: str, weight: float) -> None:
    if not is_number(weight) or not 0 <= weight < math.inf:
        raise ValueError(f"the loss weight '{name}' must be a finite number >= 0 (0 switches it off), got {weight!r}")


def _check_energy(patch_size: int, spread: float, num_outputs: int) -> None:
    if patch_size < 1 or num_outputs < 2 or not 0 <= spread < math.sqrt(2):
        raise ValueError(
            "the energy score needs patch_size >= 1, num_outputs >= 2 and 0 <= spread < sqrt(2) (1: proper), "
            f"got patch_size={patch_size}, num_outputs={num_outputs}, spread={spread}"
        )
