"""Published samplers with the same prior as ours: DDRM, DiffPIR and DPS of deepinv, PnP-Flow, long Langevin runs."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from types import SimpleNamespace
from typing import Any, cast

import deepinv
import torch
from deepinv.optim.data_fidelity import L2
from deepinv.physics import DecomposablePhysics, LinearPhysics
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ud2m.numbers import is_whole
from ud2m.physics import Adopted, DataTerm, Observation, Separable, largest_gain, per_sample
from ud2m.physics.circular import RELATIVE_RANK_TOLERANCE, CircularDownsampling
from ud2m.priors.schedule import VPSchedule
from ud2m.random import randn_like
from ud2m.samplers.base import PriorSampler, check_count
from ud2m.unfolded.denoisers import Denoiser

DDPM_TABLE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


class DeepinvDenoiser(deepinv.models.Denoiser):
    """Our ``denoiser(x_sigma, sigma [B])`` as a denoiser of deepinv, which also gives a number for all samples."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return x0_hat for images x [B, C, H, W] in [0, 1] plus noise of level sigma in the same units."""
        return self.denoiser(x, torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(len(x)))


class LinearSampler(PriorSampler):
    """A published sampler with a frozen prior, for linear operators."""

    takes = "every linear operator"
    """The operators that it takes, in words."""

    def supports(self, physics: DataTerm) -> bool:
        """Return whether it can take the operator."""
        return isinstance(physics, LinearPhysics)

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError where the operator cannot be taken, with those that can be."""
        if not self.supports(physics):
            raise ValueError(
                f"{type(self).__name__} cannot take the operator {type(physics).__name__}; it takes {self.takes}"
            )


class DeepinvSampler(LinearSampler):
    """A sampler of deepinv. These know one noise level: rows of equal ones are a batch."""

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        y, levels = observation.y, observation.sigma_y
        drawn = torch.empty(len(y), *observation.image_shape, dtype=y.dtype, device=y.device)
        for level in levels.unique():
            rows = torch.nonzero(levels == level)[:, 0]
            part, of_rows = observation.rows(rows), [streams[row] for row in rows.tolist()]
            with RowNoise(of_rows):
                samples = self.run(DeepinvDenoiser(self.denoiser(of_rows)), part.y, part.physics, float(level))
            drawn[rows] = samples.to(y.dtype)
        return drawn

    @abstractmethod
    def run(self, denoiser: DeepinvDenoiser, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [B, ...]; noise is torch's global one."""


