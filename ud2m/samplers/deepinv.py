"""Published samplers with the same prior as ours: DDRM, DiffPIR and DPS of deepinv, PnP-Flow, long Langevin runs."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from types import SimpleNamespace
from typing import Any

import deepinv
import torch
from deepinv.optim.data_fidelity import L2
from deepinv.physics import DecomposablePhysics, LinearPhysics
from torch import Tensor, nn

from ud2m.physics import Adopted, DataTerm, Observation, Separable
from ud2m.physics.circular import RELATIVE_RANK_TOLERANCE, CircularDownsampling
from ud2m.priors.schedule import VPSchedule
from ud2m.random import global_draws
from ud2m.samplers.base import Sampler, check_count
from ud2m.unfolded.denoisers import symmetric

DDPM_TABLE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


class DeepinvDenoiser(deepinv.models.Denoiser):
    """Our ``denoiser(x_sigma, sigma [B])`` as a denoiser of deepinv, which also gives a number for all samples."""

    def __init__(self, denoiser: nn.Module, symmetries: int = 1):
        super().__init__()
        self.network = denoiser  # registered
        self.denoiser = symmetric(denoiser, symmetries, None)

    def forward(self, x: Tensor, sigma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return x0_hat for images x [B, C, H, W] in [0, 1] plus noise of level sigma in the same units."""
        return self.denoiser(x, torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(len(x)))


