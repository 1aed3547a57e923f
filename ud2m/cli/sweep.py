"""One table over all runs of a sweep, which says which one won."""

import csv
import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ud2m.output import write_bytes

SCORES = ("score", "psnr_mean", "psnr", "lpips", "r", "seconds_per_image")


class SweepTable(Callback):
    """Write ``sweep.csv`` and ``sweep.md`` into the sweep folder when all its runs have ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the runs of this sweep and print the table."""
        folder = Path(config.hydra.sweep.dir)
        rows = collect(folder)
        if rows:
            write_table(folder, rows)
            print((folder / "sweep.md").read_text())

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep the overrides of a run of a sweep beside its results."""
        hydra = HydraConfig.get()
        if hydra.mode is not None and hydra.mode.name == "MULTIRUN":
            folder = Path(hydra.runtime.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / "overrides.yaml", OmegaConf.to_yaml(list(hydra.overrides.task)).encode())


def collect(folder: Path) -> list[dict]:
    """Return one row per run, the best ``score`` first; runs without ``metrics.json`` are listed as failed."""
    rows = []
    for overrides in sorted(folder.glob("*/overrides.yaml"), key=lambda p: (len(p.parent.name), p.parent.name)):
        run = overrides.parent
        row = {"run": run.name} | dict(o.split("=", 1) for o in OmegaConf.load(overrides))
        metrics = run / "metrics.json"
        row |= (
            {k: v for k, v in json.loads(metrics.read_text())[-1].items() if k in SCORES}
            if metrics.is_file()
            else {"score": None, "status": "failed"}
        )
        rows.append(row)
    return sorted(rows, key=lambda row: float("inf") if row["score"] is None else -row["score"])


def write_table(folder: Path, rows: list[dict]) -> None:
    """Write the rows as CSV and Markdown; the winner is named below the table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    if rows[0].get("score") is not None:
        lines += ["", f"best score: run {rows[0]['run']}"]
    write_bytes(folder / "sweep.md", ("\n".join(lines) + "\n").encode())
    with open(folder / "sweep.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *cells])


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
