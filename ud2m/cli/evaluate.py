"""Methods x operators x data sets: what ``ud2m evaluate`` runs."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from ud2m.cli.errors import user_facing
from ud2m.cli.methods import build_sampler, combinations, filled, shares_prior
from ud2m.cli.objects import build
from ud2m.cli.train import quiet_libraries
from ud2m.data import ImageDataModule
from ud2m.evaluation.cells import CellStore, Result, images_digest
from ud2m.evaluation.comparison import Images, Job, Tuning, flattened, measure_jobs
from ud2m.evaluation.differences import with_differences
from ud2m.evaluation.scores import build_score, check_scores
from ud2m.evaluation.table import format_table, selecting
from ud2m.files import inside, write_bytes, write_json
from ud2m.physics import OperatorFamily, Problem
from ud2m.priors.prior import Prior
from ud2m.reports.board import Board, board_page
from ud2m.reports.page import write_page
from ud2m.reports.tables import visible
from ud2m.reports.text_tables import latex, markdown
from ud2m.samplers.base import Sampler, check_count

LABEL = "label="


@user_facing
def main(config: DictConfig) -> None:
    """Measure what is not measured yet, and write the tables and the report."""
    quiet_libraries()
    evaluation = EvaluationRun(config)
    rows = evaluation.run()
    keys = [column.key for column in visible(rows)]
    print(format_table([{key: row[key] for key in keys if key in row} for row in rows]))
    print(f"report: {evaluation.folder / 'report.html'}")


class EvaluationRun:
    """The objects of one evaluation. Everything that can be refused is refused when it is made.

    Raises:
        ValueError: for unknown names, numbers out of range, and methods or metrics that cannot be used as asked.
        FileNotFoundError: for missing models, priors and weights.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self.folder = inside(config.results, config.name, "the name of an evaluation")
        self.metrics = list(config.metrics)
        self._check_config()
        self.prior = cache(self._prior)
        self.check_scores = cache(check_scores)  # builds the networks of the metrics: once, not for every cell
        self.jobs = list(self._jobs())
        if not self.jobs:
            raise ValueError("no method takes any of the operators; choose other ones")
        if config.reference is not None:
            self._check_reference()

    def _check_config(self) -> None:
        config = self.config
        for name in ("num_samples", "tune_images", "tune_samples"):
            check_count(name, config[name])
        if config.unsupported not in ("error", "skip"):
            raise ValueError(f"unsupported must be error or skip, got {config.unsupported!r}")
        try:
            selecting(config.tune_by)
        except ValueError as error:
            raise ValueError(f"tune_by: {error}") from error
        for name in ("methods", "operators", "datasets", "metrics"):
            if not config[name] or len(set(config[name])) < len(config[name]):
                raise ValueError(f"{name} must name at least one, and none twice, got {list(config[name])}")
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
        data: ImageDataModule = build(part("data", entry), "data", ImageDataModule)
        device = self.config.device
        test = [x0.to(device) for x0 in data.test_dataloader()]
        validation = torch.cat([x0.to(device) for x0 in data.val_dataloader()])
        count = self.config.tune_images
        picked = validation[[k * len(validation) // count for k in range(min(count, len(validation)))]]
        return Images(entry, test, picked.split(data.batch_size), data.evaluation_set("test").names)

    def _problem(self, entry: str, physics: Mapping[str, Any], images: Images) -> Problem:
        operator = build(physics["operator"], "physics.operator", OperatorFamily)
        try:
            problem = Problem(operator, physics["sigma_y"], self.config.seed, physics.get("noise"))
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
        config, target = self.config, method["target"]
        sampler = self._build(target)
        self._check_channels(name, sampler, images)
        observation = problem.observe(images.test[0][:1])
        try:
            sampler.check(observation.physics)
        except ValueError as error:
            if config.unsupported == "error":
                raise ValueError(f"{error}; leave out {entry}, or unsupported=skip") from error
            tqdm.write(f"skipped: {error}")
            return None
        num_samples = config.num_samples if sampler.draws else 1
        metrics = [m for m in self.metrics if sampler.draws or build_score(m).least == 1]
        self.check_scores(tuple(metrics), images.count, num_samples, images.shape)
        tuning = self._tuning(target, method)
        settings = {
            "method": target,
            "model": sampler.fingerprint,
            "prior": getattr(self.prior(), "fingerprint", None) if shares_prior(target) else None,
            "operator": physics,
            "first_observation": images_digest([observation.y]),
            "images": images_digest(images.test),
            "seed": config.seed,
            "num_samples": num_samples,
            "metrics": metrics,
            "shown": images.shown(config.show),
            "device": str(torch.device(config.device).type),
            "versions": {name: version(name) for name in ("ud2m", "deepinv")},
        }
        if tuning is not None:
            settings["tuned"] = vars(tuning) | {"images": images_digest(images.validation)}
        return Job(label(name, method["label"]), entry, images, problem, target, settings, self._build, tuning)

    def _check_channels(self, name: str, sampler: Sampler, images: Images) -> None:
        for network in sampler.networks:
            channels = getattr(network, "channels", images.shape[0])
            if channels != images.shape[0]:
                raise ValueError(
                    f"{name}: its prior draws images with {channels} channels, {images.label} has {images.shape[0]}; "
                    "choose other datasets, another prior or model"
                )

    def _tuning(self, target: Mapping[str, Any], method: Mapping[str, Any]) -> Tuning | None:
        if not self.config.tune or not method.get("tune"):
            return None
        return Tuning(list(combinations(target, method["tune"])), self.config.tune_by, self.config.tune_samples)

    def _build(self, target: Mapping[str, Any]) -> Sampler:
        return build_sampler(target, self.prior(), self.config.device)

    def run(self) -> list[dict[str, Any]]:
        """Measure what is missing, write everything, and return the rows."""
        store = CellStore(self.folder / "cells")
        found = [store.load(job.settings) for job in self.jobs]
        work = sum(job.work for job, result in zip(self.jobs, found, strict=True) if result is None)
        done = sum(result is not None for result in found)
        if done:
            print(f"{done} of {len(self.jobs)} cells are there already", flush=True)
        with tqdm(total=work, unit="sample", smoothing=0.05, disable=not work) as bar:
            results = measure_jobs(
                self.jobs, found, store, lambda job: bar.set_description(f"{job.label}, {job.operator}"), bar.update
            )
        rows = [job.row(result) for job, result in zip(self.jobs, results, strict=True)]
        if self.config.reference is not None:
            rows = with_differences(rows, results, self.config.reference)
        self._write(rows, results)
        return rows

    def _write(self, rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> None:
        config = OmegaConf.to_container(self.config, resolve=True)
        cells = [job.settings for job in self.jobs]
        settings = {"config": config, "cells": cells, "torch": torch.__version__, "threads": torch.get_num_threads()}
        names = {job.images.label: {k: job.images.names[k] for k in job.settings["shown"]} for job in self.jobs}
        board = Board(f"Evaluation {self.config.name}", rows, results, settings, names)
        write_json(self.folder / "settings.json", settings)
        write_bytes(self.folder / "table.md", markdown(rows).encode())
        write_bytes(self.folder / "table.tex", latex(rows).encode())
        write_page(self.folder / "report.html", board_page(board))
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


def label(entry: str, default: str) -> str:
    """Return how a method is called: ``label=...`` of its entry, with blanks for ``_``, or its name and settings."""
    words = entry.split()[1:]
    for word in words:
        if word.startswith(LABEL):
            return word.removeprefix(LABEL).replace("_", " ")
    words = [word.removeprefix("target.") for word in words if not word.startswith("tune=")]
    return f"{default} ({', '.join(words)})" if words else default


if __name__ == "__main__":
    raise SystemExit("error: run `ud2m evaluate` or `python -m ud2m evaluate`")
