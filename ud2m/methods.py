"""Methods that an evaluation can name besides those of ``baselines`` and ``rivals``."""

from typing import Any

import torch
from torch import Tensor, nn

from ud2m.baselines import pseudo_inverse
from ud2m.physics import DataTerm
from ud2m.pipeline import PosteriorSampler
from ud2m.prior import weights_fingerprint


class PseudoInverse:
    """A^dagger y as every sample."""

    networks: tuple[nn.Module, ...] = ()

    def __call__(
        self, y: Tensor, physics: DataTerm, sigma_y: Any = None, num_samples: int = 1, **options: Any
    ) -> Tensor:
        """Return A^dagger y [B, S, C, H, W] clamped to [0, 1]."""
        return pseudo_inverse(y, physics, sigma_y, num_samples)


class Trained:
    """A trained model with chosen options of sampling.

    Args:
        model: name of a shipped model, export folder or hub id. options: of ``PosteriorSampler.__call__``; None is the
            model's default.

    Raises:
        FileNotFoundError, ValueError: as ``PosteriorSampler.from_pretrained``.
    """

    def __init__(
        self,
        model: str,
        num_steps: int | None = None,
        eta: float | str | None = None,
        symmetries: int | None = None,
        step_scale: float | None = None,
        chunk_size: int = 64,
        tile: int | None = 512,
        device: torch.device | str = "cpu",
    ):
        self.sampler = PosteriorSampler.from_pretrained(model, device=device)
        self.options = {
            "num_steps": num_steps,
            "eta": eta,
            "symmetries": symmetries,
            "step_scale": step_scale,
            "chunk_size": chunk_size,
            "tile": tile,
        }
        network = self.sampler.network
        self.networks = [network.denoiser, *([network.warm_start] if network.warm_start.evaluations else [])]

    @property
    def fingerprint(self) -> str:
        """Which model this is: a SHA-256 of all its weights, and its defaults."""
        config = self.sampler.config
        defaults = (
            f"{config.num_steps} {config.grid_power} {config.eta} {config.symmetries} {config.step_scale} "
            f"{self.sampler.network.spec}"
        )
        return f"{weights_fingerprint(self.sampler.network.state_dict())} {defaults}"

    def __call__(
        self,
        y: Tensor,
        physics: DataTerm,
        sigma_y: float | Tensor | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Return samples [B, S, C, H, W]."""
        return self.sampler(y, physics, sigma_y, num_samples, generator=generator, **(self.options | options))
