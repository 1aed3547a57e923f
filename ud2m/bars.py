"""How far a long computation is: bars, and network evaluations, which are what takes time."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from torch import nn
from tqdm import tqdm

SECONDS = 15
"""Between two lines where no bar can be drawn."""


class Lines(tqdm):
    """A bar as a line of its own now and then: a terminal that does not know its size shows no other."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Return what writes a line."""

        def write(text: str) -> None:
            if text.strip():
                file.write(f"{text}\n")
                file.flush()

        return write


def draws_bars() -> bool:
    """Return whether the standard error stream is a terminal that knows its size."""
    return sys.stderr.isatty() and 0 not in os.get_terminal_size(sys.stderr.fileno())


def progress_bar(*items: Any, **options: Any) -> tqdm:
    """Return a bar of tqdm on the standard error stream, or ``Lines`` where that is a terminal of unknown size.

    Args:
        items: what is iterated over, if anything.
        options: of tqdm.
    """
    if sys.stderr.isatty() and not draws_bars():
        return Lines(*items, **(options | {"mininterval": SECONDS, "ncols": 100, "nrows": 100, "dynamic_ncols": False}))
    return tqdm(*items, **({"dynamic_ncols": True} | options))


Advance = Callable[[int], Any]
"""Is told how many network evaluations were just made."""


@contextmanager
def shown(progress: bool | Advance, total: int | None) -> Iterator[Advance]:
    """Yield what is to be told of network evaluations: a bar of so many (None: unknown), a function, or nothing."""
    if progress is True:
        with progress_bar(total=total, desc="sampling", unit="evaluation") as bar:
            yield bar.update
    else:
        yield progress or (lambda count: None)


class Forecast:
    """A bar of network evaluations whose number is foretold from those of the samples that are drawn already.

    Args:
        bar: that counts them.
        samples: to be drawn in all.
    """

    def __init__(self, bar: tqdm, samples: int):
        self.bar, self.samples, self.done = bar, samples, 0

    def drawn(self, samples: int) -> None:
        """Take note of further samples that are drawn."""
        self.done += samples
        self.bar.total = round(self.bar.n * self.samples / self.done)
        self.bar.refresh()


class NetworkEvaluations:
    """Count the images that pass through networks while the context is open.

    An image counts once per evaluation, whatever the batch that it is part of; a tile of a larger picture counts as
    one. ``count`` over the number of drawn samples is the NFE of one sample.

    Args:
        networks: modules whose first argument is a batch [B, ...].
        advance: is told of each evaluation when it is made.
    """

    def __init__(self, networks: Sequence[nn.Module], advance: Advance = lambda count: None):
        self.networks, self.advance, self.count = networks, advance, 0

    def __enter__(self) -> "NetworkEvaluations":
        self.handles = [network.register_forward_hook(self._count, with_kwargs=True) for network in self.networks]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _count(self, network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        # some pipelines name all arguments
        images = len(arguments[0] if arguments else next(iter(named.values())))
        self.count += images
        self.advance(images)
