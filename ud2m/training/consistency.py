"""Lightning module that distils a latent text-to-image or text-to-video model to one that needs few steps."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ud2m.files import atomic_folder
from ud2m.losses.terms import NonFiniteLossError
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.priors.latent_parts import save_pipeline
from ud2m.priors.prior import LoraSpec
from ud2m.random import rand, randn_like
from ud2m.training.ema import Ema
from ud2m.training.latent_training import ScoredModule, draw_captions
from ud2m.training.random_streams import stream
from ud2m.training.steps import StepSettings

HUBER = 1e-3
"""c of the pseudo-Huber loss sqrt(d^2 + c^2) - c, as in the code of latent consistency models."""
STEPS = 4
"""Evaluations of the samples that are scored."""


class ConsistencyModule(ScoredModule):
    """Latent consistency distillation (Luo et al., 2023) of any pipeline that ``LatentPrior`` takes.

    From z_t, t uniform, the teacher makes one DDIM step with guidance w to s = max(t - skip, 0):
    z0 = G_teacher(z_t, t, c), z_s = a_s z0 + b_s eps(z0). The student f(z, t) = c_skip z + c_out G(z, t, c), with the
    boundary scalings of ``LCMScheduler``, or G itself of a flow, which needs none, is to agree: sqrt(d^2 + c^2) - c of
    d = f(z_t, t) - f^-(z_s, s), averaged.
    f^- is the average of the student; with a LoRA it is the student itself, and the teacher the network without it.
    Differs from the paper: t is any time of the table, where the paper has 50, so that a sampler may choose its times.

    The score is minus the energy distance of latents (Szekely and Rizzo, 2013), 4 steps after noise with the captions
    of the validation images, from those of the images. The export is the folder of the pipeline with ``LCMScheduler``
    or ``FlowMatchLCMScheduler``;
    with a LoRA, that of its weights in the format of diffusers, for ``LatentPrior.from_pretrained(..., lora=...)``.

    Args:
        start_from: pipeline to be distilled: shipped name, folder or hub id.
        guidance: w of the teacher, 1: none.
        skip: times between t and s.
        lora: adapts the network by a LoRA; None: all its weights are trained.
        drop_caption: probability of no caption.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up, then cosine to zero at the last step.
        ema_decay: decay of the weight average that is validated and exported.
        seed: of all randomness.
        accumulate: batches summed into one step.
        clip: largest gradient norm.

    Raises:
        FileNotFoundError: when there is no such pipeline.
        ValueError: for numbers out of range, or a pipeline that cannot be distilled.
    """

    stream_name, method = "consistency", "consistency model"
    optimized = ("student",)
    nfe = STEPS

    def __init__(
        self,
        start_from: str,
        guidance: float = 1.5,
        skip: int = 20,
        lora: LoraSpec | None = None,
        drop_caption: float = 0.1,
        lr: float = 5e-4,
        warmup: int = 100,
        ema_decay: float = 0.995,
        seed: int = 0,
        accumulate: int = 1,
        clip: float = 1.0,
    ):
        super().__init__(StepSettings(warmup=warmup, accumulate=accumulate, clip=clip, ema_decay=ema_decay), seed, lr)
        if not guidance >= 1 or not skip >= 1 or not 0 <= drop_caption < 1:
            raise ValueError(
                "consistency distillation needs guidance >= 1, skip >= 1 and drop_caption in [0, 1), got "
                f"{guidance}, {skip} and {drop_caption}"
            )
        self.guidance, self.skip, self.lora, self.drop_caption = float(guidance), skip, lora, drop_caption
        teacher = LatentPrior.from_pretrained(start_from)
        if teacher.distilled:
            raise ValueError(f"{start_from} is distilled already; start from a model that is not")
        self.prior = teacher.as_consistency_model(shared=lora is not None)
        self.teacher = teacher
        trained = (
            self.prior.add_lora(lora) if lora is not None else self.prior.network.requires_grad_(True).parameters()
        )
        # what is frozen stays out of checkpoints
        self.trained = nn.ParameterList(trained)
        self.ema = Ema(self.trained, ema_decay)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the priors as plain attributes: as modules their frozen weights would be in every checkpoint."""
        if isinstance(value, LatentPrior):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def on_fit_start(self) -> None:
        """Move the priors to where the trained weights are."""
        self.prior.to(self.device)
        self.teacher.to(self.device)

    def losses(
        self, batch: Any, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images [B, C, H, W] or videos [B, C, T, H, W] with their captions, one a line."""
        x0, captions = batch
        table = self.teacher.table
        uniform = rand((len(x0), 3), streams, self.device)
        t = 1 + (uniform[:, 0] * (table.num_times - 1)).long()
        s = (t - self.skip).clamp(min=0)
        with torch.no_grad():
            prompt = self.prompts(captions, uniform)
            z_t = table.noised(self.teacher.encode(x0), t, randn_like(self.latents_like(x0), streams))
            with self.as_teacher():
                z0 = self.teacher.estimate(z_t, t, prompt, self.guidance)
            z_s = table.noised(z0, s, table.eps(z0, z_t, t))
            with self.as_target():
                # at s = 0 the boundary scalings, and the estimate of a flow, are z_s itself
                target = self.prior.estimate(z_s, s, prompt)
        d = self.prior.estimate(z_t, t, prompt) - target
        loss = ((d.square() + HUBER**2).sqrt() - HUBER).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError("consistency", loss.detach())
        return loss, {"total": loss.detach()}

    def prompts(self, captions: Sequence[str], uniform: Tensor) -> Prompt:
        """Return a prompt for each image, by its random numbers [B, 3]."""
        drawn = draw_captions(captions, uniform[:, 1].tolist())
        kept = [text if u >= self.drop_caption else "" for text, u in zip(drawn, uniform[:, 2].tolist(), strict=True)]
        return self.teacher.encode_prompt(kept)

    def latents_like(self, x0: Tensor) -> Tensor:
        """Return latents of the shape that those of x0 have; their values are of no interest."""
        return x0.new_empty(len(x0), *self.teacher.latent_shape(x0.shape[2:]))

    def as_teacher(self) -> AbstractContextManager:
        """Switch a LoRA off inside the context."""
        return nullcontext() if self.lora is None else self.prior.adapter_disabled()

    def as_target(self) -> AbstractContextManager:
        """Use the average of the student inside the context, where it has one of its own."""
        return self.ema.applied() if self.lora is None else nullcontext()

    def sample(self, prompt: Prompt, noise: Tensor, streams: Any) -> Tensor:
        """Return latents by ``STEPS`` steps of multistep consistency sampling from noise of their shape."""
        last = self.prior.table.num_times - 1
        z_t, z0 = noise, noise
        for step in range(STEPS):
            t = last - step * (last + 1) // STEPS
            z_t = noise if step == 0 else self.prior.noised(z0, t, randn_like(z0, streams))
            z0 = self.prior.estimate(z_t, t, prompt)
        return z0

    def image_scores(self, batch: Any, key: int) -> Tensor:
        """Return minus the energy distance of this batch's samples from its images, for each image."""
        x0, captions = batch
        noise = stream(self.device, "consistency", key)
        prompt = self.prior.encode_prompt(draw_captions(captions, [0.0] * len(x0)))
        z = self.sample(prompt, randn_like(self.latents_like(x0), noise), noise)
        return -energy_distance(z.flatten(1), self.prior.encode(x0).flatten(1)).expand(len(x0))

    def export(self, folder: Path) -> None:
        """Write the averaged model: the folder of a pipeline, or of a LoRA."""
        with self.ema.applied(), atomic_folder(folder, overwrite=True) as partial:
            if self.lora is None:
                save_pipeline(self.prior.pipeline, partial, self.teacher.captions)
            else:
                self.prior.save_lora(partial)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| of rows x [n, d] and y [m, d], over all pairs."""
    between, within_x, within_y = (torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y)))
    return 2 * between - within_x - within_y
