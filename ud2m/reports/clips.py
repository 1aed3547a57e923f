"""Clips on pages: strips of frames, clips that play side by side in one moving picture, and curves over frames."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ud2m.images import eight_bits, std_image, viewable, with_channels
from ud2m.reports.figures import MAX_SIDE, Picture

SHOWN = 8
"""Frames of a clip that stand side by side in a strip."""
PLAYED = 100
"""Frames that are played; the files beside a report have all."""
RATE = 8.0
"""Frames per second of clips that do not say it, as those of data sets."""
STD = "Standard deviation"
"""The clip that is shown in colours."""
GAP = 1 / 32
"""Between two clips, in widths of one."""


def still(image: Tensor, frames: int | None = None) -> Tensor:
    """Return an image [C, H, W] as it is, and of a clip [C, T, H, W] its strip."""
    return image if image.ndim == 3 else strip(image, frames)


def strip(clip: Tensor, frames: int | None = None) -> Tensor:
    """Return frames of a clip [C, T, H, W] side by side, [C, H, n W]: those at the times of a clip of so many."""
    count = frames or clip.shape[1]
    shown = min(count, SHOWN)
    times = [(k * count // shown) * clip.shape[1] // count for k in range(shown)]
    return torch.cat([clip[:, t] for t in times], -1)


def playing(clips: Mapping[str, Tensor], rate: float, scale: float, alt: str) -> Picture | None:
    """Return clips that play side by side, in step: one moving picture of them all; None of none.

    Args:
        clips: [C, T, H, W] in [0, 1], by their headings. Those of fewer frames or pixels than the first one are
            stretched to its size; the one called ``STD`` holds deviations, and is shown in colours.
        rate: frames per second of the first one.
        scale: deviation at the end of the colours.
        alt: what it shows, for those who do not see it.
    """
    if not clips:
        return None
    _, count, height, width = next(iter(clips.values())).shape
    shown = min(count, PLAYED)
    factor = max(1, math.ceil(max(height, len(clips) * width) / MAX_SIDE))
    size = [max(1, height // factor), max(1, width // factor)]
    gap = max(1, round(GAP * size[1]))
    columns = []
    for name, clip in clips.items():
        times = torch.arange(shown) * clip.shape[1] // count
        drawn = clip[:, times].unbind(1)
        pictures = [std_image(frame, scale)[0] if name == STD else viewable(frame)[0] for frame in drawn]
        frames = torch.stack([with_channels(picture, 3) for picture in pictures])
        mode = "area" if frames.shape[-1] > size[1] else "nearest"
        columns += [interpolate(frames, size=size, mode=mode), torch.ones(shown, 3, size[0], gap)]
    moving = torch.cat(columns[:-1], -1)
    cut = "" if shown == count else f"The first {shown} of {count} frames. "
    return {
        "frames": [eight_bits(frame) for frame in moving],
        "headings": list(clips),
        "milliseconds": round(1000 / rate),
        "alt": alt,
        "note": f"{cut}{rate:g} frames per second",
        "width": moving.shape[-1],
        "height": moving.shape[-2],
        "scaling": "crisp" if factor == 1 and len(clips) * width <= MAX_SIDE // 2 else "smooth",
    }


def flicker(clip: Tensor) -> list[float]:
    """Return the root mean square of the differences of following frames of a clip [C, T, H, W], T - 1 numbers."""
    values: list[float] = clip.diff(dim=1).square().mean((0, 2, 3)).sqrt().tolist()
    return values
