"""Samples of videos: what ``sample.py sampler=lvtino`` runs, and every sampler where the operator acts on videos."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ud2m.cli.objects import build
from ud2m.cli.sample import AUTO, Case, Group, given_operator, scored
from ud2m.cli.sample_latent import LatentRun
from ud2m.data.videos import INSTALL, can_write_videos, read_clip, write_frames, write_video
from ud2m.evaluation.scores import Draws, Score, motion_score
from ud2m.physics import Observation, OperatorFamily, estimate_sigma_y
from ud2m.reports.clips import SHOWN, STD, flicker, strip
from ud2m.reports.samples import Entry
from ud2m.samplers.base import Sampler
from ud2m.samplers.lvtino import Lvtino


def run_of(config: DictConfig) -> type[LatentRun]:
    """Return the kind of run that the operator asks for.

    Raises:
        ValueError: for an operator that cannot be made.
    """
    chosen = given_operator(config)
    acts = None if chosen is None else build(chosen.operator, "physics.operator", OperatorFamily)
    return VideoRun if acts is not None and acts.video else LatentRun


class VideoRun(LatentRun):
    """The objects of one sampling job for a video file, or a folder of frames.

    Args:
        config: of conf/sample.yaml, with a ``sampler`` and an operator on videos.
        device: of networks and videos.

    Raises:
        ValueError: for settings that do not fit together.
        FileNotFoundError: for a missing pipeline.
    """

    def __init__(self, config: DictConfig, device: torch.device):
        if config.input is None:
            raise ValueError("an operator on videos needs input=..., a video or a folder of its frames")
        super().__init__(config, device)
        if not can_write_videos():
            tqdm.write(f"clips are written as frames alone; videos need {INSTALL}")

    def built(self) -> Sampler:
        """Return the sampler; one without a network, as ADMM-TV, has no prior and takes clips as they are."""
        self.prior = None
        has_prior = "reference" in self.config.sampler
        sampler: Sampler = super().built() if has_prior else build(self.config.sampler, "sampler", Sampler)
        if not sampler.draws:
            self.config.num_samples = 1
        return sampler

    def own_files(self) -> Group:
        """Return what the video of ``input`` asks for."""
        path = Path(self.config.input).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no video {path}: give a video file, or a folder of frames")
        text = f"{SHOWN} frames or fewer of each clip, evenly spaced; the folder holds all."
        return Group("Video", text, [path.stem], lambda k: self.file_case(path, k), 1, [path])

    def file_case(self, path: Path, index: int) -> Case:
        """Return what the video asks for: an observation to be explained, or a clean clip to be degraded."""
        channels, degraded = self.prior.channels if self.prior else None, bool(self.config.degraded)
        seen = self.operator.y_channels(channels) if channels and degraded else channels
        clip = read_clip(path, seen, self.config.fps)
        x = clip.frames.unsqueeze(0).to(self.device)
        try:
            if degraded:
                self.rate = clip.rate
                physics, level = self.known_operator(x), self.problem.sigma_y
                sigma_y = estimate_sigma_y(physics, x) if self.config.sigma_y == AUTO else level
                observation = Observation.of(x, physics, sigma_y)
                self.rate *= observation.image_shape[1] / x.shape[2]
                return Case(path.stem, observation, remark=clip.remark)
            x0 = self.fitting(x)
            self.rate = clip.rate
            cut = "" if x0.shape == x.shape else f"cut to {x0.shape[3]}x{x0.shape[4]}, what is taken"
            remark = "; ".join(filter(None, (clip.remark, cut)))
            return Case(path.stem, self.problem.observe(x0, index), x0, remark=remark)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def multiple(self) -> int:
        """Of which the sides of what is degraded are multiples, for the operator and the priors."""
        others = [self.sampler.image_prior] if isinstance(self.sampler, Lvtino) else []
        multiples = [prior.multiple for prior in (self.prior, *others) if prior is not None]
        return math.lcm(self.operator.multiple, *multiples)

    def scores(self, num_samples: int, shape: Sequence[int], known: bool = True) -> list[Score]:
        """Return fresh scores, with that of motion."""
        return [*super().scores(num_samples, shape, known), *([motion_score()] if known else [])]

    @torch.no_grad()
    def entry(self, case: Case, samples: Tensor) -> Entry:
        """Return the clip's part of the report: strips of frames, and scores; those of images are means over frames."""
        observation, x0, y = case.observation, case.x0, case.observation.y
        draws = Draws(samples.mean(1) if x0 is None else x0, observation, self.problem.true_noise, samples)
        numbers = scored(self.scores(samples.shape[1], observation.image_shape, x0 is not None), draws)
        if x0 is None:
            numbers["sigma_y"] = float(observation.sigma_y)
        mean, std = samples[0].mean(0), samples[0].std(0) if samples.shape[1] > 1 else None
        clips = {} if x0 is None else {"Reference": x0[0]}
        clips |= {"Observation y": y[0], "Sample 1": samples[0, 0], "Mean": mean} | ({} if std is None else {STD: std})
        drawn, reference = torch.stack([strip(sample) for sample in samples[0]]), None if x0 is None else strip(x0[0])
        seen, spread = strip(y[0], mean.shape[1]), None if std is None else strip(std)
        entry = Entry(case.name, reference, seen, drawn, strip(mean), spread, numbers)
        return replace(entry, clips=clips, rate=self.rate, curves=curves(observation, samples, x0))

    def write(self, place: Path, case: Case, samples: Tensor, entry: Entry) -> None:
        """Write frames and videos of observation, samples, mean and standard deviation (white is the largest)."""
        std = samples[0].std(0, correction=0)
        shorter = samples.shape[3] / case.observation.y.shape[2]
        clips = {f"samples/{k:03d}": (sample, self.rate) for k, sample in enumerate(samples[0])} | {
            "observation": (case.observation.y[0], self.rate / shorter),
            "mean": (samples[0].mean(0), self.rate),
            "std": (std / std.max().clamp(min=1e-6), self.rate),
        }
        for name, (clip, rate) in clips.items():
            write_frames(clip, place / name)
            if can_write_videos():
                write_video(clip, place / f"{name}.mp4", rate)


def curves(observation: Observation, samples: Tensor, x0: Tensor | None) -> dict[str, dict[str, list[float]]]:
    """Return the residual of each frame of y, the mean over samples, and how much each frame differs from the last."""
    y, sigma_y = observation.y[0], float(observation.sigma_y)
    off = torch.stack([observation.physics.A(sample)[0] - y for sample in samples.unbind(1)])
    residuals = off.square().mean((0, 1, 3, 4)).sqrt() / sigma_y
    known = {} if x0 is None else {"Reference": flicker(x0[0])}
    moved = known | {"Sample 1": flicker(samples[0, 0]), "Mean": flicker(samples[0].mean(0))}
    return {"Residual of frames of y": {"Samples": residuals.tolist()}, "Change from frame to frame": moved}
