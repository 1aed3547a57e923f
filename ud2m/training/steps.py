"""What both trainings share: accumulation, clipping, learning rates, the average, and exact resumption."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from ud2m.losses.terms import NonFiniteLossError
from ud2m.precision import full_precision
from ud2m.training.checkpoints import read_checkpoint
from ud2m.training.ema import Ema
from ud2m.training.random_streams import row_streams
from ud2m.training.schedules import warmup_cosine

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")

SMALLEST_SCALE = 1.0
"""Factor on float16 losses below which gradients that overflow are those of a run that has gone astray."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How gradients become steps.

    Args:
        warmup: steps of linear warm-up.
        accumulate: batches summed into one step.
        clip: largest gradient norm.
        ema_decay: decay of the average.

    Raises:
        ValueError: for numbers out of range.
    """

    warmup: int = 0
    accumulate: int = 1
    clip: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.warmup < 0:
            raise ValueError(
                "accumulate must be at least 1 batch per step and warmup at least 0 steps, "
                f"got {self.accumulate} and {self.warmup}"
            )
        if not self.clip > 0:
            raise ValueError(f"clip, the largest gradient norm, must be positive, got {self.clip}")


class SteppedModule(L.LightningModule, ABC):
    """Manual optimisation in steps of ``accumulate`` batches that equal one step of the large batch.

    A subclass makes ``losses`` and validates with ``log_scores``. Every random number of row j of the data stream is a
    function of (seed, j), and the learning rate is a function of the step, so that accumulation, ranks and
    interruptions change nothing but the order of sums.
    """

    automatic_optimization = False
    stream_name: str
    optimized: tuple[str, ...]
    """Name of each optimiser, for logs and messages."""
    ema: Ema
    total_steps = 0
    """Optimiser steps of the whole run, known when training starts."""

    def __init__(self, settings: StepSettings, seed: int):
        super().__init__()
        self.settings, self.seed = settings, seed
        self.scores: dict[str, Any] = {}

    @abstractmethod
    def losses(
        self, batch: Any, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what to back-propagate for a batch, and values to log; ``total`` is shown.

        The batch is clean images [B, C, H, W] in [0, 1], or a pair of them and their captions.

        Values are losses, unless their name holds a slash. ``logged`` tells that these reach the loggers: then values
        that cost something are worth it.

        Raises:
            NonFiniteLossError: naming the term.
        """

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return what adapts a frozen network, if there is one."""
        return []

    # --- steps ---------------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """Optimiser steps so far, also of the run that a resumed one goes on with."""
        return int(self.ema.num_updates)

    def on_train_start(self) -> None:
        """Check that the trainer's plan can be kept to.

        Raises:
            ValueError: when steps do not fit into epochs, a checkpoint's counts do not fit its parameters, or for a
                precision that this module cannot train in.
        """
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {self.trainer.precision}")
        batches, accumulate = int(self.trainer.num_training_batches), self.settings.accumulate
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if done != self.steps_done * accumulate:
            raise ValueError(
                f"the checkpoint counts {done} batches, and its parameters have taken {self.steps_done} steps of "
                f"{accumulate}: parts of it are missing or of another run; start a new run"
            )
        if batches % accumulate:
            raise ValueError(
                f"an epoch of {batches} batches is no multiple of accumulate={accumulate}: a step would lie in two "
                "epochs; leave data.samples_per_epoch to follow from validate_every and accumulate"
            )
        self.total_steps = batches // accumulate * (self.trainer.max_epochs or 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Back-propagate the losses of one batch; step when enough are accumulated.

        Raises:
            FloatingPointError: when a loss, or what a prox is given, is not finite; names the step and the term.
        """
        accumulate = self.settings.accumulate
        try:
            total, values = self.losses(batch, self.streams(len(images_of(batch)), batch_idx), logs_now(self.trainer))
        except (NonFiniteLossError, FloatingPointError) as error:
            raise FloatingPointError(self.stopped(str(error))) from error
        last = (batch_idx + 1) % accumulate == 0
        with nullcontext() if last else self.local_gradients():
            self.manual_backward(total / accumulate)
        self.log_dict({name if "/" in name else f"loss/{name}": value for name, value in values.items()})
        self.log("loss", values["total"], prog_bar=True, logger=False)
        self.log("step", float(self.steps_done))  # Lightning's axis would count batches
        if last:
            self.update()

    def local_gradients(self) -> AbstractContextManager:
        """Keep gradients on this rank inside the context: those that are summed up travel once per step."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def streams(self, batch_size: int, batch_idx: int) -> list[torch.Generator]:
        """Return the random streams of the rows of this rank's batch (rows are dealt to the ranks in turn)."""
        accumulate = self.settings.accumulate
        batches = self.steps_done * accumulate + batch_idx % accumulate
        world, rank = self.trainer.world_size, self.trainer.global_rank
        positions = [(batches * batch_size + row) * world + rank for row in range(batch_size)]
        return row_streams(self.device, positions, self.seed, self.stream_name)

    def update(self) -> None:
        """Clip and step every optimiser at this step's learning rate, and move the average.

        In float16 the losses were scaled up. Gradients that overflowed are left out: that network stands still in this
        step, and the next one is scaled less.

        Raises:
            FloatingPointError: when a gradient is not finite; the parameters are then still those of the last step.
        """
        factor = warmup_cosine(self.steps_done, self.settings.warmup, self.total_steps)
        # Without an adversarial term there is no discriminator.
        networks = list(zip(self.optimized, _as_list(self.optimizers()), strict=False))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        for name, optimizer in networks:
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)
            groups = optimizer.param_groups
            norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], self.settings.clip)
            if not torch.isfinite(norm) and (scaler is None or scaler.get_scale() < SMALLEST_SCALE):
                raise FloatingPointError(self.stopped(f"the gradient of '{name}' is {norm.item():g}"))
            for group in groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
            self.log_dict({f"grad_norm/{name}": norm, f"lr/{name}": groups[-1]["lr"]})
        for _, optimizer in networks:
            if scaler is None:
                optimizer.step()
            else:  # Lightning's step unscales again, and moves the scale between the networks
                scaler.step(optimizer.optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            self.log("grad_scale", scaler.get_scale())
            scaler.update()
        self.ema.update()

    def stopped(self, reason: str) -> str:
        """Return the message of a run that cannot go on."""
        return (
            f"training stopped at step {self.steps_done}: {reason}. The checkpoints written so far are kept; "
            "lower the learning rate, the clip or the weight of the term"
        )

    # --- validation and checkpoints ------------------------------------------------------------------------------

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Use the averages, in full precision: a metric under the trainer's autocast is wrong (SSIM by far)."""
        with self.ema.applied(), full_precision(self.device):
            yield

    def log_scores(self, scores: Mapping[str, Any], score: float) -> None:
        """Log the numbers among validation ``scores``, and as ``val/score`` the one that selects (higher is better).

        Raises:
            FloatingPointError: when the selecting score is not a number; no checkpoint is written then.
        """
        if math.isnan(score):
            raise FloatingPointError(self.stopped("the validation score is nan"))
        self.scores = dict(scores) | {"score": score, "step": self.steps_done}
        self.log_dict({f"val/{k}": v for k, v in self.scores.items() if isinstance(v, float)})
        self.log("val score", score, prog_bar=True, logger=False)
        self.log("step", float(self.steps_done))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the scores of the validation that the checkpoint follows."""
        checkpoint["scores"] = self.scores

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the scores."""
        self.scores = dict(checkpoint.get("scores", {}))
        if any(value.dtype == torch.float64 for value in checkpoint["state_dict"].values()):
            self.double()  # Lightning does so only after it has loaded, and rounded, the state

    def restore(self, path: Path) -> None:
        """Load parameters, averages and scores of a checkpoint of this run.

        Raises:
            FileNotFoundError: when it is missing.
            ValueError: when it is damaged, or of another model.
        """
        checkpoint = read_checkpoint(path)
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])


def images_of(batch: Any) -> Tensor:
    """Return the images [B, C, H, W] of a batch, which may have captions beside them."""
    return batch if isinstance(batch, Tensor) else batch[0]


def logs_now(trainer: Any) -> bool:
    """Return whether the values of this batch reach the loggers."""
    return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
