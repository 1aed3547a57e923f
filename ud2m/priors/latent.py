"""A latent model of images or videos of diffusers as encoder E, decoder D and one-step estimate G(z_t, t, c)."""

import copy
import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler, LCMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ud2m.precision import DTYPES, check_precision, chosen_precision
from ud2m.priors.latent_parts import encode_texts, latent_scale, read_pipeline_captions
from ud2m.priors.pipelines import (
    CLASS,
    PARTS,
    assemble_on_meta,
    check_parts,
    check_scale,
    latent_channels,
    load_pipeline,
    load_vae,
    network_name,
    take_lora,
    take_weights,
)
from ud2m.priors.prior import LoraSpec
from ud2m.priors.schedulers import DEFAULT, DISTILLED, FLOWS, VARIANCE_PRESERVING, make_scheduler, read_scheduler
from ud2m.priors.shipped import ARCHITECTURES, PIPELINES, shipped_folder, subfolder
from ud2m.priors.store import read_weights

MADE_BY = "latent_prior"
"""Key of the metadata of a saved prompt: the fingerprint of the model that made it."""
CELL, VIDEO_CELL = 8, 16
"""Sides that diffusers' pipelines of images and of videos take are multiples of it."""
FINGERPRINTED = 64
"""Values of each tensor that enter the fingerprint: all of a large model would take minutes."""
SENTINEL = 1000
"""A length that no tokenizer cuts to: transformers writes 1e30 where there is no limit."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model is told in place of words; one prompt, or one per sample.

    Attributes:
        embeds: states of the text model [B, length, width].
        pooled: its summary [B, width], where the model takes one (SDXL).
        texts: the words that it comes from, as far as known.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, index: Tensor) -> "Prompt":
        """Return the prompts ``index`` (int64, may repeat)."""
        texts = tuple(self.texts[i] for i in index.tolist()) if self.texts else ()
        return Prompt(self.embeds[index], None if self.pooled is None else self.pooled[index], texts)

    def expand(self, count: int) -> "Prompt":
        """Return one prompt ``count`` times, or ``count`` prompts as they are.

        Raises:
            ValueError: for another number of prompts.
        """
        if len(self) == count:
            return self
        if len(self) != 1:
            raise ValueError(f"there are {len(self)} prompts for {count} samples; give one, or one each")
        return self.rows(torch.zeros(count, dtype=torch.long, device=self.embeds.device))

    def with_embeds(self, embeds: Tensor) -> "Prompt":
        """Return the prompt with other states."""
        return replace(self, embeds=embeds)


class OneStep:
    """A scheduler for diffusers' pipelines whose single step returns z0, from what the network said at time t.

    With z_t = a z + b eps: (z_t - b o) / a for o = eps; a z_t - b o for v = a eps - b z; o itself; z_t - b o for the
    flow eps - z. A consistency model adds its boundary scalings, c_skip z_t + c_out z0 (Song et al., 2023).
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, table: "NoiseTable", t: Tensor, doubled: bool):
        self.table, self.t = table, t
        self.config = table.config
        # one "time" of as many numbers as the network gets images, twice where it gets them without the prompt too
        self.timesteps = (torch.cat([t, t]) if doubled else t).unsqueeze(0)
        self.sigmas = [1.0]  # pipelines of videos tell it to caches of networks, of which there are none here

    def set_timesteps(self, num_inference_steps: int, device: Any = None, original_inference_steps: Any = None) -> None:
        """Keep the time that it was made with."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is one time."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return z0 in float32, twice: some pipelines ask for the sample, others for the estimate."""
        # pipelines of videos round the latents to float32, whatever the network is in
        widest = torch.promote_types(torch.promote_types(model_output.dtype, sample.dtype), torch.float32)
        z0 = self.table.z0(model_output.to(widest), sample, self.t)
        return z0, z0


