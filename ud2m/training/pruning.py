"""Median pruning: runs of a sweep that fall behind the others end early."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L

from ud2m.files import write_json

HISTORY_FILE = "scores.json"
FEWEST = 4
"""Other runs that must have come as far: the median of fewer says little."""


class MedianPruning(L.Callback):
    """Stop a run whose best score so far is below the median of what the runs beside it had at the same step.

    The median stopping rule [Golovin et al., "Google Vizier", 2017, section 3.2.2], as in Optuna, from files: runs may
    be made by any sweeper, in one process after another or at once on many machines. Each run keeps its best score by
    step in ``scores.json``. A run that is stopped ends as others do, with its best parameters.

    Args:
        folder: of this run; the other runs are in folders beside it.
        after: steps before which no run is stopped.

    Raises:
        ValueError: for ``after`` below 1.
    """

    def __init__(self, folder: Path, after: int):
        if after < 1:
            raise ValueError(f"give_up_after must be at least 1 step, or null, got {after}")
        self.folder, self.after = folder, after
        self.stopped_at: int | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the score, and compare it; rank 0 decides for all."""
        step, score = pl_module.steps_done, trainer.callback_metrics["val/score"].item()
        stops = (
            trainer.is_global_zero and self.should_prune(step, score) and trainer.current_epoch + 1 < _epochs(trainer)
        )
        if trainer.strategy.reduce_boolean_decision(stops, all=False):
            self.stopped_at, trainer.should_stop = step, True

    def should_prune(self, step: int, score: float) -> bool:
        """Note the score of a step, and return whether the run should end there."""
        own = history(self.folder)
        best = max([score, *(value for s, value in own.items() if int(s) < step)])
        write_json(self.folder / HISTORY_FILE, own | {str(step): best})
        beside = (path.parent for path in self.folder.parent.glob(f"*/{HISTORY_FILE}"))
        scores = [history(run) for run in beside if run.name != self.folder.name]
        others = [values[str(step)] for values in scores if str(step) in values]
        if step < self.after or len(others) < FEWEST or best >= median(others):
            return False
        print(
            f"this run ends at step {step}: its best score, {best:.4g}, is below {median(others):.4g}, the median of "
            f"{len(others)} other runs (give_up_after)",
            file=sys.stderr,
        )
        return True


def history(run: Path) -> dict[str, float]:
    """Return the best score by step that a run has written down; empty for a new one."""
    path = run / HISTORY_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def _epochs(trainer: L.Trainer) -> int:
    return trainer.max_epochs or 1
