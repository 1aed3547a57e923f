"""Measure what the precision of the networks changes: quality and time of the shipped models.

    python benchmarks/precision.py [--models NAME ...] [--precisions bfloat16 ...]

Writes ``docs/results/precision.json``: the test photographs in pieces of 128x128, 2 samples each with the same random
numbers in every precision, each model on the operator that it was trained for at its own sigma_y. ``loss`` columns are
differences from float32, paired by image; times are those of the whole sampling, on the threads that PyTorch takes.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from results import store
from tables import row_of
from ud2m.cli.sample import trained_operator
from ud2m.data import PhotoData
from ud2m.physics import Problem
from ud2m.precision import DTYPES
from ud2m.samplers.ud2m import PosteriorSampler

OPERATORS = ("gaussian_blur", "super_resolution", "inpainting")
MODELS = tuple(f"{kind}_{name}" for kind in ("photos", "photographs") for name in (*OPERATORS, "general"))
SIDE, SAMPLES = 128, 2


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


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="shipped models")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16"], choices=[*DTYPES], help="besides float32")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store."""
    options = parser().parse_args(arguments)
    tiles = PhotoData(channels=3, crop_size=SIDE, batch_size=6).evaluation_set("test")
    batches = list(torch.stack([tiles[i] for i in range(len(tiles))]).split(6))
    rows = [row for model in options.models for row in rows_of(model, options.precisions, batches)]
    config = {"models": options.models, "side": SIDE, "images": len(tiles), "samples": SAMPLES}
    print(store("precision", "python benchmarks/precision.py", config, rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
