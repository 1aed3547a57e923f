"""Print what activation checkpointing saves: python benchmarks/memory.py [--repeats 3] [--store].

One training step (with a discriminator and the energy score) of the photo prior's network with K = 2, 3 and 8 modules,
on the CPU.
The peak is that of all tensors which the step allocates, by torch's profiler; weights are there before. Times are
medians, as ratios to the step without checkpointing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments import training_module
from results import store
from ud2m.training.distillation_step import DistillationStep

COUNTS = (2, 3, 8)
"""K."""
KINDS = {
    "none": (),
    "modules": ("training.checkpointing=modules",),
    "modules, 2 kept": ("training.checkpointing=modules", "training.kept_modules=2"),
    "all": ("training.checkpointing=all",),
}


def build(num_blocks: int, *checkpointing: str) -> DistillationStep:
    """Return the training step of the deblurring experiment, with a discriminator."""
    options = [f"network.num_blocks={num_blocks}", *checkpointing]
    return training_module("photos_gaussian_blur", "name=memory", "loss.adversarial=0.01", *options).step


def run(step: DistillationStep, x0: Tensor) -> None:
    """Run one forward and backward pass."""
    streams = [torch.Generator().manual_seed(i) for i in range(len(x0))]
    step(x0, streams)[0].backward()
    step.modules.zero_grad()


def peak(function: Callable[[], object], device: str = "cpu") -> int:
    """Return the largest number of bytes that a call holds at once, beyond those that were there before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--store", action="store_true", help="write docs/results/memory.json")
    return parser


def seconds(steps: dict[str, DistillationStep], x0: Tensor, repeats: int) -> dict[str, list[float]]:
    """Return the times of steps; they take turns, so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for repeat in range(repeats + 1):
        for kind, step in steps.items():
            start = time.perf_counter()
            run(step, x0)
            if repeat:
                times[kind].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure, print one line per kind of checkpointing, and store them where asked for."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    x0 = torch.rand(options.batch, 3, options.size, options.size)
    rows: dict[str, dict[str, Any]] = {kind: {"method": f"checkpointing: {kind}"} for kind in KINDS}
    peaks: dict[tuple[str, int], float] = {}
    for count in COUNTS:
        steps = {kind: build(count, *overrides) for kind, overrides in KINDS.items()}
        times = seconds(steps, x0, options.repeats)
        for kind, step in steps.items():
            peaks[kind, count] = peak(partial(run, step, x0)) / 2**20
            ratio = statistics.median(a / b for a, b in zip(times[kind], times["none"], strict=True))
            rows[kind] |= {
                f"peak, K = {count} [MiB]": f"{peaks[kind, count]:.0f}",
                f"time, K = {count}": f"{ratio:.2f}",
            }
    for kind, row in rows.items():
        row["peak, K = 8 / K = 2"] = f"{peaks[kind, 8] / peaks[kind, 2]:.2f}"
        print(row)
    if options.store:
        config = {"size": options.size, "batch": options.batch, "repeats": options.repeats}
        print(store("memory", "python benchmarks/memory.py --store", config, list(rows.values())))


if __name__ == "__main__":
    main()