class PriorSampler(Sampler):
    """A published sampler with a frozen prior: all samples of one observation are one batch.

    Args:
        prior: ``denoiser(x_sigma, sigma) -> x0_hat``.
        chunk_size: samples that the network sees at once.
        symmetries: random orientations in which the network sees images: 1, 2 or 8 (``ud2m.unfolded.denoisers``).
    """

    takes = "every linear operator"
    """The operators that it takes, in words."""
    mixes_observations = False  # deepinv's samplers know one noise level and one operator

    def __init__(self, prior: nn.Module, chunk_size: int = 64, symmetries: int = 1):
        super().__init__([prior], chunk_size)
        self.denoiser = DeepinvDenoiser(prior, symmetries)

    def supports(self, physics: DataTerm) -> bool:
        """Return whether it can take the operator."""
        return isinstance(physics, LinearPhysics)

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError where the operator cannot be taken, with those that can be."""
        if not self.supports(physics):
            raise ValueError(
                f"{type(self).__name__} cannot take the operator {type(physics).__name__}; it takes {self.takes}"
            )

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row; the rows are copies of one observation."""
        y, one = observation.y, observation.rows(torch.tensor([0]))
        with global_draws(streams[0].initial_seed(), y.device):
            return self.run(y.clone(), one.physics, float(one.sigma_y)).to(y.dtype)

    @abstractmethod
    def run(self, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [S, ...], copies of one observation; noise is torch's global one."""


class Ddrm(PriorSampler):
    """DDRM (Kawar et al., NeurIPS 2022) of deepinv.

    Differs from deepinv: it halves the variance of all noise, which is right for the complex coefficients of a blur and
    wrong for real ones; those are handed to it divided by sqrt(2), so that the noise has the variance of the paper.

    Args:
        prior: as for ``PriorSampler``.
        chunk_size: as for ``PriorSampler``.
        symmetries: as for ``PriorSampler``.
        num_steps: levels, and network evaluations.
        eta: share of fresh noise, in the paper's notation.
        etab: share of y, in the paper's notation.
        power: exponent of the levels sigma(t_k), t_k = (T - 1) (1 - k / (num_steps - 1))^power of the DDPM table; 1 is
            the paper's uniform grid.
    """

    takes = (
        "operators with a known singular value decomposition: circular blur, super-resolution, masks, denoising, "
        "ddrm_blur and ddrm_super_resolution"
    )

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 20,
        eta: float = 0.85,
        etab: float = 1.0,
        power: float = 1.0,
        chunk_size: int = 64,
        symmetries: int = 1,
    ):
        super().__init__(prior, chunk_size, symmetries)
        if not isinstance(num_steps, int) or num_steps < 2:
            raise ValueError(f"DDRM needs num_steps of at least 2, got {num_steps!r}")
        if not 0 <= eta <= 1 or not 0 <= etab <= 1 or not power > 0:
            raise ValueError(f"DDRM needs eta and etab in [0, 1] and a positive power, got {eta}, {etab} and {power}")
        schedule = VPSchedule.from_config(DDPM_TABLE)
        t = (schedule.num_times - 1) * torch.linspace(1, 0, num_steps, dtype=torch.float64) ** power
        self.sampler = deepinv.sampling.DDRM(self.denoiser, schedule.sigma(t).tolist(), eta=eta, etab=etab)

    def supports(self, physics: DataTerm) -> bool:
        """Return whether there is a decomposition."""
        return isinstance(bare(physics), DecomposablePhysics | Separable | CircularDownsampling)

    def run(self, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [S, ...]."""
        parts = decomposition(bare(physics))
        scale = 1.0 if parts.is_complex else 2**0.5
        mask = parts.gains.expand(1, *parts.U_adjoint(y[:1]).shape[1:]).to(y.dtype)
        decomposed = SimpleNamespace(
            mask=mask,
            noise_model=SimpleNamespace(sigma=sigma_y),
            U_adjoint=lambda image: parts.U_adjoint(image) / scale,
            V_adjoint=lambda image: parts.V_adjoint(image) / scale,
            V=lambda coefficients: parts.V(scale * coefficients),
        )
        return self.sampler(y, decomposed)


def bare(physics: DataTerm) -> DataTerm:
    """Return an operator of deepinv as it came, where its own prox, and so its decomposition, is right."""
    return physics.inner if isinstance(physics, Adopted) and physics.exact else physics


@dataclass(frozen=True)
class Decomposition:
    """A = U diag(gains) V^T with V V^T = 1; complex coefficients lie as pairs of real ones.

    V may have more columns than an image has pixels (a Parseval frame): white noise of the coefficients is white noise
    of the image all the same.
    """

    gains: Tensor
    U_adjoint: Callable[[Tensor], Tensor]
    V_adjoint: Callable[[Tensor], Tensor]
    V: Callable[[Tensor], Tensor]
    is_complex: bool


@singledispatch
def decomposition(physics: DecomposablePhysics) -> Decomposition:
    """Return the singular value decomposition of an operator."""
    is_complex = isinstance(physics, deepinv.physics.BlurFFT)
    return Decomposition(physics.mask.abs(), physics.U_adjoint, physics.V_adjoint, physics.V, is_complex)


@decomposition.register
def _(physics: Separable) -> Decomposition:
    rows, columns = physics.rows, physics.columns
    side, rank = columns.shape
    complete, _ = torch.linalg.qr(columns, mode="complete")
    basis = torch.cat([columns, complete[:, rank:]], 1)
    room = (0, side - rank, 0, side - rank)

    def u_adjoint(y: Tensor) -> Tensor:
        matrix = rows.to(y.dtype)
        return nn.functional.pad(matrix.T @ y @ matrix, room)

    def v_adjoint(x: Tensor) -> Tensor:
        return basis.to(x.dtype).T @ x @ basis.to(x.dtype)

    def v(coefficients: Tensor) -> Tensor:
        return basis.to(coefficients.dtype) @ coefficients @ basis.to(coefficients.dtype).T

    gains = nn.functional.pad(physics.weights, room).unsqueeze(0)
    return Decomposition(gains, u_adjoint, v_adjoint, v, is_complex=False)


@decomposition.register
def _(physics: CircularDownsampling) -> Decomposition:
    """U is the Hartley transform, which is real and diagonalises A A^T; what A does not see stays an image.

    The coefficients are those of y, [B, C, h w], and after them the pixels of x - A^+ A x, [B, C, H W].
    """
    values = physics.singular_values()
    kept = values > RELATIVE_RANK_TOLERANCE * values.amax((-2, -1), keepdim=True)
    gains, inverse = values * kept, torch.where(kept, 1 / values, torch.zeros_like(values))
    channels, height, width = physics.img_size
    low = (height // physics.factor, width // physics.factor)

    def u_adjoint(y: Tensor) -> Tensor:
        return torch.cat([hartley(y).flatten(2), y.new_zeros(*y.shape[:2], height * width)], 2)

    def unseen(x: Tensor) -> Tensor:
        return x - physics.A_dagger(physics.A(x))

    def v_adjoint(x: Tensor) -> Tensor:
        seen = inverse.to(x.dtype) * hartley(physics.A(x))
        return torch.cat([seen.flatten(2), unseen(x).flatten(2)], 2)

    def v(coefficients: Tensor) -> Tensor:
        seen, rest = coefficients.tensor_split([low[0] * low[1]], 2)
        spread = physics.A_adjoint(hartley(inverse.to(seen.dtype) * seen.unflatten(2, low)))
        return spread + unseen(rest.unflatten(2, (height, width)))

    seen_gains = gains.expand(-1, channels, -1, -1).flatten(2)
    return Decomposition(
        torch.cat([seen_gains, seen_gains.new_zeros(len(seen_gains), channels, height * width)], 2),
        u_adjoint,
        v_adjoint,
        v,
        is_complex=False,
    )


def hartley(image: Tensor) -> Tensor:
    """Return the orthonormal two-dimensional Hartley transform, which is its own inverse (Bracewell, 1983)."""
    spectrum = torch.fft.fft2(image, norm="ortho")
    return spectrum.real - spectrum.imag


class DiffPir(PriorSampler):
    """DiffPIR (Zhu et al., CVPR workshops 2023) of deepinv, whose noise table is DDPM's.

    Args:
        prior: as for ``PriorSampler``.
        chunk_size: as for ``PriorSampler``.
        symmetries: as for ``PriorSampler``.
        num_steps: network evaluations.
        zeta: share of fresh noise.
        lambda_: weight of the prior's term.
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 100,
        zeta: float = 0.1,
        lambda_: float = 7.0,
        chunk_size: int = 64,
        symmetries: int = 1,
    ):
        super().__init__(prior, chunk_size, symmetries)
        check_count("num_steps of DiffPIR", num_steps)
        if not 0 <= zeta <= 1 or not lambda_ > 0:
            raise ValueError(f"DiffPIR needs zeta in [0, 1] and a positive lambda_, got {zeta} and {lambda_}")
        self.num_steps, self.zeta, self.lambda_ = num_steps, zeta, lambda_

    def run(self, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [S, ...]."""
        sampler = deepinv.sampling.DiffPIR(
            self.denoiser,
            L2(),
            sigma=sigma_y,
            max_iter=self.num_steps,
            zeta=self.zeta,
            lambda_=self.lambda_,
            device=str(y.device),
        )
        return sampler(y, physics)


class Dps(PriorSampler):
    """DPS (Chung et al., ICLR 2023) of deepinv. Each step also differentiates the network.

    Args:
        prior: as for ``PriorSampler``.
        chunk_size: as for ``PriorSampler``.
        symmetries: as for ``PriorSampler``.
        num_steps: of the solver; the paper takes 1000.
        weight: step size zeta' of the gradient of the residual norm.
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 1000,
        weight: float = 1.0,
        chunk_size: int = 16,
        symmetries: int = 1,
    ):
        super().__init__(prior, chunk_size, symmetries)
        if not isinstance(num_steps, int) or num_steps < 2 or not weight > 0:
            raise ValueError(f"DPS needs num_steps of at least 2 and a positive weight, got {num_steps!r} and {weight}")
        self.num_steps, self.weight = num_steps, weight

    def run(self, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [S, ...]."""
        sampler = deepinv.sampling.DPS(self.denoiser, num_steps=self.num_steps, weight=self.weight, device=y.device)
        return sampler(y, physics)


class PnpFlow(PriorSampler):
    """PnP-Flow (Martin et al., ICLR 2025), a flow matching method, with the flow that our denoiser implies.

    At time t = n / N of the straight path t x + (1 - t) eps between noise and images in [-1, 1], the flow's denoiser
    E[x | path] is ours at sigma = (1 - t) / (2 t) in [0, 1]. Each step is n = 1, ..., N - 1:
    x <- denoiser(x - w (1 - t)^alpha A^T (A x - y) / |A|^2 + sigma eps, sigma), from A^T y. With one draw of eps per
    step it samples; its authors average over five.

    Args:
        prior: as for ``PriorSampler``.
        chunk_size: as for ``PriorSampler``.
        symmetries: as for ``PriorSampler``.
        num_steps: N - 1, network evaluations.
        alpha: how fast the gradient steps shrink.
        weight: w, in (0, 2).
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 99,
        alpha: float = 0.5,
        weight: float = 1.0,
        chunk_size: int = 64,
        symmetries: int = 1,
    ):
        super().__init__(prior, chunk_size, symmetries)
        check_count("num_steps of PnP-Flow", num_steps)
        if not alpha >= 0 or not 0 < weight < 2:
            raise ValueError(f"PnP-Flow needs alpha of at least 0 and a weight in (0, 2), got {alpha} and {weight}")
        self.num_steps, self.alpha, self.weight = num_steps, alpha, weight

    def run(self, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [S, ...]."""
        x = physics.A_adjoint(y)
        norm = float(physics.compute_norm(torch.randn_like(x[:1]), verbose=False))
        for n in range(1, self.num_steps + 1):
            t = n / (self.num_steps + 1)
            sigma = (1 - t) / (2 * t)
            step = self.weight * (1 - t) ** self.alpha / norm
            x = x - step * physics.A_adjoint(physics.A(x) - y)
            x = self.denoiser(x + sigma * torch.randn_like(x), sigma)
        return x


class Langevin(PriorSampler):
    """A long run of unadjusted Langevin with the score of the denoiser (PnP-ULA, Laumont et al., SIAM J. Imaging 2022).

    x <- x + h (A^T (y - A x) / sigma_y^2 + (denoiser(x, sigma) - x) / sigma^2) + sqrt(2 h) eps, from A^T y. With the
    exact denoiser it samples the posterior under the prior smoothed by sigma, up to an error of order h. Adaptive steps
    or acceptance are not used.

    Args:
        prior: as for ``PriorSampler``.
        chunk_size: as for ``PriorSampler``.
        symmetries: as for ``PriorSampler``.
        num_steps: length of each chain, and network evaluations.
        sigma: level of the denoiser, image units.
        step: h as a share of the largest stable one, 2 / (g / sigma_y^2 + 1 / sigma^2), g the norm of A^T A; in (0, 1).
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 5000,
        sigma: float = 0.02,
        step: float = 0.25,
        chunk_size: int = 512,
        symmetries: int = 1,
    ):
        super().__init__(prior, chunk_size, symmetries)
        check_count("num_steps of Langevin", num_steps)
        if not sigma > 0 or not 0 < step < 1:
            raise ValueError(f"Langevin needs a positive sigma and a step in (0, 1), got {sigma} and {step}")
        self.num_steps, self.sigma, self.step = num_steps, sigma, step

    def run(self, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return the end of one chain for each y [S, ...]."""
        x = physics.A_adjoint(y)
        norm = float(physics.compute_norm(torch.randn_like(x[:1]), verbose=False))
        h = 2 * self.step / (norm / sigma_y**2 + 1 / self.sigma**2)
        for _ in range(self.num_steps):
            score = physics.A_adjoint(y - physics.A(x)) / sigma_y**2
            score = score + (self.denoiser(x, self.sigma) - x) / self.sigma**2
            x = x + h * score + (2 * h) ** 0.5 * torch.randn_like(x)
        return x
