"""One progress bar over the whole training run."""

from typing import Any

import lightning as L
from tqdm import tqdm

from ud2m.bars import draws_bars, progress_bar


class StepProgress(L.Callback):
    """Show batches done of all, remaining time and the logged loss values (Lightning's bars restart each epoch)."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.terminal = draws_bars()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar where a resumed run stands."""
        if trainer.is_global_zero:
            self.bar = progress_bar(
                total=int(trainer.num_training_batches) * (trainer.max_epochs or 1),
                initial=trainer.fit_loop.epoch_loop.total_batch_idx + 1,
                desc="training",
                unit="batch",
                mininterval=0.5 if self.terminal else 15,
                smoothing=0,  # the mean pace, in which past validations are a forecast of the coming ones
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by one batch."""
        if self.bar is not None:
            metrics = {k: f"{v:.4g}" for k, v in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(metrics, refresh=False)
            self.bar.update()

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say how far validation is; the time it takes is part of the remaining time."""
        if self.bar is not None:
            total = int(sum(trainer.num_val_batches))
            # A log file gets one line per validation, a terminal a running count.
            shown = self.terminal or batch_idx == 0
            self.bar.set_description(f"validating {batch_idx + 1}/{total}", refresh=shown)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go back to training."""
        if self.bar is not None:
            self.bar.set_description("training", refresh=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean before a message."""
        self.on_train_end(trainer, pl_module)
