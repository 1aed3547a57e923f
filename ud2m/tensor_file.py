"""Files of torch that may be damaged, or somebody else's."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch


def read_tensors(source: Path | BinaryIO) -> Any:
    """Return what a torch file holds, on the CPU; no code of the file is run (``weights_only``).

    Raises:
        ValueError: with the reason in one line, when it is truncated, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    # what torch raises depends on the first bytes: of some files the unpickler's own KeyError or AttributeError
    except (RuntimeError, UnpicklingError, EOFError, OSError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(str(error).strip().split("\n")[0][:160] or type(error).__name__) from error
