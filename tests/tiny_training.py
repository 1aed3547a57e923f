"""Training in miniature: data in memory, modules with a micro prior, trainers, and composed configurations."""

import math
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from tiny import ARCHITECTURE, LORA, SCHEDULER, SIZE, SPECS
from torch import Tensor
from torch.utils.data import Dataset

from ud2m.data import ImageDataModule
from ud2m.losses.adversarial import Adversarial, Discriminator, DiscriminatorLoss
from ud2m.losses.generator import build_generator_loss
from ud2m.losses.terms import L2, EnergyScore
from ud2m.physics import Inpainting
from ud2m.training import DistillationModule, Levels, PriorModule, build_distillation
from ud2m.training.checkpoints import Checkpoints
from ud2m.training.random_streams import row_streams

STEPS, EPOCHS = 2, 2
"""Optimiser steps per epoch, and epochs, of a micro run."""

LOSSES = {"l2": 1.0, "perceptual": 0.05, "energy": 1.0, "feature_energy": 0.0, "adversarial": 0.0}
"""Weights that composed micro runs start from, whatever the shipped ones are."""


class Gradients(Dataset[Tensor]):
    """Item i is a smooth colour gradient that depends on i alone; endless unless it has a length."""

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        corners = torch.rand(1, 3, 2, 2, generator=generator)
        return torch.nn.functional.interpolate(corners, (SIZE, SIZE), mode="bilinear", align_corners=True)[0]


class FixedGradients(Gradients):
    """Five of them, far from those that train; batches of four leave a rest."""

    names = [f"image-{i}" for i in range(5)]  # noqa: RUF012

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(10_000 + index)


class TinyData(ImageDataModule):
    """``Gradients`` for every split."""

    def __init__(self, batch_size: int = 4, accumulate: int = 1, **options: Any):
        super().__init__(3, SIZE, batch_size, samples_per_epoch=STEPS * accumulate * batch_size, **options)

    def train_set(self) -> Dataset[Tensor]:
        return Gradients()

    def all_images(self, split: str) -> FixedGradients:
        return FixedGradients()


def images(count: int) -> Tensor:
    """Return the first images of the training set."""
    data = TinyData().train_set()
    return torch.stack([data[i] for i in range(count)])


def streams(module: DistillationModule | PriorModule, count: int) -> list[torch.Generator]:
    """Return the random numbers of the first rows that a module trains on."""
    return row_streams("cpu", list(range(count)), module.seed, module.stream_name)


def distillation(prior: str, adversarial: float = 0.1, **overrides: Any) -> DistillationModule:
    """Return the module with every kind of loss; ``optimizer`` is merged, other overrides replace arguments."""
    torch.manual_seed(0)  # LoRA and the discriminator start at random
    terms = {
        "l2": {"weight": 1.0, "term": L2},
        "energy": {"weight": 1.0, "term": partial(EnergyScore, patch_size=4)},
        "adversarial": {"weight": adversarial, "term": Adversarial},
    }
    optimizer = {
        "lr": 1e-2,
        "lr_psi": 1e-2,
        "lr_start": 1e-3,
        "lr_discriminator": 1e-2,
        "weight_decay": 0.01,
        "warmup": 2,
        "steps": STEPS * EPOCHS,
        "accumulate": 1,
        "clip": 1.0,
        "ema_decay": 0.5,
    }
    arguments: dict[str, Any] = {
        "prior": prior,
        "lora": LORA,
        "network": {"num_blocks": 2, "rule": SPECS["annealed"], "warm_start": SPECS["smoothing"]},
        "operator": Inpainting(0.5),
        "sigma_y": 0.05,
        "levels": Levels(2),
        "loss": partial(build_generator_loss, terms=terms),
        "discriminator": partial(Discriminator, widths=(4, 8)),
        "discriminator_loss": DiscriminatorLoss(gradient_penalty=1.0),
        "sampling": {"num_steps": 2, "eta": 1.0},
        "validation": {"num_samples": 2, "lpips": None, "metric": "psnr"},
        "info": {"experiment": "tiny"},
        "seed": 3,
    }
    optimizer |= overrides.pop("optimizer", {})
    return build_distillation(**(arguments | {"optimizer": optimizer} | overrides))


def prior_module(**overrides: Any) -> PriorModule:
    """Return the training of the micro prior."""
    torch.manual_seed(0)
    return PriorModule(**({"unet": ARCHITECTURE, "scheduler": SCHEDULER, "warmup": 2, "ema_decay": 0.5} | overrides))


