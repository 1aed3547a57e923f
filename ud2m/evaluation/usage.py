"""What a method really uses: time and memory."""

import time
from contextlib import suppress
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


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
