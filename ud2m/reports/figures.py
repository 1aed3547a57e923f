"""The pictures of pages, as plain data; the page encodes them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ud2m.images import eight_bits, std_image, std_scale, viewable

Picture = dict[str, Any]
"""What the templates show, see ``picture``."""
MAX_SIDE = 1024
"""Larger pictures are shown reduced; the files beside the report keep every pixel."""
DISPLAY = 256
"""CSS pixels, four in a row; smaller pictures are enlarged by a whole factor."""

_HOLE = 0.85  # light grey leaves the measured pixels readable; black would pass for dark ones


def picture(image: Tensor, alt: str, scaling: str = "crisp", kind: str = "", **more: Any) -> Picture:
    """Return an image [1 or 3, H, W] in [0, 1] with all its pixels.

    Args:
        image: the pixels, which become ``image`` (8 bits), ``width`` and ``height``.
        alt: what it shows, for those who do not see it.
        scaling: ``crisp`` shows single pixels, ``smooth`` does not.
        kind: see ``figure``.
        more: of a figure: the ``caption`` below it, ``display``, its width on the page in CSS pixels, and ``name``.
    """
    size = {"height": image.shape[1], "width": image.shape[2]}
    return {"image": eight_bits(image), "alt": alt, "scaling": scaling, "kind": kind, **size, **more}


def figure(
    image: Tensor, caption: str, alt: str, display: int | None = None, kind: str = "", name: str = ""
) -> Picture:
    """Return an image as ``viewable`` makes it, reduced where it is larger than ``MAX_SIDE``.

    Args:
        image: [C, H, W].
        caption: below it.
        alt: see ``picture``.
        display: see ``picture``; None: ``display_width``.
        kind: ``observation``, ``sample``, ``known`` or ``derived`` where it shows the same place as the others of its
            strip; empty: it does not, and is neither enlarged with them nor compared.
        name: what it is called where it is compared; empty: by its caption.
    """
    name = name or caption
    image, remark = viewable(image)
    caption += remark
    height, width = image.shape[1:]
    factor = math.ceil(max(height, width) / MAX_SIDE)
    if factor > 1:
        image = interpolate(image[None], size=[max(side // factor, 1) for side in (height, width)], mode="area")[0]
        caption += f", reduced to 1/{factor}"
    display = display or display_width(width)
    scaling = "crisp" if display >= 1.5 * image.shape[2] else "smooth"
    return picture(image, alt, scaling, caption=caption, display=display, kind=kind, name=name)


def std_figure(std: Tensor, scale: float, caption: str, alt: str) -> Picture:
    """Return a map of standard deviations [C, H, W] in colours, brightest at ``scale``, with their bar."""
    coloured, _ = std_image(std, scale)
    alt += f", brightest where {scale:g} or more"
    colours, _ = std_image(torch.linspace(0, 1, 64).view(1, 1, 64), 1.0)
    bar = picture(colours, f"colours from 0 to {scale:g}", "smooth")
    return figure(coloured, caption, alt, kind="derived") | {"colours": bar, "scale": f"{scale:g}"}


def observation_figure(y: Tensor, image_shape: Sequence[int], alt: str, measured: Tensor | None = None) -> Picture:
    """Return y beside images (C, H, W), enlarged by a whole factor where it has as many pixels less.

    ``measured`` [h, w] is False in holes, which are coloured.
    """
    values, remark = viewable(y)
    height, width = image_shape[1:]
    rows, columns = values.shape[1:]
    factor = width // columns if width % columns == 0 else 1
    same_place = (rows * factor, columns * factor) == (height, width) and not remark
    if measured is not None:
        values = torch.where(measured.bool().cpu(), values, torch.tensor(_HOLE))
        remark += "; light grey: not measured"
    size = "" if (height, width) == (rows, columns) else f", {columns}×{rows} pixels"
    display = min(round(display_width(width) * columns * factor / width), MAX_SIDE)
    kind = "observation" if same_place else ""
    return figure(values, f"Observation y{size}{remark}", alt, display, kind, "Observation y")


def display_width(width: int) -> int:
    """Return how many CSS pixels wide a picture of so many pixels is shown."""
    return min(width * max(1, DISPLAY // width), DISPLAY)


def shared_scale(stds: Iterable[Tensor | None]) -> float:
    """Return one end of the colours for several maps of standard deviations."""
    return max((std_scale(std) for std in stds if std is not None), default=1.0)


def uncertainty(*stds: Tensor | None) -> float:
    """Return the largest mean standard deviation of several maps, by which reports order their pictures; at least 0."""
    return max((float(std.mean()) for std in stds if std is not None), default=0.0)
