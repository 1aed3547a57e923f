"""Our sampler as a pipeline of diffusers."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from ud2m.physics import DataTerm
from ud2m.samplers.ud2m import PosteriorSampler


class UD2MPipeline(DiffusionPipeline):
    """``PosteriorSampler`` with the calls that users of diffusers know."""

    def __init__(self, sampler: PosteriorSampler):
        super().__init__()
        # no module is registered: diffusers would cast psi too, and asks its modules for what ours lack
        self.register_to_config()
        self.sampler = sampler

    @classmethod
    def from_pretrained(
        cls, model: str, prior: str | None = None, torch_dtype: torch.dtype | None = None, **options: Any
    ) -> "UD2MPipeline":
        """Load a model as ``PosteriorSampler.from_pretrained``; its networks are evaluated in ``torch_dtype``."""
        pipeline = cls(PosteriorSampler.from_pretrained(model, prior, **options))
        return pipeline.to(torch_dtype) if torch_dtype else pipeline

    device = property(lambda self: self.sampler.device)

    def to(self, *wanted: Any, **named: Any) -> "UD2MPipeline":
        """Move to a device, or evaluate networks in a dtype; prox, schedule and noise stay in float32."""
        for value in (*wanted, *named.values()):
            if isinstance(value, torch.dtype):
                self.sampler = self.sampler.with_options(precision=str(value).removeprefix("torch."))
            else:
                self.sampler.to(value)
        return self

    def save_pretrained(self, save_directory: str) -> None:
        """Write the export folder, as ``PosteriorSampler.save_pretrained``."""
        self.sampler.save_pretrained(save_directory)

    def __call__(
        self, y: Tensor, physics: DataTerm, sigma_y: float | Tensor | None = None, num_samples: int = 1,
        num_inference_steps: int | None = None, generator: torch.Generator | None = None, output_type: str = "pil",
    ) -> ImagePipelineOutput:  # fmt: skip
        """Return ``images``: the samples of each y in turn as pictures (``pil``), or [B, S, C, H, W] (``pt``)."""
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be pil or pt, got {output_type!r}")
        sampler = self.sampler.with_options(num_steps=num_inference_steps)
        observation = sampler.observation(y, physics, sigma_y)
        with self.progress_bar(total=sampler.evaluations_of(observation) * len(observation) * num_samples) as bar:
            samples = sampler.sample(observation, num_samples, generator, bar.update)
        if output_type == "pil":
            return ImagePipelineOutput(self.numpy_to_pil(samples.flatten(0, 1).movedim(1, -1).cpu().numpy()))
        return ImagePipelineOutput(samples)
