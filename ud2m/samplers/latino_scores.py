"""LATINO with the best of given prompts or captions: y is compared with images drawn once with each of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.physics import Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.samplers.latent_latino import TIMES, Correction, StepRule
from ud2m.samplers.latino_pro import PromptEstimator, Trace, check_prompts
from ud2m.unfolded.warm_start import Start

SHRUNK = 0.01
"""Share of the mean variance that is added in all directions."""
BISECTIONS = 30


class LatinoScores(PromptEstimator):
    """Takes that of given prompts which explains y best, and draws the sample with it: no gradient at all.

    Images are drawn with each prompt at the first time, and y is compared with what the operator makes of them
    (``PromptWeights``). They come from a fixed seed and know nothing of y: drawn once, they serve all images of a size.
    Differs from [LATINO-PRO], which has no such prompts. Evaluations: those of the chain, and 2 x pairs for each prompt
    once. Where none are given, they are the captions that the pipeline was trained with, other than the prompt itself.

    Args:
        prior: as for ``PromptEstimator``.
        prompt: as for ``PromptEstimator``; reports show what the prior draws with it, beside the best one.
        candidates: two prompts at least; none: ``prior.captions``.
        pairs: two at least, of images drawn with each prompt, with noise eps and -eps: their mean knows the mean of all
            images four times better (digits) than that of two other ones.
        times: as for ``PromptEstimator``, as the next ones.
        steps: of the data.
        start: of the chain.
        final: of the chain.
        chunk_size: as for ``PromptEstimator``, as the next ones.
        listener: told of every batch.
        correction: of the chain.

    Raises:
        ValueError: as ``PromptEstimator``, for fewer prompts, and for no count.
    """

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        candidates: Sequence[str] = (),
        pairs: int = 20,
        times: Sequence[int] = TIMES,
        steps: StepRule | None = None,
        start: Start | None = None,
        final: str = "prox",
        chunk_size: int = 16,
        listener: Callable[[Prompt, Trace], None] | None = None,
        correction: Correction | None = None,
    ):
        super().__init__(prior, prompt, times, steps, None, start, final, chunk_size, listener, correction)
        if not is_whole(pairs) or pairs < 2:
            raise ValueError(
                f"pairs, of images drawn with each prompt, must be an integer of at least 2, got {pairs!r}"
            )
        captions = [text for text in prior.captions if text not in self.prompt.texts]
        if not candidates and len(captions) < 2:
            raise ValueError(
                "candidates, the given prompts, must be two at least, got none, and the pipeline brings no captions to "
                "take in their place"
            )
        self.texts, self.pairs = check_prompts(candidates or captions), pairs
        with torch.no_grad():
            self.candidates = prior.encode_prompt(self.texts)
        self.drawn: dict[tuple[int, ...], Tensor] = {}

    def nfe(self) -> int:
        """Return network evaluations of one sample, without those of the images that are drawn once."""
        return self.last.nfe()

    def estimate(self, observation: Observation, streams: list[torch.Generator]) -> tuple[Tensor, Prompt, Trace]:
        """Return where the chain begins, the best prompt of each row, and the weights of all."""
        images = self.candidate_images(observation)
        count, draws = images.shape[:2]
        weights, residuals = [], []
        fitted: PromptWeights | None = None
        for row in range(len(observation)):
            own = observation.rows(torch.full((count * draws,), row, device=images.device))
            measured = own.physics.A(images.flatten(0, 1)).flatten(1).unflatten(0, (count, draws)).double()
            y, sigma_y = observation.y[row].flatten().double(), observation.sigma_y[row].double()
            if fitted is None or not fitted.belong_to(measured, sigma_y):  # rows often share their operator
                fitted = PromptWeights(measured, sigma_y)
            weights.append(fitted(y.unsqueeze(0))[0])
            residuals.append((measured[weights[-1].argmax()].mean(0) - y).square().mean().sqrt())
        found = torch.stack(weights)
        trace = Trace(torch.stack(residuals).unsqueeze(0).float(), found.unsqueeze(0).float())
        return self.first(observation), self.candidates.rows(found.argmax(1)), trace

    def candidate_images(self, observation: Observation) -> Tensor:
        """Return images drawn with each candidate [P, 2 pairs, C, H, W], made once for a size of images."""
        size = observation.image_shape[-2:]
        if size not in self.drawn:
            t, shape = self.last.times[0], (self.pairs, *self.prior.latent_shape(size))
            generator, found = torch.Generator().manual_seed(0), []
            for number in range(len(self.candidates)):
                prompt = self.candidates.rows(torch.tensor([number]))
                noise = torch.randn(shape, generator=generator).to(observation.y)
                for eps in torch.cat([noise, -noise]).split(self.chunk_size):
                    z_t = self.prior.noised(torch.zeros_like(eps), t, eps)
                    z0 = self.prior.estimate(z_t, t, prompt.expand(len(eps)))
                    found.append(self.prior.decode(z0).clamp(0, 1))
            self.drawn[size] = torch.cat(found).unflatten(0, (len(self.candidates), -1))
        return self.drawn[size]


class PromptWeights:
    """p(c_i | y) = softmax(beta log p(y | c_i)) of prompts that are all as likely before, from measured draws A u.

    So few draws make the densities too sure of themselves. beta, in [0, 1], is what tells measured draws apart as well
    as it says (temperature scaling; Guo et al., 2017): one half of the pairs is fitted, the other half, with noise,
    stands for observations, and the other way round; beta has the highest mean log p(c | y) of their own prompts.

    Args:
        measured: of draws of each prompt [P, 2 pairs, m], draw k + pairs with minus the noise of draw k.
        sigma_y: noise level of y.
    """

    def __init__(self, measured: Tensor, sigma_y: Tensor):
        self.measured, self.sigma_y = measured, sigma_y
        self.densities = LogDensities(measured, sigma_y)
        count, draws = measured.shape[:2]
        noise = torch.randn(measured.shape, generator=torch.Generator().manual_seed(0)).to(measured)
        observed, even = measured + sigma_y * noise, torch.arange(draws, device=measured.device) % (draws // 2) % 2 == 0
        scores, prompts = [], []
        for held in (even, ~even):
            scores.append(LogDensities(measured[:, ~held], sigma_y)(observed[:, held].flatten(0, 1)))
            prompts.append(torch.arange(count, device=measured.device).repeat_interleave(int(held.sum())))
        self.beta = tempering(torch.cat(scores), torch.cat(prompts))

    def belong_to(self, measured: Tensor, sigma_y: Tensor) -> bool:
        """Return whether they are those of these draws and this level."""
        return torch.equal(measured, self.measured) and bool(sigma_y == self.sigma_y)

    def __call__(self, y: Tensor) -> Tensor:
        """Return the weights [N, P] of observations y [N, m]."""
        return (self.beta * self.densities(y)).softmax(1)


def tempering(scores: Tensor, prompts: Tensor) -> float:
    """Return beta in [0, 1] with the largest mean of log softmax(beta s)_c, for scores s [N, P] and true prompts c [N].

    It is concave in beta: its slope, the mean of s_c less that of s under the weights, is bisected.
    """
    own = scores.gather(1, prompts.unsqueeze(1)).mean()
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        beta = (low + high) / 2
        rising = own > ((beta * scores).softmax(1) * scores).sum(1).mean()
        low, high = (beta, high) if rising else (low, beta)
    return high


class LogDensities:
    """log p(y | c_i), up to one constant, from measured draws A u.

    y given c_i is Student's t around the draws' mean, with n / 2 degrees of freedom, as for a covariance that is known
    from n / 2 independent draws (of a pair the second adds little to it), and the scale C_i = s^2 1 + (S_i + S) / 2:
    S_i of the draws of c_i, S the mean of all S_i, and s^2 = sigma_y^2 + ``SHRUNK`` tr(S) / m for what so few draws
    leave out. C_i is never built: S_i and S are of the same P n centred draws, with other weights, so that their one
    Gram matrix serves all prompts.

    Args:
        measured: of draws of each prompt [P, n, m].
        sigma_y: noise level of y.
    """

    def __init__(self, measured: Tensor, sigma_y: Tensor):
        count, draws, self.size = measured.shape
        self.freedom, self.means = draws / 2, measured.mean(1)
        self.factors = ((measured - self.means.unsqueeze(1)) / (2 * (draws - 1)) ** 0.5).flatten(0, 1)
        gram = self.factors @ self.factors.T
        self.noise = sigma_y**2 + SHRUNK * 2 * gram.trace() / (count * self.size)
        own = torch.eye(count).to(gram).repeat_interleave(draws, dim=1)
        self.roots = (own + 1 / count).sqrt()
        variances, self.vectors = torch.linalg.eigh(self.roots.unsqueeze(2) * gram * self.roots.unsqueeze(1))
        self.variances = variances.clamp(min=0)

    def __call__(self, y: Tensor) -> Tensor:
        """Return the densities [N, P] of observations y [N, m]."""
        offsets = y.unsqueeze(1) - self.means
        # (s^2 1 + R^T R)^-1 by Woodbury's identity, in the eigenvectors of R R^T, R the weighted draws
        along = torch.einsum("pij,npi->npj", self.vectors, self.roots * (offsets @ self.factors.T))
        within = along.square() / (self.noise + self.variances)
        distances = (offsets.square().sum(2) - within.sum(2)) / self.noise
        log_scales = (self.variances / self.noise).log1p().sum(1)
        return -((self.size + self.freedom) * torch.log1p(distances / self.freedom) + log_scales) / 2
