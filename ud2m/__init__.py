"""UD2M: few-step posterior samplers from unfolded and distilled diffusion models."""

from typing import Any

__all__ = ["PosteriorSampler"]


def __getattr__(name: str) -> Any:
    # Lazily, so that importing one module of the package does not import diffusers and peft.
    if name == "PosteriorSampler":
        from ud2m.samplers.ud2m import PosteriorSampler

        return PosteriorSampler
    raise AttributeError(f"module 'ud2m' has no attribute {name!r}")
