"""What all samplers share: the call, its checks, and an independent random stream for every sample."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ud2m.physics import DataTerm, Observation
from ud2m.precision import free_memory


class Sampler(ABC):
    """Draws samples of p(x | y) for batches of observations. A new one writes ``draw``, and ``check`` where it must.

    Args:
        networks: modules whose evaluations are counted; none for a method that evaluates none.
        chunk_size: images that the networks see at once; bounds the memory.

    Raises:
        ValueError: for a chunk size that is no count.
    """

    draws = True
    """Whether samples of one observation differ."""
    mixes_observations = True
    """Whether rows of several observations may be drawn in one batch."""

    fingerprint: str | None = None
    """Which weights it draws with, for records of results."""

    def __init__(self, networks: Sequence[nn.Module] = (), chunk_size: int = 64):
        check_count("chunk_size", chunk_size)
        self.networks, self.chunk_size = tuple(networks), chunk_size

    def check(self, physics: DataTerm) -> None:  # noqa: B027 - by default every operator is taken
        """Raise ValueError where the operator cannot be taken, with those that can be."""

    def __call__(
        self,
        y: Tensor,
        physics: DataTerm,
        sigma_y: float | Tensor,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return samples [B, S, C, H, W] in [0, 1] for observations y [B, ...] = A x + sigma_y w.

        Args:
            y: observations, image units.
            physics: their operator, linear unless the sampler says otherwise.
            sigma_y: their noise level, one number or [B].
            num_samples: S, samples per observation.
            generator: source of randomness, on any device; each sample draws from a stream of its own.

        Raises:
            ValueError: as ``check``, and for numbers out of range.
        """
        return self.sample(Observation.of(y, physics, sigma_y), num_samples, generator)

    @torch.no_grad()
    def sample(
        self,
        observation: Observation,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return samples [B, S, C, H, W] in [0, 1] of an observation."""
        self.check_call(observation, num_samples)
        seeds = seeds_from(generator, len(observation) * num_samples)
        rows = torch.arange(len(observation), device=observation.y.device).repeat_interleave(num_samples)
        samples = [
            self.draw(observation.rows(chunk), [torch.Generator(rows.device).manual_seed(seed) for seed in part])
            for chunk, part in self._chunks(rows, seeds, num_samples, self.images_at_once(observation))
        ]
        return torch.cat(samples).clamp(0, 1).unflatten(0, (len(observation), num_samples))

    def check_call(self, observation: Observation, num_samples: int) -> None:
        """Raise ValueError where ``sample`` could not draw so many samples: before the first is drawn."""
        check_count("num_samples", num_samples)
        self.check(observation.physics)
        self.images_at_once(observation)
        # the chunks, and all of them joined
        needed = 2 * observation.y.element_size() * len(observation) * math.prod(observation.image_shape) * num_samples
        there = free_memory(observation.y.device)
        if needed > there:
            raise ValueError(
                f"num_samples={num_samples} of {len(observation)} x {list(observation.image_shape)} take "
                f"{needed / 1e9:.3g} GB and {there / 1e9:.3g} GB of memory are free; at most "
                f"{num_samples * there // needed} fit: draw fewer at once, with other seeds"
            )

    @abstractmethod
    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one image [C, H, W] for each row of the observation, from that row's stream: [rows, C, H, W]."""

    def images_at_once(self, observation: Observation) -> int:
        """Return how many images the networks see at once."""
        return self.chunk_size

    def _chunks(
        self, rows: Tensor, seeds: list[int], num_samples: int, size: int
    ) -> Iterable[tuple[Tensor, list[int]]]:
        groups = [rows] if self.mixes_observations else rows.split(num_samples)
        first = 0
        for chunk in (chunk for group in groups for chunk in group.split(size)):
            yield chunk, seeds[first : first + len(chunk)]
            first += len(chunk)


def seeds_from(generator: torch.Generator | None, count: int) -> list[int]:
    """Return seeds of independent streams."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a count is an integer >= 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless a number is positive and finite."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
