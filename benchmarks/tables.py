"""Rows of the studies: samplers measured on problems, and LATINO at its best setting."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ud2m.cli.commands import conf_folder
from ud2m.cli.methods import build_sampler, combinations
from ud2m.evaluation.comparison import best_settings, difference
from ud2m.evaluation.measure import Measurement
from ud2m.evaluation.scores import build_score, fitting_scores
from ud2m.evaluation.table import without_bounds
from ud2m.physics import Problem
from ud2m.samplers.base import Sampler

METRICS = ("psnr", "ssim", "lpips", "r", "residual")


def row_of(
    sampler: Sampler,
    problem: Problem,
    batches: Sequence[Tensor],
    num_samples: int,
    label: str | None = None,
    sets: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the numbers of a sampler on batches of clean images.

    Args:
        sampler: draws the samples.
        problem: how the images are observed.
        batches: clean images [B, C, H, W].
        num_samples: S, per observation.
        label: of a bar of progress; None: there is none.
        sets: metrics of the whole set of images, as ``frechet_alex``.
    """
    scores = fitting_scores(METRICS, num_samples, batches[0].shape[1:]) + [build_score(name) for name in sets]
    measurement = Measurement(sampler, problem, scores, num_samples)
    for x0 in tqdm(batches, desc=label, unit="batch", disable=label is None):
        measurement.add(x0)
    return without_bounds(measurement.row())


def best_latino(prior: nn.Module, problem: Problem, validation: Sequence[Tensor]) -> tuple[Sampler, str]:
    """Return LATINO with the setting of conf/method/latino.yaml that is best in the PSNR of the mean, and its words."""
    page: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "method" / "latino.yaml"))
    candidates = list(combinations(page["target"], page["tune"]))

    def build(target: dict[str, Any]) -> Sampler:
        return build_sampler(target, prior, "cpu")

    best = best_settings(candidates, build, problem, validation, ["psnr_mean"], 2)["psnr_mean"]
    return build(best), difference(best, candidates)
