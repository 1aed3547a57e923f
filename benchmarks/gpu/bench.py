"""Measure the real size: steps, sampling and loading of the 256x256 ImageNet network, with random weights.

    python benchmarks/gpu/bench.py OUT [--scale tiny] [--minutes 4]

Writes ``OUT/bench.json`` anew after every row, so that a run which is stopped has lost nothing; what there was no time
for is named under ``left out``. ``--scale tiny`` is the same with a micro network on the CPU, in seconds.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loading
from cost import TrainingCost, compiled_row, interleaved, sampling_ratio
from experiments import composed
from memory import peak
from results import machine
from ud2m.cli.errors import is_out_of_memory
from ud2m.cli.estimate import estimate
from ud2m.cli.models import shipped_models
from ud2m.cli.objects import build
from ud2m.cli.sample import trained_operator
from ud2m.data import FolderData, ShardData
from ud2m.files import write_json
from ud2m.physics import Problem
from ud2m.precision import find_device
from ud2m.priors.prior import Prior
from ud2m.priors.shipped import ARCHITECTURES, SCHEDULER_FILE
from ud2m.priors.store import save_prior
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.training import DistillationModule

EXPERIMENT, ARCHITECTURE = "imagenet256", "imagenet256"
MODELS = tuple(shipped_models())
ADAM = 2
"""Moments per trained parameter, which are there after the first step."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        overrides: of the experiment.
        size: side of the images.
        batches: images per training step, in rising order until memory is full.
        sampled: images per call of the sampler.
        shipped: (side, images) at which the shipped models are measured.
        models: the shipped models.
        pictures: JPEG files of the loader's example.
        matrix: side of the matrices whose product shows what the device reaches.
        precision: of the networks.
        repeats: of every measurement.
        compiled: backends and modes of torch.compile.
    """

    overrides: tuple[str, ...]
    size: int
    batches: tuple[int, ...]
    sampled: int
    shipped: tuple[tuple[int, int], ...]
    models: Sequence[str]
    pictures: int
    matrix: int
    precision: str
    repeats: int
    compiled: tuple[str, ...]


SCALES = {
    "real": Scale(
        (),
        256,
        (1, 2, 4, 8, 16, 32),
        16,
        ((128, 16), (256, 8)),
        MODELS,
        512,
        8192,
        "bfloat16",
        3,
        ("inductor", "reduce-overhead"),
    ),
    "tiny": Scale(("scale=tiny",), 32, (2,), 2, ((32, 2),), MODELS[:1], 16, 256, "float32", 1, ("eager",)),
}
KINDS = {"none": (), "modules": ("modules",), "all": ("layers",), "all, channels last": ("layout",)}
"""What is done to the network before each kind of checkpointing is measured, each on top of the ones before."""
MIXED = {"bfloat16": "bf16-mixed", "float32": "32-true"}
"""What ``trainer.precision`` calls a precision."""


@dataclass(frozen=True)
class Bench:
    """What is measured, on which device, and a folder for what has to lie in files."""

    scale: Scale
    device: str
    work: Path

    def overrides(self) -> list[str]:
        """Return the experiment's, with random weights where the real ones are not at hand."""
        if self.scale.overrides:
            return ["name=bench", *self.scale.overrides]
        return ["name=bench", f"prior={random_prior(self.work)}", f"loss.distance.weights={random_vgg(self.work)}"]

    def model(self) -> DistillationModule:
        """Return the training module on the device."""
        return build(composed(EXPERIMENT, *self.overrides()).training, "training").to(self.device)

    def images(self, count: int, side: int | None = None) -> Tensor:
        """Return random images."""
        side = side or self.scale.size
        return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.device)


def random_prior(work: Path) -> Path:
    """Write a prior of the real architecture with random weights, once, and return its folder."""
    folder = work / "prior"
    if not folder.is_dir():
        with torch.device("meta"):
            unet = Prior.from_pretrained(ARCHITECTURE).unet
        unet.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                # normalisations pass on what comes; the others are small enough for 50 residual blocks
                parameter.normal_(float("norm" in name and name.endswith("weight")), 0.02)
        save_prior(unet, {}, folder)
        shutil.copy(ARCHITECTURES / ARCHITECTURE / SCHEDULER_FILE, folder)
    return folder


def random_vgg(work: Path) -> Path:
    """Write random weights of LPIPS's backbone, once, and return their file."""
    path = work / "vgg.pth"
    if not path.is_file():
        features = torchvision.models.vgg16(weights=None).features.state_dict()
        torch.save({f"features.{name}": value for name, value in features.items()}, path)
    return path


# --- what is measured ------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device reaches: a matrix product, and a copy."""
    side, dtype = bench.scale.matrix, torch.float32 if bench.device == "cpu" else torch.bfloat16
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    big = torch.empty(side * side * 16, device=bench.device)
    times = interleaved({"product": lambda: a @ b, "copy": big.clone}, 10)
    product, copy = (sorted(times[name])[5] for name in ("product", "copy"))
    yield {
        "method": "ceilings",
        "product [TFLOP/s]": 2 * side**3 / product / 1e12,
        "copy [GB/s]": 2 * big.nbytes / copy / 1e9,
    }


