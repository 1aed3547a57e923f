"""Lightning modules of a small latent text-to-image model: its autoencoder, then its network and text model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from ud2m.evaluation.metrics import psnr
from ud2m.files import atomic_folder
from ud2m.losses.terms import NonFiniteLossError
from ud2m.priors.latent_parts import (
    assemble,
    build_conditional_unet,
    build_text_encoder,
    build_vae,
    learn_tokenizer,
    load_vae,
    merges_of,
    save_half,
    save_pipeline,
    to_latents,
    token_ids,
    tokenizer_of,
)
from ud2m.priors.schedule import VPSchedule
from ud2m.random import rand, randn_like
from ud2m.training.ema import Ema
from ud2m.training.random_streams import stream
from ud2m.training.steps import SteppedModule, StepSettings, images_of

MERGES = "merges"
"""Key of a checkpoint under which the tokenizer is kept."""


class ScoredModule(SteppedModule):
    """A module whose score is the mean of a number per validation image, higher is better.

    A subclass writes ``image_scores``.
    """

    method: str
    """Its name in tables."""
    nfe = 1
    """Network evaluations of a score."""

    def __init__(self, settings: StepSettings, seed: int, lr: float):
        super().__init__(settings, seed)
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.lr = lr

    def image_scores(self, batch: Any, key: int) -> Tensor:
        """Return the scores [B] of a batch; random numbers depend on ``key`` alone."""
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all that is trained."""
        return torch.optim.AdamW(self.ema.source, lr=self.lr, weight_decay=1e-4)

    def on_validation_epoch_start(self) -> None:
        """Start a score."""
        self.validated: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score the averaged network."""
        with self.scoring():
            self.validated.append(self.image_scores(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Log the mean as ``val/score``."""
        self.log_scores({}, torch.cat(self.validated).mean().item())

    @torch.no_grad()
    def evaluate(self, data: L.LightningDataModule) -> list[dict[str, Any]]:
        """Return one row with the score on the test images."""
        self.eval()
        with self.scoring():
            scores = [
                self.image_scores(self.transfer_batch_to_device(batch, self.device, 0), i)
                for i, batch in enumerate(tqdm(data.test_dataloader(), desc="scoring", unit="batch"))
            ]
        return [
            {"method": self.method, "nfe": self.nfe, "step": self.steps_done, "score": torch.cat(scores).mean().item()}
        ]


