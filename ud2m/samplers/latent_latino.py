"""LATINO in latent space: zero-shot sampling with a text-to-image consistency model and a prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.physics import DataTerm, Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.random import randn_like
from ud2m.samplers.base import Sampler, check_positive
from ud2m.unfolded.prox import joint_prox
from ud2m.unfolded.warm_start import SmoothingStart, Start, start_from_y

TIMES = (999, 874, 749, 624, 499, 374, 249, 124)
"""The authors' times for 8 evaluations."""
DRAWING = (999, 749, 499, 249)
FINAL = ("prox", "autoencoded")


class StepRule(ABC):
    """Which variance delta_k the estimate u has in the data step at time t_k."""

    @abstractmethod
    def variance(self, prior: LatentPrior, t: int, u: Tensor, observation: Observation) -> Tensor:
        """Return delta_k [B], image units squared, for estimates u [B, C, H, W] at time t."""


class AnnealedSteps(StepRule):
    """delta_k = (width s_k)^2, s_k = b / 2 the noise of z_t = a z + b eps for images in [0, 1].

    Free of image size and operator, since prox and misfit are both in image units. Differs from [LATINO], whose
    constants belong to an operator and to an image size: ``PublishedSteps``.

    Args:
        width: > 0.
    """

    def __init__(self, width: float = 1.0):
        check_positive("width", width)
        self.width = width

    def variance(self, prior: LatentPrior, t: int, u: Tensor, observation: Observation) -> Tensor:
        """Return delta_k [B]."""
        _, b = prior.table.at(t)
        return u.new_full((len(u),), (self.width * b / 2) ** 2)


class PublishedSteps(StepRule):
    """The constants of the authors' code: delta = early (t above the switch) or late, some times r = |A u - y|.

    Their prox has gamma = delta b^2 / (2 sigma_y)^2, so that delta_k = delta b^2 / 4. r is over all of y, for images in
    [-1, 1]: the constants belong to images of 1024 x 1024 pixels.

    Args:
        operator: of ``PUBLISHED``.

    Raises:
        ValueError: for another one.
    """

    def __init__(self, operator: str = "other"):
        if operator not in PUBLISHED:
            raise ValueError(f"the authors have no step sizes for {operator!r}; they have {', '.join(PUBLISHED)}")
        self.early, self.late, self.switch, self.relative = PUBLISHED[operator]

    def variance(self, prior: LatentPrior, t: int, u: Tensor, observation: Observation) -> Tensor:
        """Return delta_k [B]."""
        _, b = prior.table.at(t)
        delta = u.new_full((len(u),), self.early if t > self.switch else self.late)
        if self.relative:
            delta = delta * 2 * (observation.physics.A(u) - observation.y).flatten(1).norm(dim=1)
        return delta * b**2 / 4


PUBLISHED = {
    "sr16": (0.3, 0.2, 300, True),
    "sr32": (0.15, 0.3, 300, True),
    "gaussian_below_10": (5e-4, 2e-4, 400, True),
    "gaussian_from_10": (7e-4, 3e-4, 400, True),
    "motion": (4e-4, 2e-4, 400, True),
    "box": (1.0, 0.5, 500, False),
    "other": (0.01, 1.0, 200, False),
    "pro_sr16": (0.03, 0.045, 300, True),
    "pro_sr32": (0.75, 0.45, 300, True),
    "pro_gaussian_chains": (4e-3, 2e-3, 500, True),
    "pro_gaussian_last": (4e-4, 4e-4, 500, True),
    "pro_motion_chains": (4e-4, 5e-4, 500, True),
    "pro_motion_last": (5e-4, 9e-4, 400, True),
}
"""Early and late factor, the time of the switch, and whether r is a factor too; ``pro``: of LATINO-PRO."""


def data_step(observation: Observation, u: Tensor, delta: Tensor) -> Tensor:
    """Return argmin_x |y - A x|^2 / (2 sigma_y^2) + |x - u|^2 / (2 delta) for estimates u of variance delta [B]."""
    return joint_prox(observation, u, float("inf"), delta, 1.0)(u)