class NoiseTable:
    """How z_t = a z + b eps depends on t, and what the network predicts, from the configuration of a scheduler.

    Args:
        config: of the pipeline's own scheduler.
        kind: name of the scheduler's class, unless the configuration has it (as those of files). ``LCMScheduler`` has
            the boundary scalings of a consistency model.
        where: its prior, for messages.

    Raises:
        ValueError: for noise or a prediction that is not known (``read_scheduler``).
    """

    def __init__(self, config: Mapping[str, Any], kind: str | None = None, where: str = ""):
        self.config = config
        kind = str(kind or config.get(CLASS, DEFAULT))
        self.scaling = None
        if kind in FLOWS or (kind in VARIANCE_PRESERVING and config.get("prediction_type") == FLOW):
            self.schedule, self.prediction = None, FLOW
            self.num_times = make_scheduler(kind, config, where).config.num_train_timesteps
            if type(self.num_times) is not int or self.num_times < 1:
                raise ValueError(f"the prior {where} has num_train_timesteps={self.num_times!r}; it is a count")
        else:
            with torch.device("cpu"):
                options, allowed = {**config, CLASS: kind}, VARIANCE_PRESERVING + DISTILLED
                self.schedule, self.prediction = read_scheduler(options, where, allowed)
            self.num_times = self.schedule.num_times
        if kind == "LCMScheduler":
            self.scaling = config.get("timestep_scaling", 10.0)
            if type(self.scaling) not in (int, float) or not 0 < self.scaling < math.inf:
                raise ValueError(f"the prior {where} has timestep_scaling={self.scaling!r}; it is a number above 0")

    def roots(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of times t [B], float64: sqrt(abar_t) and sqrt(1 - abar_t), or 1 - t/T and t/T of a flow."""
        # without values there is nothing to look up
        t = torch.zeros(t.shape, dtype=torch.float64) if t.is_meta else t.to("cpu", torch.float64)
        if self.schedule is None:
            return 1 - t / self.num_times, t / self.num_times
        ratio = 2 * self.schedule.sigma(t)  # sigma is in image units
        a = (1 + ratio**2).rsqrt()
        return a, ratio * a

    @property
    def last_time(self) -> int:
        """The largest time: that of a flow is pure noise, T; a table has T entries."""
        return self.num_times if self.schedule is None else self.num_times - 1

    def shifted_times(self, count: int, shift: float) -> tuple[float, ...]:
        """Return ``count`` falling times T shift u / (1 + (shift - 1) u), u = 1, 1 - 1/count, ..., 1/count, of a flow.

        Large shifts stay longer near the noise; that of Wan distilled by CausVid is 8.

        Raises:
            ValueError: where the model is no flow, or for numbers out of range.
        """
        if self.schedule is not None or count < 1 or not shift > 0:
            raise ValueError(
                f"shifted times need a flow, a count >= 1 and a shift > 0, got {self.prediction}, {count} and {shift}"
            )
        shares = [1 - k / count for k in range(count)]
        return tuple(self.num_times * shift * u / (1 + (shift - 1) * u) for u in shares)

    def at(self, t: float) -> tuple[float, float]:
        """Return a and b of one time."""
        a, b = self.roots(torch.tensor([t]))
        return a.item(), b.item()

    def columns(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b as [B, 1, ...] in the type of latents."""
        a, b = (root.to(like).view(-1, *[1] * (like.ndim - 1)) for root in self.roots(t))
        return a, b

    def z0(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the estimate of the latents from what the network returned."""
        z_t = z_t.to(output.dtype)
        a, b = self.columns(t, output)
        estimate = ESTIMATES[self.prediction](z_t, output, a, b)
        if self.scaling is None:
            return estimate
        time = (self.scaling * t.to(output)).view(a.shape)
        variance = SIGMA_DATA**2
        return variance / (time**2 + variance) * z_t + time / (time**2 + variance).sqrt() * estimate

    def noised(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return z_t = a z + b eps."""
        a, b = self.columns(t, z)
        return a * z + b * eps

    def eps(self, z0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise of z_t, given its estimate z0: (z_t - a z0) / b."""
        a, b = self.columns(t, z_t)
        return (z_t - a * z0) / b


FLOW = "flow_prediction"
ESTIMATES = {
    "epsilon": lambda z, o, a, b: (z - b * o) / a,
    "v_prediction": lambda z, o, a, b: a * z - b * o,
    "sample": lambda z, o, a, b: o,
    FLOW: lambda z, o, a, b: z - b * o,
}
SIGMA_DATA = 0.5
"""Of the boundary scalings, as in ``LCMScheduler``."""


class LatentPrior(nn.Module):
    """A frozen text-to-image or text-to-video pipeline of diffusers: the only place that knows latents and times.

    E and D map images [B, C, H, W] or videos [B, C, T, H, W] in [0, 1] to scaled latents and back; E is the posterior
    *mean*. G(z_t, t, c) is the estimate of z that one evaluation of the pipeline makes: its own ``__call__`` does it,
    with time ids, guidance and all, so that any pipeline is served alike. Gradients reach the prompt and the latents.
    ``captions`` are what it was trained with, as far as the folder of ``from_pretrained`` says.

    Args:
        pipeline: of diffusers, with ``vae``, a text encoder, ``unet`` or ``transformer``, and a scheduler; one of
            videos with one network for all times, as Wan 2.1.
        reference: where it comes from.
        guidance: of classifier-free guidance, 1: none. For a network that takes the guidance as an input (LCM) that
            input. None: 8 for those, else 1.

    Raises:
        ValueError: for a pipeline that lacks a part, or guidance where it is distilled into the network.
    """

    def __init__(self, pipeline: DiffusionPipeline, reference: str | None = None, guidance: float | None = None):
        super().__init__()
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        name = type(pipeline).__name__
        check_parts(reference or name, name, parts, PARTS)
        if "transformer_2" in parts or pipeline.config.get("expand_timesteps"):
            raise ValueError(
                f"{reference or name} has a second network, or a time for each pixel, as Wan 2.2; a latent prior needs "
                "one network and one time, as Wan 2.1"
            )
        self.parts = nn.ModuleDict(parts).requires_grad_(False).eval()
        self.pipeline, self.reference, self.captions = pipeline, reference, tuple[str, ...]()
        pipeline.set_progress_bar_config(disable=True)
        self.network: Any = parts[network_name(pipeline)]
        self.vae: Any = parts["vae"]
        check_scale(self.vae, reference or name)
        config: Any = self.network.config
        taken, channels = config.in_channels, latent_channels(self.vae)
        if taken != channels:
            raise ValueError(
                f"the network of {reference or name} takes {taken} channels, and its autoencoder's latents have "
                f"{channels}: they do not fit"
            )
        self.table = NoiseTable(pipeline.scheduler.config, type(pipeline.scheduler).__name__, reference or name)
        self.takes_guidance = getattr(self.network.config, "time_cond_proj_dim", None) is not None
        self.guidance = float(guidance if guidance is not None else 8.0 if self.takes_guidance else 1.0)
        self.check_guidance(self.guidance)
        self.stride = getattr(pipeline, "vae_scale_factor_temporal", None)
        self.channels = int(pipeline.vae.config.in_channels) // (pipeline.vae.config.get("patch_size") or 1) ** 2
        self._call = inspect.unwrap(type(pipeline).__call__)  # without its no_grad

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        vae_dtype: str = "float32",
        vae: str | None = None,
        unet_weights: str | None = None,
        lora: str | None = None,
        scheduler: str | None = None,
        guidance: float | None = None,
    ) -> "LatentPrior":
        """Load a shipped pipeline by name, one of ``PIPELINES``, a diffusers folder or a hub id.

        Args:
            reference: of the pipeline.
            device: of all networks.
            dtype: of network and text encoders: float32, bfloat16 or float16.
            vae_dtype: of the autoencoder.
            vae: another autoencoder: folder or hub id.
            unet_weights: a file with other weights of the network, or OWNER/NAME/FILE of the hub, as those of DMD2, or
                of CausVid, which are renamed as diffusers has them.
            lora: a LoRA in the format of diffusers (LCM-LoRA): folder or hub id.
            scheduler: ``lcm`` for models whose distillation needs that one, as DMD2 and LCM-LoRA. None: the pipeline's.
            guidance: see the class.

        Raises:
            FileNotFoundError: when something is missing or cannot be reached.
            ValueError: as the class, and for weights that do not fit, or float16 on a CPU.
        """
        if reference in PIPELINES:
            given = {"vae": vae, "unet_weights": unet_weights, "lora": lora, "scheduler": scheduler}
            options: dict[str, Any] = PIPELINES[str(reference)] | {k: v for k, v in given.items() if v is not None}
            return cls.from_pretrained(device=device, dtype=dtype, vae_dtype=vae_dtype, guidance=guidance, **options)
        device = torch.device(device)
        network_dtype, decoder_dtype = (_dtype(name, device) for name in (dtype, vae_dtype))
        where = str(shipped_folder(str(reference)) or reference)
        parts: dict[str, Any] = {}
        if vae is not None:
            parts["vae"] = load_vae(vae, decoder_dtype)
        pipeline = load_pipeline(where, network_dtype, **parts)
        if unet_weights is not None:
            take_weights(pipeline, unet_weights)
        if lora is not None:
            take_lora(pipeline, lora)
        if scheduler is not None:
            pipeline.scheduler = _few_steps(pipeline.scheduler, scheduler)
        prior = cls(pipeline, str(reference), guidance).to(device)
        prior.captions = read_pipeline_captions(Path(where))
        # nn.Module's own cast: that of diffusers warns about modules to keep in float32, of which this class has none
        nn.Module.to(prior.vae, decoder_dtype)
        return prior

    @classmethod
    def on_meta(cls, reference: str) -> "LatentPrior":
        """Return a prior of shapes alone: of ``PIPELINES`` whose architecture ships here, shipped, or a folder.

        Raises:
            FileNotFoundError: when its architecture is not at hand.
        """
        named = subfolder(ARCHITECTURES, reference.split("_")[0]) if reference in PIPELINES else None
        folder = named or shipped_folder(reference) or Path(reference)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"the architecture of {reference!r} is not at hand; give the folder of a pipeline")
        return cls(assemble_on_meta(folder), reference)

    @property
    def distilled(self) -> bool:
        """Whether few steps and no guidance are needed: the scheduler says so, or guidance is an input."""
        return isinstance(self.pipeline.scheduler, FEW_STEPS) or self.takes_guidance

    def as_consistency_model(self, shared: bool) -> "LatentPrior":
        """Return the prior with a scheduler of ``FEW_STEPS``; the network is the same if ``shared``, else a copy."""
        pipeline = copy.copy(self.pipeline)
        if not shared:
            setattr(pipeline, network_name(pipeline), copy.deepcopy(self.network))
        pipeline.scheduler = _few_steps(self.pipeline.scheduler)
        return LatentPrior(pipeline, self.reference)

    # --- LoRA ----------------------------------------------------------------------------------------------------

    def add_lora(self, spec: LoraSpec) -> list[nn.Parameter]:
        """Put trainable LoRA factors on the network and return them; with B = 0 the function is unchanged at first.

        Raises:
            ValueError: when no layer has one of the target names, or an output convolution is to be trained.
        """
        if spec.output_conv:
            raise ValueError("a LoRA of a latent prior holds no output convolution: take lora.output_conv=false")
        config = peft.LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
        try:
            self.network.add_adapter(config)
        except ValueError as error:
            raise ValueError(f"the network has no layer to adapt whose name ends with one of {spec.targets}") from error
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Switch a LoRA off inside the context."""
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def save_lora(self, folder: Path) -> None:
        """Write a LoRA in the format of diffusers, for ``from_pretrained(..., lora=folder)``."""
        layers = {name: value.half() for name, value in peft.get_peft_model_state_dict(self.network).items()}
        named = {f"{network_name(self.pipeline)}_lora_layers": layers}
        self.pipeline.save_lora_weights(str(folder), **named, safe_serialization=True)

    # --- images and latents --------------------------------------------------------------------------------------

    @property
    def video(self) -> bool:
        """Whether it is a prior of videos [B, C, T, H, W]."""
        return self.stride is not None

    @property
    def factor(self) -> int:
        """Factor by which the sides of latents are smaller than those of images."""
        names = ("vae_scale_factor_spatial", "vae_scale_factor")
        found = [getattr(self.pipeline, name) for name in names if hasattr(self.pipeline, name)]
        return int(found[0] if found else 2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def multiple(self) -> int:
        """Sides of images must be multiples of it."""
        if not self.video:
            return math.lcm(CELL, self.factor)
        return math.lcm(VIDEO_CELL, self.factor * self.network.config.patch_size[-1])

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return latent_channels(self.vae)

    def latent_shape(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Return the shape [c, h, w] or [c, t, h, w] of the latents of one image (H, W) or video (T, H, W)."""
        frames = [(count - 1) // self.stride + 1 for count in sides[:-2]] if self.stride else []
        return (self.latent_channels, *frames, *(side // self.factor for side in sides[-2:]))

    @property
    def default_size(self) -> tuple[int, int]:
        """Sides (H, W) of the images that the model was trained on, in pixels.

        Raises:
            ValueError: for a network that does not tell it, as those of videos.
        """
        side = getattr(self.network.config, "sample_size", None)
        if side is None:
            raise ValueError(f"{self.reference} does not say for which size it was made; give one")
        height, width = (side, side) if isinstance(side, int) else side
        return int(height) * self.factor, int(width) * self.factor

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the network's values; some that need it stay in float32 (diffusers' ``_keep_in_fp32_modules``)."""
        return self.network.dtype

    def check_size(self, *sides: int) -> None:
        """Raise ValueError when the model cannot take images of sides (H, W), or videos of sides (T, H, W)."""
        what, expected = ("videos (T, H, W)", 3) if self.video else ("images (H, W)", 2)
        text = "x".join(str(side) for side in sides)
        if len(sides) != expected:
            raise ValueError(f"the latent prior {self.reference or ''} takes {what}, got sides {text}")
        height, width = sides[-2:]
        if height % self.multiple or width % self.multiple or min(height, width) < self.multiple:
            raise ValueError(
                f"the latent prior takes {what.split()[0]} whose sides are multiples of {self.multiple}, got "
                f"{height}x{width}; crop or resize"
            )
        if self.stride and (sides[0] < 1 or (sides[0] - 1) % self.stride):
            before = max(sides[0] - 1, 0) // self.stride * self.stride + 1
            raise ValueError(
                f"the latent prior takes videos of 1 + {self.stride} n frames, got {sides[0]}; take {before} or "
                f"{before + self.stride}"
            )

    def check_image(self, *shape: int) -> None:
        """Raise ValueError when the model cannot take images (C, H, W), or videos (C, T, H, W)."""
        self.check_size(*shape[1:])
        if shape[0] != self.channels:
            raise ValueError(f"the latent prior's images have {self.channels} channels, got {shape[0]}")

    def check_guidance(self, guidance: float) -> None:
        """Raise ValueError for no weight of classifier-free guidance, or one where it is distilled into the network."""
        if not guidance >= 1:
            raise ValueError(f"guidance must be at least 1 (none), got {guidance}")
        if guidance > 1 and self.distilled and not self.takes_guidance:
            raise ValueError(
                f"guidance={guidance:g} on a model that has its guidance distilled into it ({self.reference or 'this'} "
                f"with {type(self.pipeline.scheduler).__name__}); leave it out, or take 1"
            )

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents E(x), float32 at least, of images x [B, C, H, W] or videos [B, C, T, H, W] in [0, 1].

        Raises:
            ValueError: for a size or number of channels that the autoencoder cannot take.
            FloatingPointError: when the autoencoder returns values that are not finite.
        """
        self.check_image(*x.shape[1:])
        output = self.vae.encode(2 * x.to(self._vae_dtype) - 1)
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        latents = latents.to(torch.promote_types(x.dtype, torch.float32))
        shift, scale = latent_scale(self.vae, latents)
        return self._finite((latents - shift) * scale, "encoder")

    def decode(self, z: Tensor) -> Tensor:
        """Return the images or videos D(z), float32 at least, of latents z; errors as ``encode``.

        Not clipped here; the autoencoders of videos clip their frames themselves.
        """
        shift, scale = latent_scale(self.vae, z)
        x = self.vae.decode((z / scale + shift).to(self._vae_dtype)).sample
        return self._finite((x.to(torch.promote_types(z.dtype, torch.float32)) + 1) / 2, "decoder")

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def _finite(self, values: Tensor, which: str) -> Tensor:
        if not torch.isfinite(values).all():
            hint = (
                "; SDXL's own autoencoder overflows in float16: take vae_dtype=float32, or the fp16-fix autoencoder"
                if self._vae_dtype == torch.float16
                else "; its input was not finite, or its weights are damaged"
            )
            raise FloatingPointError(
                f"the {which} of the latent prior's autoencoder gave values that are not finite{hint}"
            )
        return values

    # --- the network ---------------------------------------------------------------------------------------------

    def estimate(
        self,
        z_t: Tensor,
        t: Tensor | float,
        prompt: Prompt,
        guidance: float | None = None,
        null_prompt: Prompt | None = None,
    ) -> Tensor:
        """Return G(z_t, t, c), float32 at least: the estimate of z from z_t = a z + b eps.

        Args:
            z_t: noisy latents [B, c, h, w], or [B, c, t, h, w] of videos.
            t: times, one or [B]: whole numbers in [0, T), or numbers in [0, T] of a flow.
            prompt: one, or one for each.
            guidance: instead of that of the prior.
            null_prompt: which classifier-free guidance leads away from; no words unless given.

        Raises:
            ValueError: for times outside of the table.
            FloatingPointError: when the network returns values that are not finite.
        """
        times = torch.as_tensor(t, device=z_t.device).expand(len(z_t))
        if not ((times >= 0) & (times <= self.table.last_time)).all():
            raise ValueError(f"times lie in [0, {self.table.last_time}], got {times.tolist()}")
        prompt = prompt.expand(len(z_t))
        weight = self.guidance if guidance is None else guidance
        doubled = weight > 1 and not self.takes_guidance
        arguments: dict[str, Any] = {"prompt_embeds": prompt.embeds.to(self.dtype)}
        if doubled:
            null = (null_prompt or self.encode_prompt([""])).expand(len(z_t))
            arguments["negative_prompt_embeds"] = null.embeds.to(self.dtype)
            if null.pooled is not None:
                arguments["negative_pooled_prompt_embeds"] = null.pooled.to(self.dtype)
        if self.stride:
            arguments["num_frames"] = (z_t.shape[2] - 1) * self.stride + 1
        if prompt.pooled is not None:
            arguments["pooled_prompt_embeds"] = prompt.pooled.to(self.dtype)
        own, self.pipeline.scheduler = self.pipeline.scheduler, OneStep(self.table, times, doubled and not self.video)
        try:
            z0 = self._call(
                self.pipeline,
                prompt=None,
                latents=z_t.to(self.dtype),
                height=z_t.shape[-2] * self.factor,
                width=z_t.shape[-1] * self.factor,
                num_inference_steps=1,
                guidance_scale=weight,
                output_type="latent",
                return_dict=False,
                **arguments,
            )[0]
        finally:
            self.pipeline.scheduler = own
        if not torch.isfinite(z0).all():
            raise FloatingPointError(
                f"the network of the latent prior gave values that are not finite, in {self.dtype}"
            )
        return z0

    def noised(self, z: Tensor, t: Tensor | float, eps: Tensor) -> Tensor:
        """Return z_t = a z + b eps."""
        return self.table.noised(z, torch.as_tensor(t).expand(len(z)), eps)

    def encode_prompt(self, texts: str | Sequence[str]) -> Prompt:
        """Return what the model is told for these words, one prompt for each text.

        Raises:
            ValueError: for a text that is longer than the tokenizer takes.
        """
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        for text in texts:
            self._check_length(text)
        found = encode_texts(self.pipeline, texts, self.device)
        return Prompt(found[0], found[2] if len(found) > 2 else None, texts)

    def _check_length(self, text: str) -> None:
        for name, tokenizer in self.pipeline.components.items():
            if name.startswith("tokenizer") and tokenizer is not None and tokenizer.model_max_length < SENTINEL:
                count = len(tokenizer(text).input_ids)
                if count > tokenizer.model_max_length:
                    raise ValueError(
                        f"the prompt {text!r} has {count} tokens and the model's {name} takes "
                        f"{tokenizer.model_max_length}; the rest would be ignored: shorten it"
                    )

    # --- saved prompts -------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and the first values of all weights: which model this is."""
        digest = hashlib.sha256()
        for name, value in sorted(self.parts.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.flatten()[:FINGERPRINTED].detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()

    def save_prompt(self, prompt: Prompt, path: Path) -> None:
        """Write a prompt as safetensors, which ``load_prompt`` of the same model reads."""
        tensors = {"embeds": prompt.embeds.detach().float().cpu().contiguous()}
        if prompt.pooled is not None:
            tensors["pooled"] = prompt.pooled.detach().float().cpu().contiguous()
        save_file(tensors, str(path), {MADE_BY: self.fingerprint, "texts": "\n".join(prompt.texts)})

    def load_prompt(self, path: str | Path) -> Prompt:
        """Read a prompt that ``save_prompt`` wrote.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is damaged, or of another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no saved prompt {path}")
        tensors = read_weights(path)
        with safe_open(path, "pt") as stream:
            about = stream.metadata() or {}
        if about.get(MADE_BY) != self.fingerprint:
            raise ValueError(
                f"the prompt {path} was made by another model than {self.reference}; give the one it was made with, or "
                "words"
            )
        with torch.no_grad():
            blank = self.encode_prompt([""])
        found = {name: list(value.shape) for name, value in tensors.items()}
        count = (found.get("embeds") or [0])[0]
        own = {"embeds": blank.embeds, "pooled": blank.pooled}
        expected = {name: [count, *value.shape[1:]] for name, value in own.items() if value is not None}
        if count < 1 or found != expected:
            raise ValueError(f"{path} holds tensors {found}; prompts of this model are {expected}")
        texts = tuple(about.get("texts", "").split("\n"))
        embeds = tensors["embeds"].to(self.device)
        pooled = tensors["pooled"].to(self.device) if "pooled" in tensors else None
        return Prompt(embeds, pooled, texts if len(texts) == len(embeds) else ())

    def prompt(self, given: str | Prompt) -> Prompt:
        """Return the prompt of words, of the name of a ``.safetensors`` file, or as it is."""
        if isinstance(given, Prompt):
            return given
        return self.load_prompt(given) if given.endswith(".safetensors") else self.encode_prompt(given)

    # --- memory --------------------------------------------------------------------------------------------------

    def checkpoint_layers(self) -> "LatentPrior":
        """Keep the inputs of blocks alone for a backward pass, of network and autoencoder, and evaluate them again.

        Of those parts that diffusers can evaluate so: the autoencoder of Wan is none of them.
        """
        for part in (self.network, self.vae):
            if part._supports_gradient_checkpointing:
                part.enable_gradient_checkpointing()
        return self

    def train(self, mode: bool = True) -> "LatentPrior":
        """Keep all networks in eval mode whatever a trainer asks for: dropout of a frozen prior stays off."""
        return super().train(False)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    check_precision(name)
    if name == "float16" and device.type == "cpu":
        raise ValueError("float16 on a CPU is not supported by its networks; take bfloat16 or float32")
    return DTYPES[chosen_precision(name, device)] or torch.float32


FEW_STEPS = (LCMScheduler, FlowMatchLCMScheduler)
"""Schedulers of models for few steps, whose guidance is distilled into them: of a table, and of a flow."""


def _few_steps(scheduler: Any, name: str = "lcm") -> Any:
    if name != "lcm":
        raise ValueError(f"scheduler must be lcm, or left out for the pipeline's own, got {name!r}")
    table = NoiseTable(scheduler.config, type(scheduler).__name__)
    if table.schedule is not None:
        return LCMScheduler.from_config(scheduler.config)
    shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
    return FlowMatchLCMScheduler(num_train_timesteps=table.num_times, shift=shift)
