"""LATINO-PRO: the prompt of LATINO estimated from y alone, by stochastic approximation of maximum likelihood."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ud2m.physics import Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.random import randn_like
from ud2m.samplers.base import check_count, check_positive
from ud2m.samplers.latent_latino import TIMES, LatentLatino, LatentSampler, StepRule, check_times
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


class Simplex(PromptSpace):
    """Mixtures of given prompts: states sum_i w_i e_i, w = softmax(theta), at first all equal. Readable in a report.

    Args:
        prior: encodes the words.
        candidates: two prompts at least.
    """

    def __init__(self, prior: LatentPrior, candidates: Sequence[str]):
        if len(candidates) < 2:
            raise ValueError(f"the simplex needs two prompts at least, got {list(candidates)}")
        self.texts = tuple(candidates)
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


ASCENTS: dict[str, type[Ascent]] = {"adam": Adam, "published": PublishedAscent}
GRADIENTS = ("likelihood", "transition", "scores")
SHRUNK = 0.01
"""Share of the mean variance that is added in all directions."""
CERTAIN = 1e4
"""theta of a corner of the simplex: softmax makes 1 of it, and 0 of all others."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What happened during an estimation.

    Attributes:
        residuals: |A u - y| / sqrt(m) of the first estimate of each chain [chains, B], image units.
        weights: of a simplex's prompts after each chain [chains, B, prompts]; empty for a ball.
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

    ``scores``, for given prompts: no gradient at all. Images are drawn with each of them at the first time of a chain,
    and y is compared with what the operator makes of them (``log_densities``); the best prompt is taken. Drawn once,
    from a fixed seed: they know nothing of y, and serve all images of a size. Differs from [LATINO-PRO].

    Args:
        gradient: which of them.
        evaluations: first evaluations of a chain that give a gradient. None: 2 of ``likelihood``, all transitions else.
        ascent: ``adam`` or ``published``.
        rate: of the ascent; None: its own.
        checkpoint: evaluate blocks of the networks twice, to save memory (``LatentPrior.checkpoint_layers``).
        pairs: of images that ``scores`` draws with each prompt, with noise eps and -eps: their mean knows the mean of
            all images four times better (digits) than that of two other ones.

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
        pairs: int = 20,
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
        check_count("pairs", pairs)
        self.gradient, self.evaluations, self.checkpoint, self.pairs = gradient, evaluations, checkpoint, pairs
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

    def likelihood(self, u: Tensor, observation: Observation) -> Tensor:
        """Return the log-likelihoods [B] of ``likelihood`` for images u, up to constants."""
        misfit = (observation.physics.A(u) - observation.y).flatten(1).square()
        rho2 = torch.maximum(observation.sigma_y**2, misfit.detach().mean(1))
        return -misfit.sum(1) / (2 * rho2)

    def transition(self, prior: LatentPrior, z0: Tensor, z_next: Tensor, t_next: int) -> Tensor:
        """Return the log-densities [B] of ``transition``, up to constants."""
        a, b = prior.table.columns(torch.full((len(z0),), t_next), z0)
        return -((z_next - a * z0) ** 2 / (2 * b**2)).flatten(1).sum(1)


