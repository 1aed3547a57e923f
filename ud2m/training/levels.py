"""Which noise levels sigma the network is trained at, one per sample."""

import math

import torch
from torch import Tensor

from ud2m.priors.schedule import VPSchedule
from ud2m.samplers.base import check_positive


class Levels:
    """Draw the levels that inference visits, and with probability ``spread`` any level between the extremes.

    The visited levels are ``schedule.grid(num_steps, grid_power)``; the others are log-uniform in
    [sigma_low, sigma_high]. Training on the visited levels alone is the best use of a small budget; a spread lets N be
    chosen at inference.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        num_steps: int = 3,
        spread: float = 0.25,
        sigma_low: float = 0.02,
        sigma_high: float = 80.0,
        grid_power: float = 2.0,
    ):
        if num_steps < 1:
            raise ValueError(f"num_steps (N) must be at least 1, got {num_steps}")
        if not 0 <= spread <= 1 or not 0 < sigma_low < sigma_high:
            raise ValueError(
                f"levels need 0 <= spread <= 1 and 0 < sigma_low < sigma_high, got {spread}, {sigma_low}, {sigma_high}"
            )
        check_positive("grid_power", grid_power)
        self.num_steps, self.grid_power, self.spread = num_steps, grid_power, spread
        self.log_low, self.log_high = math.log(sigma_low), math.log(sigma_high)

    def __call__(self, uniform: Tensor, schedule: VPSchedule) -> Tensor:
        """Map uniform numbers [B, 2] to levels [B], image units."""
        grid = schedule.grid(self.num_steps, self.grid_power).to(uniform.device)
        visited = grid[(uniform[:, 0] * len(grid)).long().clamp(max=len(grid) - 1)]
        anywhere = (self.log_low + (self.log_high - self.log_low) * uniform[:, 0]).exp()
        return torch.where(uniform[:, 1] < self.spread, anywhere, visited)
