"""A prior about which everything is known: a Gaussian mixture on small images, its denoiser and its posteriors."""

import math
from pathlib import Path

import torch
from deepinv.physics import LinearPhysics
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from sklearn.mixture import GaussianMixture as MixtureFit
from torch import Tensor, nn

from ud2m.files import write_bytes

SPREAD = 0.25
"""Typical standard deviation of images in [0, 1], which scales the inputs of a correction."""


class GaussianMixture(nn.Module):
    """p(x) = sum_j w_j N(x; m_j, C_j) on images of one small size, in float64.

    As a ``denoiser`` it returns the posterior mean E[x0 | x_sigma] exactly, at every noise level; for a linear operator
    and Gaussian noise p(x0 | y) is a mixture again (``posterior``). Density and denoiser follow from
    N(x_sigma; m_j, C_j + sigma^2 I) in the eigenbasis of each C_j.

    Args:
        weights: [J], positive; normalised here.
        means: [J, C, H, W].
        covariances: [J, n, n], n = C H W, symmetric and positive semi-definite.

    Raises:
        ValueError: when shapes do not fit, or a covariance is not positive semi-definite.
    """

    log_weights: Tensor
    means: Tensor
    bases: Tensor
    variances: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor):
        super().__init__()
        count, size = len(means), math.prod(means.shape[1:])
        if weights.shape != (count,) or not (weights > 0).all() or covariances.shape != (count, size, size):
            raise ValueError(
                f"a mixture needs positive weights [J], means [J, C, H, W] and covariances [J, n, n], got "
                f"{list(weights.shape)}, {list(means.shape)} and {list(covariances.shape)}"
            )
        variances, bases = torch.linalg.eigh(covariances.double())
        if not (variances >= -1e-9 * variances.abs().amax()).all():
            raise ValueError(f"a covariance has the negative eigenvalue {variances.min().item():.3g}")
        self.image_shape = tuple(means.shape[1:])
        self.register_buffer("log_weights", torch.log_softmax(weights.double().log(), 0))
        self.register_buffer("means", means.double().flatten(1))
        self.register_buffer("bases", bases)
        self.register_buffer("variances", variances.clamp_min(0))

    @classmethod
    def fit(cls, images: Tensor, count: int, ridge: float = 1e-4, seed: int = 0) -> "GaussianMixture":
        """Return the mixture of ``count`` components that scikit-learn fits to images [M, C, H, W] by EM.

        ``ridge`` is added to the diagonals of the covariances (image units squared).
        """
        fitted = MixtureFit(count, reg_covar=ridge, random_state=seed).fit(images.flatten(1).double().numpy())
        means = torch.from_numpy(fitted.means_).view(count, *images.shape[1:])
        return cls(torch.from_numpy(fitted.weights_), means, torch.from_numpy(fitted.covariances_))

    def save(self, path: Path) -> None:
        """Write weights, means and covariances as safetensors."""
        parts = {
            "weights": self.log_weights.exp(),
            "means": self.means.view(-1, *self.image_shape),
            "covariances": self.covariances(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({name: part.contiguous() for name, part in parts.items()}))

    @classmethod
    def load(cls, path: Path) -> "GaussianMixture":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it holds no mixture.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no mixture at {path}; fit one first")
        try:
            parts = load_file(path)
            return cls(parts["weights"], parts["means"], parts["covariances"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no Gaussian mixture ({error}); fit it again") from error

    def forward(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x_sigma] [B, C, H, W] for noise levels sigma [B], image units."""
        centred = self._centred(x_sigma)  # [J, B, n] in the eigenbases
        variances = self.variances.unsqueeze(1)
        share = variances / (variances + sigma.double().view(1, -1, 1) ** 2)
        parts = self.means.unsqueeze(1) + torch.einsum("jnk,jbk->jbn", self.bases, share * centred)
        weights = torch.softmax(self._log_terms(centred, sigma), 0)
        return torch.einsum("jb,jbn->bn", weights, parts).view_as(x_sigma).to(x_sigma.dtype)

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Return log p_sigma(x) [B], the density of x0 + sigma eps at x [B, C, H, W]."""
        level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        return torch.logsumexp(self._log_terms(self._centred(x), level), 0)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return independent draws [count, C, H, W]."""
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        eps = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        scaled = self.variances[which].sqrt() * eps.to(self.means.device)
        draws = self.means[which] + torch.einsum("bnk,bk->bn", self.bases[which], scaled)
        return draws.view(count, *self.image_shape)

    def mean(self) -> Tensor:
        """Return E[x] [C, H, W]."""
        return (self.log_weights.exp() @ self.means).view(self.image_shape)

    def covariance(self) -> Tensor:
        """Return Cov[x] [n, n]."""
        weights = self.log_weights.exp()
        spread = self.means - weights @ self.means
        within = torch.einsum("j,jnm->nm", weights, self.covariances())
        return within + torch.einsum("j,jn,jm->nm", weights, spread, spread)

    def covariances(self) -> Tensor:
        """Return C_j [J, n, n]."""
        return torch.einsum("jnk,jk,jmk->jnm", self.bases, self.variances, self.bases)

    def posterior(self, y: Tensor, physics: LinearPhysics, sigma_y: float) -> "GaussianMixture":
        """Return p(x0 | y) for one observation y = A x0 + sigma_y w.

        Component j has weight w_j N(y; A m_j, S_j), S_j = A C_j A^T + sigma_y^2 I, and with K_j = C_j A^T S_j^-1 the
        mean m_j + K_j (y - A m_j) and the covariance C_j - K_j A C_j.

        Args:
            y: [1, ...].
            physics: of that observation.
            sigma_y: > 0, image units.

        Raises:
            ValueError: when sigma_y is not positive, or there are several observations.
        """
        if len(y) != 1 or not sigma_y > 0:
            raise ValueError(f"one observation and a positive sigma_y are needed, got {len(y)} and {sigma_y:g}")
        A = dense_matrix(physics, self.image_shape)
        prior = self.covariances()
        cross = prior @ A.T
        S = A @ cross + sigma_y**2 * torch.eye(len(A), dtype=A.dtype)
        error = y.double().flatten() - self.means @ A.T
        factor = torch.linalg.cholesky(S)
        solved = torch.cholesky_solve(error.unsqueeze(-1), factor)
        means = self.means + (cross @ solved).squeeze(-1)
        covariances = prior - cross @ torch.cholesky_solve(cross.transpose(1, 2), factor)
        evidence = -0.5 * (error.unsqueeze(1) @ solved).flatten() - factor.diagonal(dim1=1, dim2=2).log().sum(1)
        weights = torch.softmax(self.log_weights + evidence, 0).clamp_min(1e-300)
        symmetric = (covariances + covariances.transpose(1, 2)) / 2
        return GaussianMixture(weights, means.view(-1, *self.image_shape), symmetric)

    def _centred(self, x: Tensor) -> Tensor:
        error = x.double().flatten(1) - self.means.unsqueeze(1)
        return torch.einsum("jnk,jbn->jbk", self.bases, error)

    def _log_terms(self, centred: Tensor, sigma: Tensor) -> Tensor:
        total = self.variances.unsqueeze(1) + sigma.double().view(1, -1, 1) ** 2
        exponent = (centred**2 / total + total.log()).sum(-1) + centred.shape[-1] * math.log(2 * math.pi)
        return self.log_weights.view(-1, 1) - exponent / 2


class AdaptedMixture(nn.Module):
    """The denoiser of a mixture plus a trainable correction that is 0 at first: what LoRA is to a network.

    x0_hat = E[x0 | x_sigma] + s f(x_sigma, E[x0 | x_sigma], log sigma), s = sigma / sqrt(1 + sigma^2 / ``SPREAD``^2),
    with a small dense network f whose last layer starts at 0.

    Args:
        mixture: frozen.
        width: of the two hidden layers.
    """

    def __init__(self, mixture: GaussianMixture, width: int = 128):
        super().__init__()
        size = math.prod(mixture.image_shape)
        self.mixture = mixture
        self.correction = nn.Sequential(
            nn.Linear(2 * size + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size)
        )
        for parameter in self.correction[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """Return x0_hat [B, C, H, W] for noise levels sigma [B], image units."""
        x0_hat = self.mixture(x_sigma, sigma)
        level = sigma.view(-1, 1)
        seen = (x_sigma.flatten(1) - 0.5) / (level**2 + SPREAD**2).sqrt()
        inputs = torch.cat([seen, (x0_hat.flatten(1) - 0.5) / SPREAD, level.log()], 1)
        scale = level / (1 + level**2 / SPREAD**2).sqrt()
        return x0_hat + (scale * self.correction(inputs)).view_as(x0_hat)


def dense_matrix(physics: LinearPhysics, image_shape: tuple[int, ...]) -> Tensor:
    """Return the matrix [m, n] of an operator for one image, in float64, column by column."""
    size = math.prod(image_shape)
    units = torch.eye(size, dtype=torch.float64).view(size, 1, *image_shape)
    return torch.stack([physics.A(unit).flatten() for unit in units], 1)
