"""LATINO with the best of given prompts: y is compared with images that were drawn once with each of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ud2m.physics import Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.samplers.base import check_count
from ud2m.samplers.latent_latino import TIMES, StepRule
from ud2m.samplers.latino_pro import PromptEstimator, Trace, check_prompts
from ud2m.unfolded.warm_start import Start

SHRUNK = 0.01
"""Share of the mean variance that is added in all directions."""


class LatinoScores(PromptEstimator):
    """Takes that of given prompts which explains y best, and draws the sample with it: no gradient at all.

    Images are drawn with each prompt at the first time, and y is compared with what the operator makes of them
    (``log_densities``). They come from a fixed seed and know nothing of y: drawn once, they serve all images of a size.
    Differs from [LATINO-PRO], which has no such prompts. Evaluations: len(times), and 2 x pairs for each prompt once.

    Args:
        prior: as for ``PromptEstimator``.
        prompt: as for ``PromptEstimator``; reports show what the prior draws with it, beside the best one.
        candidates: two prompts at least.
        pairs: of images drawn with each prompt, with noise eps and -eps: their mean knows the mean of all images four
            times better (digits) than that of two other ones.
        times: as for ``PromptEstimator``, as the next ones.
        steps: of the data.
        start: of the chain.
        final: of the chain.
        chunk_size: as for ``PromptEstimator``, as the next one.
        listener: told of every batch.

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
    ):
        super().__init__(prior, prompt, times, steps, None, start, final, chunk_size, listener)
        check_count("pairs", pairs)
        self.texts, self.pairs = check_prompts(candidates), pairs
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
        scores, residuals = [], []
        for row in range(len(observation)):
            own = observation.rows(torch.full((count * draws,), row, device=images.device))
            measured = own.physics.A(images.flatten(0, 1)).flatten(1).unflatten(0, (count, draws)).double()
            y = observation.y[row].flatten().double()
            scores.append(log_densities(y, measured, observation.sigma_y[row].double()))
            residuals.append((measured.mean(1) - y).square().mean(1).sqrt()[scores[-1].argmax()])
        weights = torch.stack(scores).softmax(1)
        trace = Trace(torch.stack(residuals).unsqueeze(0).float(), weights.unsqueeze(0).float())
        return self.first(observation), self.candidates.rows(weights.argmax(1)), trace

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
