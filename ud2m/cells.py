"""The cells of an evaluation: one method on one operator and one set of images, measured once and kept."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ud2m.evaluation import Method, Problem
from ud2m.output import write_bytes, write_json
from ud2m.scores import Draws, Score
from ud2m.usage import NetworkEvaluations, Stopwatch, peak_memory, reset_peak_memory

FORMAT = 2
"""Part of every digest: raised when a method or a score changes its meaning, so that old numbers are not taken up."""
PARTS = ("settings", "row", "curves")


@dataclass(frozen=True)
class Result:
    """What a cell holds.

    Args:
        row: numbers and names, flat. curves: what is more than a number. pictures: of the shown images, by number:
            ``x0``, ``y``, ``sample``, ``mean`` [C, H, W].
    """

    row: Mapping[str, Any]
    curves: Mapping[str, Any]
    pictures: Mapping[int, Mapping[str, Tensor]]


def digest(settings: Mapping[str, Any]) -> str:
    """Return the name of a cell: a SHA-256 of everything that determines it, and of ``FORMAT``."""
    text = json.dumps([FORMAT, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def images_digest(batches: Iterable[Tensor]) -> str:
    """Return a SHA-256 of images, whatever batches they come in."""
    found = hashlib.sha256()
    for x0 in batches:
        for image in x0:
            found.update(f"{tuple(image.shape)}".encode())
            found.update(image.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:24]


class CellStore:
    """Cells in a folder, each under the digest of its settings; a cell with other settings is another cell."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, settings: Mapping[str, Any]) -> Result | None:
        """Return a finished cell, or None.

        Raises:
            ValueError: when its files are damaged, or belong to other settings.
        """
        path = self._path(settings)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            tensors = load_file(path.with_suffix(".safetensors"))
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(
                f"the results in {path} are damaged ({error}); delete this file to measure again"
            ) from error
        if not isinstance(content, dict) or any(part not in content for part in PARTS):
            raise ValueError(f"{path} does not hold {', '.join(PARTS)}; delete it to measure again")
        if content["settings"] != json.loads(json.dumps(settings)):
            raise ValueError(f"the results in {path} were made with other settings; delete it to measure again")
        pictures: dict[int, dict[str, Tensor]] = {}
        for key, image in sorted(tensors.items()):
            number, _, kind = key.partition(".")
            pictures.setdefault(int(number), {})[kind] = image.float()
        return Result(content["row"], content["curves"], dict(sorted(pictures.items())))

    def save(self, settings: Mapping[str, Any], result: Result) -> None:
        """Write a cell; the file that says that it is finished comes last."""
        path = self._path(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{k}": v.half().contiguous() for i, kinds in result.pictures.items() for k, v in kinds.items()}
        write_bytes(path.with_suffix(".safetensors"), save(tensors))
        write_json(path, {"settings": settings, "row": result.row, "curves": result.curves})

    def _path(self, settings: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest(settings)}.json"


def measure(
    method: Method,
    problem: Problem,
    batches: Iterable[Tensor],
    scores: Sequence[Score],
    num_samples: int,
    shown: Collection[int] = (),
    advance: Callable[[int], Any] = lambda images: None,
) -> Result:
    """Draw samples for all images and score them.

    Args:
        method: with ``networks``, the modules whose evaluations are counted. problem: how images are observed.
        batches: clean images [B, C, H, W], in the order of their numbers.
        scores: fresh ones. num_samples: S. shown: numbers of the images whose pictures are kept.
        advance: is told how many images were done.
    """
    pictures: dict[int, dict[str, Tensor]] = {}
    first, evaluations, watch = 0, 0, None
    for x0 in batches:
        if watch is None:
            watch = Stopwatch(x0.device)
            reset_peak_memory(x0.device)
            scores = [score.to(x0.device) for score in scores]
        y, physics = problem.observe(x0, first)
        generator = problem.sampling_generator(first, x0.device)
        with NetworkEvaluations(getattr(method, "networks", ())) as counter, watch:
            samples = method(y, physics, problem.sigma_y, num_samples, generator=generator)
        evaluations += counter.count
        noise = problem.sigma_y if problem.noise is None else problem.noise
        for score in scores:
            with torch.no_grad():
                score.add(Draws(x0, y, physics, problem.sigma_y, noise, samples))
        for i in set(shown) & set(range(first, first + len(x0))):
            k = i - first
            pictures[i] = {"x0": x0[k], "y": y[k], "sample": samples[k, 0], "mean": samples[k].mean(0)}
        first += len(x0)
        advance(len(x0))
    if watch is None:
        raise ValueError("there are no images to evaluate")
    row: dict[str, Any] = {"images": first, "samples": num_samples, "nfe": _whole(evaluations / (first * num_samples))}
    curves: dict[str, Any] = {}
    for score in scores:
        row |= score.numbers()
        curves |= score.curves()
    row["seconds_per_image"] = watch.seconds / (first * num_samples)
    row["peak_memory"] = peak_memory(watch.device)
    return Result(row, curves, {i: {k: v.cpu() for k, v in kinds.items()} for i, kinds in pictures.items()})


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
