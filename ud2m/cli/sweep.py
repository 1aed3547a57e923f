"""What happens around runs: an output folder that can be written, one table and one plot over all runs of a sweep."""

import csv
import functools
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ud2m.cli.errors import correctable, message, user_facing
from ud2m.evaluation.table import markdown_line
from ud2m.files import write_bytes

SCORES = ("score", "psnr_mean", "psnr", "lpips", "r", "seconds_per_image", "gave_up_at")
OWN = ("rank", "run", "error")
"""Columns of the table that are neither settings nor scores."""
ERROR_FILE, OVERRIDES_FILE = "error.txt", "overrides.yaml"


def survives_sweep(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Let a failing run of a sweep leave ``error.txt`` and return, so that the other runs go on.

    Outside a sweep it is ``user_facing``.
    """

    @functools.wraps(function)
    def wrapped(config: DictConfig) -> Any:
        if not in_sweep():
            return user_facing(function)(config)
        try:
            return function(config)
        except Exception as error:
            if not correctable(error):
                traceback.print_exc()
            text = message(error)
            folder = Path(HydraConfig.get().runtime.output_dir)
            print(f"error in run {folder.name}: {text}", file=sys.stderr)
            write_bytes(folder / ERROR_FILE, f"{text}\n".encode())
            return None

    return wrapped


def in_sweep() -> bool:
    """Return whether this is one of the runs of ``-m``."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


class SweepTable(Callback):
    """Write ``sweep.csv``, ``sweep.md`` and ``sweep.html`` into the sweep folder when all its runs have ended.

    Hydra swallows exceptions of callbacks and shows tracebacks for its own; leaving by ``SystemExit`` is the way to
    end with one line.
    """

    @user_facing
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a run folder that cannot be made, before Hydra fails to make it."""
        HydraConfig.instance().set_config(config)
        make_folder(Path(config.hydra.run.dir))

    @user_facing
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a sweep folder that holds runs already: its table would mix them with the new ones.

        And ``run_dir``, which a sweep would not follow, and an optimiser that would look for low scores.
        """
        HydraConfig.instance().set_config(config)
        folder = Path(config.hydra.sweep.dir)
        make_folder(folder)
        if any(override.startswith("run_dir=") for override in config.hydra.overrides.task):
            raise ValueError("run_dir is the folder of one run; the runs of a sweep go to hydra.sweep.dir")
        if str(config.hydra.sweeper.get("direction", "maximize")).split(".")[-1] != "maximize":
            raise ValueError(
                "a higher score is better: add hydra.sweeper.direction=maximize, or take hydra/sweeper=optuna_score"
            )
        if any(folder.glob(f"*/{OVERRIDES_FILE}")):
            raise ValueError(f"{folder} holds the runs of another sweep; choose another hydra.sweep.dir")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keep the overrides of a run of a sweep beside its results."""
        if in_sweep():
            hydra = HydraConfig.get()
            text = OmegaConf.to_yaml(list(hydra.overrides.task))
            write_bytes(Path(hydra.runtime.output_dir) / OVERRIDES_FILE, text.encode())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect the runs of this sweep, print the table, and exit with 1 when one of them failed."""
        from ud2m.reports.page import write_page  # Hydra imports this module before the settings are checked
        from ud2m.reports.sweep_plot import sweep_page

        folder = Path(config.hydra.sweep.dir)
        rows = collect(folder)
        if not rows:
            return
        write_table(folder, rows)
        settings = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in (*OWN, *SCORES)]
        write_page(folder / "sweep.html", sweep_page(f"Sweep {folder.name}", rows, settings))
        print((folder / "sweep.md").read_text())
        print(f"sweep folder: {folder}")
        if any(row["rank"] is None for row in rows):
            sys.exit(1)


def make_folder(folder: Path) -> None:
    """Make a folder; raises OSError with what to do when that cannot be, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror}; choose another run_dir") from error


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return one row per run, ``rank`` 1 has the highest ``score``; runs without one come last and say why."""
    found = (path.parent for path in folder.glob(f"*/{OVERRIDES_FILE}"))
    runs = sorted(found, key=lambda run: (len(run.name), run.name))
    rows = sorted(map(_row, runs), key=lambda row: float("inf") if row["score"] is None else -row["score"])
    for rank, row in enumerate(rows, start=1):
        row["rank"] = None if row["score"] is None else rank
    return rows


def _row(run: Path) -> dict[str, Any]:
    texts = [str(text) for text in OmegaConf.load(run / OVERRIDES_FILE)]
    overrides = {key: value for key, _, value in (text.partition("=") for text in texts)}
    row: dict[str, Any] = {"rank": None, "run": run.name} | overrides | {"score": None}
    metrics, error = run / "metrics.json", run / ERROR_FILE
    if metrics.is_file():
        return row | {k: v for k, v in json.loads(metrics.read_text())[-1].items() if k in SCORES}
    return row | {"error": error.read_text().strip() if error.is_file() else "it ended without metrics.json"}


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV, with all settings, and as Markdown, with those in which runs differ.

    Numbers have as many digits as tell runs apart. The winner has rank 1 and is named below the table, as are ties.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = {column: _cells([row.get(column) for row in rows]) for column in columns}
    shown = [c for c in columns if c in (*OWN, *SCORES) or len(rows) == 1 or len(set(texts[c])) > 1]
    lines = [markdown_line(shown), "|" + " --- |" * len(shown)]
    lines += [markdown_line(texts[column][k] for column in shown) for k in range(len(rows))]
    scores = [row["score"] for row in rows if row["rank"] is not None]
    for score in sorted({score for score in scores if scores.count(score) > 1}, reverse=True):
        lines += ["", f"the same score: runs {', '.join(row['run'] for row in rows if row['score'] == score)}"]
    if rows[0]["rank"] is not None:
        lines += ["", f"best score: run {rows[0]['run']}"]
    failed = sum(row["rank"] is None for row in rows)
    if failed:
        lines += ["", f"failed: {failed} of {len(rows)} runs"]
    write_bytes(folder / "sweep.md", ("\n".join(lines) + "\n").encode())
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *zip(*texts.values(), strict=True)])
    write_bytes(folder / "sweep.csv", table.getvalue().encode())


def _cells(values: Sequence[Any]) -> list[str]:
    """Return the texts of a column, its numbers with the least digits, from 4 on, that tell those apart that differ."""
    numbers = {value for value in values if isinstance(value, float)}
    digits = next((d for d in range(4, 17) if len({f"{v:.{d}g}" for v in numbers}) == len(numbers)), 17)
    return ["-" if v is None else f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in values]
