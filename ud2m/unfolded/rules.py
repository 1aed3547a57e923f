"""Where the modules' step sizes and inner noise levels begin."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """Initial (delta_k, tau_k) of module k = 0..K-1, as a function of the noise levels [B], and of the closing prox."""

    def __call__(self, k: int, num_blocks: int, sigma: Tensor, sigma_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step size delta_k (a variance) and the inner noise level tau_k, each [B]."""
        ...

    closes: bool
    """Whether a prox follows the last module."""

    def closing(self, sigma: Tensor, sigma_y: Tensor) -> Tensor:
        """Return the step size [B] of that prox."""
        ...


def rho(sigma: Tensor, sigma_y: Tensor) -> Tensor:
    """Return rho with 1/rho^2 = 1/sigma_y^2 + 1/sigma^2: the noise level of both data together [UD2M, section 3]."""
    return (sigma_y**-2 + sigma**-2) ** -0.5


class PaperRule:
    """tau_k = delta_k^(1/2) = rho for every module, the authors' choice [UD2M, section 4]."""

    closes = False

    def __call__(self, k: int, num_blocks: int, sigma: Tensor, sigma_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rho^2, rho)."""
        level = rho(sigma, sigma_y)
        return level**2, level

    def closing(self, sigma: Tensor, sigma_y: Tensor) -> Tensor:
        """Raise NotImplementedError: the last network's output is the result."""
        raise NotImplementedError("the paper's rule has no closing step")


class AnnealedRule:
    """tau_k falls geometrically from min(sigma, tau_max) to ``floor`` rho, and delta_k = (width tau_k)^2.

    Differs from [UD2M]: with the paper's rule and sigma_y = 0.01 every module calls the prior almost without noise, so
    that it can change nothing; here early modules see coarse noise and late ones fine noise. K = 1 takes the geometric
    mean of both ends. A last prox with deviation ``closing`` times the lowest level returns to the data what the last
    network lost of it.

    Args:
        tau_max: largest tau_1, image units.
        floor: tau_K in units of rho.
        width: delta_k^(1/2) in units of tau_k.
        closing: deviation of the last prox in units of tau_K.

    Raises:
        ValueError: for values that are not positive.
    """

    closes = True

    def __init__(self, tau_max: float = 0.4, floor: float = 3.0, width: float = 1.0, closing: float = 0.3):
        if min(tau_max, floor, width, closing) <= 0:
            raise ValueError(
                f"tau_max, floor, width and closing must be positive, got {tau_max}, {floor}, {width} and {closing}"
            )
        self.tau_max, self.floor, self.width, self.closing_width = tau_max, floor, width, closing

    def __call__(self, k: int, num_blocks: int, sigma: Tensor, sigma_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ((width tau_k)^2, tau_k)."""
        last = self.floor * rho(sigma, sigma_y)
        first = torch.maximum(sigma.clamp(max=self.tau_max), last)
        position = k / (num_blocks - 1) if num_blocks > 1 else 0.5
        tau = first ** (1 - position) * last**position
        return (self.width * tau) ** 2, tau

    def closing(self, sigma: Tensor, sigma_y: Tensor) -> Tensor:
        """Return (closing floor rho)^2."""
        return (self.closing_width * self.floor * rho(sigma, sigma_y)) ** 2


RULES: dict[str, Callable[..., Rule]] = {"paper": PaperRule, "annealed": AnnealedRule}
