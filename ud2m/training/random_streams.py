"""Random numbers that depend on where training is, not on what ran before."""

import hashlib

import torch


def stream(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Return a generator that is a pure function of its key, e.g. (seed, "train", step, rank).

    A resumed run draws what the unbroken run would have drawn, without any saved generator state.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))


def row_streams(device: torch.device | str, positions: list[int], *key: int | str) -> list[torch.Generator]:
    """Return one generator per row of a batch, a function of the row's position in the whole stream of data."""
    return [stream(device, *key, position) for position in positions]