class LatinoPro(LatentSampler):
    """LATINO-PRO: estimates the prompt in short chains, and draws the sample in a last one with it.

    The end of each chain is where the next begins. Each sample estimates a prompt of its own, so that it does not
    depend on its batch. Evaluations: num_chains x len(chain_times) + len(times), 68 by default; of ``scores``
    len(times), and 2 x pairs for each candidate once.

    Args:
        prior: as for ``LatentSampler``.
        prompt: as for ``LatentSampler``; the first one.
        optimizer: gradients and steps.
        radius: of ``Ball``.
        fixed: of ``Ball``.
        candidates: prompts of ``Simplex``, in place of the ball.
        num_chains: M, that estimate.
        chain_times: of each.
        times: of the last chain.
        steps: as for ``LatentSampler``, in all chains.
        last_steps: those of the last chain, where they are others.
        start: as for ``LatentSampler``.
        final: as for ``LatentLatino``.
        chunk_size: as for ``LatentSampler``.
        listener: is given the estimated prompts and the ``Trace`` of every batch.

    Raises:
        ValueError: as ``LatentLatino``, and for numbers out of range.
    """

    title = "LATINO-PRO"

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
    ):
        super().__init__(prior, prompt, steps, start, chunk_size)
        check_count("num_chains", num_chains)
        check_times(chain_times, prior)
        self.optimizer = optimizer or PromptOptimizer()
        if self.optimizer.gradient == "transition" and len(chain_times) < 2:
            raise ValueError("the gradient of transitions needs two times a chain at least; or take likelihood")
        self.num_chains, self.chain_times, self.listener = num_chains, tuple(chain_times), listener
        self.space: PromptSpace = Simplex(prior, candidates) if candidates else Ball(radius, fixed)
        self.space.first(self.prompt)
        if self.optimizer.gradient == "scores" and not candidates:
            raise ValueError("gradient=scores compares given prompts: set candidates")
        self.drawn: dict[tuple[int, int], Tensor] = {}
        self.last = LatentLatino(prior, self.prompt, times, last_steps or self.steps, self.start, final, chunk_size)
        if self.optimizer.checkpoint:
            prior.checkpoint_layers()

    def nfe(self) -> int:
        """Return network evaluations of one sample."""
        scored = self.optimizer.gradient == "scores"
        return self.last.nfe() + (0 if scored else self.num_chains * len(self.chain_times))

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        x, prompt, trace = self.estimate(observation, streams)
        if self.listener is not None:
            self.listener(prompt, trace)
        return self.last.chain(x, prompt, observation, streams)

    def estimate(self, observation: Observation, streams: list[torch.Generator]) -> tuple[Tensor, Prompt, Trace]:
        """Return the end of the last estimating chain, the prompt of each row, and how they came about."""
        prompt = self.prompt.expand(len(observation))
        if self.optimizer.gradient == "scores":
            return self.score(prompt, observation)
        first = self.space.first(prompt)
        theta, ascent, x = first, self.optimizer.new_ascent(), self.first(observation)
        residuals, weights = [], []
        for chain in range(self.num_chains):
            x, gradient, misfit = self.chain(x, prompt, theta, observation, streams)
            theta = self.space.projected(ascent.step(theta, gradient, chain), first)
            residuals.append(misfit.sqrt())
            if isinstance(self.space, Simplex):
                weights.append(theta.softmax(1))
        trace = Trace(torch.stack(residuals), torch.stack(weights) if weights else theta.new_zeros(0))
        return x, prompt.with_embeds(self.space.embeds(theta).detach()), trace

    def score(self, prompt: Prompt, observation: Observation) -> tuple[Tensor, Prompt, Trace]:
        """Return what ``estimate`` does, of the candidate that explains y best."""
        images = self.candidate_images(observation)
        count, draws = images.shape[:2]
        scores, residuals = [], []
        for row in range(len(observation)):
            own = observation.rows(torch.full((count * draws,), row, device=images.device))
            measured = own.physics.A(images.flatten(0, 1)).flatten(1).unflatten(0, (count, draws)).double()
            y = observation.y[row].flatten().double()
            scores.append(log_densities(y, measured, observation.sigma_y[row].double()))
            residuals.append((measured.mean(1) - y).square().mean(1).sqrt()[scores[-1].argmax()])
        weights = torch.stack(scores).softmax(1)
        best = torch.zeros_like(weights).scatter(1, weights.argmax(1, keepdim=True), CERTAIN).float()
        trace = Trace(torch.stack(residuals).unsqueeze(0).float(), weights.unsqueeze(0).float())
        return self.first(observation), prompt.with_embeds(self.space.embeds(best)), trace

    def candidate_images(self, observation: Observation) -> Tensor:
        """Return images drawn with each candidate [P, 2 pairs, C, H, W], made once for a size of images."""
        height, width = observation.image_shape[-2:]
        if (height, width) not in self.drawn:
            first = self.space.first(self.prompt)
            corners = CERTAIN * torch.eye(first.shape[1]).to(first)
            candidates, t = self.space.embeds(corners), self.chain_times[0]
            shape = (self.optimizer.pairs, *self.prior.latent_shape((height, width)))
            generator, found = torch.Generator().manual_seed(0), []
            for embeds in candidates:
                noise = torch.randn(shape, generator=generator).to(observation.y)
                for eps in torch.cat([noise, -noise]).split(self.chunk_size):
                    prompt = self.prompt.expand(len(eps)).with_embeds(embeds.expand(len(eps), -1, -1))
                    z0 = self.prior.estimate(self.prior.noised(torch.zeros_like(eps), t, eps), t, prompt)
                    found.append(self.prior.decode(z0).clamp(0, 1))
            self.drawn[height, width] = torch.cat(found).unflatten(0, (len(candidates), -1))
        return self.drawn[height, width]

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
            with torch.set_grad_enabled(used):
                z0 = prior.estimate(z_t, t, prompt.with_embeds(self.space.embeds(moved)))
            with torch.set_grad_enabled(used and optimizer.gradient == "likelihood"):
                u = prior.decode(z0)
                if torch.is_grad_enabled():
                    gradient = gradient + gradient_of(optimizer.likelihood(u, observation), moved)
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


def gradient_of(values: Tensor, theta: Tensor) -> Tensor:
    """Return the gradient [B, ...] of each value [B] in its own row of theta."""
    return torch.autograd.grad(values, theta, torch.ones_like(values))[0]


def log_densities(y: Tensor, measured: Tensor, sigma_y: Tensor) -> Tensor:
    """Return log p(y | c_i) [P], up to one constant, of an observation y [m] from measured draws A u [P, n, m].

    y given c_i is Student's t around the draws' mean, with n degrees of freedom as for a covariance that is known from
    n draws, and the scale C_i = s^2 1 + (S_i + S) / 2: S_i of the draws of c_i, S the mean of all S_i, and s^2 =
    sigma_y^2 + ``SHRUNK`` tr(S) / m for what so few draws leave out. C_i is never built: S_i and S are of the same P n
    centred draws, with other weights, so that their one Gram matrix serves all prompts.
    """
    count, draws, size = measured.shape
    means = measured.mean(1)
    factors = ((measured - means.unsqueeze(1)) / (2 * (draws - 1)) ** 0.5).flatten(0, 1)
    gram, offsets = factors @ factors.T, y - means
    noise = sigma_y**2 + SHRUNK * 2 * gram.trace() / (count * size)
    own = torch.eye(count).to(gram).repeat_interleave(draws, dim=1)
    roots = (own + 1 / count).sqrt()
    variances, vectors = torch.linalg.eigh(roots.unsqueeze(2) * gram * roots.unsqueeze(1))
    variances = variances.clamp(min=0)
    # (s^2 1 + R^T R)^-1 by Woodbury's identity, in the eigenvectors of R R^T, R the weighted draws
    along = (vectors.mT @ (roots * (offsets @ factors.T)).unsqueeze(2)).squeeze(2)
    within = along.square() / (noise + variances)
    distances = (offsets.square().sum(1) - within.sum(1)) / noise
    log_scales = (variances / noise).log1p().sum(1)
    return -((size + draws) * torch.log1p(distances / draws) + log_scales) / 2
