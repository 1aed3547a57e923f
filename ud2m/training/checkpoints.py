"""Checkpoints: ``last.ckpt`` to resume from, ``best.ckpt`` to export, each whole or not there."""

import io
import math
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ud2m.files import read_tensors

LAST, BEST = "last.ckpt", "best.ckpt"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine back."""
PREEMPTED = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)."""


class Checkpoints(Checkpoint):
    """After every validation write ``last.ckpt``, and ``best.ckpt`` when ``val/score`` has risen.

    In between, ``last.ckpt`` is also written every ``every`` steps, and before the run ends on SIGTERM or SIGUSR1. A
    signal to any rank stops all of them after the step that is under way: within a step gradients would be lost, and
    handling the signal where it arrives would be within one. A checkpoint of a step resumes bit for bit, as batches and
    noise are functions of the position.

    Lightning's ``ModelCheckpoint`` keeps absolute paths in its state and forgets the best score in a run folder that
    was moved; this keeps the score alone.
    """

    def __init__(self, folder: Path, every: int | None = None):
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every must be at least 1 step, or null, got {every}")
        self.folder, self.every = folder, every
        self.best_score = -math.inf
        self.signalled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals, in place of Lightning, which puts all handlers back when the run ends."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember that the run shall stop."""
        self.signalled = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write ``last.ckpt`` where that is due after a step.

        Raises:
            SystemExit: when a signal has come.
        """
        accumulate = pl_module.settings.accumulate
        # The last step of an epoch has the checkpoint of the validation that follows.
        if (batch_idx + 1) % accumulate or batch_idx + 1 == trainer.num_training_batches:
            return
        stops = trainer.strategy.reduce_boolean_decision(self.signalled, all=False)
        if stops or (self.every and pl_module.steps_done % self.every == 0):
            self.save(trainer, LAST)
        if stops:
            self.stop(trainer)

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
        if trainer.strategy.reduce_boolean_decision(self.signalled, all=False):
            self.stop(trainer)

    def stop(self, trainer: L.Trainer) -> None:
        """End this process.

        Raises:
            SystemExit: with ``PREEMPTED`` on the first rank. The others end with 0: whoever watches them would kill the
                first one for their failure.
        """
        raise SystemExit(PREEMPTED if trainer.is_global_zero else 0)

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
        checkpoint = read_tensors(content)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint {path} is truncated, damaged or no checkpoint ({error}); "
            f"copy {BEST} of its folder onto {LAST} to resume from there, or start a new run"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} holds no checkpoint of a training run; choose another run_dir")
    return checkpoint
