"""Checkpoints: ``last.ckpt`` to resume from, ``best.ckpt`` to export, each whole or not there."""

import io
import math
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from tqdm import tqdm

from ud2m.files import atomic_file, read_tensors

LAST, BEST = "last.ckpt", "best.ckpt"
PREEMPTED = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = {signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED, signal.SIGINT: 128 + signal.SIGINT}
"""What schedulers send before they take a machine back, and Ctrl-C; each with the exit code that follows."""
RESUMED = ("state_dict", "optimizer_states", "loops", "callbacks")
"""What a run goes on with, beside its configuration."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, sync it to the disk and rename it.

    Lightning's own writes to the folder of temporary files first, which may be full or small, and to the place after
    that, where a full disk leaves half a file. The name beside the place is always the same: what a killed run leaves,
    the next one writes over.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; errors as of ``atomic_file``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, path.with_name(f".{path.name}.incomplete")) as stream:
            torch.save(checkpoint, stream)


class Checkpoints(Checkpoint):
    """After every validation write ``last.ckpt``, and ``best.ckpt`` when ``val/score`` has risen.

    In between, ``last.ckpt`` is also written every ``every`` steps, and before the run ends on SIGTERM, SIGUSR1 or
    Ctrl-C. A signal to any rank stops all of them after the step (or validation) that is under way: within a step
    gradients would be lost, and handling the signal where it arrives would be within one. A checkpoint of a step
    resumes bit for bit, as batches and noise are functions of the position. A second Ctrl-C ends the run where it is.

    Lightning's ``ModelCheckpoint`` keeps absolute paths in its state and forgets the best score in a run folder that
    was moved; this keeps the score alone.
    """

    def __init__(self, folder: Path, every: int | None = None):
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every must be at least 1 step, or null, got {every}")
        self.folder, self.every = folder, every
        self.best_score = -math.inf
        self.signalled: int | None = None
        self.began = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have checkpoints written atomically."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals, in place of Lightning, which puts all handlers back when the run ends."""
        self.began = True
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember that the run shall stop."""
        self.signalled = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.write(
                "stopping with a checkpoint after this step or validation; Ctrl-C again: at once", file=sys.stderr
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write ``last.ckpt`` where that is due after a step.

        Raises:
            SystemExit: when a signal has come.
        """
        accumulate = pl_module.settings.accumulate
        # The last step of an epoch has the checkpoint of the validation that follows.
        if (batch_idx + 1) % accumulate or batch_idx + 1 == trainer.num_training_batches:
            return
        stops = trainer.strategy.reduce_boolean_decision(self.signalled is not None, all=False)
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
        if trainer.strategy.reduce_boolean_decision(self.signalled is not None, all=False):
            self.stop(trainer)

    def stop(self, trainer: L.Trainer) -> None:
        """End this process.

        Raises:
            SystemExit: with the signal's code on the first rank. The others end with 0: whoever watches them would kill
                the first one for their failure.
        """
        code = PREEMPTED if self.signalled is None else SIGNALS[signal.Signals(self.signalled)]  # None: another rank's
        raise SystemExit(code if trainer.is_global_zero else 0)

    def save(self, trainer: L.Trainer, name: str) -> None:
        """Write one checkpoint; all ranks must call this."""
        trainer.save_checkpoint(self.folder / name)

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


def check_resumable(path: Path) -> None:
    """Refuse a checkpoint that a run cannot go on from.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, or was written without what training needs besides parameters.
    """
    checkpoint = read_checkpoint(path)
    missing = [part for part in RESUMED if not checkpoint.get(part)]
    if missing:
        raise ValueError(
            f"the checkpoint {path} has no {', '.join(missing)}, without which a run cannot go on: it was not written "
            f"by a run, or was cut down since; its model can be had with export={path.name}"
        )
