"""The pictures of pages, as plain data with the pixels in a data URL."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ud2m.images import data_url, std_image, viewable

Picture = dict[str, Any]
"""What the templates show, see ``picture``."""
MAX_SIDE = 512
"""Larger pictures are shown reduced; the files beside the report keep every pixel."""

_DISPLAY = 256  # CSS pixels, four in a row; smaller pictures are enlarged by a whole factor


def picture(image: Tensor, alt: str, scaling: str = "crisp", **more: Any) -> Picture:
    """Return an image [1 or 3, H, W] in [0, 1] with all its pixels.

    Args:
        image: the pixels, which become ``url``, ``width`` and ``height``.
        alt: what it shows, for those who do not see it.
        scaling: ``crisp`` shows single pixels, ``smooth`` does not.
        more: of a figure: the ``caption`` below it and ``display``, its width on the page in CSS pixels.
    """
    height, width = image.shape[1:]
    return {"url": data_url(image), "width": width, "height": height, "alt": alt, "scaling": scaling, **more}


def figure(image: Tensor, caption: str, alt: str, display: int | None = None) -> Picture:
    """Return an image as ``viewable`` makes it, reduced where it is larger than ``MAX_SIDE``."""
    image, remark = viewable(image)
    caption += remark
    height, width = image.shape[1:]
    factor = math.ceil(max(height, width) / MAX_SIDE)
    if factor > 1:
        image = interpolate(image[None], size=[max(side // factor, 1) for side in (height, width)], mode="area")[0]
        caption += f", reduced to 1/{factor}"
    display = display or display_width(width)
    scaling = "crisp" if display >= 1.5 * image.shape[2] else "smooth"
    return picture(image, alt, scaling, caption=caption, display=display)


def std_figure(std: Tensor, scale: float, name: str) -> Picture:
    """Return a map of standard deviations [C, H, W] in colours, brightest at ``scale``, with their bar."""
    coloured, _ = std_image(std, scale)
    alt = f"{name}: standard deviation of the samples, brightest where {scale:g} or more"
    colours, _ = std_image(torch.linspace(0, 1, 64).view(1, 1, 64), 1.0)
    bar = picture(colours, f"colours from 0 to {scale:g}", "smooth")
    return figure(coloured, "Standard deviation", alt) | {"colours": bar, "scale": f"{scale:g}"}


def display_width(width: int) -> int:
    """Return how many CSS pixels wide a picture of so many pixels is shown."""
    return min(width * max(1, _DISPLAY // width), MAX_SIDE)
