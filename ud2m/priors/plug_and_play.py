"""A prior as deepinv knows denoisers, for DPIR, DiffPIR and the plug-and-play methods of that library."""

from typing import Any

from deepinv.models import Denoiser
from torch import Tensor, nn


class PriorDenoiser(Denoiser):
    """``denoiser(x, sigma) -> x0_hat`` for images in [0, 1] with noise, sigma a number or a tensor of [B].

    At the levels of the noise table it equals deepinv's ``DiffusersDenoiserWrapper``. Between them that one rounds the
    time to the nearest entry; here it is interpolated, and nothing is clipped.

    Args:
        prior: ``prior(x_sigma, sigma [B]) -> x0_hat``.
    """

    def __init__(self, prior: nn.Module):
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor, sigma: float | Tensor, **options: Any) -> Tensor:
        """Return x0_hat [B, C, H, W] for x = x0 + sigma eps; methods of deepinv pass options for other denoisers."""
        return self.prior(x, self._handle_sigma(sigma, batch_size=len(x), device=x.device, dtype=x.dtype))
