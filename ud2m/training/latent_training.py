"""Lightning modules of a small latent model of images or videos: its autoencoder, then network and text model."""

import warnings
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
from ud2m.priors.latent import LatentPrior, NoiseTable
from ud2m.priors.latent_parts import (
    CAPTIONS,
    assemble,
    begin_clear,
    build_latent_network,
    build_text_encoder,
    build_vae,
    decode_unclipped,
    encode_texts,
    learn_tokenizer,
    measured_scale,
    merges_of,
    most_frequent,
    save_half,
    save_pipeline,
    to_latents,
    tokenizer_of,
)
from ud2m.priors.pipelines import latent_channels, load_vae
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
    """Train a KL autoencoder (Kingma and Welling, 2014; Rombach et al., 2022) for images or videos in [-1, 1].

    Loss: mean |x - D(z)|^2 + kl KL, D not clipped, z = mu + s eps, KL the mean of (mu^2 + s^2 - 1 - log s^2) / 2 of all
    latents. The score is the PSNR in dB of D(mu), for images in [0, 1]. The export is the diffusers folder of the
    autoencoder, whose configuration makes the scaled latents of the validation images have variance 1: each channel
    that of a video one.

    Args:
        vae: arguments of a class of ``VAES``, and its name as ``_class_name`` unless it is ``AutoencoderKL``.
        kl: weight of KL.
        clear: begins as ``begin_clear`` says.
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
    latent_moments: Tensor

    def __init__(
        self,
        vae: Mapping[str, Any],
        kl: float = 1e-4,
        clear: bool = False,
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
        if clear:
            begin_clear(self.vae)
        self.ema = Ema(self.vae.parameters(), ema_decay)
        self.register_buffer("latent_moments", torch.tensor([[0.0], [1.0]]).repeat(1, latent_channels(self.vae)))

    def losses(
        self, batch: Any, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of clean images [B, C, H, W] or videos [B, C, T, H, W]; captions are not used."""
        x = 2 * images_of(batch) - 1
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * randn_like(posterior.mean, streams)
        error = (decode_unclipped(self.vae, z) - x).square().mean()
        divergence = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        loss = error + self.kl * divergence
        if not torch.isfinite(loss):
            raise NonFiniteLossError("autoencoder", loss.detach())
        return loss, {"total": loss.detach(), "error": error.detach(), "kl": divergence.detach()}

    def on_validation_epoch_start(self) -> None:
        """Start a score."""
        super().on_validation_epoch_start()
        self.moments: list[Tensor] = []

    def image_scores(self, batch: Any, key: int) -> Tensor:
        """Return the PSNR [B] of the autoencoded images, in dB."""
        x0 = images_of(batch)
        z = self.vae.encode(2 * x0 - 1).latent_dist.mode()
        if self.trainer.validating or self.trainer.training:
            self.moments.append(torch.stack([z, z.square()], 1).flatten(3).mean(3))
        return psnr(((self.vae.decode(z).sample + 1) / 2).clamp(0, 1), x0)

    def on_validation_epoch_end(self) -> None:
        """Log the score, and keep mean and mean square of each channel of the latents."""
        self.latent_moments.copy_(torch.cat(self.moments).mean(0))
        super().on_validation_epoch_end()

    def export(self, folder: Path) -> None:
        """Write the averaged autoencoder as a diffusers folder (float16 safetensors)."""
        self.vae.register_to_config(**measured_scale(self.vae, *self.latent_moments))
        with self.ema.applied(), atomic_folder(folder, overwrite=True) as partial:
            save_half(self.vae, partial)


