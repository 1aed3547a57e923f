"""Compose objects from a configuration, train, export and score: what ``train.py`` runs."""

import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from ud2m.cli.estimate import estimate
from ud2m.cli.sweep import survives_sweep
from ud2m.output import write_bytes, write_json
from ud2m.training.checkpoints import BEST, LAST, Checkpoints, read_checkpoint
from ud2m.training.progress import StepProgress

CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"
COUNTS = ("steps", "validate_every", "accumulate")
RESUMABLE = ("trainer.", "data.num_workers")
"""What may change when a run goes on: where it runs, not what it computes."""


@survives_sweep
def main(config: DictConfig) -> float | None:
    """Run one training job in Hydra's output folder; return its score (higher is better) for sweepers."""
    quiet_libraries()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.estimate:
        print(estimate(config).table())
        remove_if_empty(folder)  # Hydra made it
        return None
    if config.export:
        print(f"model: {export(config, folder)}")
        return None
    rows = run(prepare(config, folder), folder)
    if not rows:
        return None
    write_json(folder / "metrics.json", rows)
    print(f"run folder: {folder}")
    return rows[-1]["score"]


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that nothing was written into."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def prepare(config: DictConfig, folder: Path) -> DictConfig:
    """Return the resolved configuration of the run and write it down; with resume=true, the one stored there.

    Raises:
        ValueError: when there is nothing to resume, a run is there already, or numbers do not fit together.
    """
    if config.resume:
        return stored_config(config, folder, HydraConfig.get().overrides.task)
    if (folder / CHECKPOINTS / LAST).exists():
        raise ValueError(f"{folder} holds a run already; add resume=true to go on with it, or choose another run_dir")
    for name in COUNTS:
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {config[name]}")
    if config.steps % config.validate_every:
        raise ValueError(
            f"steps must be a multiple of validate_every (each run ends in a validation), got {config.steps} and "
            f"{config.validate_every}"
        )
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert isinstance(resolved, DictConfig)
    rank_zero_only(write_bytes)(folder / CONFIG_FILE, OmegaConf.to_yaml(resolved).encode())
    return resolved


def stored_config(config: DictConfig, folder: Path, overrides: Iterable[str]) -> DictConfig:
    """Return the configuration of the run in ``folder`` to go on with, changed only where that is harmless.

    Raises:
        ValueError: when there is nothing to resume, or an override would make it another run.
    """
    stored = folder / CONFIG_FILE
    if not stored.is_file() or not (folder / CHECKPOINTS / LAST).is_file():
        raise ValueError(
            f"nothing to resume in {folder}: it has no {CONFIG_FILE} and {CHECKPOINTS}/{LAST} (a run writes its first "
            "checkpoint after validate_every steps); check run_dir, or start it without resume=true"
        )
    try:
        resumed = OmegaConf.load(stored)
    except YAMLError as error:
        raise ValueError(f"{stored} is not valid YAML: {' '.join(str(error).split())}") from error
    changed = [o.split("=")[0].lstrip("+") for o in overrides]
    changed = [key for key in changed if key not in ("resume", "run_dir")]
    refused = [key for key in changed if not key.startswith(RESUMABLE)]
    if refused:
        raise ValueError(
            f"a resumed run keeps its configuration, {stored}; leave out {', '.join(refused)} (what can be given are "
            "trainer.* and data.num_workers), or start a new run"
        )
    for key in ("resume", *changed):
        OmegaConf.update(resumed, key, OmegaConf.select(config, key))
    assert isinstance(resumed, DictConfig)
    return resumed


def export(config: DictConfig, folder: Path) -> Path:
    """Write the model of a checkpoint of the run in ``folder`` and return where it is: ``export-<checkpoint>`` there.

    Raises:
        ValueError: when there is no such run. FileNotFoundError: when it has no such checkpoint.
    """
    path, target = folder / CHECKPOINTS / config.export, folder / f"export-{Path(config.export).stem}"
    if not path.is_file():
        there = sorted(file.name for file in (folder / CHECKPOINTS).glob("*.ckpt"))
        raise FileNotFoundError(
            f"there is no checkpoint {path}; export=... names one of {', '.join(there) or 'none'} in run_dir"
        )
    model = instantiate(stored_config(config, folder, ()).training, _convert_="all")
    model.restore(path)
    model.export(target)
    return target


def run(config: DictConfig, folder: Path) -> list[dict[str, Any]]:
    """Fit, export the best parameters to ``folder/export``, and return the rows of ``metrics.json``.

    Processes other than the first one return no rows.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    checkpoints = folder / CHECKPOINTS
    resume_from = checkpoints / LAST if config.resume else None
    if resume_from is not None:
        read_checkpoint(resume_from)  # Lightning's own message for a damaged file is a traceback
    data = instantiate(config.data, _convert_="all")
    model = instantiate(config.training, _convert_="all")
    trainer = build_trainer(config, folder)
    try:
        trainer.fit(model, data, ckpt_path=resume_from, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        print(f"interrupted; {how_to_resume(folder)}", file=sys.stderr)
        raise
    finally:
        finish(trainer.loggers)
    if not trainer.is_global_zero:
        return []
    model.restore(checkpoints / BEST)
    model.export(folder / "export")
    return model.evaluate(data)


def build_trainer(config: DictConfig, folder: Path) -> L.Trainer:
    """Return the trainer with its loggers, progress bar and checkpoints (last, and best by the model's own score)."""
    loggers = [instantiate(logger) for logger in config.logger.values()]
    keep_curves(loggers)
    callbacks = [StepProgress(), Checkpoints(folder / CHECKPOINTS)]
    return instantiate(config.trainer, logger=loggers, callbacks=callbacks, default_root_dir=str(folder))


@rank_zero_only
def keep_curves(loggers: Iterable[Logger]) -> None:
    """Rename the CSV file of an interrupted run to ``metrics-1.csv`` and so on; Lightning would delete it."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            folder = Path(logger.log_dir)
            if (folder / "metrics.csv").is_file():
                number = len(list(folder.glob("metrics-*.csv"))) + 1
                (folder / "metrics.csv").rename(folder / f"metrics-{number}.csv")


@rank_zero_only
def finish(loggers: Iterable[Logger]) -> None:
    """End a wandb run: the next run of a sweep, in the same process, would go on with it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def how_to_resume(folder: Path) -> str:
    """Return what a user can do after an interruption."""
    if (folder / CHECKPOINTS / LAST).is_file():
        return f"go on from the last validation with: python train.py resume=true run_dir={folder}"
    return "there is no checkpoint yet (the first one follows the first validation)"


def quiet_libraries() -> None:
    """Silence advice of libraries that a user of this program cannot act on; warnings of our own stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    torch.set_float32_matmul_precision("high")
