"""Published samplers with a latent prior, to compare with: LDPS, PSLD, P2L and TReg, as steps of one DDIM walk.

They are made for models that are not distilled: G must be the posterior mean of z, so that eps follows from it.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ud2m.physics import Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.random import randn_like
from ud2m.samplers.base import check_count, check_positive
from ud2m.samplers.latent_latino import LatentSampler
from ud2m.samplers.latino_pro import gradient_of


class LatentWalk(LatentSampler):
    """From noise to an image in ``num_steps`` DDIM steps without noise (Song et al., 2021), t_k = T - 1 - k T / steps.

    Args:
        prior: as for ``LatentSampler``.
        prompt: as for ``LatentSampler``.
        num_steps: of the walk, and network evaluations.
        guidance: of classifier-free guidance, 1: none; else each evaluation counts twice.
        chunk_size: as for ``LatentSampler``.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        num_steps: int = 1000,
        guidance: float = 1.0,
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, chunk_size=chunk_size)
        check_count("num_steps", num_steps)
        prior.check_guidance(guidance)
        if num_steps > prior.table.num_times:
            raise ValueError(
                f"num_steps must be at most {prior.table.num_times}, the times of the prior, got {num_steps}"
            )
        self.num_steps, self.guidance = num_steps, guidance

    def nfe(self) -> int:
        """Return network evaluations of one sample, without those of its own gradients."""
        return self.num_steps

    @property
    def times(self) -> list[int]:
        """Times that are visited, and -1, where nothing is noisy."""
        count = self.prior.table.num_times
        return [count - 1 - k * count // self.num_steps for k in range(self.num_steps)] + [-1]

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        z = randn_like(self.prior.encode(self.first(observation)), streams)
        prompt = self.prompt.expand(len(observation))
        memory: dict[str, Any] = {}
        for k, (t, t_next) in enumerate(zip(self.times, self.times[1:], strict=False)):
            z, prompt = self.step(k, z, (t, t_next), prompt, observation, streams, memory)
        return self.prior.decode(z)

    @abstractmethod
    def step(
        self,
        k: int,
        z: Tensor,
        times: tuple[int, int],
        prompt: Prompt,
        observation: Observation,
        streams: list[torch.Generator],
        memory: dict[str, Any],
    ) -> tuple[Tensor, Prompt]:
        """Return latents at the second of two times from those at the first, and the prompt from there on."""

    def roots(self, t: int) -> tuple[float, float]:
        """Return a and b of z_t = a z + b eps; 1 and 0 at the end."""
        a, b = self.prior.table.roots(torch.tensor([max(t, 0)]))
        return (1.0, 0.0) if t < 0 else (float(a), float(b))

    def ddim(self, z0: Tensor, z: Tensor, times: tuple[int, int]) -> Tensor:
        """Return a' z0 + b' eps, eps = (z - a z0) / b."""
        (a, b), (a_next, b_next) = self.roots(times[0]), self.roots(times[1])
        return a_next * z0 + b_next * (z - a * z0) / b


class Ldps(LatentWalk):
    """DPS in latent space (Rout et al., 2023; Chung et al., 2023): z <- DDIM step - weight grad_z |A D(z0) - y|.

    Args:
        prior: as for ``LatentWalk``.
        prompt: as for ``LatentWalk``.
        num_steps: as for ``LatentWalk``.
        guidance: as for ``LatentWalk``.
        weight: of the gradient, of the norm and not its square.
        chunk_size: as for ``LatentWalk``.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        num_steps: int = 1000,
        guidance: float = 1.0,
        weight: float = 1.0,
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, num_steps, guidance, chunk_size)
        check_positive("weight", weight)
        self.weight = weight

    def penalty(self, z0: Tensor, x: Tensor, observation: Observation) -> Tensor:
        """Return what is to fall [B], for latents z0 and their images x."""
        return self.weight * row_norms(observation.physics.A(x) - observation.y)

    def estimated(self, z: Tensor, z0: Tensor, k: int, observation: Observation) -> Tensor:
        """Return the estimate that the DDIM step goes on with."""
        return z0

    def step(
        self,
        k: int,
        z: Tensor,
        times: tuple[int, int],
        prompt: Prompt,
        observation: Observation,
        streams: list[torch.Generator],
        memory: dict[str, Any],
    ) -> tuple[Tensor, Prompt]:
        """Return latents after one step."""
        with torch.enable_grad():
            moved = z.detach().requires_grad_()
            z0 = self.prior.estimate(moved, times[0], prompt, self.guidance)
            gradient = gradient_of(self.penalty(z0, self.prior.decode(z0), observation), moved)
        z0 = self.estimated(z, z0.detach(), k, observation)
        return self.ddim(z0, z, times) - gradient, prompt


class Psld(Ldps):
    """PSLD (Rout et al., NeurIPS 2023): LDPS, whose penalty also has glue |E(A^T y + x - A^T A x) - z0|, x = D(z0).

    Args:
        prior: as for ``LatentWalk``.
        prompt: as for ``LatentWalk``.
        num_steps: as for ``LatentWalk``.
        guidance: as for ``LatentWalk``.
        weight: as for ``Ldps``.
        glue: weight of the second norm; at 0 it is LDPS.
        chunk_size: as for ``LatentWalk``.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        num_steps: int = 1000,
        guidance: float = 1.0,
        weight: float = 1.0,
        glue: float = 0.1,
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, num_steps, guidance, weight, chunk_size)
        if not glue >= 0:
            raise ValueError(f"glue must not be negative, got {glue}")
        self.glue = glue

    def check(self, physics: Any) -> None:
        """Raise ValueError for operators without an adjoint."""
        super().check(physics)
        if not hasattr(physics, "A_adjoint"):
            raise ValueError(f"PSLD cannot take the operator {type(physics).__name__}; it takes every linear operator")

    def penalty(self, z0: Tensor, x: Tensor, observation: Observation) -> Tensor:
        """Return both norms."""
        penalty = super().penalty(z0, x, observation)
        if not self.glue:
            return penalty
        physics: Any = observation.physics
        glued = x + physics.A_adjoint(observation.y - physics.A(x))
        return penalty + self.glue * row_norms(self.prior.encode(glued) - z0)