class AutoencoderModule(ScoredModule):
    """Train a KL autoencoder (Kingma and Welling, 2014; Rombach et al., 2022) for images in [-1, 1].

    Loss: mean |x - D(z)|^2 + kl KL, z = mu + s eps, KL the mean of (mu^2 + s^2 - 1 - log s^2) / 2 over all latents. The
    score is the PSNR in dB of D(mu), for images in [0, 1]. The export is the folder of an ``AutoencoderKL`` whose
    ``scaling_factor`` makes the latents of the validation images have standard deviation 1.

    Args:
        vae: arguments of diffusers' ``AutoencoderKL``.
        kl: weight of KL.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up, then cosine to zero at the last step.
        ema_decay: decay of the weight average that is validated and exported.
        seed: of all randomness.
        accumulate: batches summed into one step.
        clip: largest gradient norm.

    Raises:
        ValueError: for numbers out of range, or an architecture that diffusers cannot build.
    """

    stream_name, method = "autoencoder", "autoencoder"
    optimized = ("autoencoder",)
    latent_power: Tensor

    def __init__(
        self,
        vae: Mapping[str, Any],
        kl: float = 1e-4,
        lr: float = 2e-3,
        warmup: int = 100,
        ema_decay: float = 0.999,
        seed: int = 0,
        accumulate: int = 1,
        clip: float = 1.0,
    ):
        super().__init__(StepSettings(warmup=warmup, accumulate=accumulate, clip=clip, ema_decay=ema_decay), seed, lr)
        if not kl >= 0:
            raise ValueError(f"kl, the weight of the divergence, must not be negative, got {kl}")
        self.vae, self.kl = build_vae(vae), kl
        self.ema = Ema(self.vae.parameters(), ema_decay)
        self.register_buffer("latent_power", torch.ones(()))

    def losses(
        self, batch: Any, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of clean images [B, C, H, W]; captions are not used."""
        x = 2 * images_of(batch) - 1
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * randn_like(posterior.mean, streams)
        error = (self.vae.decode(z).sample - x).square().mean()
        divergence = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        loss = error + self.kl * divergence
        if not torch.isfinite(loss):
            raise NonFiniteLossError("autoencoder", loss.detach())
        return loss, {"total": loss.detach(), "error": error.detach(), "kl": divergence.detach()}

    def on_validation_epoch_start(self) -> None:
        """Start a score."""
        super().on_validation_epoch_start()
        self.powers: list[Tensor] = []

    def image_scores(self, batch: Any, key: int) -> Tensor:
        """Return the PSNR [B] of the autoencoded images, in dB."""
        x0 = images_of(batch)
        z = self.vae.encode(2 * x0 - 1).latent_dist.mode()
        if self.trainer.validating or self.trainer.training:
            self.powers.append(z.square().mean((1, 2, 3)))
        return psnr(((self.vae.decode(z).sample + 1) / 2).clamp(0, 1), x0)

    def on_validation_epoch_end(self) -> None:
        """Log the score, and keep the mean square of the latents."""
        self.latent_power.copy_(torch.cat(self.powers).mean())
        super().on_validation_epoch_end()

    def export(self, folder: Path) -> None:
        """Write the averaged autoencoder as a diffusers folder (float16 safetensors)."""
        self.vae.register_to_config(scaling_factor=self.latent_power.rsqrt().item())
        with self.ema.applied(), atomic_folder(folder, overwrite=True) as partial:
            save_half(self.vae, partial)


class LatentModule(ScoredModule):
    """Train a latent text-to-image model: the network and a CLIP text model together, on a frozen autoencoder.

    Loss: |o - v|^2 at a uniform time t, with z_t = sqrt(abar) z + sqrt(1 - abar) eps and the target v of the table's
    ``prediction_type``: eps, or sqrt(abar) eps - sqrt(1 - abar) z (Salimans and Ho, 2022). Of an image's captions one
    is drawn, and no caption at all with probability ``drop_caption``, for classifier-free guidance (Ho and Salimans,
    2022). The score is minus the loss at five times. The export is the folder of a ``StableDiffusionPipeline``.

    Args:
        vae: folder of an autoencoder, as ``AutoencoderModule`` exports it, or of a pipeline; or a hub id of one.
        unet: arguments of diffusers' ``UNet2DConditionModel``.
        text_encoder: arguments of transformers' ``CLIPTextConfig``. The tokenizer is learnt from the captions, with
            ``vocab_size`` tokens at most, for prompts of ``max_position_embeddings`` tokens.
        scheduler: the noise table, in the keys of a diffusers ``scheduler_config.json``.
        drop_caption: probability in [0, 1).
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up, then cosine to zero at the last step.
        ema_decay: decay of the weight average that is validated and exported.
        seed: of all randomness.
        accumulate: batches summed into one step.
        clip: largest gradient norm.

    Raises:
        FileNotFoundError: when there is no autoencoder.
        ValueError: for numbers out of range, or architectures that cannot be built.
    """

    stream_name, method = "latent", "text-to-image"
    optimized = ("network",)

    def __init__(
        self,
        vae: str,
        unet: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        drop_caption: float = 0.1,
        lr: float = 1e-3,
        warmup: int = 200,
        ema_decay: float = 0.999,
        seed: int = 0,
        accumulate: int = 1,
        clip: float = 1.0,
    ):
        super().__init__(StepSettings(warmup=warmup, accumulate=accumulate, clip=clip, ema_decay=ema_decay), seed, lr)
        if not 0 <= drop_caption < 1:
            raise ValueError(f"drop_caption must be a probability in [0, 1), got {drop_caption}")
        if scheduler.get("prediction_type") not in TARGETS:
            raise ValueError(
                f"the table's prediction_type must be one of {', '.join(TARGETS)}, got "
                f"{scheduler.get('prediction_type')!r}"
            )
        self.vae = load_vae(vae).requires_grad_(False).eval()
        self.unet, self.text_encoder = build_conditional_unet(unet), build_text_encoder(text_encoder)
        self.scheduler, self.drop_caption = dict(scheduler), drop_caption
        self.schedule = VPSchedule.from_config(scheduler)
        self.tokenizer: Any = None
        self.ema = Ema([*self.unet.parameters(), *self.text_encoder.parameters()], ema_decay)

    def on_fit_start(self) -> None:
        """Learn the tokenizer from the captions, unless a checkpoint holds it."""
        if self.tokenizer is None:
            texts = [line for text in cast(Any, self.trainer).datamodule.all_captions() for line in text.split("\n")]
            config = self.text_encoder.config
            self.tokenizer = learn_tokenizer(texts, config.vocab_size, config.max_position_embeddings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokenizer too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[MERGES] = merges_of(self.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the tokenizer too."""
        super().on_load_checkpoint(checkpoint)
        self.tokenizer = tokenizer_of(checkpoint[MERGES], self.text_encoder.config.max_position_embeddings)

    def embedded(self, captions: Sequence[str]) -> Tensor:
        """Return the text model's states [B, length, width] of captions."""
        return self.text_encoder(token_ids(self.tokenizer, captions).to(self.device))[0]

    def losses(
        self, batch: Any, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images [B, C, H, W] with their captions, one a line."""
        x0, captions = batch
        uniform = rand((len(x0), 3), streams, self.device)
        t = (uniform[:, 0] * self.schedule.num_times).long()
        drawn = draw_captions(captions, uniform[:, 1].tolist())
        kept = [text if u >= self.drop_caption else "" for text, u in zip(drawn, uniform[:, 2].tolist(), strict=True)]
        loss = self.errors(x0, t, self.embedded(kept), streams).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError("latent prediction", loss.detach())
        return loss, {"total": loss.detach()}

    def errors(self, x0: Tensor, t: Tensor, embedding: Tensor, streams: Any) -> Tensor:
        """Return the mean square errors [B] of the prediction for images x0 at times t [B]."""
        with torch.no_grad():
            z = to_latents(self.vae, x0)
        eps = randn_like(z, streams)
        a, b = (root.view(-1, 1, 1, 1).to(z.dtype) for root in vp_roots(self.schedule, t))
        output = self.unet(a * z + b * eps, t, encoder_hidden_states=embedding).sample
        target = TARGETS[self.scheduler["prediction_type"]](z, eps, a, b)
        return (output - target).square().mean((1, 2, 3))

    def image_scores(self, batch: Any, key: int) -> Tensor:
        """Return minus the mean loss [B] over five times, each image with the first of its captions."""
        x0, captions = batch
        embedding = self.embedded(draw_captions(captions, [0.0] * len(x0)))
        errors = []
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            t = torch.full((len(x0),), int(share * self.schedule.num_times), device=self.device)
            errors.append(self.errors(x0, t, embedding, stream(self.device, "latent", f"{share:g}", key)))
        return -torch.stack(errors).mean(0)

    def export(self, folder: Path) -> None:
        """Write the averaged model as the folder of a pipeline (float16 safetensors)."""
        with self.ema.applied(), atomic_folder(folder, overwrite=True) as partial:
            save_pipeline(assemble(self.vae, self.text_encoder, self.tokenizer, self.unet, self.scheduler), partial)


TARGETS = {
    "epsilon": lambda z, eps, a, b: eps,
    "v_prediction": lambda z, eps, a, b: a * eps - b * z,
}
"""What a network is trained to return, from latents, noise and the two roots of the table."""


def vp_roots(schedule: VPSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t) of times t [B], in float32."""
    # sigma = sqrt((1 - abar) / abar) / 2, in image units
    ratio = 2 * schedule.sigma(t)
    signal = (1 + ratio**2).rsqrt()
    return signal, ratio * signal


def draw_captions(captions: Sequence[str], uniform: Sequence[float]) -> list[str]:
    """Return one line of each text, by its number in [0, 1)."""
    lines = [text.split("\n") for text in captions]
    return [line[int(u * len(line))] for line, u in zip(lines, uniform, strict=True)]