class RowNoise(TorchFunctionMode):
    """Inside, deepinv's normal noise comes from a stream for each row in place of torch's global source.

    With one observation and torch's seed that of its stream, deepinv by itself draws the same numbers.

    Args:
        streams: as many as rows.
    """

    def __init__(self, streams: list[torch.Generator]):
        super().__init__()
        self.streams = streams

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or draw what it would draw."""
        options = kwargs or {}
        if options.get("generator") is None:
            if function is torch.randn:  # of a shape, and with keywords for the rest, as deepinv calls it
                return self._drawn(torch.empty(*args, dtype=options.get("dtype"), device=options.get("device")))
            if function in (torch.randn_like, Tensor.normal_):
                return self._drawn(args[0])
        return function(*args, **options)

    def _drawn(self, like: Tensor) -> Tensor:
        # a batch may have leading dimensions of one
        return randn_like(like.reshape(len(self.streams), -1), self.streams).view(like.shape)


class Ddrm(DeepinvSampler):
    """DDRM (Kawar et al., NeurIPS 2022) of deepinv.

    Differs from deepinv: it halves the variance of all noise, which is right for the complex coefficients of a blur and
    wrong for real ones; those are handed to it divided by sqrt(2), so that the noise has the variance of the paper.

    Args:
        prior: see ``PriorSampler``.
        num_steps: levels, and network evaluations.
        eta: share of fresh noise, in the paper's notation.
        etab: share of y, in the paper's notation.
        power: exponent of the levels sigma(t_k), t_k = (T - 1) (1 - k / (num_steps - 1))^power of the DDPM table; 1 is
            the paper's uniform grid.
        options: of ``PriorSampler``.
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
        **options: Any,
    ):
        super().__init__(prior, **options)
        if not is_whole(num_steps) or num_steps < 2:
            raise ValueError(f"DDRM needs num_steps of at least 2, got {num_steps!r}")
        if not 0 <= eta <= 1 or not 0 <= etab <= 1 or not power > 0:
            raise ValueError(f"DDRM needs eta and etab in [0, 1] and a positive power, got {eta}, {etab} and {power}")
        schedule = VPSchedule.from_config(DDPM_TABLE)
        t = (schedule.num_times - 1) * torch.linspace(1, 0, num_steps, dtype=torch.float64) ** power
        self.levels, self.eta, self.etab = schedule.sigma(t).tolist(), eta, etab

    def supports(self, physics: DataTerm) -> bool:
        """Return whether there is a decomposition."""
        return isinstance(bare(physics), DecomposablePhysics | Separable | CircularDownsampling)

    def run(self, denoiser: DeepinvDenoiser, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [B, ...].

        deepinv repeats the operator's gains for every y; so that each may have its own, the batch is one y to it.
        """
        parts = decomposition(bare(physics))
        scale = 1.0 if parts.is_complex else 2**0.5
        y_bar = parts.U_adjoint(y) / scale
        decomposed = SimpleNamespace(
            mask=parts.gains.to(y.dtype).expand_as(y_bar).unsqueeze(0),
            noise_model=SimpleNamespace(sigma=sigma_y),
            U_adjoint=lambda _: y_bar.unsqueeze(0),
            V_adjoint=lambda image: parts.V_adjoint(image).unsqueeze(0) / scale,
            V=lambda coefficients: parts.V(scale * coefficients.squeeze(0)),
        )
        return deepinv.sampling.DDRM(denoiser, self.levels, eta=self.eta, etab=self.etab)(y.unsqueeze(0), decomposed)


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
    """V and Q are completed to bases: what A does not see has the gain 0."""
    v, q = _completed(physics.v), _completed(physics.q)
    room = (0, len(q) - physics.q.shape[1], 0, len(v) - physics.v.shape[1])

    def u_adjoint(y: Tensor) -> Tensor:
        return nn.functional.pad(physics.u.to(y.dtype).T @ y @ physics.p.to(y.dtype), room)

    def v_adjoint(x: Tensor) -> Tensor:
        return v.to(x.dtype).T @ x @ q.to(x.dtype)

    def synthesis(coefficients: Tensor) -> Tensor:
        return v.to(coefficients.dtype) @ coefficients @ q.to(coefficients.dtype).T

    gains = nn.functional.pad(physics.weights, room).unsqueeze(0)
    return Decomposition(gains, u_adjoint, v_adjoint, synthesis, is_complex=False)


def _completed(columns: Tensor) -> Tensor:
    """Return an orthonormal basis [n, n] that begins with the orthonormal columns [n, rank]."""
    complete, _ = torch.linalg.qr(columns, mode="complete")
    return torch.cat([columns, complete[:, columns.shape[1] :]], 1)


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


class DiffPir(DeepinvSampler):
    """DiffPIR (Zhu et al., CVPR workshops 2023) of deepinv, whose noise table is DDPM's.

    Args:
        prior: see ``PriorSampler``.
        num_steps: network evaluations.
        zeta: share of fresh noise.
        lambda_: weight of the prior's term.
        options: of ``PriorSampler``.
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 100,
        zeta: float = 0.1,
        lambda_: float = 7.0,
        **options: Any,
    ):
        super().__init__(prior, **options)
        check_count("num_steps of DiffPIR", num_steps)
        if not 0 <= zeta <= 1 or not lambda_ > 0:
            raise ValueError(f"DiffPIR needs zeta in [0, 1] and a positive lambda_, got {zeta} and {lambda_}")
        self.num_steps, self.zeta, self.lambda_ = num_steps, zeta, lambda_

    def run(self, denoiser: DeepinvDenoiser, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [B, ...]."""
        sampler = deepinv.sampling.DiffPIR(
            denoiser,
            L2(),
            sigma=sigma_y,
            max_iter=self.num_steps,
            zeta=self.zeta,
            lambda_=self.lambda_,
            device=str(y.device),
        )
        return sampler(y, physics)


class Dps(DeepinvSampler):
    """DPS (Chung et al., ICLR 2023) of deepinv. Each step also differentiates the network.

    Args:
        prior: see ``PriorSampler``.
        num_steps: of the solver; the paper takes 1000.
        weight: step size zeta' of the gradient of the residual norm.
        options: of ``PriorSampler``: its chunk size is 16 unless given, as gradients take memory.
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 1000,
        weight: float = 1.0,
        **options: Any,
    ):
        super().__init__(prior, **({"chunk_size": 16} | options))
        if not is_whole(num_steps) or num_steps < 2 or not weight > 0:
            raise ValueError(f"DPS needs num_steps of at least 2 and a positive weight, got {num_steps!r} and {weight}")
        self.num_steps, self.weight = num_steps, weight

    def run(self, denoiser: DeepinvDenoiser, y: Tensor, physics: Any, sigma_y: float) -> Tensor:
        """Return one sample for each y [B, ...]."""
        sampler = deepinv.sampling.DPS(denoiser, num_steps=self.num_steps, weight=self.weight, device=y.device)
        return sampler(y, physics)


