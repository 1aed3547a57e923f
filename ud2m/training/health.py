"""Signs that a long run goes wrong: speed in the log, and warnings in plain words."""

import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from tqdm import tqdm

WINDOW = 100
"""Optimiser steps that a judgement is based on."""
WON = 0.99
"""Share of decisions, on real and on generated images, that are right when D has won."""
MOVED = 1e-4
"""Smallest change of an adapter in ``WINDOW`` steps, relative to its norm."""


class Health(L.Callback):
    """Log ``images_per_second`` (of all ranks, without validation), and warn once when

    * the discriminator has told real from generated images almost always for ``WINDOW`` steps: its gradient then says
      little about images;
    * the adapter has hardly moved in the ``WINDOW`` steps after the warm-up.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.since = 0, 0.0, 0.0
        self.decisions: list[float] | None = []
        self.start: tuple[int, Tensor] | None = None
        self.watches_adapter = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock at the first batch, and behind a validation."""
        self.since = self.since or time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.since = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count, log and judge; loading a batch belongs to its time."""
        now = time.perf_counter()
        self.images, self.seconds = self.images + len(batch) * trainer.world_size, self.seconds + now - self.since
        self.since = now
        if (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0:
            pl_module.log("images_per_second", self.images / self.seconds)
            self.images, self.seconds = 0, 0.0
        if (batch_idx + 1) % pl_module.settings.accumulate == 0:
            self.judge_discriminator(trainer)
            self.judge_adapter(pl_module)

    def judge_discriminator(self, trainer: L.Trainer) -> None:
        """Warn when D wins outright."""
        metrics = trainer.callback_metrics
        if self.decisions is None or "accuracy/real" not in metrics:
            return
        self.decisions.append(min(metrics["accuracy/real"].item(), metrics["accuracy/generated"].item()))
        if len(self.decisions) < WINDOW:
            return
        share = sum(self.decisions) / WINDOW
        self.decisions = None if share > WON else []
        if share > WON:
            warn(
                f"the discriminator has won: over the last {WINDOW} steps {100 * share:.1f} % of its decisions were "
                "right, so it teaches little. Raise loss.gradient_penalty, or lower training.optimizer.lr_discriminator"
            )

    def judge_adapter(self, pl_module: Any) -> None:
        """Warn when the adapter does not move."""
        parameters, step = pl_module.adapter_parameters(), pl_module.steps_done
        if not self.watches_adapter or not parameters or step < pl_module.settings.warmup:
            return
        if self.start is None:
            self.start = step, flat(parameters)
        elif step == self.start[0] + WINDOW:
            before = self.start[1]
            change = ((flat(parameters) - before).norm() / before.norm()).item()
            self.watches_adapter, self.start = False, None
            if change < MOVED:
                warn(
                    f"the adapter (LoRA) does not move: in {WINDOW} steps it changed by {change:.1g} of its norm. "
                    "Raise training.optimizer.lr or training.optimizer.clip; grad_norm/generator is in the log"
                )


def flat(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Return all values as one vector."""
    return torch.cat([p.detach().flatten() for p in parameters])


@rank_zero_only
def warn(text: str) -> None:
    """Print a warning without breaking the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
