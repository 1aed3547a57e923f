"""Measure a sampler in one call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ud2m.evaluation.measure import Measurement
from ud2m.evaluation.scores import distance_score, fitting_scores
from ud2m.evaluation.table import without_bounds
from ud2m.physics import Problem


def evaluate(
    sampler: Any,
    batches: Iterable[Tensor],
    problem: Problem,
    num_samples: int = 8,
    distances: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    metrics: Sequence[str] = ("psnr", "ssim", "r", "residual"),
) -> dict[str, Any]:
    """Return the row of a sampler on batches of clean images, without bounds of intervals."""
    batches = list(batches)
    scores = fitting_scores(metrics, num_samples, batches[0].shape[1:])
    scores += [distance_score(name, distance) for name, distance in (distances or {}).items()]
    measurement = Measurement(sampler, problem, scores, num_samples)
    for x0 in batches:
        measurement.add(x0)
    return without_bounds(measurement.row())
