"""Signs that a long run goes wrong: speed in the log, and warnings in plain words."""

import math
import sys
import time
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from ud2m.training.steps import logs_now

WINDOW = 100
"""Optimiser steps that a judgement is based on."""
WON = 0.99
"""Share of decisions, on real and on generated images, that are right when D has won."""
UNDECIDED = 0.97 * math.log(4)
"""Loss of D, of log 4 for one that says the same of all images, above which it has learned nothing."""
FELT = 0.01
"""Smallest share of a weighted term in the sum of all terms' gradients at the outputs."""
MEASURED = 10
"""Logged steps that a judgement of the terms is based on."""
TINY = 1e-30
MOVED = 1e-4
"""Smallest change of an adapter in ``WINDOW`` steps, relative to its norm."""


class Health(L.Callback):
    """Log ``images_per_second`` (of all ranks, without validation), and warn once when

    * the discriminator has told real from generated images almost always for ``WINDOW`` steps, or says the same of both
      after its warm-up: its gradient then says little about images;
    * a term of the loss has a weight and hardly a share in what is asked of the outputs;
    * the adapter has hardly moved in the ``WINDOW`` steps after the warm-up.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.since = 0, 0.0, 0.0
        self.decisions: list[tuple[float, float]] | None = []
        self.shares: dict[str, deque[float]] = {}
        self.faint: set[str] = set()
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
        if logs_now(trainer):
            pl_module.log("images_per_second", self.images / self.seconds)
            self.images, self.seconds = 0, 0.0
        if (batch_idx + 1) % pl_module.settings.accumulate == 0:
            self.judge_discriminator(trainer, pl_module)
            self.judge_terms(trainer)
            self.judge_adapter(pl_module)

    def judge_discriminator(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Warn when D wins outright, or has learned nothing by the end of its warm-up."""
        metrics = trainer.callback_metrics
        if self.decisions is None or "accuracy/real" not in metrics:
            return
        right = min(metrics["accuracy/real"].item(), metrics["accuracy/generated"].item())
        self.decisions.append((right, metrics["loss/discriminator"].item()))
        if len(self.decisions) < WINDOW:
            return
        share, loss = (sum(values) / WINDOW for values in zip(*self.decisions, strict=True))
        warmed_up = pl_module.steps_done > pl_module.settings.discriminator_warmup
        self.decisions = []
        if share > WON:
            self.decisions = None
            warn(
                f"the discriminator has won: over the last {WINDOW} steps {100 * share:.1f} % of its decisions were "
                "right, so it teaches little. Raise loss.gradient_penalty, or lower training.optimizer.lr_discriminator"
            )
        elif warmed_up and loss > UNDECIDED:
            self.decisions = None
            warn(
                f"the discriminator is undecided: over the last {WINDOW} steps its loss was {loss:.3f}, and "
                f"{math.log(4):.3f} is that of one that says the same of all images. Lower loss.gradient_penalty, "
                "raise training.optimizer.lr_discriminator, or let it learn for longer before the generator feels it: "
                "training.optimizer.discriminator_warmup"
            )

    def judge_terms(self, trainer: L.Trainer) -> None:
        """Warn when a term with a weight asks for next to nothing."""
        norms = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("gradient/")}
        if not norms or not logs_now(trainer):
            return
        for key, norm in norms.items():
            shares = self.shares.setdefault(key, deque(maxlen=MEASURED))
            shares.append(norm / max(sum(norms.values()), TINY))
            if len(shares) == MEASURED and max(shares) < FELT and key not in self.faint:
                self.faint.add(key)
                name = key.partition("/")[2]
                warn(
                    f"the loss term {name} is hardly felt: at most {100 * max(shares):.2g} % of the gradients at the "
                    f"outputs in the last {MEASURED} logged steps. Raise loss.{name}; {key} is in the log"
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
