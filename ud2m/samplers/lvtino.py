"""LVTINO: zero-shot video restoration with a video and an image consistency model in turn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ud2m.numbers import is_number, is_whole
from ud2m.physics import DataTerm, Observation
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.random import randn_like
from ud2m.samplers.latent_latino import LatentSampler, StepRule, check_times
from ud2m.unfolded.total_variation import tv_prox
from ud2m.unfolded.warm_start import Start

TIMES, IMAGE_TIMES = (522, 450, 350, 255, 125), (249, 124)
"""For 7 evaluations, where the authors publish none. From a start that knows y low times were best on digits."""


class Lvtino(LatentSampler):
    """LVTINO [LVTINO, algorithm 1]: samples of p(x | y), prior p_V^eta p_I^(1 - eta) exp(-TV), for clips of any length.

    From a start that follows from y, for each time t of the video prior: z_t = a E(x) + b eps; u = D(G(z_t, t, c));
    x = argmin of the data, of TV, and of |x - u|^2 / (2 eta delta). While times of the image prior are left the same
    with it, frame by frame with one eps for all, with |x - u|^2 / (2 (1 - eta) delta) and without TV. Both delta are
    those of ``steps``, free of size and operator. With eta = 1 and no TV it is ``LatentLatino``. Differs from [LVTINO]:
    it begins at ``SmoothingStart``, not at A^dagger y, and has one rule of step sizes where the authors tune each
    problem.

    A clip that is longer than ``window`` goes through the video prior in windows that overlap. Frames that two of them
    see have the same noise and are faded from one estimate to the other; the data step is that of the whole clip. So
    the memory of the networks is that of one window, whatever the clip's length. A clip whose length the video
    prior's autoencoder does not take is continued by its last frame while the prior sees it.

    Args:
        prior: of videos.
        image_prior: of images; not used at eta = 1.
        prompt: of the video prior, as for ``LatentSampler``.
        image_prompt: of the image prior.
        times: of the video prior, falling.
        image_times: of the image prior, falling, at most as many.
        eta: share of the video prior, in (0, 1].
        space: weight of differences between pixels in TV (``tv_prox``), per image unit.
        time: weight of differences between frames.
        steps: as for ``LatentSampler``.
        start: as for ``LatentSampler``.
        window: frames that the video prior sees at once, as its autoencoder takes them. None: all.
        overlap: frames that windows share, at least.
        chunk_size: images that the image prior sees at once, and frames of several clips together.

    Raises:
        ValueError: for priors of the wrong kind, or numbers out of range.
    """

    title = "LVTINO"

    def __init__(
        self,
        prior: LatentPrior,
        image_prior: LatentPrior | None = None,
        prompt: str | Prompt = "a high resolution video",
        image_prompt: str | Prompt = "a high resolution photo",
        times: Sequence[int] = TIMES,
        image_times: Sequence[int] = IMAGE_TIMES,
        eta: float = 0.5,
        space: float = 0.0,
        time: float = 0.0,
        steps: StepRule | None = None,
        start: Start | None = None,
        window: int | None = None,
        overlap: int = 4,
        chunk_size: int = 16,
    ):
        super().__init__(prior, prompt, steps, start, chunk_size)
        if not is_number(eta) or not 0 < eta <= 1:
            raise ValueError(f"eta must be a share in (0, 1], got {eta!r}")
        for name, value in {"space": space, "time": time}.items():
            if not is_number(value) or not 0 <= value < torch.inf:
                raise ValueError(f"{name} must be a weight of at least 0, got {value!r}")
        if not prior.video:
            raise ValueError(f"{prior.reference} is a pipeline of images; LVTINO needs one of videos")
        check_times(times, prior)
        self.stride = prior.stride or 1
        self.times, self.image_times = tuple(times), tuple(image_times) if eta < 1 else ()
        if eta < 1:
            if image_prior is None or image_prior.video:
                raise ValueError(f"eta={eta} needs a pipeline of images too: give image_pipeline=..., or take eta=1")
            check_times(image_times, image_prior)
            if len(image_times) > len(times):
                raise ValueError(
                    f"image_times has {len(image_times)} times and times {len(times)}: the image prior comes after the "
                    "video prior and cannot have more"
                )
            self.networks = (*self.networks, image_prior.network)
            with torch.no_grad():
                self.image_prompt = image_prior.prompt(image_prompt)
        self.image_prior, self.eta, self.space, self.time = image_prior, eta, space, time
        self.window, self.overlap = window, overlap
        if window is not None and (not is_whole(window) or window < 1 or (window - 1) % self.stride):
            raise ValueError(
                f"window must be 1 + {self.stride} n frames, as the video prior takes them, got {window!r}"
            )
        if not is_whole(overlap) or overlap < 0 or (window is not None and overlap > max(window - self.stride, 0)):
            raise ValueError(
                f"overlap must be a number of frames from 0 to window - {self.stride}, got {overlap!r} at "
                f"window={window}"
            )

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        prompt: str | Prompt = "a high resolution video",
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        vae_dtype: str = "float32",
        guidance: float | None = None,
        image_reference: str | Path | None = None,
        **options: Any,
    ) -> "Lvtino":
        """Return the sampler with pipelines: shipped names, diffusers folders or hub ids.

        Args:
            reference: of the video prior, see ``LatentPrior.from_pretrained``, as the next ones.
            prompt: see the class.
            device: of networks.
            dtype: of both networks.
            vae_dtype: of both autoencoders.
            guidance: of classifier-free guidance of the video prior.
            image_reference: of the image prior; None at eta = 1.
            options: further ones of the class.
        """
        prior, image_prior = LatentPrior.from_pretrained(reference, device, dtype, vae_dtype, guidance=guidance), None
        if image_reference is not None and options.get("eta") != 1:
            image_prior = LatentPrior.from_pretrained(image_reference, device, dtype, vae_dtype)
        return cls(prior, image_prior, prompt, **options)

    def nfe(self) -> int:
        """Return evaluations of one sample; one of a network on all frames counts once, as the authors count."""
        return len(self.times) + len(self.image_times)

    def evaluations_of(self, observation: Observation) -> int:
        """Return evaluations of networks, those of windows and frames one by one."""
        frames = observation.image_shape[1]
        return len(self.times) * len(self.starts(frames)) + len(self.image_times) * frames

    def images_at_once(self, observation: Observation) -> int:
        """Return how many clips the video prior sees at once."""
        return max(1, self.chunk_size // min(observation.image_shape[1], self.window or self.chunk_size))

    def check(self, physics: DataTerm) -> None:
        """Raise ValueError for operators on images, and for frames that a prior cannot take."""
        check_video(self.title, physics, *filter(None, (self.prior, self.image_prior if self.eta < 1 else None)))

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        x = self.first(observation)
        for k, t in enumerate(self.times):
            u = self.of_videos(x, t, streams)
            delta = self.eta * self.steps.variance(self.prior, t, u, observation)
            x = tv_prox(observation, u, delta, self.space, self.time).clamp(0, 1)
            if self.image_prior is not None and k < len(self.image_times):
                u = self.of_images(self.image_prior, x, self.image_times[k], streams)
                delta = (1 - self.eta) * self.steps.variance(self.image_prior, self.image_times[k], u, observation)
                x = tv_prox(observation, u, delta).clamp(0, 1)
        return x

    def starts(self, frames: int) -> list[int]:
        """Return the first frames of the windows of a clip: multiples of the autoencoder's stride."""
        stride, whole = self.stride, self.whole(frames)
        window = min(self.window or whole, whole)
        step = max(stride, (window - self.overlap) // stride * stride)
        return [*range(0, whole - window, step), whole - window]

    def whole(self, frames: int) -> int:
        """Return the frames of a clip that is continued to what the autoencoder takes, 1 + stride n."""
        return 1 + -(-(frames - 1) // self.stride) * self.stride

    def of_videos(self, x: Tensor, t: int, streams: list[torch.Generator]) -> Tensor:
        """Return the video prior's clipped estimate of x [B, C, T, H, W] after noise of time t, in windows."""
        prior, frames = self.prior, x.shape[2]
        starts, whole = self.starts(frames), self.whole(frames)
        window = whole - starts[-1]
        clip = torch.cat([x, x[:, :, -1:].expand(-1, -1, whole - frames, -1, -1)], 2)
        noise = randn_like(x.new_empty(len(x), *prior.latent_shape(tuple(clip.shape[2:]))), streams)
        prompt, total, weights = self.prompt.expand(len(x)), torch.zeros_like(clip), x.new_zeros(whole)
        ramp = fade(window, window - starts[1] if starts[1:] else 0).to(x)
        for first in starts:
            seen, latents = slice(first, first + window), first // self.stride
            z = prior.encode(clip[:, :, seen])
            eps = noise[:, :, latents : latents + z.shape[2]]
            u = prior.decode(prior.estimate(prior.noised(z, t, eps), t, prompt)).clamp(0, 1)
            total[:, :, seen] += ramp.view(-1, 1, 1) * u
            weights[seen] += ramp
        return total[:, :, :frames] / weights[:frames].view(-1, 1, 1)

    def of_images(self, prior: LatentPrior, x: Tensor, t: int, streams: list[torch.Generator]) -> Tensor:
        """Return the image prior's clipped estimate of each frame of x [B, C, T, H, W] after one noise for all."""
        eps = randn_like(x.new_empty(len(x), *prior.latent_shape(tuple(x.shape[3:]))), streams)
        return frame_by_frame(prior, x, t, eps.repeat_interleave(x.shape[2], 0), self.image_prompt, self.chunk_size)


def frame_by_frame(prior: LatentPrior, x: Tensor, t: int, eps: Tensor, prompt: Prompt, chunk_size: int) -> Tensor:
    """Return an image prior's clipped estimate of each frame of x [B, C, T, H, W] after noise eps [B T, c, h, w]."""
    frames = x.transpose(1, 2).flatten(0, 1)
    parts = [
        prior.decode(prior.estimate(prior.noised(prior.encode(part), t, noise), t, prompt))
        for part, noise in zip(frames.split(chunk_size), eps.split(chunk_size), strict=True)
    ]
    return torch.cat(parts).clamp(0, 1).unflatten(0, (len(x), -1)).transpose(1, 2)


def check_video(name: str, physics: DataTerm, *priors: LatentPrior) -> None:
    """Raise ValueError for an operator on images, and for frames that a prior cannot take."""
    shape: tuple[int, ...] = getattr(physics, "img_size", ())
    if len(shape) != 4:
        raise ValueError(f"{name} restores videos; take an operator on videos, as physics=video_a")
    for prior in priors:
        check_channels(prior, shape[0])
        prior.check_size(*([1] if prior.video else []), *shape[-2:])


def check_channels(prior: LatentPrior, channels: int) -> None:
    """Raise ValueError for a prior whose frames have other channels than a clip."""
    if prior.channels != channels:
        raise ValueError(
            f"the pipeline {prior.reference} has frames of {prior.channels} channels and the clip {channels}; take "
            "another pipeline, or one for each prior (image_pipeline=...)"
        )


def fade(window: int, shared: int) -> Tensor:
    """Return weights of the frames of a window: 1, 2, ... from its ends over the frames that it shares."""
    place = torch.arange(1, window + 1)
    return torch.minimum(place, window + 1 - place).clamp(max=shared + 1).float()
