"""One progress bar over the whole training run."""

import sys
from typing import Any

import lightning as L
from tqdm import tqdm


class StepProgress(L.Callback):
    """Show steps done of all steps, remaining time and the logged loss values (Lightning's bars restart each epoch)."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar where a resumed run stands."""
        if trainer.is_global_zero:
            total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
            terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=total,
                initial=trainer.fit_loop.total_batch_idx + 1,
                desc="training",
                unit="step",
                mininterval=0.5 if terminal else 15,
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by one batch."""
        if self.bar is not None:
            metrics = {k: f"{v:.4g}" for k, v in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(metrics, refresh=False)
            self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean before a message."""
        self.on_train_end(trainer, pl_module)
