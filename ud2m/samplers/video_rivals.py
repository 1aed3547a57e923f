"""What LVTINO is compared with: ADMM-TV, VISION-XL, and LATINO frame by frame."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ud2m.physics import DataTerm, Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.random import randn_like
from ud2m.samplers.base import Sampler, check_count, check_positive
from ud2m.samplers.latent_latino import TIMES, LatentSampler, StepRule, check_times
from ud2m.samplers.lvtino import check_video, frame_by_frame
from ud2m.unfolded.prox import joint_prox
from ud2m.unfolded.total_variation import primal_dual


class AdmmTv(Sampler):
    """The minimum of |A x - y|^2 / (2 sigma_y^2) + TV(x), by ADMM (Boyd et al., 2011); nothing is drawn or learnt.

    x is the operator's prox at v - s, v the TV denoising of x + s, s <- s + x - v, with one step size delta.

    Args:
        space: weight of differences between pixels in TV (``total_variation``), per image unit.
        time: weight of differences between frames.
        delta: step size, image units squared: of the way there, not of the result.
        iterations: of ADMM.
        inner: of each denoising.

    Raises:
        ValueError: for numbers out of range.
    """

    draws = False
    title = "ADMM-TV"

    def __init__(
        self, space: float = 3.0, time: float = 3.0, delta: float = 1e-2, iterations: int = 100, inner: int = 20
    ):
        super().__init__()
        for name, value in {"space": space, "time": time, "delta": delta}.items():
            check_positive(name, value)
        for name, count in {"iterations": iterations, "inner": inner}.items():
            check_count(name, count)
        self.space, self.time, self.delta, self.iterations, self.inner = space, time, delta, iterations, inner

    def nfe(self) -> int:
        """Return 0: there is no network."""
        return 0

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError for operators on images."""
        check_video(self.title, physics)

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return the minimum for each row."""
        v = observation.physics.A_dagger(observation.y)
        s, p = torch.zeros_like(v), None
        back_to_data = joint_prox(observation, v, math.inf, self.delta, 1.0)
        for _ in range(self.iterations):
            x = back_to_data(v - s)
            v, p = primal_dual(lambda u: u, x + s, self.delta, self.space, self.time, self.inner, p)
            s = s + x - v
        return v


class VisionXl(LatentSampler):
    """VISION-XL (Kwon and Ye, 2024): an image prior frame by frame, held together by one noise for all frames.

    From the start that follows from y the latents of the first frame are taken up to the first time by inverted DDIM
    steps, and copied to all frames. For each time: z0 = G(z_t, t, c); x = the data step of D(z0), all frames together,
    smoothed by a Gaussian of sqrt(2) b pixels; z = a' E(x) + b' (sqrt(1 - eta^2) eps_hat + eta eps). Differs from the
    authors' code: no guidance, and the prox of ``steps`` in place of ten conjugate gradients.

    Args:
        prior: of images.
        prompt: as for ``LatentSampler``.
        times: falling; the last 8 of 25 by default.
        eta: share of fresh noise, in [0, 1].
        steps: as for ``LatentSampler``.
        chunk_size: as for ``LatentSampler``.

    Raises:
        ValueError: for a prior of videos, and numbers out of range.
    """

    title = "VISION-XL"

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "a high resolution photo",
        times: Sequence[int] = (281, 241, 201, 161, 121, 81, 41, 1),
        eta: float = 0.2,
        steps: StepRule | None = None,
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, steps, chunk_size=chunk_size)
        check_times(times, prior)
        if prior.video or not 0 <= eta <= 1:
            raise ValueError(f"VISION-XL needs a pipeline of images and eta in [0, 1], got {prior.reference} and {eta}")
        self.times, self.eta = tuple(times), eta

    def nfe(self) -> int:
        """Return network evaluations of each frame, without those of the first frame's inversion."""
        return len(self.times)

    def images_at_once(self, observation: Observation) -> int:
        """Return 1: the frames of a clip are seen ``chunk_size`` at once."""
        return 1

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError for operators on images, and for frames that the prior cannot take."""
        check_video(self.title, physics, self.prior)

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row, of which there is one."""
        x = self.first(observation)
        z = self.prior.encode(x[:, :, 0])
        for t, later in pairwise(reversed(self.times)):
            z0 = self.prior.estimate(z, t, self.prompt)
            z = self.prior.noised(z0, later, self.prior.table.eps(z0, z, torch.tensor([t])))
        z = z.expand(x.shape[2], *z.shape[1:])
        for t, later in zip(self.times, (*self.times[1:], -1), strict=True):
            z0 = torch.cat([self.prior.estimate(part, t, self.prompt) for part in z.split(self.chunk_size)])
            eps = self.prior.table.eps(z0, z, torch.full((len(z),), t))
            frames = torch.cat([self.prior.decode(part) for part in z0.split(self.chunk_size)]).clamp(0, 1)
            x = self.back_to_data(frames.unsqueeze(0).transpose(1, 2), t, observation)
            if later >= 0:
                fresh = randn_like(z[:1], streams)
                frames = low_pass(x[0].transpose(0, 1), 2**0.5 * self.prior.table.at(t)[1])
                z0 = torch.cat([self.prior.encode(part) for part in frames.split(self.chunk_size)])
                z = self.prior.noised(z0, later, (1 - self.eta**2) ** 0.5 * eps + self.eta * fresh)
        return x


class FrameLatino(LatentSampler):
    """LATINO with an image prior on each frame, with noise of its own; frames meet in the data step alone.

    Args:
        prior: of images.
        prompt: as for ``LatentSampler``.
        times: as for ``LatentLatino``.
        steps: as for ``LatentSampler``.
        chunk_size: frames that the prior sees at once.

    Raises:
        ValueError: for a prior of videos, and times that do not fall.
    """

    title = "LATINO by frame"

    def __init__(
        self,
        prior: LatentPrior,
        prompt: str | Prompt = "",
        times: Sequence[int] = TIMES,
        steps: StepRule | None = None,
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, steps, chunk_size=chunk_size)
        check_times(times, prior)
        if prior.video:
            raise ValueError(f"LATINO by frame needs a pipeline of images, got {prior.reference}")
        self.times = tuple(times)

    def nfe(self) -> int:
        """Return network evaluations of each frame."""
        return len(self.times)

    def evaluations_of(self, observation: Observation) -> int:
        """Return network evaluations of all frames."""
        return len(self.times) * observation.image_shape[1]

    def images_at_once(self, observation: Observation) -> int:
        """Return how many clips are restored at once."""
        return max(1, self.chunk_size // observation.image_shape[1])

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError for operators on images, and for frames that the prior cannot take."""
        check_video(self.title, physics, self.prior)

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        x = self.first(observation)
        shape = (x.shape[2], *self.prior.latent_shape(tuple(x.shape[3:])))
        for t in self.times:
            eps = randn_like(x.new_empty(len(x), *shape), streams).flatten(0, 1)
            x = self.back_to_data(frame_by_frame(self.prior, x, t, eps, self.prompt, self.chunk_size), t, observation)
        return x


def low_pass(x: Tensor, width: float) -> Tensor:
    """Return frames [T, C, H, W] after a Gaussian of this standard deviation in pixels, cut at 3 of them."""
    side = 2 * math.ceil(3 * width) + 1
    return gaussian_blur(x, [side, side], [width, width])
