"""Lightning module that trains a small pixel-space diffusion prior by eps-prediction."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ud2m.bars import progress_bar
from ud2m.evaluation.metrics import psnr
from ud2m.files import atomic_folder
from ud2m.losses.terms import NonFiniteLossError
from ud2m.priors.adm import build_unet
from ud2m.priors.prior import Prior, denoise
from ud2m.priors.schedule import VPSchedule
from ud2m.priors.store import save_prior
from ud2m.priors.widening import widen
from ud2m.random import rand, randn_like
from ud2m.training.ema import Ema
from ud2m.training.random_streams import stream
from ud2m.training.steps import SteppedModule, StepSettings


class PriorModule(SteppedModule):
    """Train ``eps_theta(x_t, t)`` with |eps - eps_theta|^2 (Ho et al., 2020), averaged weights, cosine learning rate.

    Levels: with probability ``focus`` log-uniform in [sigma_min of the table, ``focus_max``], otherwise a uniform time.
    Restoration calls a prior at low noise only, where a small network should spend its capacity.

    Args:
        unet: keyword arguments of diffusers' ``UNet2DModel``.
        scheduler: the noise table in the keys of a diffusers ``scheduler_config.json``.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up, then cosine to zero at the last step.
        ema_decay: decay of the weight average that is validated and exported.
        focus: probability of a level up to ``focus_max``.
        focus_max: end of the range of low levels, image units.
        levels: noise levels (image units) at which the validation PSNR is measured.
        seed: of all randomness.
        accumulate: batches summed into one step.
        clip: largest gradient norm.
        start_from: prior whose weights the run begins with: name of a shipped one, folder or hub id. ``unet`` may have
            a multiple of its channels (``priors.widening``).

    Raises:
        ValueError: for numbers out of range, an architecture that diffusers cannot build, or a prior of another one.
    """

    stream_name = "prior"
    optimized = ("network",)

    def __init__(
        self,
        unet: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        lr: float = 1e-3,
        warmup: int = 200,
        ema_decay: float = 0.999,
        focus: float = 0.8,
        focus_max: float = 1.0,
        levels: Sequence[float] = (0.05, 0.1, 0.25, 0.5),
        seed: int = 0,
        accumulate: int = 1,
        clip: float = 1.0,
        start_from: str | None = None,
    ):
        super().__init__(StepSettings(warmup=warmup, accumulate=accumulate, clip=clip, ema_decay=ema_decay), seed)
        self.scheduler = dict(scheduler)
        self.schedule = VPSchedule.from_config(scheduler)
        if not lr > 0 or not levels or min(levels) <= 0:
            raise ValueError(f"lr and the levels of validation must be positive, got {lr} and {list(levels)}")
        if not 0 <= focus <= 1 or not focus_max > self.schedule.sigma_min:
            raise ValueError(
                f"focus must lie in [0, 1] and focus_max above {self.schedule.sigma_min:.2g}, got {focus}, {focus_max}"
            )
        self.unet = build_unet(unet)
        stride, size = 2 ** (len(self.unet.config.block_out_channels) - 1), self.unet.config.sample_size
        if size % stride:
            raise ValueError(f"the network halves images to 1/{stride}; crops must be multiples of that, got {size}")
        if start_from is not None:
            self._take_weights(start_from)
        self.ema = Ema(self.unet.parameters(), ema_decay)
        self.lr, self.focus, self.focus_max, self.levels = lr, focus, focus_max, tuple(levels)

    def _take_weights(self, reference: str) -> None:
        """Begin with the weights of a prior of this architecture, or of one with an f-th of its channels."""
        try:
            widen(self.unet, Prior.from_pretrained(reference).unet)
        except ValueError as error:
            raise ValueError(
                f"the run cannot begin with {reference}: {error}; describe its own architecture in training.unet, or "
                "one with a multiple of its block_out_channels"
            ) from error

    def losses(
        self, x0: Tensor, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the eps-prediction loss of clean images x0 [B, C, H, W]."""
        sigma = self.draw_sigma(rand((len(x0), 2), streams, self.device)).to(x0.dtype)
        eps = randn_like(x0, streams)
        level = sigma.view(-1, 1, 1, 1)
        x_t = (2 * (x0 + level * eps) - 1) / (1 + 4 * level**2).sqrt()
        eps_hat = self.unet(x_t, self.schedule.time(sigma)).sample[:, : x0.shape[1]]
        loss = (eps_hat - eps).square().mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError("noise prediction", loss.detach())
        return loss, {"total": loss.detach()}

    def draw_sigma(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers [B, 2] to levels [B], image units."""
        low, high = math.log(self.schedule.sigma_min), math.log(self.focus_max)
        focused = (low + (high - low) * uniform[:, 0]).exp()
        anywhere = self.schedule.sigma((self.schedule.num_times - 1) * uniform[:, 0])
        return torch.where(uniform[:, 1] < self.focus, focused, anywhere)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all weights."""
        return torch.optim.AdamW(self.unet.parameters(), lr=self.lr, weight_decay=1e-4)

    # --- results -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start a score."""
        self.validated: list[dict[str, Tensor]] = []

    def validation_step(self, x0: Tensor, batch_idx: int) -> None:
        """Measure the denoising PSNR of the averaged network."""
        with self.scoring():
            self.validated.append(self.denoising_psnr(x0, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Log the denoising PSNR (dB, mean over images) at each level, and their mean as ``val/score``."""
        row = _row(self.validated)
        self.log_scores(row, row["score"])

    def denoising_psnr(self, x0: Tensor, key: int = 0) -> dict[str, Tensor]:
        """Return PSNR in dB [B] per level for clean images x0; the noise depends on the level and ``key`` alone."""
        scores = {}
        for sigma in self.levels:
            eps = randn_like(x0, stream(self.device, "denoise", f"{sigma:g}", key))
            x0_hat = denoise(self.unet, self.schedule, x0 + sigma * eps, x0.new_full((len(x0),), sigma))
            scores[f"psnr@{sigma:g}"] = psnr(x0_hat.clamp(0, 1), x0)
        return scores

    @torch.no_grad()
    def evaluate(self, data: L.LightningDataModule) -> list[dict[str, Any]]:
        """Return one row with the denoising PSNR on the test images; ``score`` is the mean over the levels."""
        self.eval()
        with self.scoring():
            scores = [
                self.denoising_psnr(x0.to(self.device), i)
                for i, x0 in enumerate(progress_bar(data.test_dataloader(), desc="scoring", unit="batch"))
            ]
        return [{"method": "prior", "nfe": 1, "step": self.steps_done} | _row(scores)]

    def export(self, folder: Path) -> None:
        """Write the averaged prior as a diffusers folder (fp16 safetensors)."""
        with self.ema.applied(), atomic_folder(folder, overwrite=True) as partial:
            save_prior(self.unet, self.scheduler, partial)


def _row(batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the means over all images of all batches, and their mean as ``score``."""
    row = {name: torch.cat([batch[name] for batch in batches]).mean().item() for name in batches[0]}
    return row | {"score": sum(row.values()) / len(row)}
