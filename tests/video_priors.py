"""Priors of videos and of frames with known answers, in place of ``LatentPrior``."""

import torch
from torch import Tensor, nn

from ud2m.priors.latent import NoiseTable, Prompt

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


class IdentityPrior:
    """Latents are 4 (x - 1/2); G returns z_t / a. It notes how many frames it saw at once.

    With ``stride`` above 1 the first latent frame is the first frame, and each further one the mean of so many.
    """

    fingerprint, reference, latent_channels, channels = "stub", "stub", 1, 1

    def __init__(self, video: bool, stride: int = 1):
        self.video, self.stride = video, stride if video else None
        self.table, self.network, self.seen = NoiseTable(FLOW if video else VP), nn.Identity(), []

    def prompt(self, given) -> Prompt:
        return Prompt(torch.zeros(1, 1, 1), texts=(str(given),))

    def check_size(self, *sides: int) -> None:
        assert len(sides) == (3 if self.video else 2)

    def latent_shape(self, sides) -> tuple[int, ...]:
        *frames, height, width = sides
        return (1, *((count - 1) // self.stride + 1 for count in frames), height, width)

    def encode(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[2] if self.video else len(x))
        if self.video and self.stride > 1:
            assert (x.shape[2] - 1) % self.stride == 0
            later = x[:, :, 1:].unflatten(2, (-1, self.stride)).mean(3)
            x = torch.cat([x[:, :, :1], later], 2)
        return 4 * (x - 0.5)

    def decode(self, z: Tensor) -> Tensor:
        if self.video and self.stride > 1:
            z = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(self.stride, 2)], 2)
        return 0.5 + z / 4

    def noised(self, z: Tensor, t: int, eps: Tensor) -> Tensor:
        return self.table.noised(z, torch.full((len(z),), t), eps)

    def estimate(self, z_t: Tensor, t: int, prompt: Prompt) -> Tensor:
        self.network(z_t)  # a hook counts it
        a, _ = self.table.columns(torch.full((len(z_t),), t), z_t)
        return self.denoised(z_t / a, t)

    def denoised(self, z: Tensor, t: int) -> Tensor:
        return z


class GaussianPrior(IdentityPrior):
    """z ~ N(mean, covariance) over all pixels of a clip, or of a frame; G is the exact E[z | z_t]."""

    def __init__(self, video: bool, *sides: int, seed: int = 0):
        super().__init__(video)
        generator, n = torch.Generator().manual_seed(seed), torch.Size(sides).numel()
        self.mean = 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        self.covariance = 0.1 * torch.eye(n, dtype=torch.float64) + root @ root.T / n

    def denoised(self, z: Tensor, t: int) -> Tensor:
        a, b = (float(root) for root in self.table.roots(torch.tensor([t])))
        flat = z.flatten(1) - self.mean
        system = self.covariance + (b / a) ** 2 * torch.eye(len(self.mean), dtype=torch.float64)
        return (self.mean + flat @ torch.linalg.solve(system, self.covariance)).view_as(z)


class OffsetPrior(IdentityPrior):
    """Every other time that it is asked its estimate is brighter, else darker, by ``OFFSET`` of image units."""

    OFFSET = 0.1

    def __init__(self, stride: int):
        super().__init__(True, stride)
        self.sign = 1

    def denoised(self, z: Tensor, t: int) -> Tensor:
        self.sign = -self.sign
        return z + 4 * self.sign * self.OFFSET
