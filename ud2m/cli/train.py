"""Compose objects from a configuration, train, export and score: what ``train.py`` runs."""

import logging
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ud2m.cli import PLACES
from ud2m.cli.errors import INTERRUPTED, correctable
from ud2m.cli.estimate import estimate
from ud2m.cli.objects import build, leaves, resolved
from ud2m.cli.sweep import survives_sweep
from ud2m.files import locked, plain_name, write_bytes, write_json
from ud2m.training.checkpoints import BEST, LAST, Checkpoints, check_resumable
from ud2m.training.health import Health
from ud2m.training.progress import StepProgress
from ud2m.training.pruning import MedianPruning

CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"
RESUMABLE = ("trainer", "data.num_workers", "checkpoint_every", *PLACES)
"""What may change when a run goes on: where it runs and where its images lie, not what it computes."""
AUTO = "auto"
NOT_COMPARED = (*RESUMABLE, "resume", "run_dir", "logger")
"""What need not be as stored for resume=auto to go on."""


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
    with rank_zero_only(locked)(folder) or nullcontext():
        rows = run(prepare(config, folder), folder)
        if not rows:
            return None
        write_json(folder / "metrics.json", rows)
    metric = OmegaConf.select(config, "training.validation.metric")
    of = "denoising PSNR on the test images" if metric is None else f"{metric} on the validation images"
    print(f"score ({of}): {rows[-1]['score']:.4g}")
    print(f"run folder: {folder}")
    return rows[-1]["score"]


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that nothing was written into."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def prepare(config: DictConfig, folder: Path) -> DictConfig:
    """Return the resolved configuration of the run and write it down; with resume=true, the one stored there.

    With resume=auto, the one stored there when there is a run to go on with.

    Raises:
        ValueError: when there is nothing to resume, a run is there already, or numbers do not fit together.
    """
    there = (folder / CHECKPOINTS / LAST).exists()
    if config.resume == AUTO and there:
        return same_config(config, folder)
    if config.resume is True:
        return stored_config(config, folder, HydraConfig.get().overrides.task)
    if there:
        raise ValueError(f"{folder} holds a run already; add resume=true to go on with it, or choose another run_dir")
    if config.steps % config.validate_every:
        raise ValueError(
            f"steps must be a multiple of validate_every (each run ends in a validation), got {config.steps} and "
            f"{config.validate_every}"
        )
    final = resolve(config)
    final.resume = False
    final.version = version("ud2m")
    rank_zero_only(write_bytes)(folder / CONFIG_FILE, OmegaConf.to_yaml(final).encode())
    return final


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
    resumed = load_config(stored)
    changed = [o.split("=")[0].lstrip("+") for o in overrides]
    changed = [key for key in changed if key not in ("resume", "run_dir")]
    refused = [key for key in changed if not key.startswith(RESUMABLE)]
    if refused:
        raise ValueError(
            f"a resumed run keeps its configuration, {stored}; leave out {', '.join(refused)} (what can be given is "
            f"{', '.join(RESUMABLE)}), or start a new run"
        )
    for key in ("resume", *changed):
        OmegaConf.update(resumed, key, OmegaConf.select(config, key))
    return resumed