class P2l(Ldps):
    """P2L (Chung et al., ICML 2024): LDPS, whose prompt takes one Adam step on |A D(z0) - y|^2 before each step.

    Every ``every``-th estimate is z0 = E(prox of the data at D(z0)) with gamma = 1.

    Args:
        prior: as for ``LatentWalk``.
        prompt: as for ``LatentWalk``.
        num_steps: as for ``LatentWalk``; each step has two evaluations.
        guidance: as for ``LatentWalk``.
        weight: as for ``Ldps``.
        rate: of Adam; 0 leaves the prompt as it is, and saves its evaluations.
        every: steps between two that go back to the data.
        chunk_size: as for ``LatentWalk``.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        num_steps: int = 1000,
        guidance: float = 1.0,
        weight: float = 1.0,
        rate: float = 1e-4,
        every: int = 8,
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, num_steps, guidance, weight, chunk_size)
        check_count("every", every)
        if not rate >= 0:
            raise ValueError(f"rate must not be negative, got {rate}")
        self.rate, self.every = rate, every

    def estimated(self, z: Tensor, z0: Tensor, k: int, observation: Observation) -> Tensor:
        """Return the estimate, taken back to the data in every ``every``-th step."""
        if (k + 1) % self.every:
            return z0
        return self.prior.encode(observation.physics.prox_l2(self.prior.decode(z0), observation.y, 1.0))

    def step(
        self,
        k: int,
        z: Tensor,
        times: tuple[int, int],
        prompt: Prompt,
        observation: Observation,
        streams: list[torch.Generator],
        memory: dict[str, Any],
    ) -> tuple[Tensor, Prompt]:
        """Return latents after one step, with the prompt moved before."""
        if self.rate:
            with torch.enable_grad():
                embeds = memory.setdefault("embeds", prompt.embeds.detach().clone().requires_grad_())
                adam = memory.setdefault("adam", torch.optim.Adam([embeds], lr=self.rate))
                z0 = self.prior.estimate(z, times[0], prompt.with_embeds(embeds), self.guidance)
                misfit = row_norms(observation.physics.A(self.prior.decode(z0)) - observation.y).square().sum()
                embeds.grad = torch.autograd.grad(misfit, embeds)[0]
            adam.step()
            prompt = prompt.with_embeds(embeds.detach().clone())
        return super().step(k, z, times, prompt, observation, streams, memory)


class Treg(LatentWalk):
    """TReg (Kim et al., ICLR 2025): classifier-free guidance, and the data in every third of the first 85 % of steps.

    There x = prox of the data at D(z0) with gamma, z0 <- abar' E(x) + (1 - abar') z0 and the step's noise is
    (1 - abar') eps + sqrt(abar' (1 - abar')) times a fresh one. The guidance leads away from a null prompt, "out of
    focus, depth of field" in the paper. Differs from the paper: there it goes on to learn from the features of a CLIP
    image tower, which a pipeline does not have; here it stays.

    Args:
        prior: as for ``LatentWalk``.
        prompt: as for ``LatentWalk``.
        num_steps: as for ``LatentWalk``.
        guidance: as for ``LatentWalk``.
        gamma: of the prox; 0: no data at all.
        every: steps between two with the data.
        share: of the steps, from the first, that may have them.
        null_prompt: words, or a prompt; as long as the model's tokenizer takes.
        chunk_size: as for ``LatentWalk``.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        num_steps: int = 200,
        guidance: float = 5.0,
        gamma: float = 1e4,
        every: int = 3,
        share: float = 0.85,
        null_prompt: str | Prompt = "",
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, num_steps, guidance, chunk_size)
        check_count("every", every)
        if not gamma >= 0 or not 0 <= share <= 1:
            raise ValueError(f"TReg needs gamma >= 0 and share in [0, 1], got {gamma} and {share}")
        self.gamma, self.every, self.share = gamma, every, share
        with torch.no_grad():
            self.null_prompt = prior.prompt(null_prompt)

    def step(
        self,
        k: int,
        z: Tensor,
        times: tuple[int, int],
        prompt: Prompt,
        observation: Observation,
        streams: list[torch.Generator],
        memory: dict[str, Any],
    ) -> tuple[Tensor, Prompt]:
        """Return latents after one step."""
        z0 = self.prior.estimate(z, times[0], prompt, self.guidance, self.null_prompt)
        if not self.gamma or (k + 1) % self.every or k >= self.share * self.num_steps:
            return self.ddim(z0, z, times), prompt
        (a, b), (a_next, b_next) = self.roots(times[0]), self.roots(times[1])
        x = observation.physics.prox_l2(self.prior.decode(z0), observation.y, self.gamma)
        mixed = a_next**2 * self.prior.encode(x) + b_next**2 * z0
        noise = b_next**2 * (z - a * z0) / b + a_next * b_next * randn_like(z, streams)
        return a_next * mixed + noise, prompt


def row_norms(residual: Tensor) -> Tensor:
    """Return the Euclidean norm [B] of residuals [B, ...]."""
    return residual.flatten(1).norm(dim=1)
