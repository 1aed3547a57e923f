"""What all samplers share: the call, its checks, and an independent random stream for every sample."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ud2m.bars import Advance, NetworkEvaluations, shown
from ud2m.numbers import is_number, is_whole
from ud2m.physics import DataTerm, Observation
from ud2m.precision import AUTO, check_precision, free_memory
from ud2m.priors.prior import Prior
from ud2m.unfolded.denoisers import Denoiser, check_symmetries, in_precision, symmetric


class Sampler(ABC):
    """Draws samples of p(x | y) for batches of observations. A new one writes ``draw``, and ``check`` where it must.

    Args:
        networks: modules whose evaluations are counted; none for a method that evaluates none.
        chunk_size: images that the networks see at once; bounds the memory.
        precision: in which denoisers are evaluated: float32, bfloat16, float16, or auto (bfloat16 where the hardware
            has instructions for it). All else stays in float32.

    Raises:
        ValueError: for a chunk size that is no count, or an unknown precision.
    """

    draws = True
    """Whether samples of one observation differ."""

    fingerprint: str | None = None
    """Which weights it draws with, for records of results."""

    def __init__(self, networks: Sequence[nn.Module] = (), chunk_size: int = 64, precision: str = AUTO):
        check_count("chunk_size", chunk_size)
        check_precision(precision)
        self.networks, self.chunk_size, self.precision = tuple(networks), chunk_size, precision

    def compile(self, how: str) -> "Sampler":
        """Compile the priors' networks (``Prior.compile_network``); calls of several chunks then keep to one shape.

        Raises:
            ValueError: for no backend or mode of torch.compile.
        """
        for network in self.networks:
            if isinstance(network, Prior):
                network.compile_network(how)
        return self

    @property
    def one_shape(self) -> bool:
        """Whether the last chunk of a call is filled up to the size of the others, as a network is compiled for one."""
        return any(isinstance(network, Prior) and network.is_compiled for network in self.networks)

    def check(self, physics: DataTerm) -> None:  # noqa: B027 - by default every operator is taken
        """Raise ValueError where the operator cannot be taken, with those that can be."""

    def __call__(
        self,
        y: Tensor,
        physics: DataTerm,
        sigma_y: float | Tensor,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        progress: bool | Advance = False,
    ) -> Tensor:
        """Return samples [B, S, C, H, W] in [0, 1] for observations y [B, ...] = A x + sigma_y w.

        Args:
            y: observations, image units.
            physics: their operator, linear unless the sampler says otherwise.
            sigma_y: noise level of their values, one number or [B] (see ``Observation.independent`` for grey ones).
            num_samples: S, samples per observation.
            generator: source of randomness, on any device; each sample draws from a stream of its own.
            progress: True: a bar counts network evaluations; or a function that is told of each.

        Raises:
            ValueError: as ``check``, and for numbers out of range.
        """
        return self.sample(Observation.of(y, physics, sigma_y), num_samples, generator, progress)

    @torch.no_grad()
    def sample(
        self,
        observation: Observation,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        progress: bool | Advance = False,
    ) -> Tensor:
        """Return samples [B, S, C, H, W] in [0, 1] of an observation."""
        self.check_call(observation, num_samples)
        num_samples = int(num_samples)  # where it is a scalar of numpy
        seeds = seeds_from(generator, len(observation) * num_samples)
        rows = torch.arange(len(observation), device=observation.y.device).repeat_interleave(num_samples)
        size = self.images_at_once(observation)
        count, told, samples = len(rows), observation.independent(), []
        each = self.evaluations_of(observation)
        if self.one_shape and count > size:
            missing = -count % size
            rows, seeds = torch.cat([rows, rows[:missing]]), seeds + seeds[:missing]
        with (
            shown(progress, None if each is None else each * len(rows)) as advance,
            NetworkEvaluations(self.networks, advance),
        ):
            for first in range(0, len(rows), size):
                streams = [torch.Generator(rows.device).manual_seed(seed) for seed in seeds[first : first + size]]
                samples.append(self.draw(told.rows(rows[first : first + size]), streams))
        return torch.cat(samples)[:count].clamp(0, 1).unflatten(0, (len(observation), num_samples))

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

    def nfe(self) -> int | None:
        """Return network evaluations of one sample; None: they are not known before, or there are none to be told."""
        return None

    def evaluations_of(self, observation: Observation) -> int | None:
        """Return the network evaluations that one sample takes, those of tiles one by one; None: not known before."""
        return None

    def images_at_once(self, observation: Observation) -> int:
        """Return how many images the networks see at once."""
        return self.chunk_size


class PriorSampler(Sampler):
    """A sampler around a frozen prior.

    Args:
        prior: ``denoiser(x_sigma, sigma) -> x0_hat``.
        chunk_size: see ``Sampler``.
        precision: see ``Sampler``.
        symmetries: random orientations in which it sees images: 1, 2 or 8 (``ud2m.unfolded.denoisers.symmetric``).

    Raises:
        ValueError: for options out of range.
    """

    def __init__(self, prior: nn.Module, chunk_size: int = 64, precision: str = AUTO, symmetries: int = 1):
        super().__init__([prior], chunk_size, precision)
        check_symmetries(symmetries)
        self.prior, self.symmetries = prior, symmetries

    def denoiser(self, streams: list[torch.Generator]) -> Denoiser:
        """Return the denoiser of rows with these streams."""
        return symmetric(in_precision(self.prior, self.precision), self.symmetries, streams)


def seeds_from(generator: torch.Generator | None, count: int) -> list[int]:
    """Return seeds of independent streams."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a count is an integer >= 1."""
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless a number is positive and finite."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
