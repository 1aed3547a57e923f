"""The start x^(0) of the unfolded network: f(x_sigma, y)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepinv.models import RAM, DRUNet
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from ud2m.files import read_tensors
from ud2m.physics import Denoising, Observation
from ud2m.precision import full_precision
from ud2m.priors.store import check_finite, weights_fingerprint
from ud2m.unfolded.prox import joint_prox

NOTHING_KNOWN = 1e3
"""A noise level at which x_sigma says nothing about an image in [0, 1]."""


class Start(nn.Module):
    """x^(0) = f(x_sigma, y) [UD2M, section 4.1]; one is used at training and at sampling.

    ``evaluations`` counts the network evaluations of one call, and ``frozen`` says that its weights are somebody
    else's, which neither training nor an export touches.
    """

    evaluations: int = 0
    frozen: bool = False

    def forward(self, x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
        """Return x^(0) [B, C, H, W]; arguments as for ``UnfoldedNetwork``."""
        raise NotImplementedError

    def stored_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options that an export stores, from those that this start was built with."""
        return options


class PinvStart(Start):
    """x^(0) = A^dagger y, the authors' start without a network; amplifies noise and leaves holes black."""

    def forward(self, x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
        """Return x^(0) [B, C, H, W]."""
        with full_precision(x_sigma.device):
            return observation.physics.A_dagger(observation.y)


class SmoothingStart(Start):
    """Regularised, hole-filling start: smooth at falling scales and go back to the data after each.

    x <- argmin_u |y - A u|^2 / (2 sigma_y^2) + |u - x_sigma|^2 / (2 sigma^2) + |u - m|^2 / (2 deviation^2), from grey
    0.5, with m = S_s x for the last scale and m = 2 S_s x - x before, where S_s averages over s x s pixels and
    interpolates back. Over-relaxation fills holes in half as many steps; 2 is the most that amplifies no frequency. Any
    linear operator is served: a blur is inverted with Tikhonov damping, holes are filled from coarse to fine.

    Differs from [UD2M, section 4.1]: the paper starts from A^dagger y or RAM.

    Args:
        scales: widths s of the averages in pixels, coarse to fine.
        deviation: how far, in image units, a pixel may lie from its smooth neighbourhood.
    """

    def __init__(self, scales: Sequence[int] = (32, 16, 8, 4, 4, 2, 2, 2), deviation: float = 0.07):
        super().__init__()
        if not scales or min(scales) < 1 or deviation <= 0:
            raise ValueError(f"scales must be >= 1 and deviation > 0, got {list(scales)} and {deviation}")
        self.scales, self.deviation = tuple(scales), deviation

    def forward(self, x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
        """Return x^(0) [B, C, H, W]."""
        back_to_data = joint_prox(observation, x_sigma, sigma, self.deviation**2, 1.0)
        x = back_to_data(torch.full_like(x_sigma, 0.5))
        *coarse, last = self.scales
        for scale in coarse:
            x = back_to_data(2 * smooth(x, scale) - x)
        return back_to_data(smooth(x, last))


def smooth(x: Tensor, scale: int) -> Tensor:
    """Average images, or each frame of videos, over about scale x scale pixels and interpolate back to their size."""
    size = x.shape[-2:]
    coarse = [max(1, math.ceil(length / scale)) for length in size]
    low = F.interpolate(x.flatten(1, -3), size=coarse, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(low, size=size, mode="bilinear", align_corners=False).view_as(x)


def start_from_y(start: Start, observation: Observation) -> Tensor:
    """Return a warm start [B, C, H, W] from y alone: x_sigma is grey and says nothing."""
    sigma_y = observation.sigma_y
    grey = torch.full((len(observation), *observation.image_shape), 0.5, dtype=sigma_y.dtype, device=sigma_y.device)
    return start(grey, torch.full_like(sigma_y, NOTHING_KNOWN), observation)


class NetworkStart(Start):
    """The smoothing start, corrected by a small restoration network that is trained along: deepinv's ``DRUNet``.

    x^(0) = s + DRUNet(s, sigma_y), s = ``SmoothingStart``. Its last layer is 0 at first, so that training begins at s.

    Args:
        channels: C of the images.
        widths: channels of DRUNet's four levels.
        num_blocks: residual blocks per level.
        scales: see ``SmoothingStart``.
        deviation: see ``SmoothingStart``.

    Raises:
        ValueError: when there are not four widths.
    """

    evaluations = 1

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (16, 32, 48, 64),
        num_blocks: int = 1,
        scales: Sequence[int] = (32, 16, 8, 4, 4, 2, 2, 2),
        deviation: float = 0.07,
    ):
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"the network of the warm start has four levels, got widths {list(widths)}")
        self.smoothing = SmoothingStart(scales, deviation)
        self.network = DRUNet(channels, channels, nc=list(widths), nb=num_blocks, pretrained=None)
        nn.init.zeros_(self.network.m_tail.weight)

    def forward(self, x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
        """Return x^(0) [B, C, H, W]."""
        s = self.smoothing(x_sigma, sigma, observation)
        return s + self.network(s, observation.sigma_y.to(s.dtype))


class RamStart(Start):
    """x^(0) = RAM(y, A, sigma_y): the Reconstruct Anything Model (Terris et al., 2025), as deepinv has it.

    One evaluation of a network of 34 million parameters. It sees y alone and needs a linear operator (best: norm 1); of
    any other observation it sees A^dagger y, as an image with noise of sigma_y (so the decoded picture of a JPEG).

    Args:
        weights: a file as ``torch.save`` wrote it, "download" (the authors', through deepinv), or None: random ones, to
            be loaded from an export.
        trainable: fine-tune it with the rest (``optimizer.lr_start``); an export then holds it whole. False: an
            export names the weights, with their fingerprint.
        channels: numbers of channels of the images that the weights are made for.
        fingerprint: SHA-256 that frozen weights must have.

    Raises:
        FileNotFoundError: when the weights are missing.
        ValueError: when they are damaged, or others than the fingerprint's.
    """

    evaluations = 1

    def __init__(
        self,
        weights: str | None = None,
        trainable: bool = True,
        channels: Sequence[int] = (1, 2, 3),
        fingerprint: str | None = None,
    ):
        super().__init__()
        if weights is None and not trainable:
            raise ValueError("a RAM that is not trained needs weights: a file, or download")
        self.weights, self.frozen = weights, not trainable
        self.network = load_ram(weights, channels).requires_grad_(trainable)
        self.fingerprint = weights_fingerprint(self.network.state_dict()) if self.frozen else None
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(
                f"the model was trained with a RAM of fingerprint {fingerprint[:12]}, but {weights} has "
                f"{str(self.fingerprint)[:12]}; put the right weights there"
            )

    def forward(self, x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
        """Return x^(0) [B, C, H, W]."""
        y, physics = observation.y, observation.physics
        if not isinstance(physics, LinearPhysics):
            y = physics.A_dagger(y)
            physics = Denoising().draw(len(y), (y.shape[1], y.shape[2], y.shape[3]), device=y.device)
        noise = observation.sigma_y.to(y.dtype)
        return self.network(y, physics, sigma=noise, gain=torch.zeros_like(noise))  # gain: of Poisson noise

    def stored_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return where frozen weights are and what they must be; trained ones are in the export."""
        return options | ({"fingerprint": self.fingerprint} if self.frozen else {"weights": None})


def load_ram(weights: str | None, channels: Sequence[int]) -> RAM:
    """Return RAM with the weights of a file, the authors', or random ones (see ``RamStart``)."""
    channels = tuple(channels)
    if weights == "download":
        try:
            return RAM(in_channels=channels, pretrained=True)
        except OSError as error:
            raise FileNotFoundError(
                f"RAM's weights cannot be downloaded from here ({error}); fetch ram.pth.tar from the hub repository "
                "mterris/ram and give its path as network.warm_start.weights"
            ) from error
    network = RAM(in_channels=channels, pretrained=False)
    if weights is None:
        return network
    if not Path(weights).is_file():
        raise FileNotFoundError(f"there are no RAM weights at {weights}; give a file, or download")
    try:
        state = read_tensors(Path(weights))
        check_finite(state, weights)
        network.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise ValueError(f"{weights} does not hold RAM's weights for {list(channels)} channels: {reason}") from error
    return network


WARM_STARTS: dict[str, Callable[..., Start]] = {
    "pinv": PinvStart,
    "smoothing": SmoothingStart,
    "network": NetworkStart,
    "ram": RamStart,
}