def training(bench: Bench) -> Iterator[Row]:
    """Seconds and memory of a step, beside the bare passes and what ``estimate=true`` says."""
    model = bench.model()
    weights = [*model.parameters(), *model.buffers()]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    there = sum(tensor.nbytes for tensor in weights) + ADAM * trained
    for kind, changes in KINDS.items():
        change(model, changes)
        options = [
            f"training.checkpointing={kind.partition(',')[0]}",
            f"trainer.precision={MIXED[bench.scale.precision]}",
        ]
        predicted = estimate(composed(EXPERIMENT, "name=bench", *bench.scale.overrides, *options))
        for batch in bench.scale.batches:
            row: Row = {"method": f"checkpointing: {kind}", "batch": batch}
            try:
                cost = TrainingCost(model, bench.images(batch), bench.scale.precision)
                cost.step()  # AdamW's moments appear
                row["memory [GB]"] = (there + peak(cost.step, bench.device)) / 1e9
                row["training / bare"], row["seconds per step"] = cost.ratio(bench.scale.repeats)
                row["images per second"] = batch / row["seconds per step"]
                row["TFLOP/s"] = batch * predicted.flops / row["seconds per step"] / 1e12
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                row["memory [GB]"] = "out of memory"
            row["memory, estimated [GB]"] = replace(predicted, batch=batch, accumulate=1, devices=1).memory / 1e9
            yield row
            if "seconds per step" not in row:
                torch.cuda.empty_cache()
                break


def change(model: DistillationModule, changes: Sequence[str]) -> None:
    """Switch checkpointing or the layout of a model that is there already, as ``build_trained_network`` does."""
    if "modules" in changes:
        model.network.kept_modules = 1
    if "layers" in changes:
        model.prior.checkpoint_layers()
    if "layout" in changes:
        model.prior.use_channels_last()


def sampling(bench: Bench) -> Iterator[Row]:
    """Seconds of a call of the sampler, beside its bare evaluations."""
    model = bench.model()
    sampler = PosteriorSampler(model.network, model.sampler.config.with_options(precision=bench.scale.precision))
    yield sampling_row(EXPERIMENT, sampler, model.step.problem, bench.images(bench.scale.sampled), bench)


def shipped(bench: Bench) -> Iterator[Row]:
    """The same for the shipped models."""
    for (side, count), name in itertools.product(bench.scale.shipped, bench.scale.models):
        sampler = PosteriorSampler.from_pretrained(name, device=bench.device, precision=bench.scale.precision)
        problem = Problem(trained_operator(sampler.config.info["physics"]["operator"]), sampler.config.sigma_y, seed=0)
        yield sampling_row(name, sampler, problem, bench.images(count, side), bench)


def sampling_row(name: str, sampler: PosteriorSampler, problem: Problem, x0: Tensor, bench: Bench) -> Row:
    """Return one row of sampling."""
    held = peak(lambda: sampler.sample(problem.observe(x0)), bench.device)
    ratio, seconds = sampling_ratio(sampler, problem, x0, bench.scale.repeats)
    return {
        "method": name,
        "size": f"{x0.shape[-1]}x{x0.shape[-1]}",
        "batch": len(x0),
        "nfe": sampler.nfe(),
        "sampling / bare": ratio,
        "seconds per call": seconds,
        "images per second": len(x0) / seconds,
        "memory beside weights [GB]": held / 1e9,
    }


def compiled(bench: Bench) -> Iterator[Row]:
    """A shipped model with its network compiled, beside the network as it is."""
    side, count = bench.scale.shipped[0]
    for how in bench.scale.compiled:
        yield compiled_row(MODELS[0], how, bench.scale.precision, bench.images(count, side), bench.scale.repeats)


def loader(bench: Bench) -> Iterator[Row]:
    """Images per second that reach a training, from shards and from files, with all loader processes together."""
    workers = 0 if bench.device == "cpu" else max(1, torch.get_num_threads() - 1)
    batches = max(2, bench.scale.pictures // 16)
    shards, folder = loading.example(bench.work / "pictures", bench.scale.pictures)
    common = {"channels": 3, "crop_size": bench.scale.size, "batch_size": 16, "num_workers": workers}
    common |= {"samples_per_epoch": 16 * (batches + 1), "scales": [1.0], "probabilities": [1.0]}
    readers = {
        "shards": ShardData(shards, shards, **common),
        "folder": FolderData(folder, cache_mb=0, **common),
    }
    for name, data in readers.items():
        speed = loading.speed(data, batches) * max(1, workers)
        yield {"method": f"loading from {name}", "workers": workers, "images per second": speed}


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ceilings": ceilings,
    "training": training,
    "sampling": sampling,
    "shipped": shipped,
    "loader": loader,
    "compiled": compiled,
}


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that bench.json is written into")
    parser.add_argument("--scale", choices=[*SCALES], default="real")
    parser.add_argument("--minutes", type=float, default=4.0, help="no row is begun after so many")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure part by part for as long as there is time."""
    options = parser().parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    device = "cpu" if options.scale == "tiny" else str(find_device("auto"))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found: Row = {"machine": f"{name}; {machine()}", "scale": options.scale, "left out": []}
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "pictures").mkdir()
        bench = Bench(SCALES[options.scale], device, Path(work))
        for name, part in PARTS.items():
            rows = found.setdefault(name, [])
            started = part(bench) if time.monotonic() < end else iter(())
            for row in started:
                rows.append(row)
                print(row, flush=True)
                write_json(options.out / "bench.json", found)
                if time.monotonic() > end:
                    break
            if time.monotonic() > end:
                found["left out"].append(name)
    write_json(options.out / "bench.json", found)


if __name__ == "__main__":
    main()
