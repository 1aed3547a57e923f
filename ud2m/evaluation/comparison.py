"""Comparing samplers: the best setting of each, found on validation images, then a cell for each problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from ud2m.bars import Forecast
from ud2m.evaluation.cells import Result
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import build_score
from ud2m.evaluation.table import metric_of, selecting
from ud2m.evaluation.team import ALONE, Team
from ud2m.names import flattened
from ud2m.physics import Problem
from ud2m.samplers.base import Sampler

Setting = TypeVar("Setting")
EDGE = " (edge of the grid)"


def best_settings(
    candidates: Sequence[Setting],
    build: Callable[[Setting], Sampler],
    problem: Problem,
    batches: Sequence[Tensor],
    by: Sequence[str],
    num_samples: int,
    forecast: Forecast | None = None,
    team: Team = ALONE,
) -> dict[str, Setting]:
    """Return the best setting on validation images by each of several numbers, such as ``psnr_mean`` and ``lpips``.

    Args:
        candidates: settings to choose from.
        build: makes a sampler of one.
        problem: how the images are observed.
        batches: clean validation images [B, C, H, W].
        by: names of numbers, of ``COLUMNS`` those that select.
        num_samples: S, per observation.
        forecast: see ``measure``.
        team: processes that share the images.

    Raises:
        ValueError: for a number that nothing can be chosen by.
    """
    columns = {key: selecting(key) for key in by}
    metrics, device = dict.fromkeys(metric_of(key) for key in by), batches[0].device
    rows = []
    for candidate in candidates:
        scores = [build_score(name) for name in metrics]
        rows.append(measure(build(candidate), problem, batches, scores, num_samples, (), forecast, device, team).row)
    best = {}
    for key, column in columns.items():
        qualities = [column.quality(row[key]) for row in rows]
        finite = [float("-inf") if quality is None else quality for quality in qualities]
        best[key] = candidates[finite.index(max(finite))]
    return best


@dataclass(frozen=True)
class Images:
    """The images of one data set, or its videos.

    Attributes:
        label: how the set is called.
        test: images [n, C, H, W], or videos [n, C, T, H, W].
        validation: images on which settings are chosen.
        batch: how many are observed at once.
        names: of the test images.
    """

    label: str
    test: Tensor
    validation: Tensor
    batch: int
    names: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), or (C, T, H, W)."""
        return tuple(self.test.shape[1:])


@dataclass(frozen=True)
class Job:
    """A cell to be measured: one sampler on one problem and set of images.

    Attributes:
        label: how the sampler is called.
        operator: how the operator is called.
        images: the set.
        problem: how they are observed.
        settings: all that determines the numbers, plain. ``method`` describes the sampler; with ``tuned`` the best of
            its ``candidates`` is taken, by the number ``by``, of ``num_samples`` per validation image.
        build: makes the sampler of a description.
    """

    label: str
    operator: str
    images: Images
    problem: Problem
    settings: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], Sampler]

    @property
    def work(self) -> int:
        """Samples to be drawn."""
        tuned, images = self.settings.get("tuned"), self.images
        searched = len(images.validation) * len(tuned["candidates"]) * tuned["num_samples"] if tuned else 0
        return searched + len(images.test) * self.settings["num_samples"]

    def measured(self, forecast: Forecast | None = None, team: Team = ALONE) -> Result:
        """Return the cell, of which each process of a team makes its share.

        With a tuned setting, the row says which under ``setting``.
        """
        method, tuned, images = self.settings["method"], self.settings.get("tuned"), self.images
        found = {}
        if tuned:
            by, candidates, samples = tuned["by"], tuned["candidates"], tuned["num_samples"]
            validation = images.validation.split(images.batch)
            method = best_settings(candidates, self.build, self.problem, validation, [by], samples, forecast, team)[by]
            found = {"setting": difference(method, candidates)}
        scores, shown = [build_score(name) for name in self.settings["metrics"]], self.settings["shown"]
        test, samples = images.test.split(images.batch), self.settings["num_samples"]
        sampler, device = self.build(method), images.test.device
        result = measure(sampler, self.problem, test, scores, samples, shown, forecast, device, team)
        return replace(result, row={**result.row, **found})

    def row(self, result: Result) -> dict[str, Any]:
        """Return the row of ``metrics.json``."""
        setting = {
            "method": self.label,
            "data": self.images.label,
            "size": "x".join(map(str, self.images.shape[1:])),
            "operator": self.operator,
            "sigma_y": self.problem.sigma_y,
            "seed": self.problem.seed,
        }
        return setting | dict(result.row)


def difference(target: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> str:
    """Return the values of a description that differ among the candidates, in words.

    A number at the edge of three or more is marked: a better one may lie beyond.
    """
    words, chosen = [], flattened(target)
    for key, value in chosen.items():
        values = [flattened(candidate)[key] for candidate in candidates]
        different = len({str(other) for other in values})
        if different > 1:
            is_edge = different > 2 and isinstance(value, int | float) and value in (min(values), max(values))
            words.append(f"{key.removeprefix('setting.')} = {value}{EDGE if is_edge else ''}")
    return ", ".join(words)