def same_config(config: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration of the run in ``folder`` to go on with, which must be ``config`` but for where it runs.

    Raises:
        ValueError: when it is another one.
    """
    stored, now = load_config(folder / CONFIG_FILE), resolve(config)
    before, after = dict(leaves(resolved(stored))), dict(leaves(resolved(now)))
    missing = object()
    changed = [
        key
        for key in before | after
        if before.get(key, missing) != after.get(key, missing) and not key.startswith(NOT_COMPARED)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run with another configuration (other {', '.join(changed[:6])}); resume=auto goes on "
            "with the same one alone: choose another run_dir"
        )
    for key in RESUMABLE:
        value = OmegaConf.select(now, key, default=missing)  # type: ignore[call-overload]  # its stub wants a string
        if value is not missing:
            OmegaConf.update(stored, key, value, merge=False)
    stored.resume = True
    return stored


def resolve(config: DictConfig) -> DictConfig:
    """Return the configuration with all its references replaced by values."""
    return cast(DictConfig, OmegaConf.create(resolved(config)))


def load_config(path: Path) -> DictConfig:
    """Read the configuration that a run has stored.

    Raises:
        ValueError: when it is none, or of a version whose runs this one cannot go on with.
    """
    try:
        # few of them can stand for more values than there is memory; none of ours has any
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(path.read_text())):
            raise ValueError("it has aliases")
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig) or any("${" in str(v) for _, v in leaves(OmegaConf.to_container(config))):
        raise ValueError(f"{path} holds no values alone, as a run writes them; it cannot be gone on with")
    wrote, this = config.pop("version", None), version("ud2m")
    if wrote is None or series(wrote) != series(this):
        raise ValueError(
            f"{path} was written by ud2m {wrote or 'before 0.2'}, and this is ud2m {this}, which goes on with runs of "
            f"{series(this)} alone: start a new run (its export folder can still be used), or install that version"
        )
    return config


def series(number: str) -> str:
    """Return the first two parts of a version: versions that share them can read one another's runs."""
    return ".".join(str(number).split(".")[:2])


def export(config: DictConfig, folder: Path) -> Path:
    """Write the model of a checkpoint of the run in ``folder`` and return where it is: ``export-<checkpoint>`` there.

    Raises:
        ValueError: when there is no such run, and for a path in place of a name.
        FileNotFoundError: when it has no such checkpoint.
    """
    name = plain_name(config.export, "a checkpoint to export")
    path, target = folder / CHECKPOINTS / name, folder / f"export-{Path(name).stem}"
    if not path.is_file():
        there = sorted(file.name for file in (folder / CHECKPOINTS).glob("*.ckpt"))
        raise FileNotFoundError(
            f"there is no checkpoint {path}; export=... names one of {', '.join(there) or 'none'} in run_dir"
        )
    model = build(stored_config(config, folder, ()).training, "training", L.LightningModule)
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
        check_resumable(resume_from)  # Lightning's own messages are tracebacks
    data = build(config.data, "data", L.LightningDataModule)
    model = build(config.training, "training", L.LightningModule)
    callbacks = build_callbacks(config, folder)
    trainer = build_trainer(config, folder, callbacks)
    check_batch(config.data.batch_size, trainer.world_size)
    try:
        fit(trainer, model, data, resume_from)
        if not trainer.is_global_zero:
            return []
        prunings = [callback for callback in callbacks if isinstance(callback, MedianPruning)]
        if all(pruning.stopped_at is None for pruning in prunings):
            check_finished(model.steps_done, config.steps, folder)
        model.restore(checkpoints / BEST)
        model.export(folder / "export")
        log_export(trainer.loggers, folder / "export", config.name)
        rows = model.evaluate(data)
        for pruning in prunings:
            rows[-1]["gave_up_at"] = pruning.stopped_at
        return rows
    except SystemExit as error:  # a signal
        if error.code:
            print(f"interrupted; {how_to_resume(folder)}", file=sys.stderr)
        raise
    finally:
        finish(trainer.loggers)


def fit(trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule, resume_from: Path | None) -> None:
    """Train; when this process fails, end those that it started, which would wait for it.

    Raises:
        OSError: when another process of the run is gone.
        ValueError: when the checkpoint does not fit.
        SystemExit: when the run is interrupted.
    """
    # Under SLURM Lightning would answer the first one within a step, `Checkpoints` does after it; the other it leaves
    # ignored.
    before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, signal.SIG_IGN)}
    before |= {signal.SIGINT: signal.getsignal(signal.SIGINT)}
    try:
        trainer.fit(model, data, ckpt_path=resume_from, weights_only=True)
    except BaseException as error:
        if trainer.strategy.launcher is not None and not isinstance(error, SystemExit):
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if trainer.world_size > 1 and is_lost_rank(error):
            raise OSError(
                f"process {trainer.global_rank} of {trainer.world_size} lost the connection to another one, which has "
                "failed or was killed (see its message above, or memory and time limits); go on with resume=true"
            ) from error
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(INTERRUPTED) from error  # Lightning's answer is 1
        began = any(callback.began for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
        if resume_from is not None and not began and isinstance(error, Exception) and not correctable(error):
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"the run cannot go on from {resume_from}, which does not fit it: {reason}") from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error is the network's, as torch.distributed reports it."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection closed by peer"))


