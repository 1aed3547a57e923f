"""Few-step posterior sampling with an unfolded network: a DDIM-style walk down a grid of noise levels."""

from collections.abc import Callable

import torch
from torch import Tensor

from ud2m.numbers import is_number
from ud2m.physics import Observation
from ud2m.random import Generators, randn_like

FRESH = "fresh"


def step_deviation(sigma: Tensor, sigma_next: Tensor, eta: float | str) -> Tensor:
    """Return s, the new noise of a step from sigma to sigma_next, image units.

    s = eta sigma_next sqrt(1 - sigma_next^2 / sigma^2); eta = 0 is DDIM (Song et al., 2021), eta = 1 ancestral, and
    ``"fresh"`` takes s = sigma_next: multistep consistency sampling (Song et al., 2023).
    """
    if eta == FRESH:
        return sigma_next
    return float(eta) * sigma_next * (1 - sigma_next**2 / sigma**2).clamp(min=0).sqrt()


def ddim_step(
    x: Tensor, x0_hat: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float | str, generator: Generators = None
) -> Tensor:
    """Return x at level sigma_next: x0_hat + sqrt(sigma_next^2 - s^2) (x - x0_hat) / sigma + s eps.

    When x0_hat is a draw of p(x0 | x) the result has exactly the marginal of level sigma_next, for every eta.
    """
    s = step_deviation(sigma, sigma_next, eta)
    direction = (x - x0_hat) / sigma
    return x0_hat + (sigma_next**2 - s**2).clamp(min=0).sqrt() * direction + s * randn_like(x, generator)


def check_eta(eta: float | str) -> None:
    """Raise ValueError unless eta is a number in [0, 1] or "fresh"."""
    if eta != FRESH and not (is_number(eta) and 0 <= eta <= 1):
        raise ValueError(f'eta must be a number in [0, 1] or "{FRESH}", got {eta!r}')


def sample_posterior(
    network: Callable[..., Tensor],
    observation: Observation,
    levels: Tensor,
    eta: float | str = 1.0,
    generator: Generators = None,
) -> Tensor:
    """Return one posterior sample per row of y: x ~ N(0, levels[0]^2), then x0_hat = L(x, level, y) and a DDIM step.

    Args:
        network: L(x_sigma, sigma, observation, generator) -> x0_hat.
        observation: of B images.
        levels: noise levels to visit [N], falling, image units (``VPSchedule.grid``).
        eta: stochasticity of the steps, see ``step_deviation``.
        generator: source of all randomness.

    Raises:
        ValueError: when the levels are not positive and falling, or eta is out of range.
    """
    check_eta(eta)
    if levels.ndim != 1 or len(levels) < 1 or not (levels > 0).all() or not (levels[:-1] > levels[1:]).all():
        raise ValueError(f"levels must be positive and strictly falling, got {levels.tolist()}")
    like, batch = observation.sigma_y, len(observation)
    levels = levels.to(like)
    zeros = torch.zeros(batch, *observation.image_shape, device=like.device, dtype=like.dtype)
    x = levels[0] * randn_like(zeros, generator)
    x0_hat = zeros
    for n, level in enumerate(levels):
        x0_hat = network(x, level.expand(batch), observation, generator)
        if n + 1 < len(levels):
            x = ddim_step(x, x0_hat, level, levels[n + 1], eta, generator)
    return x0_hat
