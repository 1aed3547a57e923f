"""What pictures, threads and processes cost on a CPU.

    python benchmarks/cores.py pictures [--repeats 3]   # cost of a pixel in small and large pictures
    python benchmarks/cores.py threads [--repeats 3]    # two threads that have one core, as beside a busy process
    python benchmarks/cores.py shared [--repeats 3]     # two processes that share pictures beside one

Each measurement is a process of its own, with one thread unless said otherwise; repetitions are interleaved, and
medians are stored in ``docs/results``. Processor seconds count, which other programs on the machine hardly change, and
those of the clock stand beside them where waiting is what is measured.
"""

import argparse
import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ud2m.cli.process import keep_memory, prepare_process

MODEL = "photos_gaussian_blur"
SMALL = (128, 128, 8)
CASES = (
    *(("prepared", *size, "float32") for size in (SMALL, (512, 768, 2), (1024, 1536, 1))),
    *(("prepared", *size, "bfloat16") for size in (SMALL, (512, 768, 2))),
    ("bare", 512, 768, 2, "float32"),
)
"""Settings of the process, height, width, number of samples, precision."""
SHARED, SIDE, SAMPLES = 6, 256, 2
"""Pictures that processes share, their side, and samples of each."""


# --- in a process of its own -----------------------------------------------------------------------------------------


def spent() -> tuple[float, float, float]:
    """Return seconds of the clock, of the processor in this program, and in the kernel for it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime, used.ru_stime


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of a call, and the peak memory of this process in GB."""
    before = spent()
    run()
    clock, user, kernel = (b - a for a, b in zip(before, spent(), strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"clock": clock, "processor": user + kernel, "kernel": kernel, "peak": peak}


def draw(height: int, width: int, samples: int, precision: str = "float32") -> dict[str, float]:
    """Return what drawing samples of a picture with N = 1 takes, after a first time."""
    import torch

    from ud2m import PosteriorSampler
    from ud2m.physics import GaussianBlur

    sampler = PosteriorSampler.from_pretrained(MODEL, device="cpu", num_steps=1, tile=1024, precision=precision)
    physics = GaussianBlur(1.6).draw(1, (3, height, width))
    y = torch.rand(1, 3, height, width)

    def run() -> None:
        sampler(y, physics, 0.01, samples)

    run()
    return timed(run)


def on_one_core(threads: int) -> dict[str, float]:
    """Return what a small picture takes when OpenMP has counted all cores, and one is left for its threads."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, range(threads))
    importlib.import_module("torch")
    os.sched_setaffinity(0, {core})
    return draw(128, 128, 2)


def share(devices: int, folder: str) -> dict[str, float] | None:
    """Return what sampling for the pictures of a folder takes in so many processes, once they are there."""
    from hydra import compose, initialize_config_dir

    from ud2m.cli.commands import conf_folder
    from ud2m.cli.devices import Devices
    from ud2m.cli.sample import SamplingRun

    words = [f"model={MODEL}", "physics=gaussian_blur", f"input={folder}", f"num_samples={SAMPLES}", "num_steps=1"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        settings = [*words, "lpips=null", "show=1", "device=cpu", "precision=float32", f"devices={devices}"]
        config = compose("sample", settings)
    machine = Devices(config)
    job = SamplingRun(config, machine.device)
    with machine.team() as team, tempfile.TemporaryDirectory() as own:
        out = Path(team.gathered(own)[0])
        parts = team.gathered(timed(lambda: job.run(out, team)))
    whole = {key: max(part[key] for part in parts) for key in ("clock", "peak")}
    return whole | {"processor": sum(part["processor"] for part in parts)} if machine.first else None


# --- outside of it ---------------------------------------------------------------------------------------------------


def child(call: str, *arguments: object, threads: int = 1, setting: str = "prepared") -> dict[str, float]:
    """Run one of the functions above in a new process and return what it does."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    words = [sys.executable, __file__, "run", setting, call, json.dumps(arguments)]
    done = subprocess.run(
        words, env=environment | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"{call}{arguments} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run(setting: str, call: str, arguments: str) -> None:
    """Be such a process: with the settings of the commands, with those of its memory alone, or with none."""
    {"prepared": prepare_process, "spinning": keep_memory, "bare": lambda: None}[setting]()
    found = {"draw": draw, "on_one_core": on_one_core, "share": share}[call](*json.loads(arguments))
    if found is not None:
        print(json.dumps(found))


def medians(cases: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the median of each number of each case, over interleaved repetitions."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            found[name].append(case())
    return {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}


def pictures(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each case."""
    cases = {case: partial(child, "draw", *case[1:], setting=case[0]) for case in CASES}
    found = medians(cases, repeats)
    per_pixel = {case: numbers["processor"] * 1e6 / math.prod(case[1:4]) for case, numbers in found.items()}
    return [
        {
            "method": f"{height}x{width}, {precision}" + (", memory as the system has it" if setting == "bare" else ""),
            "samples": samples,
            "processor seconds per megapixel, sample and step": f"{cost:.1f}",
            "/ 128x128": f"{cost / per_pixel['prepared', *SMALL, precision]:.2f}",
            "in the kernel": f"{100 * numbers['kernel'] / numbers['processor']:.1f} %",
            "peak memory [GB]": f"{numbers['peak']:.1f}",
        }
        for ((setting, height, width, samples, precision), numbers), cost in zip(
            found.items(), per_pixel.values(), strict=True
        )
    ]


def threads(repeats: int) -> list[dict[str, Any]]:
    """Return a row for one thread, two that sleep where they wait, and two that spin."""
    cases = {
        "one thread": partial(child, "on_one_core", 1),
        "two threads, as the commands set them": partial(child, "on_one_core", 2, threads=2),
        "two threads, as the system has them": partial(child, "on_one_core", 2, threads=2, setting="spinning"),
    }
    return compared(medians(cases, repeats))


def shared(repeats: int) -> list[dict[str, Any]]:
    """Return a row for one process and for two that share the same pictures."""
    import torch

    from ud2m.images import write_image

    with tempfile.TemporaryDirectory() as folder:
        for number in range(SHARED):
            write_image(torch.rand(3, SIDE, SIDE), Path(folder) / f"{number}.png")
        return compared(medians({f"{n} process(es)": partial(child, "share", n, folder) for n in (1, 2)}, repeats))


def compared(found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return rows with seconds, and their ratios to the first row."""
    first = next(iter(found.values()))
    return [
        {
            "method": name,
            **{f"{key} [s]": f"{numbers[key]:.2f}" for key in ("processor", "clock")},
            **{f"{key}, ratio": f"{numbers[key] / first[key]:.2f}" for key in ("processor", "clock")},
        }
        for name, numbers in found.items()
    ]


PARTS = {"pictures": pictures, "threads": threads, "shared": shared}


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part and store it."""
    options = parser().parse_args(arguments)
    rows = PARTS[options.part](options.repeats)
    for row in rows:
        print(row)
    from results import store

    config = {"repeats": options.repeats, "model": MODEL}
    print(store(options.part, f"python benchmarks/cores.py {options.part}", config, rows, options.note))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(*sys.argv[2:])
    else:
        try:
            main()
        except ValueError as error:
            sys.exit(f"error: {error}")
