"""What a method really uses: network evaluations, counted by hooks, time, and memory."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class NetworkEvaluations:
    """Count the images that pass through networks while the context is open.

    An image counts once per evaluation, whatever the batch that it is part of; a tile of a larger picture counts as
    one. ``count`` over the number of drawn samples is the NFE of one sample.

    Args:
        networks: modules whose first argument is a batch [B, ...].
    """

    def __init__(self, networks: Sequence[nn.Module]):
        self.networks, self.count = networks, 0

    def __enter__(self) -> "NetworkEvaluations":
        self.handles = [network.register_forward_pre_hook(self._count, with_kwargs=True) for network in self.networks]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _count(self, network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # some pipelines name all arguments
        self.count += len(arguments[0] if arguments else next(iter(named.values())))


class Stopwatch:
    """Sum of the seconds inside its contexts; on a GPU until the work is done."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.seconds, self.start = 0.0, 0.0

    def __enter__(self) -> "Stopwatch":
        self.start = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds += self._now() - self.start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def reset_peak_memory(device: torch.device | str = "cpu") -> None:
    """Begin a new measurement of ``peak_memory``."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # another system: peak_memory is None there, or that of the whole process
        _RESET.write_text("5")  # Linux: the peak becomes the present size


def peak_memory(device: torch.device | str = "cpu") -> float | None:
    """Return the peak since the reset in MB: of tensors on a GPU, of the resident process on Linux, else None."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), None)