class Correction:
    """How y corrects the noisy latents before they are denoised, by gradients through decoder and network.

    With u = D(G(z_t, t, c)) and x given z_t as N(u, delta 1), log p(y | z_t) is minus the Moreau envelope of the data
    term, up to a constant: its gradient in u is (prox_delta(u) - u) / delta, for any operator with a prox, and
    automatic differentiation carries it to z_t. Then z_t <- z_t + rate b^2 grad, n times, and after the last one
    z = G(z_t, t, c) + (rate b^2 / a) grad, which keeps the noise. With n = 1 and rate 1 this is the mean of z given
    z_t and y wherever G is the mean of z given z_t, and delta right (Tweedie's formula; Song et al., Pi-GDM, 2023, have
    it for pixels). More evaluations search the noise that explains y, as Ben-Hamu et al. (D-Flow, 2024) do from one
    time alone; they climb p(y | z_t), and forget p(z_t) the more of them there are.

    Args:
        evaluations: n, of the network at each time, each with a backward pass (together about three evaluations' work).
            0: none, as in [LATINO].
        rate: > 0.
        checkpoint: evaluate blocks of the networks twice, to save memory (``LatentPrior.checkpoint_layers``).

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, evaluations: int = 0, rate: float = 1.0, checkpoint: bool = False):
        if not is_whole(evaluations) or evaluations < 0:
            raise ValueError(
                f"evaluations, of the network at each time, must be an integer of at least 0, got {evaluations!r}"
            )
        check_positive("rate", rate)
        self.evaluations, self.rate, self.checkpoint = evaluations, rate, checkpoint

    def estimate(
        self, prior: LatentPrior, z_t: Tensor, t: int, prompt: Prompt, steps: StepRule, observation: Observation
    ) -> Tensor:
        """Return z [B, c, h, w] from noisy latents at time t; delta is that of ``steps``."""
        if not self.evaluations:
            return prior.estimate(z_t, t, prompt)
        a, b = prior.table.at(t)
        for _ in range(self.evaluations):
            with torch.enable_grad():
                z_t = z_t.detach().requires_grad_()
                z = prior.estimate(z_t, t, prompt)
                decoded = prior.decode(z)
            u = decoded.detach()
            delta = steps.variance(prior, t, u, observation)
            towards_y = (data_step(observation, u, delta) - u) / delta.view(-1, 1, 1, 1)
            step = self.rate * b**2 * torch.autograd.grad(decoded, z_t, towards_y.to(u))[0]
            z, z_t = z.detach() + step / a, z_t.detach() + step
        return z


class LatentSampler(Sampler):
    """What samplers with a latent prior share.

    Args:
        prior: encoder, decoder and network.
        prompt: words, the name of a saved prompt (``.safetensors``), or a ``Prompt``.
        steps: rule of the data step; ``AnnealedSteps`` unless given.
        start: where it begins; ``SmoothingStart`` unless given.
        chunk_size: images that the networks see at once.
    """

    title = "LATINO"
    """What it is called in tables."""

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        steps: StepRule | None = None,
        start: Start | None = None,
        chunk_size: int = 16,
    ):
        super().__init__([prior.network], chunk_size)
        self.fingerprint = prior.fingerprint
        self.prior, self.steps, self.start = prior, steps or AnnealedSteps(), start or SmoothingStart()
        with torch.no_grad():
            self.prompt = prior.prompt(prompt)

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        prompt: str | Prompt = "",
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        vae_dtype: str = "float32",
        guidance: float | None = None,
        **options: Any,
    ) -> Any:
        """Return the sampler with a pipeline: shipped name, diffusers folder or hub id.

        Args:
            reference: see ``LatentPrior.from_pretrained``, as the next ones.
            prompt: see the class.
            device: of networks.
            dtype: of the network.
            vae_dtype: of the autoencoder.
            guidance: of classifier-free guidance.
            options: further ones of the class.
        """
        prior = LatentPrior.from_pretrained(reference, device, dtype, vae_dtype, guidance=guidance)
        return cls(prior, prompt, **options)

    def nfe(self) -> int:
        """Return network evaluations of one sample."""
        raise NotImplementedError

    def from_prior(self, prompt: Prompt, size: tuple[int, int], streams: list[torch.Generator]) -> Tensor:
        """Return images of a size (H, W) drawn from the prior alone, one for each prompt, at the times ``DRAWING``."""
        prior = self.prior
        z0 = torch.zeros(len(prompt), *prior.latent_shape(size), device=prompt.embeds.device)
        for t in DRAWING:
            z0 = prior.estimate(prior.noised(z0, t, randn_like(z0, streams)), t, prompt)
        return prior.decode(z0).clamp(0, 1)

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError where images of the operator's size cannot be taken."""
        shape = getattr(physics, "img_size", None)
        if shape is not None and len(shape) == 3:
            self.prior.check_image(*shape)

    def first(self, observation: Observation) -> Tensor:
        """Return where a chain begins [B, C, H, W]."""
        return start_from_y(self.start, observation).clamp(0, 1)

    def back_to_data(self, u: Tensor, t: int, observation: Observation) -> Tensor:
        """Return the data step of clipped estimates u at time t, clipped too, as in the authors' code."""
        return data_step(observation, u, self.steps.variance(self.prior, t, u, observation)).clamp(0, 1)


