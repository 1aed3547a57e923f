"""Where computing takes place, and in which precision: only networks may be evaluated in less than float32."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

AUTO = "auto"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of precisions; None: autocast stays off."""
AMPERE = 8
"""Compute capability from which GPUs have instructions for bfloat16."""
LARGE = 64 * 64
"""Pixels from which ``fastest_layout`` changes."""


def full_precision(device: torch.device | str) -> AbstractContextManager:
    """Switch autocast off inside the context: only networks may be evaluated in less than float32.

    Devices without autocast, such as PyTorch's meta device, know no other precision.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def network_precision(precision: str, device: torch.device | str) -> AbstractContextManager:
    """Return the context that a network is evaluated in: autocast, or nothing for ``float32``.

    Args:
        precision: of ``DTYPES``, or ``auto``.
        device: of the network.
    """
    dtype = DTYPES[chosen_precision(precision, device)]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


def chosen_precision(precision: str, device: torch.device | str) -> str:
    """Return what ``auto`` is on a device, bfloat16 where the hardware has instructions for it, else float32.

    Any other precision is returned as it is.
    """
    return _fastest(torch.device(device)) if precision == AUTO else precision


def fastest_layout(images: torch.Tensor) -> torch.memory_format:
    """Return the layout in which a network computes fastest: channels side by side from 64 x 64 pixels on.

    Measured on CPUs: 0.8 to 0.95 of the time in float32 and bfloat16; in small images bfloat16 loses as much. What GPUs
    do is the training's choice (``training.channels_last``).
    """
    is_large = images.device.type == "cpu" and images.shape[-2] * images.shape[-1] >= LARGE
    return torch.channels_last if is_large else torch.contiguous_format


def check_precision(precision: str) -> None:
    """Raise ValueError for what is no precision."""
    if precision not in (AUTO, *DTYPES):
        raise ValueError(f"precision must be one of {AUTO}, {', '.join(DTYPES)}, got {precision!r}")


def find_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is a GPU where there is one, else the CPU.

    Raises:
        ValueError: for what is no device, or one that is not there.
    """
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == AUTO:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in there:
        raise ValueError(f"device must be {AUTO}, cpu, cuda, cuda:N or mps, got {name!r}")
    if (device.index or 0) >= there[device.type]:
        found = ", ".join(f"{count} of {kind}" for kind, count in there.items())
        raise ValueError(f"there is no device {name!r} on this machine, which has {found}; take device={AUTO}")
    return device


def free_memory(device: torch.device | str) -> int:
    """Return the bytes that are left on a device, as far as the system says."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _fastest(device: torch.device) -> str:
    if device.type == "cuda":
        has_instructions = torch.cuda.get_device_capability(device)[0] >= AMPERE
    else:
        # AVX512-BF16, AMX or Arm's: on other processors bfloat16 is slower than float32
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        has_instructions = any(value for key, value in capabilities.items() if str(key).endswith("bf16"))
    return "bfloat16" if has_instructions else "float32"
