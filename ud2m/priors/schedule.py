"""Variance-preserving noise table seen through noise levels.

The package speaks variance-exploding noise in image units: ``x_sigma = x0 + sigma eps`` with ``x0`` in [0, 1].
A pre-trained network wants ``x_t = sqrt(abar_t) (2 x0 - 1) + sqrt(1 - abar_t) eps``. Dividing by ``2 sqrt(abar_t)``
shows that both are the same noisy image when ``sigma = sqrt((1 - abar_t) / abar_t) / 2``.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class VPSchedule(nn.Module):
    """Convert between noise levels and *continuous* time indices of a variance-preserving table.

    Between the integers of the table ``log sigma`` is linear in t, so ``sigma`` and ``time`` are exact inverses of
    each other on [sigma_min, sigma_max] and have gradients (a cast to integers would cut the gradient of a learned
    level).

    Args:
        alphas_cumprod: abar_t for t = 0..T-1, strictly falling, inside (0, 1).

    Raises:
        ValueError: when the table is not strictly falling inside (0, 1).
    """

    NAMED = ("linear", "scaled_linear", "squaredcos_cap_v2")
    log_sigmas: Tensor

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]):
        super().__init__()
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        if abar.ndim != 1 or len(abar) < 2 or not (abar[:-1] > abar[1:]).all() or abar[0] >= 1 or abar[-1] <= 0:
            raise ValueError(
                "alphas_cumprod must be a strictly falling sequence inside (0, 1) with at least two entries, "
                f"got shape {tuple(abar.shape)} from {abar.flatten()[0].item():g} to {abar.flatten()[-1].item():g}"
            )
        # float64 keeps the conversion an inverse pair; it is not part of any checkpoint, the prior's config is.
        self.register_buffer("log_sigmas", (((1 - abar) / abar).sqrt() / 2).log(), persistent=False)

    @classmethod
    def from_config(cls, config: Mapping) -> "VPSchedule":
        """Read a table from the keys of a diffusers ``scheduler_config.json``.

        ``linear``: beta_t linear between ``beta_start`` and ``beta_end`` (Ho et al., 2020); ``scaled_linear``:
        sqrt(beta_t) linear; ``squaredcos_cap_v2``: abar_t = cos^2 (Nichol and Dhariwal, 2021), beta_t <= 0.999.
        ``rescale_betas_zero_snr`` moves and stretches sqrt(abar_t) so that it falls to 0 (Lin et al., 2024, algorithm
        1); the time at which it does is no noise level and left out.
        """
        name, steps = config.get("beta_schedule", "linear"), int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        elif name == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif name == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif name == "squaredcos_cap_v2":
            angle = (torch.linspace(0, 1, steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2
            abar = angle.cos() ** 2
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"unknown beta_schedule {name!r}; allowed: {', '.join(cls.NAMED)}, or trained_betas")
        abar = (1 - betas).cumprod(0)
        if config.get("rescale_betas_zero_snr"):
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1]))[:-1] ** 2
        return cls(abar)

    @property
    def num_times(self) -> int:
        """T, the length of the table."""
        return len(self.log_sigmas)

    @property
    def sigma_min(self) -> float:
        """Smallest level of the table, in image units."""
        return float(self.log_sigmas[0].exp())

    @property
    def sigma_max(self) -> float:
        """Largest level of the table, in image units."""
        return float(self.log_sigmas[-1].exp())

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level of time t (any shape, clamped to [0, T - 1]), in image units."""
        t = torch.as_tensor(t).clamp(0, self.num_times - 1)
        below = t.detach().floor().long().clamp(max=self.num_times - 2)
        low, high = self.log_sigmas[below], self.log_sigmas[below + 1]
        log_sigma = low + (t.to(low.dtype) - below) * (high - low)
        return log_sigma.exp().to(t.dtype if t.is_floating_point() else torch.get_default_dtype())

    def time(self, sigma: Tensor) -> Tensor:
        """Return the time of a noise level (any shape, image units); levels outside the table meet its ends.

        Raises:
            ValueError: when a level is not positive.
        """
        sigma = torch.as_tensor(sigma)
        if not (sigma > 0).all():
            raise ValueError(f"sigma must be positive, got {sigma.min().item():g}")
        log_sigma = sigma.to(self.log_sigmas.dtype).log()
        below = torch.searchsorted(self.log_sigmas, log_sigma.detach().contiguous(), right=True) - 1
        below = below.clamp(0, self.num_times - 2)
        low, high = self.log_sigmas[below], self.log_sigmas[below + 1]
        t = below + (log_sigma - low) / (high - low)
        return t.clamp(0, self.num_times - 1).to(sigma.dtype)

    def grid(self, num_steps: int, power: float = 2.0) -> Tensor:
        """Return the N levels that sampling visits, largest first: sigma(t_n), t_n = (T - 1) (n / N)^power.

        The power 2 is the grid of the authors (t = 999, 444, 111 for N = 3).

        Raises:
            ValueError: when ``num_steps`` < 1 or the power is not positive.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps (N) must be at least 1, got {num_steps}")
        if not power > 0:
            raise ValueError(f"the power of the grid must be positive, got {power}")
        n = torch.arange(num_steps, 0, -1, dtype=torch.float64, device=self.log_sigmas.device)
        return self.sigma((self.num_times - 1) * (n / num_steps) ** power).to(torch.get_default_dtype())


def abar(sigma: Tensor) -> Tensor:
    """Return abar = 1 / (1 + 4 sigma^2), the variance-preserving signal power of a level in image units."""
    return 1 / (1 + 4 * sigma**2)
