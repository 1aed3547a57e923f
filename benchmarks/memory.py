"""Print what activation checkpointing saves: python benchmarks/memory.py [--repeats 3] [--json FILE].

One training step (both players, energy score) of the photo prior's network with K = 2, 3 and 8 modules, on the CPU.
The peak is that of all tensors which the step allocates, by torch's profiler; weights are there before. Times are
medians, as ratios to the step without checkpointing.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ud2m.cli  # noqa: F401 (registers the resolvers of conf/)
from ud2m.training import DistillationModule
from ud2m.training.distillation import CHECKPOINTING

CONF = str(Path(__file__).resolve().parents[1] / "conf")


def build(num_blocks: int, checkpointing: str) -> DistillationModule:
    """Return the training module of the deblurring experiment, with a discriminator."""
    options = [f"network.num_blocks={num_blocks}", f"training.checkpointing={checkpointing}"]
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("train", ["experiment=photos_gaussian_blur", "name=memory", "loss.adversarial=0.01", *options])
    return instantiate(config.training, _convert_="all")


def step(model: DistillationModule, x0: Tensor) -> None:
    """Run one forward and backward pass."""
    streams = [torch.Generator().manual_seed(i) for i in range(len(x0))]
    model.losses(x0, streams)[0].backward()
    model.zero_grad()


def peak(model: DistillationModule, x0: Tensor) -> int:
    """Return the largest number of bytes that one step holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, x0)
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
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    """Measure, print one line per setting, and write JSON where asked for."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    x0 = torch.rand(options.batch, 3, options.size, options.size)
    rows = {}
    for count in (2, 3, 8):
        models = {kind: build(count, kind) for kind in CHECKPOINTING}
        seconds: dict[str, list[float]] = {kind: [] for kind in models}
        for repeat in range(options.repeats + 1):  # interleaved: a drifting machine hits all alike
            for kind, model in models.items():
                start = time.perf_counter()
                step(model, x0)
                if repeat:
                    seconds[kind].append(time.perf_counter() - start)
        for kind, model in models.items():
            ratios = [a / b for a, b in zip(seconds[kind], seconds["none"], strict=True)]
            rows[f"{kind}, K={count}"] = {"peak_mib": peak(model, x0) / 2**20, "time": statistics.median(ratios)}
            print(f"{kind}, K={count}: {rows[f'{kind}, K={count}']}", flush=True)
    for kind in CHECKPOINTING:
        few, many = (rows[f"{kind}, K={count}"]["peak_mib"] for count in (2, 8))
        print(f"{kind}: peak(K=8) / peak(K=2) = {many / few:.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
