"""LATINO-PRO: the prompt of LATINO estimated from y alone, by stochastic approximation of maximum likelihood."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ud2m.physics import Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.random import randn_like
from ud2m.samplers.base import check_count, check_positive
from ud2m.samplers.latent_latino import TIMES, Correction, LatentLatino, LatentSampler, StepRule, check_times
from ud2m.unfolded.warm_start import Start

CHAIN_TIMES = (999, 749, 499, 249)
"""The authors' times of the chains that estimate the prompt."""
TINY = 1e-12


class PromptSpace(ABC):
    """Which prompts are tried: parameters theta [B, ...], and the states of the text model that they stand for."""

    @abstractmethod
    def first(self, prompt: Prompt) -> Tensor:
        """Return theta of the prompts that the estimation begins with."""

    @abstractmethod
    def embeds(self, theta: Tensor) -> Tensor:
        """Return the states [B, length, width], differentiable in theta."""

    def projected(self, theta: Tensor, first: Tensor) -> Tensor:
        """Return the nearest theta that is allowed."""
        return theta


class Ball(PromptSpace):
    """Every token within a ball around the first prompt's, the leading ones fixed [LATINO-PRO].

    Args:
        radius: of each token's ball, Euclidean.
        fixed: leading tokens that stay: the start and "a photo of" in the paper.
    """

    def __init__(self, radius: float = 15.0, fixed: int = 4):
        check_positive("radius", radius)
        if not isinstance(fixed, int) or fixed < 0:
            raise ValueError(f"fixed, the leading tokens that stay, must be a whole number from 0, got {fixed!r}")
        self.radius, self.fixed = radius, fixed

    def first(self, prompt: Prompt) -> Tensor:
        """Return the states."""
        if self.fixed >= prompt.embeds.shape[1]:
            raise ValueError(f"fixed={self.fixed} leaves none of {prompt.embeds.shape[1]} tokens to be estimated")
        return prompt.embeds.detach().float()

    def embeds(self, theta: Tensor) -> Tensor:
        """Return theta; no gradient reaches the fixed tokens."""
        return torch.cat([theta[:, : self.fixed].detach(), theta[:, self.fixed :]], 1)

    def projected(self, theta: Tensor, first: Tensor) -> Tensor:
        """Return theta with every token on its ball."""
        offset = theta - first
        length = offset.norm(dim=-1, keepdim=True)
        return first + offset * (self.radius / length.clamp(min=TINY)).clamp(max=1)


def check_prompts(candidates: Sequence[str]) -> tuple[str, ...]:
    """Return given prompts, or raise ValueError for fewer than two."""
    if isinstance(candidates, str) or len(candidates) < 2:
        raise ValueError(f"candidates, the given prompts, must be two at least, got {candidates!r}")
    return tuple(candidates)


class Simplex(PromptSpace):
    """Mixtures of given prompts: states sum_i w_i e_i, w = softmax(theta), at first all equal. Readable in a report.

    Args:
        prior: encodes the words.
        candidates: two prompts at least.
    """

    def __init__(self, prior: LatentPrior, candidates: Sequence[str]):
        self.texts = check_prompts(candidates)
        with torch.no_grad():
            self.corners = prior.encode_prompt(self.texts).embeds.float()

    def first(self, prompt: Prompt) -> Tensor:
        """Return theta = 0."""
        return self.corners.new_zeros(len(prompt), len(self.texts))

    def embeds(self, theta: Tensor) -> Tensor:
        """Return the mixtures."""
        return torch.einsum("bp,pld->bld", theta.softmax(1), self.corners)


class Ascent(ABC):
    """How the gradients of a chain become a step: a fresh one for every estimation."""

    @abstractmethod
    def step(self, theta: Tensor, gradient: Tensor, chain: int) -> Tensor:
        """Return theta after chain number ``chain`` (from 0)."""

    def result(self, theta: Tensor) -> Tensor:
        """Return the estimate, for theta after the last chain."""
        return theta


