"""Latent priors with known answers, in place of ``LatentPrior``."""

import torch
from torch import Tensor, nn

from ud2m.priors.latent import NoiseTable, Prompt

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SIDE, NUMBERS, WIDTH = 8, 64, 5
"""Side of the images, numbers in their latents, and numbers in a prompt."""


def onto_y(prior, observation) -> tuple[Tensor, Tensor]:
    """Return A D without its constant, as a matrix, and y less the constant."""
    A = observation.physics.A(torch.eye(NUMBERS, dtype=torch.float64).view(NUMBERS, 1, SIDE, SIDE)).flatten(1).T
    return 0.05 * A @ prior.Q, observation.y.flatten() - A @ torch.full((NUMBERS,), 0.5, dtype=torch.float64)


class GaussianLatentPrior:
    """z | c ~ N(W c, diag(v)), x = 0.5 + 0.05 Q z with an orthogonal Q: everything about y is linear in c.

    G is the exact posterior mean E[z | z_t, c] = W c + a v (z_t - a W c) / (a^2 v + b^2).
    """

    fingerprint, captions = "gaussian", ()

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.W = torch.randn(NUMBERS, WIDTH, generator=generator, dtype=torch.float64)
        self.v = 0.05 + 0.5 * torch.rand(NUMBERS, generator=generator, dtype=torch.float64)
        square = torch.randn(NUMBERS, NUMBERS, generator=generator, dtype=torch.float64)
        self.Q = torch.linalg.qr(square)[0]
        self.table, self.network = NoiseTable(TABLE), nn.Identity()

    def prompt(self, given: Prompt) -> Prompt:
        return given

    def encode_prompt(self, texts: tuple[str, ...]) -> Prompt:
        """Return a random prompt for each number that is written in words."""
        rows = [torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(int(text))) for text in texts]
        return Prompt(torch.stack(rows), texts=tuple(texts))

    def check_image(self, channels: int, height: int, width: int) -> None:
        assert (channels, height, width) == (1, SIDE, SIDE)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (NUMBERS,)

    def encode(self, x: Tensor) -> Tensor:
        return ((x.flatten(1) - 0.5) / 0.05) @ self.Q

    def decode(self, z: Tensor) -> Tensor:
        return (0.5 + 0.05 * z @ self.Q.T).view(-1, 1, SIDE, SIDE)

    def noised(self, z: Tensor, t: int, eps: Tensor) -> Tensor:
        return self.table.noised(z, torch.full((len(z),), t), eps)

    def estimate(self, z_t: Tensor, t: int, prompt: Prompt) -> Tensor:
        self.network(z_t)  # a hook counts it
        a, b = self.table.columns(torch.full((len(z_t),), t), z_t)
        mean = prompt.embeds.flatten(1).to(z_t) @ self.W.T
        return mean + a * self.v * (z_t - a * mean) / (a**2 * self.v + b**2)
