"""Methods x operators x data sets: what ``ud2m evaluate`` runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from ud2m.bars import Forecast, progress_bar
from ud2m.cli import plain
from ud2m.cli.devices import Devices
from ud2m.cli.errors import user_facing
from ud2m.cli.methods import build_sampler, combinations, shares_prior
from ud2m.cli.objects import build, in_words, resolved
from ud2m.cli.pages import label, method_page, part
from ud2m.cli.train import quiet_libraries
from ud2m.data import ImageDataModule
from ud2m.data.module import evenly_spaced
from ud2m.evaluation.cells import CellStore, Result, digest, images_digest
from ud2m.evaluation.comparison import Images, Job, Search, Task, best_label, metrics_of
from ud2m.evaluation.differences import with_differences
from ud2m.evaluation.scores import build_score, check_scores, left_out
from ud2m.evaluation.table import selecting
from ud2m.evaluation.team import ALONE, Team
from ud2m.files import inside, write_bytes, write_json
from ud2m.physics import OperatorFamily, Problem
from ud2m.precision import check_precision, chosen_precision
from ud2m.priors.prior import Prior
from ud2m.reports.board import Board, board_page
from ud2m.reports.page import write_page
from ud2m.reports.tables import visible
from ud2m.reports.text_tables import format_table, latex, markdown
from ud2m.samplers.base import Sampler


@user_facing
def main(config: DictConfig) -> None:
    """Measure what is not measured yet, and write the tables and the report."""
    quiet_libraries()
    devices = Devices(config)
    evaluation = EvaluationRun(config, devices.device)
    with devices.team() as team:
        rows = evaluation.run(team)
    if not devices.first:
        return
    print(format_table(rows, visible(rows)))
    print(f"report: {evaluation.folder / 'report.html'}")


class EvaluationRun:
    """The objects of one evaluation. Everything that can be refused is refused when it is made.

    Raises:
        ValueError: for unknown names, numbers out of range, and methods or metrics that cannot be used as asked.
        FileNotFoundError: for missing models, priors and weights.
    """

    def __init__(self, config: DictConfig, device: torch.device):
        self.config, self.device = config, device
        self.folder = inside(config.results, config.name, "the name of an evaluation")
        self.metrics = list(config.metrics)
        self.tune_by = [config.tune_by] if isinstance(config.tune_by, str) else list(config.tune_by)
        self._check_config()
        self.prior = Prior.from_pretrained(config.prior).to(self.device)
        if config.compile is not None:
            self.prior.compile_network(config.compile)
        self.check_scores = cache(check_scores)  # builds the networks of the metrics: once, not for every cell
        self.jobs = list(self._jobs())
        if not self.jobs:
            raise ValueError("no method takes any of the operators; choose other ones")
        if config.reference is not None:
            self._check_reference()

    def _check_config(self) -> None:
        check_precision(self.config.precision)
        for number in self.tune_by:
            try:
                selecting(number)
            except ValueError as error:
                raise ValueError(f"tune_by: {error}") from error
        if self.config.unsupported == "skip":
            missing = {name: reason for name in self.metrics for reason in left_out([name])}
            for reason in missing.values():
                tqdm.write(f"skipped: {reason}")
            self.metrics = [name for name in self.metrics if name not in missing]
        for name in self.metrics:
            build_score(name)

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

    def _jobs(self) -> Iterator[Job]:
        operators = {entry: part("physics", entry) for entry in self.config.operators}
        for data in self.config.datasets:
            images = self._images(data)
            for entry, physics in operators.items():
                problem = self._problem(entry, physics, images)
                for name in self.config.methods:
                    yield from self._jobs_of(name, entry, physics, problem, images)

    def _images(self, entry: str) -> Images:
        data: ImageDataModule = build(part("data", entry), "data", ImageDataModule)
        loaders = (data.test_dataloader(), data.val_dataloader())
        test, validation = (torch.cat(list(loader)).to(self.device) for loader in loaders)
        picked = validation[evenly_spaced(len(validation), self.config.tune_images)]
        return Images(entry, test, picked, data.batch_size, data.evaluation_set("test").names)

    def _problem(self, entry: str, physics: Mapping[str, Any], images: Images) -> Problem:
        operator = build(physics["operator"], "physics.operator", OperatorFamily)
        try:
            problem = Problem(operator, physics["sigma_y"], self.config.seed, physics.get("noise"))
            operator.check(images.shape)
        except ValueError as error:
            raise ValueError(f"{entry} on {images.label}: {error}") from error
        return problem

    def _jobs_of(
        self, name: str, entry: str, physics: Mapping[str, Any], problem: Problem, images: Images
    ) -> Iterator[Job]:
        """Yield the cell of a method, or one for each number of ``tune_by``; none where it cannot take the operator."""
        config, method = self.config, method_page(name, entry)
        target = method["target"]
        sampler = self._build(target)
        self._check_channels(name, sampler, images)
        observation = problem.observe(images.test[:1])
        try:
            sampler.check(observation.physics)
        except ValueError as error:
            if config.unsupported == "error":
                raise ValueError(f"{error}; leave out {entry}, or unsupported=skip") from error
            tqdm.write(f"skipped: {error}")
            return
        num_samples = config.num_samples if sampler.draws else 1
        metrics = [m for m in self.metrics if sampler.draws or build_score(m).least == 1]
        self.check_scores(tuple(metrics), len(images.test), num_samples, images.shape)
        common = {
            "model": sampler.fingerprint,
            "prior": getattr(self.prior, "fingerprint", None) if shares_prior(target) else None,
            "operator": physics,
            "seed": config.seed,
            "device": self.device.type,
            "precision": chosen_precision(sampler.precision, self.device) if sampler.networks else None,
            "versions": {name: version(name) for name in ("ud2m", "deepinv")},
        }
        settings = common | {
            "method": target,
            "first_observation": images_digest([observation.y]),
            "images": images_digest([images.test]),
            "num_samples": num_samples,
            "metrics": metrics,
            "shown": evenly_spaced(len(images.test), config.show),
        }
        job = Job(label(name, method["label"]), entry, images, problem, settings, self._build)
        if not (config.tune and method.get("tune")):
            yield job
            return
        of_search = common | {
            "candidates": list(combinations(target, method["tune"])),
            "by": self.tune_by,
            "num_samples": config.tune_samples,
            "first_observation": images_digest([problem.observe(images.validation[:1]).y]),
            "images": images_digest([images.validation]),
        }
        self.check_scores(tuple(metrics_of(self.tune_by)), len(images.validation), config.tune_samples, images.shape)
        search = Search(f"settings of {job.label}", entry, images, problem, of_search, self._build)
        for number in self.tune_by:
            name_there = best_label(job.label, number) if self.tune_by[1:] else job.label
            yield replace(job, label=name_there, search=search, by=number)

    def _check_channels(self, name: str, sampler: Sampler, images: Images) -> None:
        ours = images.shape[0]
        wrong = {getattr(network, "channels", ours) for network in sampler.networks} - {ours}
        if wrong:
            raise ValueError(
                f"{name}: its prior draws images with {wrong.pop()} channels, {images.label} has {ours}; choose other "
                "datasets, another prior or model"
            )

    def _build(self, target: Mapping[str, Any]) -> Sampler:
        return build_sampler(target, self.prior, self.device, self.config.precision, self.config.compile)

    @property
    def searches(self) -> list[Search]:
        """The searches of the cells, each once."""
        return list({id(job.search): job.search for job in self.jobs if job.search is not None}.values())

    def run(self, team: Team = ALONE) -> list[dict[str, Any]]:
        """Measure what is missing, each process of a team its share, and return the rows; the first one writes."""
        store = CellStore(self.folder / "cells")
        found = dict(zip(map(id, self.searches), self._results(self.searches, store, team), strict=True))
        self.jobs = [job if job.search is None else job.chosen(found[id(job.search)]) for job in self.jobs]
        results = self._results(self.jobs, store, team)
        rows = [job.row(result) for job, result in zip(self.jobs, results, strict=True)]
        if self.config.reference is not None:
            rows = with_differences(rows, results, self.config.reference)
        if team.rank == 0:
            self._write(rows, results)
        return rows

    def _results(self, tasks: Sequence[Task], store: CellStore, team: Team) -> list[Result]:
        """Return the results of all tasks, of which those that are not in the store are measured."""
        found = team.gathered([store.load(task.settings) for task in tasks])[0]
        done = sum(result is not None for result in found)
        if done and team.rank == 0:
            print(f"{done} of {len(tasks)} cells are there already", flush=True)
        results: dict[str, Result] = {}  # two numbers may choose the same setting
        for number, (task, result) in enumerate(zip(tasks, found, strict=True), start=1):
            name = digest(task.settings)
            if name not in results:
                about = f"{number} of {len(tasks)}: {task.label}, {task.operator}"
                results[name] = self._measured(task, about, store, team) if result is None else result
        return [results[digest(task.settings)] for task in tasks]

    def _measured(self, task: Task, about: str, store: CellStore, team: Team) -> Result:
        with progress_bar(desc=about, unit="evaluation", disable=team.rank > 0) as bar:
            result = task.measured(Forecast(bar, task.work), team)
        if team.rank == 0:
            store.save(task.settings, result)
        return result

    def _write(self, rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> None:
        config, cells = plain(self.config), [job.settings for job in self.jobs]
        settings = {
            "config": config,
            "cells": cells,
            "searches": [search.settings for search in self.searches],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        names = {job.images.label: {k: job.images.names[k] for k in job.settings["shown"]} for job in self.jobs}
        operators = {job.operator: in_words(resolved(job.settings["operator"]["operator"])) for job in self.jobs}
        board = Board(f"Evaluation {self.config.name}", rows, results, settings, names, operators)
        write_json(self.folder / "settings.json", settings)
        write_bytes(self.folder / "table.md", markdown(rows).encode())
        write_bytes(self.folder / "table.tex", latex(rows).encode())
        write_page(self.folder / "report.html", board_page(board))
        write_json(self.folder / "metrics.json", rows)


if __name__ == "__main__":
    raise SystemExit("error: run `ud2m evaluate` or `python -m ud2m evaluate`")
