"""What training on many GPUs would take: python benchmarks/scaling.py [--store] [--nvlink 450] [--network 3.1].

Data parallel training averages gradients once per step. With n GPUs in a ring each sends 2 (n - 1) / n times the bytes
of the gradients, in 2 (n - 1) rounds (Patarasu and Yuan, 2009), so that a step takes

    T(n) = T(1) + 2 (n - 1) (c l + B / (n w)):

B bytes in c messages, w the bandwidth of the slowest link in the ring, l the latency of a round there. Nothing is taken
to be hidden behind the backward pass, so T(n) is the most that it takes. Every GPU has its own images.

T(1) is the fastest step per image of ``docs/results/gpu_training.json`` once that is measured; until then it is the
operations of a step over the TFLOP/s that ``device_tflops`` assumes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments import composed
from results import load, store
from ud2m.cli.estimate import estimate

EXPERIMENT = "imagenet256"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
PER_MACHINE = 8
"""GPUs of one machine."""
MESSAGES = 4
"""All-reduce calls of a step: two buckets of gradients, which parameters were used, whether somebody was stopped."""
NVLINK, NETWORK = 450.0, 3.1
"""GB/s: NVLink 4 in one direction; Ethernet of 25 Gbit/s, which the GPUs of a machine share."""
LATENCIES = {"NVLink": 1e-5, "Ethernet": 1e-4}
"""Seconds of a round."""


@dataclass(frozen=True)
class Link:
    """The slowest link of a ring: bytes per second, and seconds that a message takes besides."""

    name: str
    bandwidth: float
    latency: float


def sent(count: int, size: float) -> float:
    """Return the bytes that each of ``count`` GPUs sends, and receives, to average ``size`` bytes in a ring."""
    return 2 * (count - 1) / count * size


def communication(count: int, size: float, link: Link, messages: int = MESSAGES) -> float:
    """Return the seconds of averaging ``size`` bytes, in so many messages, over a ring of ``count`` GPUs."""
    return sent(count, size) / link.bandwidth + 2 * (count - 1) * messages * link.latency


def one_gpu(predicted: Any) -> tuple[float, int, str]:
    """Return seconds of a step on one GPU, its images, and where both come from."""
    stored = load("gpu_training")
    measured = [row for row in stored["rows"] if "images per second" in row] if stored else []
    if measured:
        best = max(measured, key=lambda row: row["images per second"])
        return best["seconds per step"], best["batch"], f"**measured** ({best['method']}; {stored['machine']})"
    batch, flops = predicted.batch, predicted.batch * predicted.flops
    words = f"**estimated**: {flops / 1e12:.4g} TFLOPs at {predicted.tflops:g} TFLOP/s"
    return flops / (predicted.tflops * 1e12), batch, words


def rows_of(seconds: float, batch: int, size: float, nvlink: Link, network: Link) -> list[dict[str, Any]]:
    """Return one row for each number of GPUs."""
    rows = []
    for count in COUNTS:
        link = nvlink if count <= PER_MACHINE else network
        extra = communication(count, size, link)
        rows.append(
            {
                "GPUs": count,
                "link": "–" if count == 1 else link.name,
                "sent per GPU and step [MB]": f"{sent(count, size) / 1e6:.1f}",
                "communication [ms]": f"{1e3 * extra:.2f}",
                "step [s]": f"{seconds + extra:.3f}",
                "images per second": f"{count * batch / (seconds + extra):.1f}",
                "share of the ideal": f"{100 * seconds / (seconds + extra):.1f} %",
            }
        )
    return rows


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvlink", type=float, default=NVLINK, help="GB/s between GPUs of a machine")
    parser.add_argument("--network", type=float, default=NETWORK, help="GB/s between machines")
    parser.add_argument("--store", action="store_true", help="write docs/results/scaling.json")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per number of GPUs, and store them where asked for."""
    options = parser().parse_args(arguments)
    predicted = estimate(composed(EXPERIMENT, "name=scaling"))
    seconds, batch, source = one_gpu(predicted)
    links = [Link("NVLink", 1e9 * options.nvlink, LATENCIES["NVLink"])]
    links += [Link("Ethernet", 1e9 * options.network, LATENCIES["Ethernet"])]
    rows = rows_of(seconds, batch, predicted.communicated, *links)
    for row in rows:
        print(row)
    if options.store:
        note = f"The step of one GPU, {seconds:.3f} s for {batch} images, is {source}. All else is computed from it."
        config = {"experiment": EXPERIMENT, "batch": batch, "seconds": seconds, "bytes": predicted.communicated}
        config |= {"GB/s": {"NVLink": options.nvlink, "Ethernet": options.network}, "latency": LATENCIES}
        print(store("scaling", "python benchmarks/scaling.py --store", config, rows, note))


if __name__ == "__main__":
    main()