class LatentModule(ScoredModule):
    """Train a latent text-to-image or text-to-video model: network and text model together, on a frozen autoencoder.

    Loss: |o - v|^2 at a uniform time t, with z_t = a z + b eps of the table and the target v of what it predicts: eps,
    a eps - b z (Salimans and Ho, 2022), or the flow eps - z (Lipman et al., 2023). Of an image's captions one is drawn,
    and no caption at all with probability ``drop_caption``, for classifier-free guidance (Ho and Salimans, 2022). The
    score is minus the loss at five times. The export is the folder of a pipeline: of Stable Diffusion, or of Wan.

    Args:
        vae: folder of an autoencoder, as ``AutoencoderModule`` exports it, or of a pipeline; or a hub id of one.
        network: arguments of a class of ``NETWORKS``, and its name as ``_class_name`` unless the first.
        text_encoder: likewise of ``TEXT_MODELS``. The tokenizer is learnt from the captions, with ``vocab_size`` tokens
            at most.
        scheduler: the noise table, in the keys of a diffusers ``scheduler_config.json``.
        start_from: pipeline whose network, text model and tokenizer the run begins with, in place of new ones: a folder
            or hub id, of the same autoencoder and noise, and not distilled.
        prompt_length: tokens of a prompt at most, start and end among them.
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
        network: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        start_from: str | None = None,
        prompt_length: int = 12,
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
        self.table = NoiseTable(scheduler)
        if self.table.prediction not in TARGETS:
            raise ValueError(
                f"the table's prediction_type must be one of {', '.join(TARGETS)}, got {self.table.prediction!r}"
            )
        self.vae = load_vae(vae).requires_grad_(False).eval()
        self.scheduler, self.prompt_length, self.drop_caption = dict(scheduler), prompt_length, drop_caption
        self.tokenizer: Any = None
        self.captions: tuple[str, ...] = ()
        if start_from is None:
            self.network, self.text_encoder = build_latent_network(network), build_text_encoder(text_encoder)
        else:
            begun = pipeline_to_go_on_from(start_from, self.vae, self.table)
            self.network = begun.network.requires_grad_(True)
            self.text_encoder = begun.pipeline.text_encoder.requires_grad_(True)
            self.tokenizer, self.captions = begun.pipeline.tokenizer, begun.captions
        self.ema = Ema([*self.network.parameters(), *self.text_encoder.parameters()], ema_decay)

    def on_fit_start(self) -> None:
        """Learn the tokenizer from the captions, unless a checkpoint holds it, and look whether videos are too long."""
        x0, _ = next(iter(cast(Any, self.trainer).datamodule.val_dataloader()))
        warn_of_drift(self.vae, x0.to(self.device))
        if self.tokenizer is None:
            texts = [line for text in cast(Any, self.trainer).datamodule.all_captions() for line in text.split("\n")]
            self.tokenizer = learn_tokenizer(texts, self.text_encoder.config.vocab_size, self.prompt_length)
            self.captions = most_frequent(texts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokenizer and captions too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[MERGES], checkpoint[CAPTIONS] = merges_of(self.tokenizer), list(self.captions)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the tokenizer and captions too."""
        super().on_load_checkpoint(checkpoint)
        self.tokenizer = tokenizer_of(checkpoint[MERGES], self.prompt_length)
        self.captions = tuple(checkpoint.get(CAPTIONS, ()))  # older checkpoints have none

    def pipeline(self) -> Any:
        """Return the parts as they are now, as a pipeline."""
        return assemble(self.vae, self.text_encoder, self.tokenizer, self.network, self.scheduler)

    def embedded(self, captions: Sequence[str]) -> Tensor:
        """Return the text model's states [B, length, width] of captions, as the pipeline makes them."""
        return encode_texts(self.pipeline(), captions, self.device)[0]

    def losses(
        self, batch: Any, streams: list[torch.Generator], logged: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images [B, C, H, W] or videos [B, C, T, H, W] with their captions, one a line."""
        x0, captions = batch
        uniform = rand((len(x0), 3), streams, self.device)
        t = (uniform[:, 0] * self.table.num_times).long()
        drawn = draw_captions(captions, uniform[:, 1].tolist())
        kept = [text if u >= self.drop_caption else "" for text, u in zip(drawn, uniform[:, 2].tolist(), strict=True)]
        loss = self.errors(x0, t, self.embedded(kept), streams).mean()
        if not torch.isfinite(loss):
            raise NonFiniteLossError("latent prediction", loss.detach())
        return loss, {"total": loss.detach()}

    def errors(self, x0: Tensor, t: Tensor, embedding: Tensor, streams: Any) -> Tensor:
        """Return the mean square errors [B] of the prediction for images or videos x0 at times t [B]."""
        with torch.no_grad():
            z = to_latents(self.vae, x0)
        eps = randn_like(z, streams)
        a, b = self.table.columns(t, z)
        output = self.network(a * z + b * eps, t, encoder_hidden_states=embedding).sample
        return (output - TARGETS[self.table.prediction](z, eps, a, b)).square().flatten(1).mean(1)

    def image_scores(self, batch: Any, key: int) -> Tensor:
        """Return minus the mean loss [B] over five times, each image with the first of its captions."""
        x0, captions = batch
        embedding = self.embedded(draw_captions(captions, [0.0] * len(x0)))
        errors = []
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            t = torch.full((len(x0),), int(share * self.table.num_times), device=self.device)
            errors.append(self.errors(x0, t, embedding, stream(self.device, "latent", f"{share:g}", key)))
        return -torch.stack(errors).mean(0)

    def export(self, folder: Path) -> None:
        """Write the averaged model as the folder of a pipeline (float16 safetensors)."""
        with self.ema.applied(), atomic_folder(folder, overwrite=True) as partial:
            save_pipeline(self.pipeline(), partial, self.captions)


def pipeline_to_go_on_from(reference: str, vae: Any, table: NoiseTable) -> LatentPrior:
    """Return the pipeline whose networks a training on these latents and this noise begins with.

    Raises:
        ValueError: where it is a model for few steps, or its network has learnt other latents, noise or another target.
    """
    begun = LatentPrior.from_pretrained(reference)
    if begun.distilled:
        raise ValueError(f"training.start_from={reference} is distilled into few steps; take a pipeline that is not")
    if begun.table.prediction != table.prediction or not same_noise(begun.table, table):
        raise ValueError(
            f"training.start_from={reference} has learnt {begun.table.prediction} with {begun.table.num_times} times, "
            f"and training.scheduler says {table.prediction} with {table.num_times}, or other noise at them; give the "
            "numbers of its scheduler/scheduler_config.json"
        )
    theirs, ours = begun.pipeline.vae.state_dict(), vae.state_dict()
    # a pipeline holds halves of what the autoencoder's own folder may hold in full
    if theirs.keys() != ours.keys() or not all(torch.equal(theirs[key].half(), ours[key].half()) for key in ours):
        raise ValueError(
            f"training.start_from={reference} has learnt the latents of another autoencoder than training.vae; take "
            f"training.vae={reference}"
        )
    return begun


def same_noise(first: NoiseTable, second: NoiseTable) -> bool:
    """Return whether two tables have equally many times, and the same a and b at all of them."""
    times = torch.arange(first.last_time + 1)
    return first.num_times == second.num_times and all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(first.roots(times), second.roots(times), strict=True)
    )


TARGETS = {
    "epsilon": lambda z, eps, a, b: eps,
    "v_prediction": lambda z, eps, a, b: a * eps - b * z,
    "flow_prediction": lambda z, eps, a, b: eps - z,
}
"""What a network is trained to return, from latents, noise and the two roots of the table."""


DRIFT = 2.0
"""Factor of square error, 3 dB, from which on an autoencoder is said to lose the second half of videos."""


@torch.no_grad()
def warn_of_drift(vae: Any, x0: Tensor) -> None:
    """Warn where an autoencoder keeps the second half of videos x0 [B, C, T, H, W] much worse than the first.

    A causal autoencoder that was trained on shorter ones takes them, but its latents drift from frame to frame.
    """
    if x0.ndim < 5 or x0.shape[2] == 1:
        return
    z = vae.encode(2 * x0 - 1).latent_dist.mode()
    error = ((vae.decode(z).sample + 1) / 2 - x0).square().mean((0, 1, 3, 4))
    first, second = (half.mean() for half in error.split(-(-len(error) // 2)))
    if second > DRIFT * first:
        heard = [f"{-10 * half.log10():.1f} dB" for half in (first, second)]
        warnings.warn(
            f"the autoencoder keeps the first half of videos of {len(error)} frames with {heard[0]} and the second "
            f"with {heard[1]}: it was trained on shorter ones; train it with data.frames={len(error)}, or take fewer",
            stacklevel=2,
        )


def draw_captions(captions: Sequence[str], uniform: Sequence[float]) -> list[str]:
    """Return one line of each text, by its number in [0, 1)."""
    lines = [text.split("\n") for text in captions]
    return [line[int(u * len(line))] for line, u in zip(lines, uniform, strict=True)]
