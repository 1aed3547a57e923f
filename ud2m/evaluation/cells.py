"""The cells of an evaluation: one method on one operator and one set of images, measured once and kept."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ud2m.files import parse_json, write_bytes, write_json

FORMAT = 3
"""Part of every digest: raised when a method or a score changes its meaning, so that old numbers are not taken up."""
PARTS = ("settings", "row", "curves")


@dataclass(frozen=True)
class Result:
    """What a cell holds.

    Args:
        row: numbers and names, flat.
        curves: what is more than a number.
        pictures: of the shown images, by number: ``x0``, ``y``, ``sample``, ``mean`` [C, H, W], and ``std`` of several
            samples.
    """

    row: Mapping[str, Any]
    curves: Mapping[str, Any]
    pictures: Mapping[int, Mapping[str, Tensor]]


def digest(settings: Mapping[str, Any]) -> str:
    """Return the name of a cell: a SHA-256 of everything that determines it, and of ``FORMAT``."""
    return hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode()).hexdigest()[:24]


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
            content = parse_json(path.read_text())
            known, row, curves = (content[part] for part in PARTS)
            tensors = load_file(path.with_suffix(".safetensors"))
        except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
            raise ValueError(
                f"the results in {path} are damaged ({error!r}); delete this file to measure again"
            ) from error
        if known != json.loads(json.dumps(settings)):
            raise ValueError(f"the results in {path} were made with other settings; delete it to measure again")
        pictures: dict[int, dict[str, Tensor]] = {}
        for key, image in sorted(tensors.items()):
            number, _, kind = key.partition(".")
            pictures.setdefault(int(number), {})[kind] = image.float()
        return Result(row, curves, dict(sorted(pictures.items())))

    def save(self, settings: Mapping[str, Any], result: Result) -> None:
        """Write a cell; the file that says that it is finished comes last."""
        path = self._path(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{k}": v.half().contiguous() for i, kinds in result.pictures.items() for k, v in kinds.items()}
        write_bytes(path.with_suffix(".safetensors"), save(tensors))
        write_json(path, {"settings": settings, "row": result.row, "curves": result.curves})

    def _path(self, settings: Mapping[str, Any]) -> Path:
        return self.folder / f"{digest(settings)}.json"
