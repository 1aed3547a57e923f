"""Checkpoints: ``last.ckpt`` to resume from, ``best.ckpt`` to export, each whole or not there."""

import io
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

LAST, BEST = "last.ckpt", "best.ckpt"


class Checkpoints(Checkpoint):
    """After every validation write ``last.ckpt``, and ``best.ckpt`` when ``val/score`` has risen.

    Lightning's ``ModelCheckpoint`` keeps absolute paths in its state and forgets the best score in a run folder that
    was moved; this keeps the score alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.best_score = -math.inf

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoints of a training run."""
        if not trainer.training and not trainer.validating and not trainer.sanity_checking:
            return
        score = trainer.callback_metrics["val/score"].item()
        if score > self.best_score:
            self.best_score = score
            # Before last.ckpt: whoever resumes from a last.ckpt that knows this score must find its file.
            self.save(trainer, BEST)
        self.save(trainer, LAST)

    def save(self, trainer: L.Trainer, name: str) -> None:
        """Write one checkpoint aside and rename it into place; all ranks must call this."""
        unfinished = self.folder / f".{name}.incomplete"
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            unfinished.replace(self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        """Return the score to beat."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the score to beat."""
        self.best_score = state_dict["best_score"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content on the CPU; loading runs no code of the file (``weights_only``).

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is truncated, or holds anything but tensors and plain values.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"the checkpoint {path} is truncated, damaged or no checkpoint ({_first_line(error)}); "
            f"copy {BEST} of its folder onto {LAST} to resume from there, or start a new run"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} holds no checkpoint of a training run; choose another run_dir")
    return checkpoint


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
