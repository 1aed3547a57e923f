"""Compose objects from a configuration, train, export and score: what ``train.py`` runs."""

import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from ud2m.cli.errors import user_facing
from ud2m.output import write_bytes, write_json
from ud2m.training.progress import StepProgress

CONFIG_FILE = "config.yaml"


@user_facing
def main(config: DictConfig) -> float | None:
    """Run one training job in Hydra's output folder; return its score (higher is better) for sweepers."""
    quiet_libraries()
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = prepare(config, folder)
    rows = run(config, folder)
    write_json(folder / "metrics.json", rows)
    print(f"run folder: {folder}")
    return rows[-1].get("score")


def prepare(config: DictConfig, folder: Path) -> DictConfig:
    """Return the resolved configuration of the run and write it down; with resume=true, the one stored there.

    Raises:
        ValueError: when there is nothing to resume, a run is there already, or numbers do not fit together.
    """
    stored, last = folder / CONFIG_FILE, folder / "checkpoints" / "last.ckpt"
    if config.resume:
        if not stored.is_file() or not last.is_file():
            raise ValueError(f"nothing to resume in {folder}: it has no {CONFIG_FILE} and checkpoints/last.ckpt")
        overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith(("experiment=", "run_dir="))]
        return OmegaConf.merge(OmegaConf.load(stored), OmegaConf.from_dotlist(overrides))  # type: ignore[return-value]
    if last.exists():
        raise ValueError(f"{folder} holds a run already; add resume=true to go on with it, or choose another run_dir")
    if config.steps < 1 or config.steps % config.validate_every:
        raise ValueError(
            f"steps must be a positive multiple of validate_every, got {config.steps} and {config.validate_every}"
        )
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    write_bytes(stored, OmegaConf.to_yaml(resolved).encode())
    return resolved


def run(config: DictConfig, folder: Path) -> list[dict]:
    """Fit, export to ``folder/export``, and return the rows of ``metrics.json``."""
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data, _convert_="all")
    model = instantiate(config.model, _convert_="all")
    trainer = build_trainer(config, folder)
    resume_from = folder / "checkpoints" / "last.ckpt" if config.resume else None
    trainer.fit(model, data, ckpt_path=resume_from, weights_only=True)
    model.export(folder / "export")
    return model.evaluate(data)


def build_trainer(config: DictConfig, folder: Path) -> L.Trainer:
    """Return the trainer with its loggers, progress bar and checkpoints (last, and best by the model's own score)."""
    checkpoints = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="best-{step}",
        monitor="val/score",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=False,
    )
    loggers = [instantiate(logger) for logger in config.logger.values()]
    return instantiate(
        config.trainer, logger=loggers, callbacks=[StepProgress(), checkpoints], default_root_dir=str(folder)
    )


def quiet_libraries() -> None:
    """Silence advice of libraries that a user of this program cannot act on; warnings of our own stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    torch.set_float32_matmul_precision("high")
