"""Random inpainting."""

from pathlib import Path
from typing import Any

import deepinv
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ud2m.noise import Generators, rand
from ud2m.physics.family import OperatorFamily
from ud2m.physics.immutable import Immutable
from ud2m.physics.samples import at_least_float32, per_sample


class PixelMask(Immutable, deepinv.physics.Inpainting):
    """A = diag(mask): known pixels are kept, missing ones are 0.

    deepinv's ``Inpainting``, but for: no state; images keep their dtype; the prox (deepinv's divides 0 by 0
    at missing pixels when gamma is infinite).

    Args:
        mask: 1 where measured, 0 where missing; [1 or B, 1 or C, H, W].
        image_shape: (C, H, W).
        device: where the operator lives.

    Raises:
        ValueError: for a mask of another shape, not binary, or with every pixel missing in some sample.
    """

    def __init__(self, mask: Tensor, image_shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        channels, height, width = image_shape
        if mask.ndim != 4 or mask.shape[1] not in (1, channels) or mask.shape[2:] != (height, width):
            raise ValueError(f"the mask must be [1 or B, 1 or {channels}, {height}, {width}], got {list(mask.shape)}")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("the mask must be binary: 1 where a pixel is measured, 0 where it is missing")
        if not mask.flatten(1).any(dim=1).all():
            raise ValueError("the mask measures nothing in at least one sample: every pixel is missing")
        super().__init__(img_size=tuple(image_shape), mask=mask.float(), device=device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return mask x."""
        self.update_parameters(**kwargs)
        if x.shape[-2:] != self.mask.shape[-2:]:
            raise ValueError(f"the mask is for {list(self.mask.shape[-2:])} pixels, got {list(x.shape)}")
        return self.mask.to(x.dtype) * x

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y = A y."""
        return self.A(y, **kwargs)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^dagger y = A y."""
        return self.A(y, **kwargs)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2 = z + mask (y - z) / (1 + 1 / gamma).

        ``gamma``: number, or tensor of one element, [B] or [B, 1, 1, 1]; infinity is allowed.
        """
        self.update_parameters(**kwargs)
        mean = z.to(at_least_float32(z, y))
        step = self.mask.to(mean.dtype) / (1 + 1 / per_sample(gamma, mean))
        return (mean + step * (y - mean)).to(z.dtype)


class Inpainting(OperatorFamily):
    """y = mask x with pixels missing at random, all channels together, another mask for every sample.

    Args:
        missing: probability that a pixel is missing, inside (0, 1). At least one pixel is always measured.

    Raises:
        ValueError: when ``missing`` is not inside (0, 1).
    """

    random = True

    def __init__(self, missing: float = 0.7):
        if not 0 < missing < 1:
            raise ValueError(f"missing (share of unmeasured pixels) must be inside (0, 1), got {missing}")
        self.missing = missing

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> PixelMask:
        """Return B independent masks."""
        self.check(image_shape)
        score = rand((batch_size, 1, *image_shape[1:]), generator, device)
        # the pixel of highest score is measured whatever happens
        threshold = score.amax((-2, -1), keepdim=True).clamp(max=self.missing)
        return PixelMask(score >= threshold, image_shape, device)


class MaskFile(OperatorFamily):
    """y = mask x with the user's own mask, from an image file: white (above half) is measured, black is missing.

    Raises:
        FileNotFoundError: when there is no such file. ValueError: when it is not an image.
    """

    def __init__(self, path: str | Path):
        try:
            with Image.open(path) as image:
                levels = np.array(image.convert("L"))
        except UnidentifiedImageError as error:
            raise ValueError(f"the mask {path} is not an image; give a black and white PNG") from error
        self.mask = torch.from_numpy(levels)[None, None] > 127

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> PixelMask:
        """Return the mask, the same for all samples."""
        self.check(image_shape)
        return PixelMask(self.mask, image_shape, device)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError for images of another size than the mask."""
        super().check(image_shape)
        if tuple(image_shape[1:]) != tuple(self.mask.shape[2:]):
            raise ValueError(
                f"the mask has {self.mask.shape[2]}x{self.mask.shape[3]} pixels (height x width), the image "
                f"{image_shape[1]}x{image_shape[2]}; they must be equal"
            )
