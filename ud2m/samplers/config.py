"""The options of sampling, spelled once."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ud2m.numbers import as_python, is_number
from ud2m.precision import AUTO, check_precision
from ud2m.samplers.base import check_count, check_positive
from ud2m.unfolded.ddim import check_eta
from ud2m.unfolded.denoisers import check_symmetries, check_tile


@dataclass(frozen=True)
class SamplerConfig:
    """Options of ``PosteriorSampler`` and where the model comes from; stored in ``config.json`` of an export.

    Attributes:
        num_steps: N.
        grid_power: exponent of the levels (``VPSchedule.grid``), which are those of training.
        eta: stochasticity of the steps between levels, in [0, 1] or "fresh" (``ud2m.unfolded.ddim.step_deviation``).
        symmetries: the network sees images in 1, 2 or 8 random orientations (``ud2m.unfolded.denoisers.symmetric``).
        step_scale: factor on the modules' delta_k, > 0. More gives samples that differ more and look sharper, less
            gives single samples that are closer to the posterior mean.
        needs_float32: ``precision=auto`` is float32 on all hardware: rounding of this model was measured to cost more
            than 0.02 dB or 0.001 LPIPS (``benchmarks/precision.py``).
        chunk_size: images that the network sees at once; bounds the memory. It changes samples by rounding alone.
        tile: pictures larger than tile x tile pixels go through the network in overlapping tiles of that size
            (``ud2m.unfolded.denoisers.tiled``), and the network sees at most tile^2 pixels at once, which bounds the
            memory of large pictures. None: neither.
        precision: in which networks are evaluated: float32, bfloat16, float16, or auto (bfloat16 where the hardware has
            instructions for it). Prox, schedule and noise stay in float32.
        sigma_y: noise level of training, image units; that of a call which gives none.
        info: what else is known of the training (information, not a limit).

    Raises:
        ValueError: for options that no call could use.
    """

    num_steps: int = 3
    grid_power: float = 2.0
    eta: float | str = 1.0
    symmetries: int = 1
    step_scale: float = 1.0
    needs_float32: bool = False
    chunk_size: int = 64
    tile: int | None = None
    precision: str = AUTO
    sigma_y: float = 0.01
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, as_python(getattr(self, entry.name)))
        check_count("num_steps (N)", self.num_steps)
        check_count("chunk_size", self.chunk_size)
        check_eta(self.eta)
        check_symmetries(self.symmetries)
        check_tile(self.tile)
        check_precision(self.precision)
        if not isinstance(self.needs_float32, bool):
            raise ValueError(f"needs_float32 must be true or false, got {self.needs_float32!r}")
        check_positive("step_scale", self.step_scale)
        check_positive("grid_power", self.grid_power)
        if not is_number(self.sigma_y) or not 0 < self.sigma_y < math.inf:
            raise ValueError(f"sigma_y must be a positive noise level in image units, got {self.sigma_y!r}")
        if not isinstance(self.info, dict):
            raise ValueError(f"info must be a dictionary, got {self.info!r}")

    def with_options(self, **options: Any) -> "SamplerConfig":
        """Return the configuration with other options; those that are None stay as they are.

        Raises:
            ValueError: for an option that there is not, and as the class.
        """
        known = [entry.name for entry in fields(self)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ValueError(f"a sampler has no option {', '.join(unknown)}; it has {', '.join(known)}")
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @property
    def of_networks(self) -> str:
        """The precision that networks are evaluated in: ``auto`` is float32 for a model that needs it."""
        return "float32" if self.precision == AUTO and self.needs_float32 else self.precision

    def chunk(self, height: int, width: int) -> int:
        """Return how many images of this size the network sees at once."""
        if self.tile is None:
            return self.chunk_size
        return max(1, min(self.chunk_size, self.tile**2 // (height * width)))

    def stored(self) -> dict[str, Any]:
        """Return what an export keeps: not what belongs to the machine of a call."""
        return {name: value for name, value in asdict(self).items() if name not in ("chunk_size", "tile", "precision")}