class Adam(Ascent):
    """Adam (Kingma and Ba, 2015) at rate / sqrt(1 + chain / 10).

    Args:
        rate: > 0.
        betas: decay of both moments.
    """

    def __init__(self, rate: float = 0.2, betas: tuple[float, float] = (0.7, 0.95)):
        self.rate, self.betas = rate, betas
        self.mean: Tensor | float = 0.0
        self.power: Tensor | float = 0.0

    def step(self, theta: Tensor, gradient: Tensor, chain: int) -> Tensor:
        """Return theta after one step."""
        slow, slower = self.betas
        self.mean = slow * self.mean + (1 - slow) * gradient
        self.power = slower * self.power + (1 - slower) * gradient.square()
        mean, power = self.mean / (1 - slow ** (chain + 1)), self.power / (1 - slower ** (chain + 1))
        return theta + self.rate / (1 + chain / 10) ** 0.5 * mean / (power.sqrt() + TINY)


class AveragedAdam(Adam):
    """Adam with a short memory, and the mean of the last few theta as the result (Polyak and Juditsky, 1992).

    Args:
        rate: as for ``Adam``, as the next one.
        betas: decay of both moments.
        kept: theta of so many last chains.
    """

    def __init__(self, rate: float = 0.6, betas: tuple[float, float] = (0.5, 0.9), kept: int = 5):
        super().__init__(rate, betas)
        self.seen: deque[Tensor] = deque(maxlen=kept - 1)

    def step(self, theta: Tensor, gradient: Tensor, chain: int) -> Tensor:
        """Return theta after one step."""
        if chain:
            self.seen.append(theta)
        return super().step(theta, gradient, chain)

    def result(self, theta: Tensor) -> Tensor:
        """Return the mean of the last theta: it lies in every convex set that they lie in."""
        return torch.stack([*self.seen, theta]).mean(0)


class PublishedAscent(Ascent):
    """theta + rate max(0.9^max(0, chain - 10), 1e-3) S, S the sum of all gradients so far, each of length 1 per token.

    Args:
        rate: 0.08 in the authors' code.
    """

    def __init__(self, rate: float = 0.08):
        self.rate, self.total = rate, 0.0

    def step(self, theta: Tensor, gradient: Tensor, chain: int) -> Tensor:
        """Return theta after one step."""
        self.total = self.total + gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=TINY)
        return theta + self.rate * max(0.9 ** max(0, chain - 10), 1e-3) * self.total


ASCENTS: dict[str, type[Ascent]] = {"adam": Adam, "averaged": AveragedAdam, "published": PublishedAscent}
GRADIENTS = ("likelihood", "covariance", "transition")
NUMBERS = 256
"""Of y at most, for ``covariance``."""
RIDGE = 0.01
"""Share of the mean variance that is added to that of each number of y: networks are no exact posterior means."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What happened during an estimation.

    Attributes:
        residuals: |A u - y| / sqrt(m) of the first estimate of each chain [chains, B], image units.
        weights: of given prompts after each chain [chains, B, prompts]; empty where none are given.
    """

    residuals: Tensor
    weights: Tensor


