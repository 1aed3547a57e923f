"""Diffusion bridges from a degraded image to a clean one: the image-to-image baselines I2SB and CDDB.

[I2SB] Liu et al., "I2SB: Image-to-image Schroedinger bridge", ICML 2023. [CDDB] Chung et al., "Direct diffusion bridge
using data consistency for inverse problems", NeurIPS 2023.
"""

import itertools
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ud2m.files import atomic_folder, parse_json
from ud2m.physics import DataTerm, Observation
from ud2m.physics.rows import per_sample
from ud2m.precision import find_device
from ud2m.priors.shipped import SCHEDULER_FILE
from ud2m.priors.store import load_network, save_prior, weights_fingerprint
from ud2m.random import randn_like
from ud2m.samplers.base import Sampler, check_count
from ud2m.unfolded.denoisers import in_precision
from ud2m.unfolded.warm_start import SmoothingStart, start_from_y

KIND = "Bridge"
LAST_TIME = 999
"""Time that the network is told at t = 1, where a prior that it begins as has its last one."""


class BridgeSchedule:
    """Noise of a Brownian bridge between a clean image (t = 0) and a degraded one (t = 1) [I2SB, section 3].

    The diffusion beta(t) is symmetric: sqrt(beta) rises linearly from sqrt(beta_min), at a rate that would reach
    sqrt(beta_max) at t = 1, until t = 1/2, and falls back. sigma_t^2 is its integral from 0 to t, in closed form.

    Args:
        beta_min: beta at both ends, for images in [-1, 1] as in the authors' code (variances here: images in [0, 1]).
        beta_max: what the rise would reach at t = 1, in the same units.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 0.3):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"a bridge needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def variance(self, t: Tensor) -> Tensor:
        """Return sigma_t^2 for times t in [0, 1]."""
        whole = self._rising(torch.full_like(t, 0.5))
        return self._rising(t.clamp(max=0.5)) + whole - self._rising((1 - t).clamp(max=0.5))

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return w and s of x_t = (1 - w) x0 + w x1 + s eps [I2SB, proposition 3.3], for both ends known."""
        share = self.variance(t) / self.variance(torch.ones_like(t))
        return share, (self.variance(t) * (1 - share)).sqrt()

    def step(self, t: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Return w and s of x_earlier = (1 - w) x0 + w x_t + s eps, the law given x0 and x_t."""
        share = self.variance(earlier) / self.variance(t)
        return share, (self.variance(earlier) * (1 - share)).sqrt()

    def _rising(self, t: Tensor) -> Tensor:
        start, slope = self.beta_min**0.5, self.beta_max**0.5 - self.beta_min**0.5
        return (start**2 * t + start * slope * t**2 + slope**2 * t**3 / 3) / 4


class Bridge(nn.Module):
    """The network of a bridge: x_t, t -> eps, an estimate of (x_t - x0) / sigma_t.

    Differs from [I2SB], whose degraded end is y, or y brought to image size: here it is the warm start made from y.

    Args:
        unet: as of a prior; the first C of its output channels are used.
        schedule: of the noise.
        start: see above.
    """

    def __init__(self, unet: UNet2DModel, schedule: BridgeSchedule, start: SmoothingStart):
        super().__init__()
        self.unet, self.schedule, self.start = unet, schedule, start

    @property
    def channels(self) -> int:
        """C of the images."""
        return int(self.unet.config.in_channels)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return eps [B, C, H, W] for x_t [B, C, H, W] in image units and times t [B]."""
        return self.unet(2 * x_t - 1, LAST_TIME * t).sample[:, : x_t.shape[1]].to(x_t.dtype)

    def degraded(self, observation: Observation) -> Tensor:
        """Return x1 [B, C, H, W], the end at t = 1."""
        return start_from_y(self.start, observation)

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the estimate of the clean image [B, C, H, W]."""
        return x_t - self.schedule.variance(t).sqrt().view(-1, 1, 1, 1) * self(x_t, t)

    def save(self, folder: Path) -> None:
        """Write a folder that ``load`` reads: the network as of a prior (fp16), the rest as JSON."""
        settings = {
            "_class_name": KIND,
            "beta_min": self.schedule.beta_min,
            "beta_max": self.schedule.beta_max,
            "scales": list(self.start.scales),
            "deviation": self.start.deviation,
        }
        with atomic_folder(folder, overwrite=True) as partial:
            save_prior(self.unet, settings, partial)

    @classmethod
    def load(cls, folder: str | Path) -> "Bridge":
        """Read a folder that ``save`` wrote.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is no bridge, or damaged.
        """
        path = Path(folder) / SCHEDULER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no trained bridge: it has no {SCHEDULER_FILE}")
        settings = parse_json(path.read_text())
        if settings.get("_class_name") != KIND:
            raise ValueError(f"{folder} is a {settings.get('_class_name')}, not a bridge (train.py training=bridge)")
        schedule = BridgeSchedule(settings["beta_min"], settings["beta_max"])
        return cls(
            load_network(UNet2DModel, str(folder)), schedule, SmoothingStart(settings["scales"], settings["deviation"])
        )


class BridgeSampler(Sampler):
    """Ancestral sampling along a bridge, from t = 1 to 0 in equal steps [I2SB, algorithm 2].

    With ``consistency`` c > 0 each estimate is first moved towards the data, x0_hat + c A^T (y - A x0_hat) [CDDB].

    Args:
        bridge: the network.
        num_steps: N, and network evaluations.
        consistency: c >= 0.
        options: of ``Sampler``.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, bridge: Bridge, num_steps: int = 9, consistency: float = 0.0, **options: Any):
        super().__init__([bridge], **options)
        check_count("num_steps", num_steps)
        if not consistency >= 0:
            raise ValueError(f"consistency must not be negative, got {consistency}")
        self.bridge, self.num_steps, self.consistency = bridge, num_steps, consistency

    @classmethod
    def from_pretrained(cls, model: str, device: torch.device | str = "cpu", **options: Any) -> "BridgeSampler":
        """Return the sampler of a bridge in a folder, the export of a run with ``training=bridge``.

        Args:
            model: the folder.
            device: where it computes; ``auto``: a GPU where there is one.
            options: of ``BridgeSampler``.

        Raises:
            FileNotFoundError: as ``Bridge.load``.
            ValueError: as ``Bridge.load``.
        """
        sampler = cls(Bridge.load(model).to(find_device(str(device))).eval(), **options)
        sampler.fingerprint = weights_fingerprint(sampler.bridge.state_dict())
        return sampler

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError for an operator that has no adjoint, which data consistency needs."""
        if self.consistency and not hasattr(physics, "A_adjoint"):
            raise ValueError(f"CDDB needs a linear operator, {type(physics).__name__} is none; take i2sb")

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        y, physics = observation.y, cast(Any, observation.physics)
        x = self.bridge.degraded(observation)
        x0_hat_of = in_precision(self.bridge.x0_hat, self.precision)
        times = torch.linspace(1, 0, self.num_steps + 1, dtype=x.dtype, device=x.device).unsqueeze(1).expand(-1, len(x))
        for t, earlier in itertools.pairwise(times):
            x0_hat = x0_hat_of(x, t)
            if self.consistency:
                x0_hat = x0_hat + self.consistency * physics.A_adjoint(y - physics.A(x0_hat))
            share, deviation = (per_sample(value, x) for value in self.bridge.schedule.step(t, earlier))
            x = (1 - share) * x0_hat + share * x + deviation * randn_like(x, streams)
        return x
