"""Comparing samplers: the best setting of each, found on validation images, then a cell for each problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ud2m.evaluation.cells import CellStore, Result
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import build_score
from ud2m.evaluation.table import metric_of, selecting
from ud2m.names import flattened
from ud2m.physics import Problem
from ud2m.samplers.base import Sampler

Setting = TypeVar("Setting")
Advance = Callable[[int], Any]


def best_settings(
    candidates: Sequence[Setting],
    build: Callable[[Setting], Sampler],
    problem: Problem,
    batches: Sequence[Tensor],
    by: Sequence[str],
    num_samples: int,
    advance: Advance = lambda samples: None,
    device: torch.device | str = "cpu",
) -> dict[str, Setting]:
    """Return the best setting on validation images by each of several numbers, such as ``psnr_mean`` and ``lpips``.

    Args:
        candidates: settings to choose from.
        build: makes a sampler of one.
        problem: how the images are observed.
        batches: clean validation images [B, C, H, W].
        by: names of numbers, of ``COLUMNS`` those that select.
        num_samples: S, per observation.
        advance: is told how many samples were drawn.
        device: where the images are.

    Raises:
        ValueError: for a number that nothing can be chosen by.
    """
    columns = {key: selecting(key) for key in by}
    metrics = dict.fromkeys(metric_of(key) for key in by)
    rows = [
        measure(
            build(candidate),
            problem,
            batches,
            [build_score(name) for name in metrics],
            num_samples,
            advance=lambda images: advance(images * num_samples),
            device=device,
        ).row
        for candidate in candidates
    ]
    best = {}
    for key, column in columns.items():
        qualities = [column.quality(row[key]) for row in rows]
        finite = [float("-inf") if quality is None else quality for quality in qualities]
        best[key] = candidates[finite.index(max(finite))]
    return best


@dataclass(frozen=True)
class Images:
    """The images of one data set.

    Attributes:
        label: how the set is called.
        test: batches [B, C, H, W].
        validation: batches on which settings are chosen.
        names: of the test images.
    """

    label: str
    test: Sequence[Tensor]
    validation: Sequence[Tensor]
    names: Sequence[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.test[0].shape[1:]
        return channels, height, width

    @property
    def count(self) -> int:
        """Number of test images."""
        return sum(len(x0) for x0 in self.test)

    def shown(self, most: int) -> list[int]:
        """Return the numbers of at most so many test images, evenly spaced."""
        count = min(most, self.count)
        return [k * self.count // count for k in range(count)]


@dataclass(frozen=True)
class Tuning:
    """How a setting is chosen: from ``candidates``, by the number ``by``, of ``num_samples`` per validation image."""

    candidates: Sequence[Mapping[str, Any]]
    by: str
    num_samples: int


@dataclass(frozen=True)
class Job:
    """A cell to be measured: one sampler on one problem and set of images.

    Attributes:
        label: how the sampler is called.
        operator: how the operator is called.
        images: the set.
        problem: how they are observed.
        method: plain description of the sampler.
        settings: all that determines the numbers, plain.
        build: makes the sampler of a description.
        tuning: None: the description is taken as it is.
    """

    label: str
    operator: str
    images: Images
    problem: Problem
    method: Mapping[str, Any]
    settings: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], Sampler]
    tuning: Tuning | None = None

    @property
    def num_samples(self) -> int:
        """S, per observation."""
        return int(self.settings["num_samples"])

    @property
    def work(self) -> int:
        """Samples to be drawn."""
        tuning = self.tuning
        searched = sum(len(x0) for x0 in self.images.validation)
        extra = 0 if tuning is None else len(tuning.candidates) * searched * tuning.num_samples
        return extra + self.images.count * self.num_samples

    def measured(self, advance: Advance) -> Result:
        """Return the cell; with a tuned setting, the row says which under ``setting``."""
        device = self.images.test[0].device
        method = self._tuned(advance, device)
        result = measure(
            self.build(method),
            self.problem,
            self.images.test,
            [build_score(name) for name in self.settings["metrics"]],
            self.num_samples,
            self.settings["shown"],
            lambda images: advance(images * self.num_samples),
            device,
        )
        if self.tuning is None:
            return result
        return replace(result, row=dict(result.row) | {"setting": difference(method, self.tuning.candidates)})

    def row(self, result: Result) -> dict[str, Any]:
        """Return the row of ``metrics.json``."""
        height, width = self.images.shape[1:]
        setting = {
            "method": self.label,
            "data": self.images.label,
            "size": f"{height}x{width}",
            "operator": self.operator,
            "sigma_y": self.problem.sigma_y,
            "seed": self.problem.seed,
        }
        return setting | dict(result.row)

    def _tuned(self, advance: Advance, device: torch.device) -> Mapping[str, Any]:
        if self.tuning is None:
            return self.method
        by, samples = self.tuning.by, self.tuning.num_samples
        return best_settings(
            self.tuning.candidates,
            self.build,
            self.problem,
            self.images.validation,
            [by],
            samples,
            advance,
            device,
        )[by]


def measure_jobs(
    jobs: Sequence[Job],
    found: Sequence[Result | None],
    store: CellStore,
    begin: Callable[[Job], Any],
    advance: Advance,
) -> list[Result]:
    """Return the cells of all jobs; those that were found are not measured again, the others are put into the store.

    Args:
        jobs: what is to be measured.
        found: the finished cell of each job, or None.
        store: where new cells are kept.
        begin: is told which job comes next.
        advance: is told how many samples were drawn.
    """
    results = []
    for job, result in zip(jobs, found, strict=True):
        if result is None:
            begin(job)
            result = job.measured(advance)
            store.save(job.settings, result)
        results.append(result)
    return results


def difference(target: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> str:
    """Return the values of a description that differ among the candidates, in words."""
    flat = [flattened(candidate) for candidate in candidates]
    chosen = flattened(target)
    return ", ".join(
        f"{key.removeprefix('setting.')} = {chosen[key]}"
        for key in chosen
        if len({str(other[key]) for other in flat}) > 1
    )