class PromptOptimizer:
    """Gradients of log p(y | c) in the prompt c along LATINO's chains, and the steps that they make.

    ``transition``, the authors': grad_c of -|z_{k+1} - a_{k+1} G(z_k, t_k, c)|^2 / (2 b_{k+1}^2), z_{k+1} = a z + b eps
    kept fixed; no gradient goes through autoencoder, operator or prox.

    ``likelihood``: grad_c of -|A D(G(z_k, t_k, c)) - y|^2 / (2 rho^2), rho^2 = max(sigma_y^2, misfit / m), y of m
    numbers. By Fisher's identity the gradient of log p(y | c) is the mean of grad_c log p(y | z_k, c) under the
    posterior of z_k, from which the chain draws; rho tempers what one evaluation of G cannot explain. Differs from
    [LATINO-PRO].

    ``covariance``, ours too: grad_c of log N(y; A u, A C A^T + sigma_y^2 1), u = D(G(z_k, t_k, c)), where C, the
    covariance of x given z_k, is (b^2 / a) J dG/dz_k J^T by Tweedie's formula, J the Jacobian of D; it is kept fixed,
    and ``RIDGE`` of its mean variance is added. One backward pass for each number of y gives A C A^T. With these passes
    z is corrected by y as well, z = G + Cov(z, y) Cov(y)^-1 (y - A u), before the chain goes on: exact where all is
    Gaussian.

    Args:
        gradient: which of them.
        evaluations: first evaluations of a chain that give a gradient. None: 2, but all transitions.
        ascent: ``adam``, ``averaged`` or ``published``.
        rate: of the ascent; None: its own.
        checkpoint: evaluate blocks of the networks twice, to save memory (``LatentPrior.checkpoint_layers``).

    Raises:
        ValueError: for unknown names and numbers out of range.
    """

    def __init__(
        self,
        gradient: str = "likelihood",
        evaluations: int | None = None,
        ascent: str = "adam",
        rate: float | None = None,
        checkpoint: bool = False,
    ):
        if gradient not in GRADIENTS or ascent not in ASCENTS:
            raise ValueError(
                f"gradient must be one of {', '.join(GRADIENTS)} and ascent one of {', '.join(ASCENTS)}, got "
                f"{gradient!r} and {ascent!r}"
            )
        if evaluations is not None:
            check_count("evaluations", evaluations)
        if rate is not None:
            check_positive("rate", rate)
        self.gradient, self.evaluations, self.checkpoint = gradient, evaluations, checkpoint
        self.ascent, self.rate = ascent, rate

    def new_ascent(self) -> Ascent:
        """Return the rule of steps, at its beginning."""
        make = ASCENTS[self.ascent]
        return make() if self.rate is None else make(rate=self.rate)  # type: ignore[call-arg]

    def uses(self, k: int, count: int) -> bool:
        """Return whether evaluation k (from 0) of a chain of ``count`` gives a gradient."""
        if self.gradient == "transition":
            return k < min(count - 1, self.evaluations or count)
        return k < (self.evaluations or 2)

    def of_data(
        self, prior: LatentPrior, t: int, z_t: Tensor, z: Tensor, observation: Observation
    ) -> tuple[Tensor, Tensor]:
        """Return values [B] with the data's gradient in the prompt, and the images that the chain goes on with.

        Args:
            prior: whose estimate z is, at time t.
            t: see above.
            z_t: noisy latents that z was made from, with their graph.
            z: see above.
            observation: y.
        """
        u = prior.decode(z)
        measured = observation.physics.A(u).flatten(1)
        residual = observation.y.flatten(1) - measured
        if self.gradient == "likelihood":
            return self.likelihood(residual, observation.sigma_y), u
        onto_z_t, onto_z = jacobians(measured, z_t, z)
        a, b = prior.table.at(t)
        covariance = b**2 / a * onto_z_t @ onto_z.mT
        explained = solved(covariance, observation.sigma_y, residual.detach())
        corrected = z.detach() + b**2 / a * (onto_z_t.mT @ explained.unsqueeze(2)).view_as(z)
        return (measured * explained).sum(1), prior.decode(corrected)

    def likelihood(self, residual: Tensor, sigma_y: Tensor) -> Tensor:
        """Return the log-likelihoods [B] of ``likelihood`` for y - A u [B, m], up to constants."""
        misfit = residual.square()
        rho2 = torch.maximum(sigma_y**2, misfit.detach().mean(1))
        return -misfit.sum(1) / (2 * rho2)

    def check(self, observation: Observation) -> None:
        """Raise ValueError for too many numbers in y."""
        count = observation.y[0].numel()
        if self.gradient == "covariance" and count > NUMBERS:
            raise ValueError(
                f"gradient=covariance takes a backward pass for each number of y, {NUMBERS} at most, and y has "
                f"{count}: take gradient=likelihood"
            )

    def transition(self, prior: LatentPrior, z0: Tensor, z_next: Tensor, t_next: int) -> Tensor:
        """Return the log-densities [B] of ``transition``, up to constants."""
        a, b = prior.table.columns(torch.full((len(z0),), t_next), z0)
        return -((z_next - a * z0) ** 2 / (2 * b**2)).flatten(1).sum(1)


