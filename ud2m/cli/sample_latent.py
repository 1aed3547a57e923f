"""Samples with a latent prior and a prompt: what ``sample.py sampler=...`` runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ud2m.cli.objects import build
from ud2m.cli.sample import ENTRY, METRICS, Case, SamplingRun, given_noise_level, given_operator
from ud2m.evaluation.scores import Score, build_score, fitting_scores, lpips_metric
from ud2m.files import read_tensors
from ud2m.physics import OperatorFamily, Problem
from ud2m.priors.latent import Prompt
from ud2m.reports.samples import Entry, Section, write_pictures
from ud2m.samplers.latent_latino import LatentSampler
from ud2m.samplers.latino_pro import PromptEstimator, Trace

DRAWN = 8
"""Pictures from the prior that the report shows, before and after a prompt was estimated."""
PROMPT_FILE, FIRST, ESTIMATED = "prompt.safetensors", "first_prompt", "estimated_prompt"
"""The estimated prompt, and the folders of pictures from the prior."""


class LatentRun(SamplingRun):
    """The objects of one sampling job with a latent prior.

    Args:
        config: of conf/sample.yaml, with a ``sampler``.
        device: of networks and images.

    Raises:
        ValueError: for settings that do not fit together.
        FileNotFoundError: for a missing pipeline.
    """

    def __init__(self, config: DictConfig, device: torch.device):
        self.config, self.device = config, device
        chosen = given_operator(config)
        if chosen is None:
            raise ValueError("sampler=... needs an operator: add physics=super_resolution, or another of conf/physics")
        if config.sampler.get("prompt", "") is None:
            raise ValueError('sampler=... needs prompt="words", or the file of a saved prompt')
        if config.compile is not None:
            raise ValueError("compile=... belongs to model=...; the pipeline of sampler=... is evaluated as it is")
        if config.compare:
            raise ValueError("compare=true belongs to model=...; ud2m evaluate compares methods with a latent prior")
        self.sampler = self.built()
        self.described = chosen.operator
        self.operator = build(chosen.operator, "physics.operator", OperatorFamily)
        noise_level = given_noise_level(config, chosen.sigma_y)
        self.problem = Problem(self.operator, noise_level, config.seed, chosen.get("noise"))
        self.lpips = [] if config.lpips is None else [lpips_metric(config.lpips)]
        self.found: list[tuple[Prompt, Trace]] = []
        if isinstance(self.sampler, PromptEstimator):
            self.sampler.listener = lambda prompt, trace: self.found.append((prompt, trace))
        self.plan({"fingerprint": self.sampler.fingerprint})

    def built(self) -> Any:
        """Return the sampler, whose prior is that of the run.

        Raises:
            ValueError: for one without a prior, which images do not do without.
        """
        if "reference" not in self.config.sampler:
            raise ValueError("this sampler restores videos; take an operator on videos, as physics=video_a")
        sampler = build(self.config.sampler, "sampler", LatentSampler, device=self.device)
        self.prior = sampler.prior
        return sampler

    @property
    def name(self) -> str:
        """What the sampler is called in tables."""
        return str(self.sampler.title)

    def headline(self) -> tuple[str, str]:
        """Return title and summary of the report."""
        return (
            self.name + (f": {self.config.sampler.prompt}" if self.prior else ""),
            f"{self.config.num_samples} samples per observation, {self.sampler.nfe()} network evaluations each; "
            + (f"pipeline {self.prior.reference}, " if self.prior else "")
            + f"{self.measurement}. Bright places of the standard deviation are "
            "those that neither observation nor prompt determine.",
        )

    def scores(self, num_samples: int, shape: Sequence[int], known: bool = True) -> list[Score]:
        """Return fresh scores: the residual always, the others where the images are known."""
        names = [*METRICS, *self.lpips, "r"] if known else []
        return [*fitting_scores(names, num_samples, shape), build_score("residual")]

    def sample(self, case: Case, bar: tqdm) -> Tensor:
        """Draw samples for one observation, and note what became of the prompt."""
        self.found.clear()
        return super().sample(case, bar)

    @torch.no_grad()
    def keep(self, case: Case, place: Path, entry: Entry) -> None:
        """Write the mean of the samples' prompts, and pictures from the prior with the first prompt and with it."""
        if not self.found:
            return
        first = self.sampler.prompt
        embeds = torch.cat([prompt.embeds for prompt, _ in self.found]).mean(0, keepdim=True)
        pooled = [prompt.pooled for prompt, _ in self.found if prompt.pooled is not None]
        estimated = Prompt(embeds, torch.cat(pooled).mean(0, keepdim=True) if pooled else None, first.texts)
        self.prior.save_prompt(estimated, place / PROMPT_FILE)
        size, device = (entry.mean.shape[1], entry.mean.shape[2]), case.observation.y.device
        for folder, title, prompt, note in (
            (FIRST, f"{case.name}: {self.config.prompt}", first, ""),
            (ESTIMATED, f"{case.name}: estimated", estimated, self.told()),
        ):
            streams = [torch.Generator(device).manual_seed(self.config.seed + k) for k in range(DRAWN)]
            drawn = self.sampler.from_prior(prompt.expand(DRAWN), size, streams)
            about = Entry(
                title, entry.reference, entry.observation, drawn, drawn.mean(0), drawn.std(0), {}, note, entry.measured
            )
            write_pictures(place / folder, about, case.pixels)
            torch.save(vars(about), place / folder / ENTRY)

    def told(self) -> str:
        """Return what happened over the chains, in words: means over the samples."""
        residuals = torch.cat([trace.residuals for _, trace in self.found], 1).mean(1)
        text = "Residual of the chains' first estimates: " + ", ".join(f"{value:.3g}" for value in residuals.tolist())
        weights = [trace.weights for _, trace in self.found if trace.weights.numel()]
        if not weights:
            return text
        last = torch.cat(weights, 1)[-1].mean(0)
        ranked = sorted(zip(last.tolist(), self.sampler.texts, strict=True), reverse=True)
        return f"{text}. Weights of the prompts: " + ", ".join(f"{name} {weight:.2f}" for weight, name in ranked)

    def further_sections(self, folder: Path) -> list[Section]:
        """Return what became of the prompts of the shown pictures."""
        places = [
            folder if group.alone else self.place(folder, name)
            for group in self.groups
            for name in group.names[: group.shown]
        ]
        files = [place / part / ENTRY for place in places for part in (FIRST, ESTIMATED)]
        entries = [Entry(**read_tensors(file)) for file in files if file.is_file()]
        text = "Pictures drawn from the prior alone, with the given prompt and with the estimated one."
        return [Section("The prompt", text, entries)] if entries else []
