"""Go on training a prior, and a model on top of it, for as long as there is time; bring averaged weights back.

    python benchmarks/gpu/go_on.py OUT --seconds 300 [--prior NAME] [--photographs FOLDER] [--models NAME,...]

The pace of each run is measured first and decides on its number of steps, so that its learning rate falls to 0 when its
time is over. A run that is still too long is stopped, and what its average is then is exported. ``OUT/NAME.tar.00`` and
so on are the parts of an export folder (``cat NAME.tar.* | tar -x``), ``OUT/train.json`` says what was done.
"""

import argparse
import io
import json
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deadline import run_for
from experiments import composed
from ud2m.cli import train
from ud2m.cli.objects import build
from ud2m.files import write_bytes, write_json
from ud2m.priors.shipped import shipped_folder
from ud2m.priors.store import UNET_FILE
from ud2m.training.checkpoints import PREEMPTED

REPOSITORY = Path(__file__).resolve().parents[2]
PRIORS = ("photographs_prior", "photos_prior")
"""Shipped ones, the largest first, and the experiments that train them: on a folder, and on what packages contain."""
PRIOR_SHARE = 0.6
"""Of the time: for the prior where a model follows it."""
TRAINING_SHARE = 0.85
"""Of a run's time: for its steps. The rest goes to its start, validations and scores."""
PART_BYTES = 15 * 2**20
"""Largest file that is written."""
NEVER = 10**9
"""Steps that no run has the time for."""


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
        prior: overrides of the prior's run.
        model: of a model's run.
        warm, timed: steps that measure the pace, the first ones left out.
        most: steps of a run at most.
    """

    prior: tuple[str, ...]
    model: tuple[str, ...]
    warm: int
    timed: int
    most: int = NEVER


def scale(name: str) -> Scale:
    """Return a scale by its name."""
    if name == "tiny":
        common = ("data.crop_size=32", "data.tile_size=32", "data.batch_size=2", "data.num_workers=0")
        common += ("data.val_limit=2", "data.test_limit=2", "trainer.accelerator=cpu", "trainer.precision=32-true")
        return Scale(common, (*common, "training.validation.num_samples=2"), warm=1, timed=1, most=2)
    common = (f"data.num_workers={max(1, (os.cpu_count() or 2) - 2)}", "trainer.precision=bf16-mixed")
    return Scale(
        (*common, "data.batch_size=128"),
        (*common, "data.batch_size=32", "data.crop_size=64", "data.val_limit=48", "training.channels_last=true"),
        warm=30,
        timed=50,
    )


class Clock(L.Callback):
    """Remember when batches ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Note the time, when the device has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())


def seconds_per_step(experiment: str, overrides: Sequence[str], size: Scale) -> float:
    """Train for a moment and return the mean time of a step, loading included."""
    train.quiet_libraries()
    count, clock = size.warm + size.timed, Clock()
    short = [f"steps={count}", f"validate_every={count}", "+trainer.limit_val_batches=0"]
    short += ["+trainer.enable_checkpointing=false"]
    with tempfile.TemporaryDirectory() as folder:
        config = composed(experiment, *overrides, *short, f"run_dir={folder}")
        config.logger = {}
        data = build(config.data, "data", L.LightningDataModule)
        model = build(config.training, "training", L.LightningModule)
        train.build_trainer(config, Path(folder), [clock]).fit(model, data)
    return (clock.times[-1] - clock.times[size.warm - 1]) / size.timed


def steps_for(seconds: float, each: float, most: int) -> int:
    """Return the steps that fit, an even number: half of them lie between two validations."""
    return 2 * max(1, min(most, int(TRAINING_SHARE * seconds / each)) // 2)


def run(experiment: str, overrides: Sequence[str], size: Scale, seconds: float, folder: Path) -> dict[str, Any]:
    """Train for ``seconds``, all told, and return what was done; the model is in the returned ``export``."""
    end = time.monotonic() + seconds
    each = seconds_per_step(experiment, overrides, size)
    steps = steps_for(end - time.monotonic(), each, size.most)
    places = [f"experiment={experiment}", f"run_dir={folder}"]
    words = [*places, *overrides, f"steps={steps}", f"validate_every={steps // 2}"]
    status = run_for([sys.executable, str(REPOSITORY / "train.py"), *words], end - time.monotonic())
    done = {"experiment": experiment, "steps planned": steps, "seconds per step": each, "exit status": status}
    if status == PREEMPTED:  # after its last whole step
        run_for([sys.executable, str(REPOSITORY / "train.py"), *places, *overrides, "export=last.ckpt"], 60)
    export = next((path for name in ("export", "export-last") if (path := folder / name).is_dir()), None)
    scores = folder / "metrics.json"
    done["scores"] = json.loads(scores.read_text()) if scores.is_file() else []
    return done | {"export": None if export is None else str(export)}


def architecture(prior: str) -> list[str]:
    """Return overrides that describe the network of a prior to its training."""
    content = json.loads(((shipped_folder(prior) or Path(prior)) / UNET_FILE).read_text())
    # the experiment's crops may have another size than those that the network was first trained on
    own = {key: value for key, value in content.items() if not key.startswith("_") and key != "sample_size"}
    return [f"++training.unet.{key}={json.dumps(value)}" for key, value in own.items()]


def bring(folder: Path, out: Path, name: str) -> list[str]:
    """Write a folder as ``NAME.tar.00``, ... into ``out`` and return the names."""
    for old in out.glob(f"{name}.tar.*"):
        old.unlink()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=name)
    content = buffer.getvalue()
    parts = [content[first : first + PART_BYTES] for first in range(0, len(content), PART_BYTES)]
    names = [f"{name}.tar.{number:02d}" for number in range(len(parts))]
    for file, part in zip(names, parts, strict=True):
        write_bytes(out / file, part)
    return names


def go_on(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train the prior, then the models on it, with run folders in ``work``, and return what was done."""
    end = time.monotonic() + options.seconds
    size = scale(options.scale)
    prior = options.prior or next(name for name in PRIORS if shipped_folder(name))
    folder = options.photographs.is_dir()  # else the dozen that ship inside installed packages
    data = ["data=folder", f"data.root={options.photographs.resolve()}"] if folder else ["data=photos"]
    experiment = PRIORS[0 if folder else 1]
    models = [name for name in options.models.split(",") if name]
    done: dict[str, Any] = {"prior": prior, "photographs": folder, "runs": []}

    def trained(experiment: str, overrides: Sequence[str], seconds: float) -> str | None:
        result = run(experiment, [*data, *overrides], size, seconds, work / experiment)
        export = result.pop("export")
        result["files"] = [] if export is None else bring(Path(export), options.out, experiment)
        done["runs"].append(result)
        write_json(options.out / "train.json", done)
        return export

    share = PRIOR_SHARE if models else 1.0
    start = [f"training.start_from={prior}", *architecture(prior), *size.prior]
    better = trained(experiment, start, share * options.seconds)
    for left, name in zip(range(len(models), 0, -1), models, strict=True):
        trained(name, [f"prior={better or prior}", *size.model], (end - time.monotonic()) / left)
    return done


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--scale", choices=["real", "tiny"], default="real")
    parser.add_argument("--prior", default="", help="a name or a folder; default: the largest shipped one")
    parser.add_argument("--photographs", type=Path, default=Path("benchmarks/gpu/photographs"))
    parser.add_argument("--models", default="photos_general", help="experiments, separated by commas")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status is 0 when every run has left a model."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # ends the run below, too
    with tempfile.TemporaryDirectory() as work:
        done = go_on(parser().parse_args(arguments), Path(work))
    return 0 if all(run["files"] for run in done["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
