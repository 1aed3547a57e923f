"""What LVTINO holds at once for clips of four lengths: python benchmarks/video_memory.py [--store].

The shipped pipelines on clips of 32 x 32, physics=video_a, on the CPU. The peak is that of all tensors which one sample
allocates, by torch's profiler; weights are there before. ``clip`` is one copy of the clip itself.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from memory import peak
from results import store
from ud2m.physics import Problem, SuperResolution, VideoOperator
from ud2m.samplers.lvtino import Lvtino

LENGTHS = (17, 33, 65, 129)
CHOICES: dict[str, dict[str, Any]] = {
    "both priors, windows of 9 frames": {"window": 9},
    "video prior alone, windows of 9 frames": {"eta": 1, "window": 9},
    "video prior alone, all frames at once": {"eta": 1},
}
SIDE, MEGABYTE = 32, 1e6


def held(options: Mapping[str, Any], x0: torch.Tensor) -> float:
    """Return the peak of one sample of clips x0, in MB, by LVTINO with these options."""
    given = {"image_reference": "digits", "image_prompt": "a photo of a digit"} | options
    sampler = Lvtino.from_pretrained("moving_digits", "a video of a digit", **given)
    observation = Problem(VideoOperator(SuperResolution(4), 4, 4), 0.001).observe(x0)
    return peak(lambda: sampler.sample(observation, 1, torch.Generator().manual_seed(0))) / MEGABYTE


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write docs/results/video_memory.json")
    return parser


def main() -> None:
    """Print the table, and store it if asked."""
    options = parser().parse_args()
    clips = {n: torch.rand(1, 1, n, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) for n in LENGTHS}
    rows: list[dict[str, Any]] = [{"method": "clip"} | row(lambda x: x.nbytes / MEGABYTE, clips)]
    for name, given in CHOICES.items():
        rows.append({"method": name} | row(partial(held, given), clips))
        print(rows[-1])
    if options.store:
        print(store("video_memory", "python benchmarks/video_memory.py --store", {}, rows))


def row(measured: Callable[[torch.Tensor], float], clips: Mapping[int, torch.Tensor]) -> dict[str, str]:
    """Return a number for each clip."""
    return {f"{frames} frames [MB]": f"{measured(x):.1f}" for frames, x in clips.items()}


if __name__ == "__main__":
    main()
