"""The order in which training items are visited."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StreamSampler(Sampler[int]):
    """Visit one endless stream of items, a fixed number per epoch.

    Epoch e holds positions [e S, (e + 1) S) of the stream, S = samples_per_epoch rounded down to whole
    batches. Position q is item q of an endless data set. Of a data set of ``size`` items it is item number
    (q mod size) of the permutation drawn from (seed, q div size): nothing comes twice before everything came
    once, wherever epochs end. Ranks take every ``world_size``-th position, hence batch number b of all ranks
    together is batch number b of a single process.

    Args:
        samples_per_epoch: positions per epoch, over all ranks.
        batch_size: samples of a batch over all ranks together; a multiple of ``world_size``.
        seed: another seed is another order (of a data set with a size).
        size: number of items of the data set; None for an endless one.
        rank: this process.
        world_size: number of processes.
        epoch: the first epoch.
        batches_done: batches of it to leave out; later epochs are whole.

    Raises:
        ValueError: when a batch does not divide over the ranks or does not fit into an epoch.
    """

    def __init__(
        self,
        samples_per_epoch: int,
        batch_size: int,
        seed: int = 0,
        size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        batches_done: int = 0,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size counts the samples of all processes ({world_size}) and must be a positive "
                f"multiple of their number, got {batch_size}"
            )
        if samples_per_epoch < batch_size:
            raise ValueError(
                f"an epoch of {samples_per_epoch} samples holds no batch of {batch_size}: "
                "raise samples_per_epoch or lower batch_size"
            )
        self.batches = samples_per_epoch // batch_size
        self.batch_size, self.seed, self.size = batch_size, seed, size
        self.rank, self.world_size = rank, world_size
        self.epoch, self.batches_done = epoch, batches_done

    def __len__(self) -> int:
        # Of a whole epoch, also where the first one starts in the middle: Lightning counts batches from its
        # restored counter up to this length.
        return self.batches * self.batch_size // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; within the first epoch, stay where it is to be resumed.

        Lightning calls this before every epoch, but the first iterator, whose workers read ahead, is older.
        """
        if epoch != self.epoch:
            self.epoch, self.batches_done = epoch, 0

    def __iter__(self) -> Iterator[int]:
        start = (self.epoch * self.batches + self.batches_done) * self.batch_size
        stop = (self.epoch + 1) * self.batches * self.batch_size
        positions = range(start + self.rank, stop, self.world_size)
        return iter(positions) if self.size is None else self._permuted(positions, self.size)

    def _permuted(self, positions: range, size: int) -> Iterator[int]:
        turn, order = -1, np.empty(0, dtype=np.int64)
        for position in positions:
            if position // size != turn:
                turn = position // size
                order = np.random.default_rng([self.seed, turn]).permutation(size)
            yield int(order[position % size])
