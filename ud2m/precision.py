"""Where autocast must not reach."""

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device | str) -> AbstractContextManager:
    """Switch autocast off inside the context: only networks may be evaluated in less than float32.

    Devices without autocast, such as PyTorch's meta device, know no other precision.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
