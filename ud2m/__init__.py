"""UD2M: few-step posterior samplers from unfolded and distilled diffusion models."""

from typing import Any

__all__ = ["PosteriorSampler", "Prior", "Problem"]


def __getattr__(name: str) -> Any:
    # Lazily, so that importing one module of the package does not import diffusers and peft.
    if name == "PosteriorSampler":
        from ud2m.samplers.ud2m import PosteriorSampler

        return PosteriorSampler
    if name == "Prior":
        from ud2m.priors.prior import Prior

        return Prior
    if name == "Problem":
        from ud2m.physics import Problem

        return Problem
    raise AttributeError(f"module 'ud2m' has no attribute {name!r}")