class PromptEstimator(LatentSampler):
    """Estimates a prompt for each sample, so that none depends on its batch, and draws the sample with it by LATINO.

    A new one writes ``estimate``.

    Args:
        prior: as for ``LatentSampler``.
        prompt: as for ``LatentSampler``.
        times: of the chain that draws.
        steps: as for ``LatentSampler``.
        last_steps: of the chain that draws, where they are others.
        start: as for ``LatentSampler``.
        final: as for ``LatentLatino``.
        chunk_size: as for ``LatentSampler``.
        listener: is given the estimated prompts and the ``Trace`` of every batch.
        correction: of the chain that draws, as for ``LatentLatino``.

    Raises:
        ValueError: as ``LatentLatino``.
    """

    title = "LATINO-PRO"
    texts: tuple[str, ...] = ()
    """The prompts that ``Trace.weights`` are of."""

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        times: Sequence[int] = TIMES,
        steps: StepRule | None = None,
        last_steps: StepRule | None = None,
        start: Start | None = None,
        final: str = "prox",
        chunk_size: int = 16,
        listener: Callable[[Prompt, Trace], None] | None = None,
        correction: Correction | None = None,
    ):
        super().__init__(prior, prompt, steps, start, chunk_size)
        rule = last_steps or self.steps
        self.last = LatentLatino(prior, self.prompt, times, rule, self.start, final, chunk_size, correction)
        self.listener = listener

    @abstractmethod
    def estimate(self, observation: Observation, streams: list[torch.Generator]) -> tuple[Tensor, Prompt, Trace]:
        """Return where the last chain begins, the prompt of each row, and how they came about."""

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        x, prompt, trace = self.estimate(observation, streams)
        if self.listener is not None:
            self.listener(prompt, trace)
        return self.last.chain(x, prompt, observation, streams)


