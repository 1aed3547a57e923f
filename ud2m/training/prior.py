"""Lightning module that trains a small pixel-space diffusion prior by eps-prediction."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ud2m.metrics import psnr
from ud2m.output import atomic_folder
from ud2m.prior import build_unet, denoise, save_prior
from ud2m.schedule import VPSchedule
from ud2m.training.ema import Ema
from ud2m.training.random_streams import stream
from ud2m.training.schedules import warmup_cosine


class PriorModule(L.LightningModule):
    """Train ``eps_theta(x_t, t)`` with |eps - eps_theta|^2 (Ho et al., 2020), averaged weights, cosine learning rate.

    Levels: with probability ``focus`` log-uniform in [sigma_min of the table, ``focus_max``], otherwise a uniform time.
    Restoration calls a prior at low noise only, where a small network should spend its capacity.

    Args:
        unet: keyword arguments of diffusers' ``UNet2DModel``.
        scheduler: the noise table in the keys of a diffusers ``scheduler_config.json``.
        lr: peak learning rate of AdamW. warmup: steps of linear warm-up, then cosine to zero at the last step.
        ema_decay: decay of the weight average that is validated and exported.
        levels: noise levels (image units) at which the validation PSNR is measured.
    """

    def __init__(
        self,
        unet: dict[str, Any],
        scheduler: dict[str, Any],
        lr: float = 1e-3,
        warmup: int = 200,
        ema_decay: float = 0.999,
        focus: float = 0.8,
        focus_max: float = 1.0,
        levels: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5),
        seed: int = 0,
    ):
        super().__init__()
        self.scheduler = dict(scheduler)
        self.schedule = VPSchedule.from_config(scheduler)
        self.unet = build_unet(unet)
        self.ema = Ema(self.unet.parameters(), ema_decay)
        self.lr, self.warmup, self.focus, self.focus_max = lr, warmup, focus, focus_max
        self.levels, self.seed = tuple(levels), seed

    def draw_sigma(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw one level per sample, [B] in image units."""
        uniform = torch.rand(2, batch_size, generator=generator, device=self.device)
        low, high = math.log(self.schedule.sigma_min), math.log(self.focus_max)
        focused = (low + (high - low) * uniform[0]).exp()
        anywhere = self.schedule.sigma((self.schedule.num_times - 1) * uniform[0])
        return torch.where(uniform[1] < self.focus, focused, anywhere)

    def training_step(self, x0: Tensor, batch_idx: int) -> Tensor:
        """Return the eps-prediction loss of one batch x0 [B, C, H, W] in [0, 1]."""
        generator = stream(self.device, self.seed, "prior", self.global_step, self.global_rank)
        sigma = self.draw_sigma(len(x0), generator)
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        level = sigma.view(-1, 1, 1, 1)
        x_t = (2 * (x0 + level * eps) - 1) / (1 + 4 * level**2).sqrt()
        eps_hat = self.unet(x_t, self.schedule.time(sigma)).sample[:, : x0.shape[1]]
        loss = (eps_hat - eps).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the weights after every optimiser step."""
        self.ema.update()

    def validation_step(self, x0: Tensor, batch_idx: int) -> None:
        """Log the denoising PSNR (dB, mean over images) of the averaged network at each level."""
        with self.ema.applied():
            scores = self.denoising_psnr(x0, batch_idx)
        scores["score"] = torch.stack(list(scores.values())).mean()
        self.log_dict({f"val/{k}": v for k, v in scores.items()}, batch_size=len(x0), sync_dist=True)

    def denoising_psnr(self, x0: Tensor, key: int = 0) -> dict[str, Tensor]:
        """Return PSNR in dB per level for clean images x0; the noise depends on the level and ``key`` alone."""
        scores = {}
        for sigma in self.levels:
            eps = torch.randn(x0.shape, generator=stream(self.device, "denoise", sigma, key), device=self.device)
            x0_hat = denoise(self.unet, self.schedule, x0 + sigma * eps, x0.new_full((len(x0),), sigma))
            scores[f"psnr@{sigma:g}"] = psnr(x0_hat.clamp(0, 1), x0).mean()
        return scores

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay over the planned steps."""
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=self.lr, weight_decay=1e-4)
        schedule = warmup_cosine(optimizer, self.warmup, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    @torch.no_grad()
    def evaluate(self, data: L.LightningDataModule) -> list[dict]:
        """Return one row with the denoising PSNR on the test images."""
        with self.ema.applied():
            batches = [self.denoising_psnr(x0.to(self.device), i) for i, x0 in enumerate(data.test_dataloader())]
        row = {name: sum(b[name].item() for b in batches) / len(batches) for name in batches[0]}
        return [{"method": "prior", "nfe": 1} | row | {"score": sum(row.values()) / len(row)}]

    def export(self, folder: Path) -> None:
        """Write the averaged prior as a diffusers folder (fp16 safetensors)."""
        with self.ema.applied(), atomic_folder(folder, overwrite=True) as partial:
            save_prior(self.unet, self.scheduler, partial)
