"""Our samplers as deepinv knows methods: a ``Reconstructor`` with the interface of its samplers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor, nn

from ud2m.samplers.base import check_count

Statistic = Callable[[dict[str, Tensor]], Tensor]


class PosteriorReconstructor(Reconstructor):
    """The mean of posterior samples as an estimate; ``sample`` also gives their variance, as deepinv's samplers do.

    The noise level is that of ``physics.noise_model``. It estimates alone: no gradient passes through it. In deepinv's
    ``test`` and ``Trainer.test`` it is a model as any other, and with one sample a method for its ``DiffusionSampler``.

    Args:
        draw: ``(y, physics, num_samples=..., generator=...) -> samples [B, S, C, H, W]``, as a ``Sampler``.
        num_samples: S, of which the mean is taken.
        networks: modules that it evaluates, which move and are counted with it.

    Raises:
        ValueError: when S is no count.
    """

    def __init__(self, draw: Callable[..., Tensor], num_samples: int = 8, networks: Sequence[nn.Module] = ()):
        super().__init__()
        check_count("num_samples", num_samples)
        self.draw, self.num_samples, self.networks = draw, num_samples, nn.ModuleList(networks)

    def forward(self, y: Tensor, physics: Physics, seed: int | None = None) -> Tensor:
        """Return the mean of the samples [B, C, H, W]; ``seed`` makes it the same each time."""
        return self.samples(y, physics, seed).mean(1)

    def sample(
        self,
        y: Tensor,
        physics: Physics,
        x_init: Tensor | None = None,
        seed: int | None = None,
        g_statistics: Statistic | Sequence[Statistic] = (lambda state: state["x"],),
    ) -> tuple[Any, Any]:
        """Return mean and variance over the samples of each statistic, as ``deepinv.sampling.BaseSampling.sample``.

        The variance divides by S - 1, and is 0 for one sample. There is no chain, so ``x_init`` must be None.

        Raises:
            ValueError: for an ``x_init``.
        """
        if x_init is not None:
            raise ValueError("these samples are independent and begin nowhere: leave x_init out")
        statistics = [g_statistics] if callable(g_statistics) else list(g_statistics)
        images = self.samples(y, physics, seed).unbind(1)
        values = [torch.stack([g({"x": x}) for x in images]) for g in statistics]
        means = [value.mean(0) for value in values]
        variances = [value.var(0) if len(images) > 1 else torch.zeros_like(value[0]) for value in values]
        return (means[0], variances[0]) if len(values) == 1 else (means, variances)

    def samples(self, y: Tensor, physics: Physics, seed: int | None = None) -> Tensor:
        """Return the samples themselves [B, S, C, H, W]."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.draw(y, physics, num_samples=self.num_samples, generator=generator)
