"""Measure what the precision of the networks changes: quality and time of the shipped models.

    python benchmarks/precision.py [--models NAME ...] [--precisions bfloat16 ...]

Writes ``docs/results/precision.json``: the test photographs in pieces of 128x128, 2 samples each with the same random
numbers in every precision, each model on the operator that it was trained for at its own sigma_y. With ``--models`` the
rows of other shipped models stay. ``loss`` columns are
differences from float32, paired by image; times are those of the whole sampling, on the threads that PyTorch takes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from results import load, store
from tables import row_of
from ud2m.cli.models import shipped_models
from ud2m.cli.sample import trained_operator
from ud2m.data import PhotoData
from ud2m.physics import Problem
from ud2m.precision import DTYPES
from ud2m.samplers.ud2m import PosteriorSampler

NAME = "precision"
SIDE, SAMPLES = 128, 2

Rows = Sequence[Mapping[str, Any]]


def rows_of(model: str, precisions: Sequence[str], batches: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """Return a row for each precision, the first one float32."""
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for precision in ("float32", *precisions):
        sampler = PosteriorSampler.from_pretrained(model, precision=precision)
        operator = trained_operator(sampler.config.info["physics"]["operator"])
        problem = Problem(operator, sampler.config.sigma_y, seed=0)
        row = row_of(sampler, problem, batches, SAMPLES, f"{model}, {precision}")
        first = first or row
        rows.append(
            {
                "method": precision,
                "operator": model,
                "psnr_mean": row["psnr_mean"],
                "loss of PSNR of mean [dB]": first["psnr_mean"] - row["psnr_mean"],
                "lpips": row.get("lpips"),
                "loss of LPIPS": row["lpips"] - first["lpips"] if "lpips" in row else None,
                "time / float32": row["seconds_per_image"] / first["seconds_per_image"],
            }
        )
    return rows


def merged(stored: Rows, measured: Rows, models: Sequence[str]) -> list[dict[str, Any]]:
    """Return the measured rows, and the stored ones of models that were not measured, in the order of ``models``."""
    anew = {row["operator"] for row in measured}
    rows = [*measured, *(row for row in stored if row["operator"] not in anew)]
    return [dict(row) for model in models for row in rows if row["operator"] == model]


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models(), help="default: all")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16"], choices=[*DTYPES], help="besides float32")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store."""
    options = parser().parse_args(arguments)
    tiles = PhotoData(channels=3, crop_size=SIDE, batch_size=6).evaluation_set("test")
    batches = list(torch.stack([tiles[i] for i in range(len(tiles))]).split(6))
    measured = [row for model in options.models for row in rows_of(model, options.precisions, batches)]
    rows = merged((load(NAME) or {"rows": []})["rows"], measured, shipped_models())
    config = {"models": shipped_models(), "side": SIDE, "images": len(tiles), "samples": SAMPLES}
    print(store(NAME, "python benchmarks/precision.py", config, rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
