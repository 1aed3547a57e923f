"""Validation of a sampler: the score that selects checkpoints is the sampler's own."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ud2m.evaluation.measure import Measurement
from ud2m.evaluation.scores import Draws, build_score, fitting_scores, lpips_metric
from ud2m.evaluation.table import metric_of, selecting
from ud2m.physics import Problem
from ud2m.samplers.base import Sampler, check_count

METRICS = ("psnr", "ssim", "residual", "r")
"""What is always measured; LPIPS comes on top."""


class Validation:
    """Measures a sampler on validation images, as often as training asks.

    Args:
        sampler: the one that is trained.
        problem: how the images are observed.
        num_samples: S, per image.
        lpips: backbone of LPIPS, or None to do without; it is left out where its weights are not in the torch cache.
        metric: number of ``COLUMNS`` that selects the best checkpoint, as ``psnr_mean``, ``lpips`` or ``energy``.

    Raises:
        ValueError: for a number that cannot be measured or chosen by, or no samples.
    """

    def __init__(
        self,
        sampler: Sampler,
        problem: Problem,
        num_samples: int = 4,
        lpips: str | None = "alex",
        metric: str = "psnr_mean",
    ):
        check_count("validation.num_samples", num_samples)
        self.sampler, self.problem, self.num_samples, self.metric = sampler, problem, num_samples, metric
        self.metrics = self._metrics(lpips, metric)
        self.measurement: Measurement | None = None

    @staticmethod
    def _metrics(lpips: str | None, metric: str) -> Sequence[str]:
        needed = metric_of(metric)
        try:
            selecting(metric)
            build_score(needed)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"validation.metric={metric}: {error}") from error
        return tuple(dict.fromkeys([*METRICS, *([] if lpips is None else [lpips_metric(lpips)]), needed]))

    def begin(self) -> None:
        """Start a measurement."""
        self.measurement = None

    def add(self, x0: Tensor) -> Draws:
        """Draw samples for clean images x0 [B, C, H, W], and score them."""
        if self.measurement is None:
            scores = fitting_scores(self.metrics, self.num_samples, x0.shape[1:])
            self.measurement = Measurement(self.sampler, self.problem, scores, self.num_samples, x0.device)
        return self.measurement.add(x0)

    def result(self) -> tuple[dict[str, Any], float]:
        """Return the numbers of what was added, and the one that selects, higher for better.

        Raises:
            ValueError: when nothing was added, or the selecting number is not defined on these images.
        """
        if self.measurement is None:
            raise ValueError("there are no validation images")
        row = self.measurement.means()
        if self.metric not in row:
            raise ValueError(
                f"validation.metric={self.metric} is not defined for {self.num_samples} samples of these images; take "
                "another metric, more samples or larger images"
            )
        quality = selecting(self.metric).quality(row[self.metric])
        return row, float("nan") if quality is None else quality
