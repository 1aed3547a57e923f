"""Methods x operators x data sets: what ``python -m ud2m.evaluate`` runs."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ud2m.cli.errors import user_facing
from ud2m.cli.train import quiet_libraries
from ud2m.data import ImageDataModule
from ud2m.evaluation.cells import CellStore, Result, images_digest
from ud2m.evaluation.differences import with_differences
from ud2m.evaluation.features import BACKBONES
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import build_score, check_scores
from ud2m.evaluation.table import format_table
from ud2m.files import write_bytes, write_json
from ud2m.physics.problem import Problem
from ud2m.priors.prior import Prior
from ud2m.reports.board import Board, latex, markdown, render, visible
from ud2m.samplers.base import check_count

CONF = Path(__file__).resolve().parents[2] / "conf"
PLACE = "{physics}"
LABEL = "label="
TUNED = {"psnr_mean": "psnr", "psnr": "psnr", "ssim_mean": "ssim", "ssim": "ssim", "energy": "energy"}
TUNED |= {f"lpips_{net}": f"lpips_{net}" for net in BACKBONES}
"""Numbers that a setting can be chosen by, and the metric that they are of."""
LOWER_IS_BETTER = ("energy", "lpips_")


@dataclass(frozen=True)
class Images:
    """The images of one data set. names: of the test images; validation: batches on which settings are chosen."""

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


@dataclass(frozen=True)
class Job:
    """A cell to be measured: what determines it, and how to make its method, with what is written beside it."""

    label: str
    operator: str
    images: Images
    problem: Problem
    method: Mapping[str, Any]
    settings: Mapping[str, Any]
    num_samples: int
    candidates: Sequence[Mapping[str, Any]]
    build: Callable[[Mapping[str, Any]], Any]


@user_facing
def main(config: DictConfig) -> None:
    """Measure what is not measured yet, and write the tables and the report."""
    quiet_libraries()
    evaluation = EvaluationRun(config)
    rows = evaluation.run()
    keys = [column.key for column in visible(rows)]
    print(format_table([{key: row[key] for key in keys if key in row} for row in rows]))
    print(f"report: {evaluation.folder / 'report.html'}")


command = hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")(main)


class EvaluationRun:
    """The objects of one evaluation. Everything that can be refused is refused when it is made.

    Raises:
        ValueError: for unknown names, numbers out of range, and methods or metrics that cannot be used as asked.
        FileNotFoundError: for missing models, priors and weights.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self.folder = Path(config.results) / config.name
        self.store = CellStore(self.folder / "cells")
        self.metrics = list(config.metrics)
        for name in ("num_samples", "tune_images", "tune_samples"):
            check_count(name, config[name])
        if config.unsupported not in ("error", "skip"):
            raise ValueError(f"unsupported must be error or skip, got {config.unsupported!r}")
        if config.tune_by not in TUNED:
            raise ValueError(f"tune_by must be one of {', '.join(TUNED)}, got {config.tune_by!r}")
        for name in ("methods", "operators", "datasets", "metrics"):
            if not config[name] or len(set(config[name])) < len(config[name]):
                raise ValueError(f"{name} must name at least one, and none twice, got {list(config[name])}")
        for name in self.metrics:
            build_score(name)
        self.prior = cache(self._prior)
        self.check_scores = cache(check_scores)  # builds the networks of the metrics: once, not for every cell
        self.jobs = list(self._jobs())
        if not self.jobs:
            raise ValueError("no method takes any of the operators; choose other ones")
        if config.reference is not None:
            self._check_reference()

    def _check_reference(self) -> None:
        reference, labels = self.config.reference, dict.fromkeys(job.label for job in self.jobs)
        if reference not in labels:
            raise ValueError(f"reference must be one of the methods {', '.join(labels)}, got {reference!r}")
        measured = {(job.operator, job.images.label) for job in self.jobs if job.label == reference}
        for job in self.jobs:
            if (job.operator, job.images.label) not in measured:
                raise ValueError(
                    f"the reference {reference} cannot take {job.operator}; leave this operator out, or take another "
                    "reference"
                )

    # --- what is to be done --------------------------------------------------------------------------------------

    def _prior(self) -> nn.Module:
        return Prior.from_pretrained(self.config.prior).to(self.config.device)

    def _jobs(self) -> Iterator[Job]:
        operators = {entry: part("physics", entry) for entry in self.config.operators}
        for data in self.config.datasets:
            images = self._images(data)
            for entry, physics in operators.items():
                problem = self._problem(entry, physics, images)
                for name in self.config.methods:
                    # filled before too: in an override of Hydra a brace begins a dictionary
                    kind = entry.split()[0]
                    method = filled(part("method", filled(name, kind)), kind)
                    job = self._job(name, method, entry, physics, problem, images)
                    if job is not None:
                        yield job

    def _images(self, entry: str) -> Images:
        data: ImageDataModule = instantiate(part("data", entry), _convert_="all")
        device = self.config.device
        test = [x0.to(device) for x0 in data.test_dataloader()]
        validation = torch.cat([x0.to(device) for x0 in data.val_dataloader()])
        count = self.config.tune_images
        picked = validation[[k * len(validation) // count for k in range(min(count, len(validation)))]]
        return Images(entry, test, picked.split(data.batch_size), data.evaluation_set("test").names)

    def _problem(self, entry: str, physics: Mapping[str, Any], images: Images) -> Problem:
        operator = instantiate(physics["operator"], _convert_="all")
        problem = Problem(operator, physics["sigma_y"], self.config.seed, physics.get("noise"))
        if not problem.sigma_y > 0:
            raise ValueError(f"{entry}: sigma_y must be positive, got {problem.sigma_y}; noise=0 makes exact data")
        try:
            operator.check(images.shape)
        except ValueError as error:
            raise ValueError(f"{entry} on {images.label}: {error}") from error
        return problem

    def _job(
        self,
        name: str,
        method: Mapping[str, Any],
        entry: str,
        physics: Mapping[str, Any],
        problem: Problem,
        images: Images,
    ) -> Job | None:
        config = self.config
        target = method["target"]
        num_samples = method.get("samples", config.num_samples)
        metrics = [m for m in self.metrics if num_samples > 1 or "samples" not in method or not several(m)]
        self.check_scores(tuple(metrics), images.count, num_samples, images.shape)
        built = self._build(target)
        for network in getattr(built, "networks", ()):
            channels = getattr(network, "channels", images.shape[0])
            if channels != images.shape[0]:
                raise ValueError(
                    f"{name}: its prior draws images with {channels} channels, {images.label} has {images.shape[0]}; "
                    "choose other datasets, another prior or model"
                )
        y, operator = problem.observe(images.test[0][:1])
        try:
            if hasattr(built, "check"):
                built.check(operator)
        except ValueError as error:
            if config.unsupported == "error":
                raise ValueError(f"{error}; leave out {entry}, or unsupported=skip") from error
            tqdm.write(f"skipped: {error}")
            return None
        candidates = list(combinations(target, method["tune"])) if config.tune and method.get("tune") else []
        settings = {
            "method": target,
            "model": getattr(built, "fingerprint", None),
            "prior": getattr(self.prior(), "fingerprint", None) if "prior" in _arguments(target) else None,
            "operator": physics,
            "first_observation": images_digest([y]),
            "images": images_digest(images.test),
            "seed": config.seed,
            "num_samples": num_samples,
            "metrics": metrics,
            "shown": self._shown(images),
            "device": str(torch.device(config.device).type),
            "versions": {name: version(name) for name in ("ud2m", "deepinv")},
        }
        if candidates:
            settings["tuned"] = {
                "candidates": candidates,
                "by": config.tune_by,
                "num_samples": config.tune_samples,
                "images": images_digest(images.validation),
            }
        return Job(
            label(name, method["label"]), entry, images, problem, target, settings, num_samples, candidates, self._build
        )

    def _shown(self, images: Images) -> list[int]:
        count = min(self.config.show, images.count)
        return [k * images.count // count for k in range(count)]

    def _build(self, target: Mapping[str, Any]) -> Any:
        """Return the method; it gets the prior and the device where it has such an argument."""
        extra: dict[str, Any] = {}
        arguments = _arguments(target)
        if "prior" in arguments:
            extra["prior"] = self.prior()
        if "device" in arguments:
            extra["device"] = self.config.device
        return instantiate(dict(target), _convert_="all", _partial_=True)(**extra)

    # --- doing it ------------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Measure what is missing, write everything, and return the rows."""
        found = [self.store.load(job.settings) for job in self.jobs]
        waiting = sum(self._work(job) for job, result in zip(self.jobs, found, strict=True) if result is None)
        done = sum(result is not None for result in found)
        if done:
            print(f"{done} of {len(self.jobs)} cells are there already", flush=True)
        results = []
        with tqdm(total=waiting, unit="sample", smoothing=0.05, disable=not waiting) as bar:
            for job, result in zip(self.jobs, found, strict=True):
                results.append(result or self._measured(job, bar))
        rows = [self._row(job, result) for job, result in zip(self.jobs, results, strict=True)]
        if self.config.reference is not None:
            rows = with_differences(rows, results, self.config.reference)
        self._write(rows, results)
        return rows

    def _work(self, job: Job) -> int:
        tuning = len(job.candidates) * sum(len(x0) for x0 in job.images.validation) * self.config.tune_samples
        return tuning + job.images.count * job.num_samples

    def _measured(self, job: Job, bar: tqdm) -> Result:
        bar.set_description(f"{job.label}, {job.operator}")
        target = self._tuned(job, bar) if job.candidates else job.method
        scores = [build_score(name) for name in job.settings["metrics"]]
        result = measure(
            job.build(target),
            job.problem,
            job.images.test,
            scores,
            job.num_samples,
            job.settings["shown"],
            lambda images: bar.update(images * job.num_samples),
        )
        if job.candidates:
            result = Result(
                dict(result.row) | {"setting": difference(target, job.candidates)}, result.curves, result.pictures
            )
        self.store.save(job.settings, result)
        return result

    def _tuned(self, job: Job, bar: tqdm) -> Mapping[str, Any]:
        """Return the setting that is best on the validation images."""
        by, samples = self.config.tune_by, self.config.tune_samples
        values = []
        for target in job.candidates:
            score = build_score(TUNED[by])
            row = measure(
                job.build(target),
                job.problem,
                job.images.validation,
                [score],
                samples,
                advance=lambda images: bar.update(images * samples),
            ).row
            values.append(-row[by] if by.startswith(LOWER_IS_BETTER) else row[by])
        finite = [value if value == value else float("-inf") for value in values]
        return job.candidates[finite.index(max(finite))]

    def _row(self, job: Job, result: Result) -> dict[str, Any]:
        height, width = job.images.shape[1:]
        setting = {
            "method": job.label,
            "data": job.images.label,
            "size": f"{height}x{width}",
            "operator": job.operator,
            "sigma_y": job.problem.sigma_y,
            "seed": self.config.seed,
        }
        return setting | dict(result.row)

    def _write(self, rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> None:
        config = OmegaConf.to_container(self.config, resolve=True)
        cells = [job.settings for job in self.jobs]
        settings = {"config": config, "cells": cells, "torch": torch.__version__, "threads": torch.get_num_threads()}
        names = {job.images.label: {k: job.images.names[k] for k in job.settings["shown"]} for job in self.jobs}
        board = Board(f"Evaluation {self.config.name}", rows, results, settings, names)
        write_json(self.folder / "settings.json", settings)
        write_bytes(self.folder / "table.md", markdown(rows).encode())
        write_bytes(self.folder / "table.tex", latex(rows).encode())
        write_bytes(self.folder / "report.html", render(board).encode(errors="replace"))
        write_json(self.folder / "metrics.json", rows)


def part(group: str, entry: str) -> dict[str, Any]:
    """Return a configuration ``NAME [key=value ...]`` of a group as plain values.

    Raises:
        ValueError: for an unknown name or key.
    """
    name, *overrides = [word for word in entry.split() if not word.startswith(LABEL)] or [""]
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    if name not in known:
        raise ValueError(f"unknown {group} {name!r}; known: {', '.join(known)}")
    fixed = ["data.samples_per_epoch=1", "data.num_workers=0", "data.seed=0"] if group == "data" else []
    chosen = [f"+{group}={name}", *fixed]
    try:
        composed = compose(overrides=[*chosen, *(f"{group}.{text}" for text in overrides)])
    except HydraException as error:
        keys = flattened(part(group, name))
        first = str(error).splitlines()[0]
        raise ValueError(f"{entry!r}: {first}; settings of {group} {name} are {', '.join(keys)}") from error
    container = OmegaConf.to_container(composed[group], resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def filled(value: Any, physics: str) -> Any:
    """Return a configuration with ``{physics}`` replaced in all its texts."""
    if isinstance(value, Mapping):
        return {key: filled(item, physics) for key, item in value.items()}
    return value.replace(PLACE, physics) if isinstance(value, str) else value


def combinations(target: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the configuration with every combination of the values of dotted keys.

    Raises:
        ValueError: for a key that the configuration does not have.
    """
    for values in itertools.product(*grid.values()):
        changed = copy.deepcopy(dict(target))
        for key, value in zip(grid, values, strict=True):
            *path, last = key.split(".")
            node = changed
            for step in path:
                node = node.get(step, {})
            if last not in node:
                raise ValueError(f"tune names {key!r}, which the method does not have; it has {', '.join(node)}")
            node[last] = value
        yield changed


def difference(target: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> str:
    """Return the values of a configuration that differ among the candidates, in words."""
    flat = [flattened(candidate) for candidate in candidates]
    chosen = flattened(target)
    return ", ".join(
        f"{key.removeprefix('setting.')} = {chosen[key]}"
        for key in chosen
        if len({str(other[key]) for other in flat}) > 1
    )


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flattened(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return found


def label(entry: str, default: str) -> str:
    """Return how a method is called: ``label=...`` of its entry, with blanks for ``_``, or its name and settings."""
    words = entry.split()[1:]
    for word in words:
        if word.startswith(LABEL):
            return word.removeprefix(LABEL).replace("_", " ")
    words = [word.removeprefix("target.") for word in words if not word.startswith("tune=")]
    return f"{default} ({', '.join(words)})" if words else default


def several(metric: str) -> bool:
    """Return whether a metric is of several samples, and left out for a method that draws nothing."""
    return metric in ("diversity", "energy", "r", "coverage", "sbc")


def _arguments(target: Mapping[str, Any]) -> Sequence[str]:
    function = hydra.utils.get_object(target["_target_"])
    return tuple(inspect.signature(function).parameters)