class LatinoPro(PromptEstimator):
    """LATINO-PRO: estimates the prompt in short chains, and draws the sample in a last one with it.

    The end of each chain is where the next begins. Evaluations: num_chains x len(chain_times) + len(times), 68 by
    default.

    Args:
        prior: as for ``PromptEstimator``.
        prompt: as for ``PromptEstimator``; the first one.
        optimizer: gradients and steps.
        radius: of ``Ball``.
        fixed: of ``Ball``.
        candidates: prompts of ``Simplex``, in place of the ball.
        num_chains: M, that estimate.
        chain_times: of each.
        times: as for ``PromptEstimator``, as the next ones.
        steps: in all chains.
        last_steps: those of the last chain, where they are others.
        start: of the first chain.
        final: of the last chain.
        chunk_size: as for ``PromptEstimator``, as the next ones.
        listener: told of every batch.
        correction: of the last chain.

    Raises:
        ValueError: as ``PromptEstimator``, and for numbers out of range.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        optimizer: PromptOptimizer | None = None,
        radius: float = 15.0,
        fixed: int = 4,
        candidates: Sequence[str] = (),
        num_chains: int = 15,
        chain_times: Sequence[int] = CHAIN_TIMES,
        times: Sequence[int] = TIMES,
        steps: StepRule | None = None,
        last_steps: StepRule | None = None,
        start: Start | None = None,
        final: str = "prox",
        chunk_size: int = 16,
        listener: Callable[[Prompt, Trace], None] | None = None,
        correction: Correction | None = None,
    ):
        super().__init__(prior, prompt, times, steps, last_steps, start, final, chunk_size, listener, correction)
        check_count("num_chains", num_chains)
        check_times(chain_times, prior)
        self.optimizer = optimizer or PromptOptimizer()
        if self.optimizer.gradient == "transition" and len(chain_times) < 2:
            raise ValueError("the gradient of transitions needs two times a chain at least; or take likelihood")
        self.num_chains, self.chain_times, self.texts = num_chains, tuple(chain_times), tuple(candidates)
        self.space: PromptSpace = Simplex(prior, candidates) if candidates else Ball(radius, fixed)
        self.space.first(self.prompt)
        if self.optimizer.checkpoint:
            prior.checkpoint_layers()

    def nfe(self) -> int:
        """Return network evaluations of one sample."""
        return self.num_chains * len(self.chain_times) + self.last.nfe()

    def estimate(self, observation: Observation, streams: list[torch.Generator]) -> tuple[Tensor, Prompt, Trace]:
        """Return the end of the last estimating chain, the prompt of each row, and how they came about."""
        self.optimizer.check(observation)
        prompt = self.prompt.expand(len(observation))
        first = self.space.first(prompt)
        theta, ascent, x = first, self.optimizer.new_ascent(), self.first(observation)
        residuals, weights = [], []
        for chain in range(self.num_chains):
            x, gradient, misfit = self.chain(x, prompt, theta, observation, streams)
            theta = self.space.projected(ascent.step(theta, gradient, chain), first)
            residuals.append(misfit.sqrt())
            if self.texts:
                weights.append(theta.softmax(1))
        theta = ascent.result(theta)
        trace = Trace(torch.stack(residuals), torch.stack(weights) if weights else theta.new_zeros(0))
        return x, prompt.with_embeds(self.space.embeds(theta).detach()), trace

    def chain(
        self, x: Tensor, prompt: Prompt, theta: Tensor, observation: Observation, streams: list[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the end of one chain, the sum of its gradients in theta, and its first mean square misfit [B]."""
        prior, optimizer, count = self.prior, self.optimizer, len(self.chain_times)
        gradient, misfit = torch.zeros_like(theta), theta.new_zeros(len(x))
        z_t = self.noised(x, self.chain_times[0], streams)
        for k, t in enumerate(self.chain_times):
            moved = theta.detach().requires_grad_()
            used = optimizer.uses(k, count)
            z_t = z_t.requires_grad_(used and optimizer.gradient == "covariance")
            with torch.set_grad_enabled(used):
                z0 = prior.estimate(z_t, t, prompt.with_embeds(self.space.embeds(moved)))
            with torch.set_grad_enabled(used and optimizer.gradient != "transition"):
                if torch.is_grad_enabled():
                    values, u = optimizer.of_data(prior, t, z_t, z0, observation)
                    gradient = gradient + gradient_of(values, moved)
                else:
                    u = prior.decode(z0)
            u = u.detach().clamp(0, 1)
            if k == 0:
                misfit = (observation.physics.A(u) - observation.y).flatten(1).square().mean(1)
            x = self.back_to_data(u, t, observation)
            if k + 1 == count:
                break
            z_t = self.noised(x, self.chain_times[k + 1], streams)
            if used and optimizer.gradient == "transition":
                with torch.enable_grad():
                    density = optimizer.transition(prior, z0, z_t, self.chain_times[k + 1])
                gradient = gradient + gradient_of(density, moved)
        return x, gradient, misfit

    def noised(self, x: Tensor, t: int, streams: list[torch.Generator]) -> Tensor:
        """Return z_t of images x."""
        z = self.prior.encode(x)
        return self.prior.noised(z, t, randn_like(z, streams))


def jacobians(measured: Tensor, *of: Tensor) -> list[Tensor]:
    """Return the Jacobians [B, m, n] of ``measured`` [B, m], row by row, in each of the tensors [B, ...]."""
    rows = [torch.autograd.grad(column.sum(), of, retain_graph=True) for column in measured.unbind(1)]
    return [torch.stack([row.flatten(1) for row in part], 1) for part in zip(*rows, strict=True)]


def solved(found: Tensor, sigma_y: Tensor, residual: Tensor) -> Tensor:
    """Return S^-1 r for residuals r [B, m].

    S is the covariance that is nearest to a matrix [B, m, m], with the noise of y and ``RIDGE`` of its mean variance.
    """
    variances, vectors = torch.linalg.eigh((found + found.mT) / 2)
    variances = variances.clamp(min=0)
    added = sigma_y.view(-1, 1) ** 2 + RIDGE * variances.mean(1, keepdim=True)
    along = vectors.mT @ residual.unsqueeze(2)
    return (vectors @ (along / (variances + added).unsqueeze(2))).squeeze(2)


def gradient_of(values: Tensor, theta: Tensor) -> Tensor:
    """Return the gradient [B, ...] of each value [B] in its own row of theta."""
    return torch.autograd.grad(values, theta, torch.ones_like(values))[0]
