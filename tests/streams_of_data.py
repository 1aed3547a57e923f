"""What trainings see of a data stream, in one process or several."""

from contextlib import suppress
from pathlib import Path

import lightning
import torch

import ud2m.cli  # noqa: F401  registers the resolvers that the configurations use


class PowerCutError(Exception):
    pass


class Recorder(lightning.LightningModule):
    """Keep the training batches; stop with an error before batch number ``fail_at``."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.fail_at = [], fail_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise PowerCutError
        self.seen.append(batch)
        return self.parameter * batch.mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, data, callback=None, resume=None, fail_at=None, **settings):
    """Train for 3 epochs and return the batches seen."""
    recorder = Recorder(fail_at)
    trainer = lightning.Trainer(
        **{"max_epochs": 3} | settings,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callback,
        enable_checkpointing=callback is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    with suppress(PowerCutError):
        trainer.fit(recorder, data, ckpt_path=resume, weights_only=True if resume else None)
    return recorder.seen


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# (how the checkpoint is made, after how many batches the one resumed from was made)
INTERRUPTIONS = {
    "within an epoch": ({"every_n_train_steps": 6}, {}, 6),
    "at the last batch of an epoch": ({"every_n_train_steps": 8}, {}, 8),
    "at a validation in the middle": ({"save_on_train_epoch_end": False}, {"val_check_interval": 2}, 6),
    "at the validation that ends an epoch": ({"save_on_train_epoch_end": False}, {}, 8),
    "after an epoch": ({"save_on_train_epoch_end": True}, {}, 4),
    "after an epoch without validation": ({"save_on_train_epoch_end": True}, {"limit_val_batches": 0}, 8),
}


class RankRecorder(Recorder):
    def on_train_end(self):
        torch.save(self.seen, Path(self.trainer.default_root_dir) / f"{self.global_rank}.pt")


def two_processes(folder):
    """Return a trainer of three epochs on two ranks."""
    return lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
