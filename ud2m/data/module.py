"""The Lightning data module that all data sets share."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from typing import Any, Literal, Protocol

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ud2m.data.sampler import StreamSampler

Split = Literal["train", "val", "test"]


class NamedImages(Protocol):
    """A fixed sequence of images, float32 [C, H, W] in [0, 1], with one name each; or of ``captioned`` ones."""

    names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class ImageDataModule(lightning.LightningDataModule, ABC):
    """Batches of clean images, float32 [B, C, H, W] in [0, 1].

    A data set is a subclass with a ``train_set`` and an ``all_images``.

    The training batches are a function of (data set, settings, seed, epoch, batch number) alone: not of
    workers, ranks, interruptions or global random numbers. A run that goes on from a checkpoint, taken
    anywhere in an epoch, gets the batches that the unbroken run would have got. The trainer must not add
    samplers of its own (``use_distributed_sampler=False``). Validation and test images are fixed, and every
    rank sees all of them, so that the scores are those of a single process.

    Args:
        channels: 1 (grey) or 3 (colour).
        crop_size: side of the training images in pixels.
        batch_size: samples per batch, over all ranks together.
        samples_per_epoch: samples per training epoch, over all ranks; None: the size of the data set.
        num_workers: loader processes per rank.
        seed: another seed, other batches.
        tile_size: side of validation and test images; None: ``crop_size``.
        val_limit: at most so many validation images, evenly spaced over the set; None: all.
        test_limit: the same for test images.

    Raises:
        ValueError: for numbers out of range. Missing or damaged files are reported by the data sets when they
            are first asked for.
    """

    def __init__(
        self,
        channels: int,
        crop_size: int,
        batch_size: int,
        samples_per_epoch: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tile_size: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
    ):
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        if seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0 (0: load in the training process), got {num_workers}")
        self.channels, self.crop_size, self.batch_size = channels, crop_size, batch_size
        self.samples_per_epoch, self.num_workers, self.seed = samples_per_epoch, num_workers, seed
        self.tile_size = crop_size if tile_size is None else tile_size
        self.limits = {"val": val_limit, "test": test_limit}
        self.resumed: dict[str, Any] = {}

    @abstractmethod
    def train_set(self) -> Dataset[Tensor]:
        """Return the training images; a data set without length is endless."""

    @abstractmethod
    def all_images(self, split: Split) -> NamedImages:
        """Return the images of the split ``val`` or ``test`` without a limit."""

    def all_captions(self) -> Sequence[str]:
        """Return the captions of the training images, each once at least.

        Raises:
            ValueError: for data without captions.
        """
        raise ValueError(
            f"{type(self).__name__} gives no captions here, and a text model needs them: data=folder, webdataset or "
            "mnist with data.captions=true"
        )

    def evaluation_set(self, split: Split) -> "EvenSubset":
        """Return the images of the split ``val`` or ``test`` within its limit; they have ``names``."""
        return EvenSubset(self.all_images(split), self.limits[split])

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return a loader that starts at the first batch that the trainer has not processed yet.

        Raises:
            ValueError: when the run goes on from a checkpoint that was made with other settings.
        """
        dataset = self.train_set()
        sampler = self.train_sampler(dataset)
        return DataLoader(
            dataset,
            batch_size=self.batch_size // sampler.world_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=True,
            worker_init_fn=leave_interrupts,
            generator=torch.Generator(),  # iterating must not draw from the global one
        )

    def train_sampler(self, dataset: Dataset[Tensor]) -> StreamSampler:
        """Return the order of the training items on this rank, from the trainer's position on."""
        self._check_resumed()
        size = len(dataset) if isinstance(dataset, Sized) else None
        samples = size if self.samples_per_epoch is None else self.samples_per_epoch
        if samples is None:
            raise ValueError("samples_per_epoch must be a number: random crops never end by themselves")
        if self.trainer is None:
            return StreamSampler(samples, self.batch_size, self.seed, size)
        epoch, batches_done = position(self.trainer)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return StreamSampler(samples, self.batch_size, self.seed, size, rank, world_size, epoch, batches_done)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return a loader of the validation images in their order."""
        return self._fixed_loader("val")

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return a loader of the test images in their order."""
        return self._fixed_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the training batches besides the position, which is in Lightning's counters."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples_per_epoch": self.samples_per_epoch,
            "crop_size": self.crop_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the settings of the checkpoint; the next training loader compares them."""
        self.resumed = dict(state_dict)

    def _check_resumed(self) -> None:
        now = self.state_dict()
        other = [f"{key} {old}, now {now[key]}" for key, old in self.resumed.items() if old != now[key]]
        if other:
            raise ValueError(
                f"the checkpoint was made with {'; '.join(other)}: its run cannot go on with other batches; "
                "use the same settings or start a new run"
            )

    def _fixed_loader(self, split: Split) -> DataLoader[Tensor]:
        return DataLoader(
            self.evaluation_set(split),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=leave_interrupts,
            generator=torch.Generator(),
        )


def leave_interrupts(worker: int) -> None:
    """Let a loader's process work on after Ctrl-C, which a terminal sends to it too: the step under way needs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def position(trainer: lightning.Trainer) -> tuple[int, int]:
    """Return the epoch and the batch in it that the trainer processes next.

    Lightning (2.6) restores its counters from a checkpoint before it asks for the training loader, and leaves
    it to the loader to start there.

    Raises:
        ValueError: for a checkpoint between epochs in a run limited by ``max_steps``: Lightning miscounts there.
    """
    epochs = trainer.fit_loop.epoch_progress.current.state_dict()
    progress = trainer.fit_loop.epoch_loop.batch_progress
    batches = progress.current.state_dict()
    if epochs["ready"] == epochs["processed"]:  # between epochs, where the batches are still those of the last
        if trainer.fit_loop.is_resuming and trainer.max_steps != -1:
            raise ValueError(
                "Lightning cannot go on from a checkpoint between epochs when max_steps limits the run "
                f"(got max_steps={trainer.max_steps}); use max_epochs instead"
            )
        return epochs["processed"], 0
    if progress.is_last_batch and batches["ready"] == batches["processed"]:
        # The workers read ahead before Lightning closes the epoch, with the iterator that serves the next one.
        return epochs["processed"] + 1, 0
    return epochs["processed"], batches["processed"]


def captioned(image: Tensor, captions: Sequence[str] | None, index: int) -> Any:
    """Return an item of a data set: the image, and where there are captions also its own, one a line."""
    return image if captions is None else (image, captions[index])


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most so many of the numbers 0 to ``count`` - 1, evenly spaced."""
    chosen = min(count, most)
    return [k * count // chosen for k in range(chosen)]


class EvenSubset(Dataset[Tensor]):
    """At most ``limit`` images of a set, evenly spaced over it: numbers floor(k n / limit), k < limit.

    Raises:
        ValueError: for a limit below 1.
    """

    def __init__(self, images: NamedImages, limit: int | None):
        if limit is not None and limit < 1:
            raise ValueError(f"a limit on validation or test images must be at least 1, or null, got {limit}")
        self.images, self.picked = images, evenly_spaced(len(images), len(images) if limit is None else limit)
        self.names = [images.names[k] for k in self.picked]

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.picked[index]]
