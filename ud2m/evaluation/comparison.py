"""Compare a trained sampler with what needs no training: A^dagger y, the warm start, zero-shot LATINO."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ud2m.evaluation.measure import Distance, Evaluation, Method
from ud2m.physics.problem import Problem
from ud2m.priors.prior import Prior
from ud2m.samplers.latino import Latino, LatinoSetting, WarmStart, latino_settings, pseudo_inverse
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.unfolded.warm_start import SmoothingStart, Start

Rows = list[dict[str, Any]]


def compare(
    sampler: PosteriorSampler,
    prior: Prior,
    problem: Problem,
    validation: Sequence[Tensor],
    test: Sequence[Tensor],
    num_samples: int,
    distances: Mapping[str, Distance],
    **options: Any,
) -> Rows:
    """Return the rows of a table on the test images; every method sees the same operators and noise.

    Args:
        sampler: the trained model. prior: the same prior without adapter.
        problem: operator family and noise.
        validation, test: batches of clean images; the setting of LATINO is searched on the first alone.
        num_samples: samples per image. distances: as for ``Evaluation``; the first one also chooses a LATINO setting.
        options: of the sampler, e.g. ``num_steps``.
    """
    trained = sampler.network.warm_start
    start = SmoothingStart() if trained.evaluations else trained  # what needs no training starts from no network
    methods: list[tuple[str, int, Method, dict[str, Any]]] = [
        ("A^dagger y", 0, pseudo_inverse, {}),
        ("warm start", 0, WarmStart(start), {}),
    ]
    for label, setting in search_latino(prior, problem, validation, distances, start).items():
        zero_shot = Latino(prior, setting, start)
        methods.append((f"LATINO, best {label}", zero_shot.nfe, zero_shot, {"setting": setting.describe()}))
    rows = []
    for name, nfe, method, extra in methods:
        samples = num_samples if nfe else 1
        rows.append({"method": name, "nfe": nfe} | score(method, problem, test, samples, distances, name) | extra)
    return [*rows, sampler_row(sampler, problem, test, num_samples, distances, **options)]


def sampler_row(
    sampler: PosteriorSampler,
    problem: Problem,
    test: Sequence[Tensor],
    num_samples: int,
    distances: Mapping[str, Distance],
    **options: Any,
) -> dict[str, Any]:
    """Return the row of the trained model."""
    num_steps = options.get("num_steps") or sampler.config.num_steps
    name = f"UD2M (K={sampler.network.num_blocks}, N={num_steps})"
    scores = score(sampler, problem, test, num_samples, distances, name, **options)
    return {"method": name, "nfe": sampler.nfe(num_steps)} | scores


def search_latino(
    prior: Prior,
    problem: Problem,
    validation: Sequence[Tensor],
    distances: Mapping[str, Distance],
    warm_start: Start | None = None,
) -> dict[str, LatinoSetting]:
    """Return LATINO's best settings on validation images: by PSNR of the mean, and by the first distance."""
    results = []
    for setting in tqdm(list(latino_settings()), desc="LATINO: searching its best setting", unit="setting"):
        results.append((setting, score(Latino(prior, setting, warm_start), problem, validation, 2, distances)))
    best = {"PSNR": max(results, key=lambda result: result[1]["psnr_mean"])[0]}
    for name in [name for name in distances if name in results[0][1]][:1]:
        best[name] = min(results, key=lambda result, key=name: result[1][key])[0]  # type: ignore[misc]
    return best


def score(
    method: Method,
    problem: Problem,
    batches: Sequence[Tensor],
    num_samples: int,
    distances: Mapping[str, Distance],
    label: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the scores of a method, with a progress bar when it has a label."""
    evaluation = Evaluation(method, problem, num_samples, distances, **options)
    for x0 in tqdm(batches, desc=label, unit="batch", disable=label is None):
        evaluation.add(x0)
    return evaluation.row()