def trainer(
    folder: Path, callbacks: tuple[L.Callback, ...] = (), every: int | None = None, **options: Any
) -> L.Trainer:
    """Return a trainer as ``ud2m.cli.train`` builds it, without loggers."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    callbacks = (*callbacks, Checkpoints(folder / "checkpoints", every))
    return L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **(defaults | options))


def checkpoint(folder: Path, name: str = "last") -> Path:
    """Return the path of a checkpoint of the run in a folder."""
    return folder / "checkpoints" / f"{name}.ckpt"


def fit(
    module: L.LightningModule,
    folder: Path,
    data: L.LightningDataModule | None = None,
    resume: bool = False,
    **options: Any,
) -> L.Trainer:
    """Train and return the trainer; ``resume`` goes on from the folder's last checkpoint."""
    made = trainer(folder, **options)
    made.fit(module, data or TinyData(), ckpt_path=checkpoint(folder) if resume else None, weights_only=True)
    return made


class Break(L.Callback):
    """Raise an error at the start of batch number ``batch`` of epoch number ``epoch``."""

    def __init__(self, epoch: int, batch: int, error: BaseException | None = None):
        self.epoch, self.batch, self.error = epoch, batch, error or RuntimeError("power cut")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise self.error


class At(L.Callback):
    """Call a function at the start of a batch, counted from 0 over the whole run."""

    def __init__(self, batch: int, function: Callable[[], Any]):
        self.batch, self.function = batch, function

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            self.function()


def everything(path: Path) -> dict[str, Any]:
    """Return all tensors and numbers of a checkpoint by path, without what a clock measured."""
    return dict(_leaves(torch.load(path, weights_only=True), ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{path}/{key}")
    elif "seconds" not in path:
        yield path, value


def assert_equal(one: dict[str, Any], other: dict[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Assert that two results of ``everything`` are equal bit for bit."""
    assert one.keys() == other.keys()
    different = [
        key
        for key, value in one.items()
        if not key.startswith(skip)
        and not (torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key])
    ]
    assert not different, different


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest absolute difference between two state dicts."""
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


@contextmanager
def composed(*overrides: str, folder: Path, config_name: str = "train") -> Iterator[DictConfig]:
    """Compose a configuration as the command line would, for a run in ``folder``; HydraConfig is set inside."""
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose(
            config_name, [*overrides, f"hydra.run.dir={folder}", f"hydra.runtime.output_dir={folder}"], True
        )
    HydraConfig.instance().set_config(config)
    try:
        with open_dict(config):
            del config["hydra"]
        yield config
    finally:
        HydraConfig.instance().cfg = None


def tiny_overrides(prior: str, images: Path) -> list[str]:
    """Return overrides that make ``experiment=photos_gaussian_blur`` a matter of seconds, on images in a folder."""
    return [
        f"prior={prior}",
        "data=folder",
        f"data.root={images}",
        f"data.crop_size={SIZE}",
        "data.batch_size=4",
        "data.num_workers=0",
        "data.val_limit=2",
        f"steps={STEPS * EPOCHS}",
        f"validate_every={STEPS}",
        "trainer.precision=32-true",
        *(f"loss.{name}={weight}" for name, weight in LOSSES.items()),
        "network.num_blocks=1",
        "training.sampling.num_steps=1",
        "training.validation.num_samples=2",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
    ]


def command_line(*arguments: str) -> int:
    """Run ``python train.py *arguments`` in this process, which saves the imports; return the exit code."""
    with patch.object(sys, "argv", ["train.py", *arguments]):
        try:
            runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
        except SystemExit as error:
            return int(error.code or 0)
    return 0


def write_images(folder: Path, count: int = 6, side: int = 2 * SIZE) -> Path:
    """Write smooth colour images as PNG files."""
    from ud2m.images import write_image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Gradients()[i].unsqueeze(0)
        write_image(torch.nn.functional.interpolate(image, (side, side))[0], folder / f"{i}.png")
    return folder


def warmup_cosine_oracle(step: int, warmup: int, total: int) -> float:
    """The published formula, written down again."""
    rise = (step + 1) / warmup if step + 1 < warmup else 1.0
    return rise * math.cos(math.pi * step / (2 * total)) ** 2
