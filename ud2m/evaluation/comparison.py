"""Comparing samplers: the best settings of each, found on validation images, then a cell for each problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from ud2m.bars import Forecast
from ud2m.evaluation.cells import Result
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import build_score
from ud2m.evaluation.table import column_of, metric_of, selecting
from ud2m.evaluation.team import ALONE, Team
from ud2m.names import flattened
from ud2m.physics import Problem
from ud2m.samplers.base import Sampler

Setting = TypeVar("Setting")
EDGE = " (edge of the grid)"


def search(
    candidates: Sequence[Setting],
    build: Callable[[Setting], Sampler],
    problem: Problem,
    batches: Sequence[Tensor],
    by: Sequence[str],
    num_samples: int,
    forecast: Forecast | None = None,
    team: Team = ALONE,
) -> list[Mapping[str, Any]]:
    """Return the row of numbers of each setting on validation images; the arguments are those of ``best_settings``."""
    metrics, device = metrics_of(by), batches[0].device
    rows = []
    for candidate in candidates:
        scores = [build_score(name) for name in metrics]
        rows.append(measure(build(candidate), problem, batches, scores, num_samples, (), forecast, device, team).row)
    return rows


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
    for key in by:
        selecting(key)
    rows = search(candidates, build, problem, batches, by, num_samples, forecast, team)
    return {key: best_of(candidates, rows, key) for key in by}


def metrics_of(by: Sequence[str]) -> list[str]:
    """Return the metrics that compute numbers."""
    return list(dict.fromkeys(metric_of(key) for key in by))


def best_of(candidates: Sequence[Setting], rows: Sequence[Mapping[str, Any]], by: str) -> Setting:
    """Return the setting whose row is best in a number; the first of equal ones."""
    column = selecting(by)
    qualities = [column.quality(row[by]) for row in rows]
    finite = [float("-inf") if quality is None else quality for quality in qualities]
    return candidates[finite.index(max(finite))]


def best_label(label: str, by: str) -> str:
    """Return what a method is called at the setting that is best in a number, as ``LATINO, best LPIPS``."""
    return f"{label}, best {column_of(by).heading.split(' of ')[0]}"


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
class Task:
    """What is measured once and kept: a cell, or the search for a setting.

    Attributes:
        label: how the sampler is called.
        operator: how the operator is called.
        images: the set.
        problem: how they are observed.
        settings: all that determines the numbers, plain.
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
        raise NotImplementedError

    def measured(self, forecast: Forecast | None = None, team: Team = ALONE) -> Result:
        """Return what is kept, of which each process of a team makes its share."""
        raise NotImplementedError


@dataclass(frozen=True)
class Search(Task):
    """The settings of one sampler, to be measured on validation images.

    Of ``settings`` the ``candidates``, descriptions of samplers, are measured with ``num_samples`` per validation image
    by the numbers ``by``.
    """

    @property
    def work(self) -> int:
        """Samples to be drawn."""
        return len(self.images.validation) * len(self.settings["candidates"]) * self.settings["num_samples"]

    def measured(self, forecast: Forecast | None = None, team: Team = ALONE) -> Result:
        """Return the rows of all candidates, as a curve."""
        candidates, by, samples = (self.settings[key] for key in ("candidates", "by", "num_samples"))
        batches = self.images.validation.split(self.images.batch)
        rows = search(candidates, self.build, self.problem, batches, by, samples, forecast, team)
        return Result({}, {"rows": rows}, {})


@dataclass(frozen=True)
class Job(Task):
    """A cell to be measured: one sampler, the ``method`` of ``settings``, on one problem and set of images.

    ``search`` finds the best method by the number ``by``, which ``setting`` then says in words; None: it is given.
    """

    search: Search | None = None
    by: str = ""
    setting: str | None = None

    @property
    def work(self) -> int:
        """Samples to be drawn."""
        return len(self.images.test) * self.settings["num_samples"]

    def chosen(self, found: Result) -> "Job":
        """Return the cell at the setting that is best in what its search found."""
        assert self.search is not None
        candidates = self.search.settings["candidates"]
        method = best_of(candidates, found.curves["rows"], self.by)
        settings = {**self.settings, "method": method}
        return replace(self, settings=settings, setting=difference(method, candidates))

    def measured(self, forecast: Forecast | None = None, team: Team = ALONE) -> Result:
        """Return the cell."""
        scores, shown = [build_score(name) for name in self.settings["metrics"]], self.settings["shown"]
        test, samples = self.images.test.split(self.images.batch), self.settings["num_samples"]
        sampler, device = self.build(self.settings["method"]), self.images.test.device
        return measure(sampler, self.problem, test, scores, samples, shown, forecast, device, team)

    def row(self, result: Result) -> dict[str, Any]:
        """Return the row of ``metrics.json``; of a search, it says what was chosen under ``setting``."""
        measured_on = {
            "method": self.label,
            "data": self.images.label,
            "size": "x".join(map(str, self.images.shape[1:])),
            "operator": self.operator,
            "sigma_y": self.problem.sigma_y,
            "seed": self.problem.seed,
        }
        chosen = {} if self.setting is None else {"setting": self.setting}
        return measured_on | dict(result.row) | chosen


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