class LatentLatino(LatentSampler):
    """LATINO [LATINO, algorithm 1]: samples of p(x | y, c) in as many network evaluations as there are times.

    For each time: z_t = a E(x) + b eps; u = D(G(z_t, t, c)); x = prox of the data at u with variance delta_k. Both are
    clipped to [0, 1]. Differs from [LATINO]: it begins at ``SmoothingStart``, not at A^dagger y, and has another rule
    of step sizes. With a ``correction`` y acts through the networks, and the chain stays in latent space: the next
    time takes the corrected z itself, not E(x), and the prox is that of the last time alone.

    Args:
        prior: as for ``LatentSampler``.
        prompt: as for ``LatentSampler``.
        times: falling whole numbers below the length of the prior's table.
        steps: as for ``LatentSampler``.
        start: as for ``LatentSampler``.
        final: the result is the last ``prox``, or ``autoencoded``: D(E(x)), as the authors have it.
        chunk_size: as for ``LatentSampler``.
        correction: of noisy latents by y; none unless given.

    Raises:
        ValueError: for times that do not fall, or another ``final``.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        times: Sequence[int] = TIMES,
        steps: StepRule | None = None,
        start: Start | None = None,
        final: str = "prox",
        chunk_size: int = 16,
        correction: Correction | None = None,
    ):
        super().__init__(prior, prompt, steps, start, chunk_size)
        check_times(times, prior)
        if final not in FINAL:
            raise ValueError(f"final must be one of {', '.join(FINAL)}, got {final!r}")
        self.times, self.final, self.correction = tuple(times), final, correction or Correction()
        if self.correction.checkpoint:
            prior.checkpoint_layers()

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        prompt = self.prompt.expand(len(observation))
        return self.chain(self.first(observation), prompt, observation, streams)

    def nfe(self) -> int:
        """Return network evaluations of one sample."""
        return len(self.times) * max(1, self.correction.evaluations)

    def chain(self, x: Tensor, prompt: Prompt, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return the end of a chain that begins at x [B, C, H, W], with a prompt for each row."""
        prior, z = self.prior, self.prior.encode(x)
        for k, t in enumerate(self.times):
            if k and not self.correction.evaluations:
                z = prior.encode(self.restored(z, self.times[k - 1], observation))
            z_t = prior.noised(z, t, randn_like(z, streams))
            z = self.correction.estimate(prior, z_t, t, prompt, self.steps, observation)
        x = self.restored(z, self.times[-1], observation)
        return x if self.final == "prox" else self.prior.decode(self.prior.encode(x))

    def restored(self, z: Tensor, t: int, observation: Observation) -> Tensor:
        """Return the images of latents estimated at time t, after the data step."""
        return self.back_to_data(self.prior.decode(z).clamp(0, 1), t, observation)


def check_times(times: Sequence[int], prior: LatentPrior) -> None:
    """Raise ValueError unless times fall and lie in the prior's table."""
    count = prior.table.num_times
    whole = all(isinstance(t, int) and 0 <= t < count for t in times)
    if not times or not whole or any(a < b for a, b in pairwise(times)):
        raise ValueError(f"times must be whole numbers that fall, from {count - 1} to 0, got {list(times)}")