class PnpFlow(LinearSampler):
    """PnP-Flow (Martin et al., ICLR 2025), a flow matching method, with the flow that our denoiser implies.

    At time t = n / N of the straight path t x + (1 - t) eps between noise and images in [-1, 1], the flow's denoiser
    E[x | path] is ours at sigma = (1 - t) / (2 t) in [0, 1]. Each step is n = 1, ..., N - 1:
    x <- denoiser(x - w (1 - t)^alpha A^T (A x - y) / |A|^2 + sigma eps, sigma), from A^T y. With one draw of eps per
    step it samples; its authors average over five.

    Args:
        prior: see ``PriorSampler``.
        num_steps: N - 1, network evaluations.
        alpha: how fast the gradient steps shrink.
        weight: w, in (0, 2).
        options: of ``PriorSampler``.
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 99,
        alpha: float = 0.5,
        weight: float = 1.0,
        **options: Any,
    ):
        super().__init__(prior, **options)
        check_count("num_steps of PnP-Flow", num_steps)
        if not alpha >= 0 or not 0 < weight < 2:
            raise ValueError(f"PnP-Flow needs alpha of at least 0 and a weight in (0, 2), got {alpha} and {weight}")
        self.num_steps, self.alpha, self.weight = num_steps, alpha, weight

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        y, physics, denoiser = observation.y, cast(LinearPhysics, observation.physics), self.denoiser(streams)
        x = physics.A_adjoint(y)
        norm = per_sample(largest_gain(physics, x), x)
        for n in range(1, self.num_steps + 1):
            t = n / (self.num_steps + 1)
            sigma = (1 - t) / (2 * t)
            step = self.weight * (1 - t) ** self.alpha / norm
            x = x - step * physics.A_adjoint(physics.A(x) - y)
            x = denoiser(x + sigma * randn_like(x, streams), torch.full_like(observation.sigma_y, sigma))
        return x


class Langevin(LinearSampler):
    """A long run of unadjusted Langevin with the score of the denoiser (PnP-ULA, Laumont et al., SIAM J. Imaging 2022).

    x <- x + h (A^T (y - A x) / sigma_y^2 + (denoiser(x, sigma) - x) / sigma^2) + sqrt(2 h) eps, from A^T y. With the
    exact denoiser it samples the posterior under the prior smoothed by sigma, up to an error of order h. Adaptive steps
    or acceptance are not used.

    Args:
        prior: see ``PriorSampler``.
        num_steps: length of each chain, and network evaluations.
        sigma: level of the denoiser, image units.
        step: h as a share of the largest stable one, 2 / (g / sigma_y^2 + 1 / sigma^2), g the norm of A^T A; in (0, 1).
        options: of ``PriorSampler``.
    """

    def __init__(
        self,
        prior: nn.Module,
        num_steps: int = 5000,
        sigma: float = 0.02,
        step: float = 0.25,
        **options: Any,
    ):
        super().__init__(prior, **options)
        check_count("num_steps of Langevin", num_steps)
        if not sigma > 0 or not 0 < step < 1:
            raise ValueError(f"Langevin needs a positive sigma and a step in (0, 1), got {sigma} and {step}")
        self.num_steps, self.sigma, self.step = num_steps, sigma, step

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return the end of one chain for each row."""
        y, physics, denoiser = observation.y, cast(LinearPhysics, observation.physics), self.denoiser(streams)
        x = physics.A_adjoint(y)
        variance, level = per_sample(observation.sigma_y, x) ** 2, torch.full_like(observation.sigma_y, self.sigma)
        h = 2 * self.step / (per_sample(largest_gain(physics, x), x) / variance + 1 / self.sigma**2)
        for _ in range(self.num_steps):
            score = physics.A_adjoint(y - physics.A(x)) / variance
            score = score + (denoiser(x, level) - x) / self.sigma**2
            x = x + h * score + (2 * h) ** 0.5 * randn_like(x, streams)
        return x
