"""Lightning module that trains a bridge (I2SB), the image-to-image baseline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ud2m.losses.terms import NonFiniteLossError
from ud2m.physics import OperatorFamily
from ud2m.physics.problem import Problem
from ud2m.precision import full_precision
from ud2m.priors.prior import Prior
from ud2m.random import rand, randn_like
from ud2m.samplers.bridge import Bridge, BridgeSampler, BridgeSchedule
from ud2m.training.ema import Ema
from ud2m.training.steps import SteppedModule, StepSettings
from ud2m.training.validation import Validation
from ud2m.unfolded.warm_start import SmoothingStart

FIRST_TIME = 1e-3
"""Smallest t of training: at 0 the target (x_t - x0) / sigma_t is not defined."""


class BridgeModule(SteppedModule):
    """Minimise |eps_theta(x_t, t) - (x_t - x0) / sigma_t|^2, t uniform [I2SB, algorithm 1], over all weights.

    Args:
        prior: whose network is what the bridge begins as, as in the authors' code.
        operator: family that the physics are drawn from.
        sigma_y: noise level of the observations, image units.
        validation: ``num_samples`` per image and ``lpips``; the PSNR of the samples' mean selects the best checkpoint.
        scales: of the ``SmoothingStart`` that makes the degraded end.
        deviation: of the same.
        num_steps: of the sampler that validates.
        beta_min: see ``BridgeSchedule``.
        beta_max: see ``BridgeSchedule``.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up, then cosine to zero at the last step.
        ema_decay: decay of the weight average that is validated and exported.
        seed: of all randomness.
        accumulate: batches summed into one step.
        clip: largest gradient norm.

    Raises:
        ValueError: for numbers out of range.
    """

    stream_name = "bridge"
    optimized = ("network",)

    def __init__(
        self,
        prior: str,
        operator: OperatorFamily,
        sigma_y: float,
        validation: Mapping[str, Any],
        scales: Sequence[int],
        deviation: float,
        num_steps: int = 9,
        beta_min: float = 0.1,
        beta_max: float = 0.3,
        lr: float = 2e-4,
        warmup: int = 50,
        ema_decay: float = 0.998,
        seed: int = 0,
        accumulate: int = 1,
        clip: float = 1.0,
    ):
        super().__init__(StepSettings(warmup=warmup, accumulate=accumulate, clip=clip, ema_decay=ema_decay), seed)
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        unet: Any = Prior.from_pretrained(prior).unet
        schedule = BridgeSchedule(beta_min, beta_max)
        self.bridge = Bridge(unet.requires_grad_(True), schedule, SmoothingStart(scales, deviation))
        self.lr = lr
        self.problem = Problem(operator, float(sigma_y), seed)
        self.sampler = BridgeSampler(self.bridge, num_steps)
        self.validation = Validation(self.sampler, self.problem, **validation)
        self.ema = Ema(self.bridge.parameters(), ema_decay)

    def losses(
        self, x0: Tensor, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of clean images x0 [B, C, H, W]."""
        schedule = self.bridge.schedule
        with full_precision(self.device), torch.no_grad():
            sigma_y = x0.new_full((len(x0),), self.problem.sigma_y)
            x1 = self.bridge.degraded(self.problem.draw(x0, sigma_y, streams))
            t = rand((len(x0), 1), streams, self.device)[:, 0].to(x0).clamp(min=FIRST_TIME)
            share, deviation = (value.view(-1, 1, 1, 1) for value in schedule.marginal(t))
            x_t = (1 - share) * x0 + share * x1 + deviation * randn_like(x0, streams)
            target = (x_t - x0) / schedule.variance(t).sqrt().view(-1, 1, 1, 1)
        loss = (self.bridge(x_t, t) - target).square().mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError("bridge", loss.detach())
        return loss, {"total": loss.detach()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all weights."""
        return torch.optim.AdamW(self.bridge.parameters(), lr=self.lr, weight_decay=0.0)

    def on_validation_epoch_start(self) -> None:
        """Start a score of the sampler."""
        self.validation.begin()

    def validation_step(self, x0: Tensor, batch_idx: int) -> None:
        """Draw samples for clean images x0 with the averaged weights, and score them."""
        with self.scoring():
            self.validation.add(x0)

    def on_validation_epoch_end(self) -> None:
        """Log the sampler's scores."""
        self.log_scores(*self.validation.result())

    def evaluate(self, data: L.LightningDataModule) -> list[dict[str, Any]]:
        """Return one row with the scores of these parameters on the validation images."""
        return [{"method": "I2SB", "nfe": self.sampler.num_steps} | self.scores]

    def export(self, folder: Path) -> None:
        """Write the averaged network as a folder that ``Bridge.load`` reads."""
        with self.ema.applied():
            self.bridge.save(folder)