def check_finished(done: int, steps: int, folder: Path) -> None:
    """Raise ValueError when a run ended before its last step, whatever ended it: it has no model to show."""
    if done < steps:
        raise ValueError(
            f"the run ended after {done} of {steps} steps and is not finished: something stopped it early, as "
            "trainer.max_steps, max_epochs, max_time, limit_train_batches or data.samples_per_epoch do; leave it "
            f"out. {how_to_resume(folder)}"
        )


def check_batch(batch_size: int, world_size: int) -> None:
    """Raise ValueError, before other processes are started, when a batch does not divide over them."""
    if batch_size % world_size:
        raise ValueError(
            f"data.batch_size counts the images of all {world_size} processes together and must be a multiple of their "
            f"number, got {batch_size}; change it, or trainer.devices and trainer.num_nodes"
        )


def build_callbacks(config: DictConfig, folder: Path) -> list[L.Callback]:
    """Return progress bar, health, checkpoints (last, and best by the model's own score), and pruning where asked."""
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.get("checkpoint_every"))
    after = config.get("give_up_after")
    return [StepProgress(), Health(), checkpoints, *([] if after is None else [MedianPruning(folder, after)])]


def build_trainer(config: DictConfig, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """Return the trainer with its loggers."""
    loggers = build_loggers(config, folder)
    keep_curves(loggers)
    try:
        given: dict[str, Any] = {"logger": loggers, "callbacks": callbacks, "default_root_dir": str(folder)}
        return build(config.trainer, "trainer", L.Trainer, **given)
    except ValueError as error:
        if isinstance(error.__cause__, MisconfigurationException):  # no such device, above all
            reason = " ".join(str(error.__cause__).split())
            raise ValueError(
                f"no trainer with accelerator={config.trainer.accelerator}, devices={config.trainer.devices}: {reason}"
                "; see trainer.accelerator, trainer.devices and trainer.strategy"
            ) from error
        raise


def build_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """Return the loggers; a run that goes on writes its curves into its folder, wherever that is now.

    Raises:
        ValueError: when what the run has stored would have them written elsewhere.
    """
    pages = resolved(config.logger)
    if not isinstance(pages, Mapping):
        raise ValueError(f"logger holds loggers by their names, got {pages!r}")
    here: dict[str, Any] = {"save_dir": str(folder)} if config.get("resume") else {}
    loggers: list[Logger] = [build(page, f"logger.{name}", Logger, **here) for name, page in pages.items()]
    for place in (logger.log_dir for logger in loggers if here and logger.log_dir):
        if not Path(place).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / CONFIG_FILE} has curves written to {place}, outside of the run folder")
    return loggers


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
def log_export(loggers: Iterable[Logger], export: Path, name: str) -> None:
    """Keep the exported model as an artefact of a wandb run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb  # here alone: it takes long

            artefact = wandb.Artifact(f"{name}-export", type="model")
            artefact.add_dir(str(export))
            logger.experiment.log_artifact(artefact)


@rank_zero_only
def finish(loggers: Iterable[Logger]) -> None:
    """End a wandb run: the next run of a sweep, in the same process, would go on with it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def how_to_resume(folder: Path) -> str:
    """Return what a user can do after an interruption."""
    if (folder / CHECKPOINTS / LAST).is_file():
        return f"go on from the last checkpoint with: python train.py resume=true run_dir={folder}"
    return "there is no checkpoint yet (the first one follows the first validation)"


def quiet_libraries() -> None:
    """Silence advice of libraries that a user of this program cannot act on; warnings of our own stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # which process of several failed, before all are ended
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    torch.set_float32_matmul_precision("high")


if __name__ == "__main__":
    raise SystemExit("error: run `ud2m train` or `python -m ud2m train`")
