"""The judge of adversarial training: is this image a plausible original of that observation?"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Discriminator(nn.Module):
    """Map an image and its condition (y at image size) to a patch map of raw logits, D(x, condition).

    A 3x3 stem of the first width, then one convolution per further width: 4x4 with stride 2 where the width
    rises, 3x3 with stride 1 where it does not, so that ``(32, 64, 128, 256, 128, 64)``, the widths of the
    UD2M authors' code, halves the image three times. No sigmoid: the loss takes logits (a second sigmoid
    would keep it above 0.69). No batch norm: the gradient penalty is a statement about single samples. SiLU
    is smooth, as the penalty differentiates twice.

    Args:
        channels: C of the images. condition_channels: those of the condition, C unless given.
        widths: channels of the hidden layers.

    Raises:
        ValueError: when a number of channels or a width is below 1 or no width is given.
    """

    def __init__(
        self, channels: int, widths: Sequence[int] = (32, 64, 128, 256), condition_channels: int | None = None
    ):
        super().__init__()
        condition_channels = channels if condition_channels is None else condition_channels
        if not widths or min(channels, condition_channels, *widths) < 1:
            raise ValueError(
                "the discriminator needs at least one width, and widths and channels of at least 1; "
                f"got widths={list(widths)}, channels={channels}, condition_channels={condition_channels}"
            )
        self.channels, self.condition_channels = channels, condition_channels
        self.min_size = 2 ** sum(after > before for before, after in pairwise(widths))
        inputs = channels + condition_channels
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1), nn.SiLU()]
        for before, after in pairwise(widths):
            kernel, stride = (4, 2) if after > before else (3, 1)
            layers += [nn.Conv2d(before, after, kernel, stride, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return logits [B, 1, h, w] (above 0: real) for images and conditions of one size, about [0, 1].

        Raises:
            ValueError: when channels or sizes do not fit, or the image is smaller than the total stride.
        """
        if (x.shape[1], condition.shape[1]) != (self.channels, self.condition_channels):
            raise ValueError(
                f"the discriminator takes {self.channels} channels of the image and "
                f"{self.condition_channels} of the condition, got {x.shape[1]} and {condition.shape[1]}"
            )
        if x.shape[2:] != condition.shape[2:] or min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f"image and condition must have one size of at least {self.min_size}x{self.min_size}, got "
                f"{tuple(x.shape[2:])} and {tuple(condition.shape[2:])}; use larger crops or fewer widths"
            )
        # Centred inputs: without normalisation layers a mean of 0.5 would reach every layer.
        return self.layers(2 * torch.cat([x, condition], dim=1) - 1)
