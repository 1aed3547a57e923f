"""What LVTINO holds at once for clips of four lengths: python benchmarks/video_memory.py [--store].

The shipped pipelines on clips of 32 x 32, physics=video_a, on the CPU. The peak is that of all tensors which one sample
allocates, by torch's profiler; weights are there before. ``clip`` is one copy of the clip itself.
"""

import argparse
from typing import Any

import torch

from memory import peak
from results import store
from ud2m.physics import Problem, SuperResolution, VideoOperator
from ud2m.samplers.lvtino import Lvtino

LENGTHS = (17, 33, 65, 129)
WINDOWS = (9, None)
SIDE, MEGABYTE = 32, 1e6


def row(window: int | None, frames: int) -> dict[str, Any]:
    """Return the peak of one sample of a clip of so many frames, in MB."""
    sampler = Lvtino.from_pretrained("moving_digits", "a video of a digit", image_reference="digits", window=window)
    x0 = torch.rand(1, 1, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    observation = Problem(VideoOperator(SuperResolution(4), 4, 4), 0.001).observe(x0)
    held = peak(lambda: sampler.sample(observation, 1, torch.Generator().manual_seed(0)))
    clip = x0.nelement() * x0.element_size()
    return {"window": window or "all", "frames": frames, "peak [MB]": held / MEGABYTE, "clip [MB]": clip / MEGABYTE}


def main() -> None:
    """Print the table, and store it if asked."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--store", action="store_true", help="write docs/results/video_memory.json")
    options = found.parse_args()
    rows = [row(window, frames) for window in WINDOWS for frames in LENGTHS]
    for line in rows:
        print(line)
    if options.store:
        print(store("video_memory", "python benchmarks/video_memory.py --store", {}, rows))


if __name__ == "__main__":
    main()
