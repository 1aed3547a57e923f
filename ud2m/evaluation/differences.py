"""Differences of methods from one of them, paired by image.

Images differ far more from one another than methods do on one image: intervals of two means may overlap widely where
the interval of the mean difference does not contain 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ud2m.evaluation.cells import Result
from ud2m.evaluation.scores import VALUES, with_interval
from ud2m.evaluation.table import SETTING, setting_of

DIFFERENCE = "_difference"
REFERENCE = "reference"


def with_differences(
    rows: Sequence[Mapping[str, Any]], results: Sequence[Result], reference: str
) -> list[dict[str, Any]]:
    """Return the rows with ``NAME_difference``: the mean over images of NAME minus that of the method ``reference``.

    Of all numbers that are means of one value per image; ``NAME_difference_low`` and ``_high`` bound its 95 %
    bootstrap interval over images. Values that are infinite (equal images) have no difference.

    Args:
        rows: of ``metrics.json``.
        results: the cell of each row.
        reference: name of a method, as in the rows.

    Raises:
        ValueError: when the reference is missing for some operator or data set.
    """
    references = {
        setting_of(row): result for row, result in zip(rows, results, strict=True) if row["method"] == reference
    }
    found = []
    for row, result in zip(rows, results, strict=True):
        other = references.get(setting_of(row))
        if other is None:
            raise ValueError(
                f"there is no method {reference!r} on {row['operator']} and {row['data']} to take differences from"
            )
        numbers: dict[str, Any] = {REFERENCE: reference}
        shared = [] if other is result else [k for k in result.curves if k.endswith(VALUES) and k in other.curves]
        for key in shared:
            pair = torch.tensor([result.curves[key], other.curves[key]], dtype=torch.float64)
            if pair.isfinite().all():
                numbers |= with_interval(key.removesuffix(VALUES) + DIFFERENCE, pair[0] - pair[1])
        found.append(dict(row) | numbers)
    return found


def difference_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what ``with_differences`` added as rows of their own, under the plain names of the numbers."""
    kept = ("method", "nfe", *SETTING, "lpips_backend")  # the network is named in headings
    found = []
    for row in rows:
        numbers = {key.replace(DIFFERENCE, ""): value for key, value in row.items() if DIFFERENCE in key}
        if numbers:
            found.append({key: row[key] for key in kept if key in row} | numbers)
    return found


def excludes_zero(row: Mapping[str, Any], key: str) -> bool:
    """Return whether the interval of a number lies on one side of 0."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return low is not None and high is not None and low * high > 0
