"""Random numbers with one generator for all, or one per row so that a row does not depend on its batch."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_GLOBAL = threading.RLock()

Generators = torch.Generator | Sequence[torch.Generator] | None


@contextmanager
def global_draws(seed: int | None = None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Keep in here what code of others draws from torch's global generators: afterwards they are as before.

    One thread at a time: a second one would draw from the first one's stream.

    Args:
        seed: of the generators of the CPU and of ``device`` inside the context; None leaves them.
        device: another device whose generator is drawn from.
    """
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    with _GLOBAL, torch.random.fork_rng(devices=cuda):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach those of all other devices
            for each in cuda:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
        yield


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Return N(0, 1) noise of the shape of x [B, ...]; of B generators, generator b alone makes row b."""
    return _draw(torch.randn, tuple(x.shape), generator, x.device, x.dtype)


def rand(shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
    """Return U(0, 1) numbers [B, ...]; of B generators, generator b alone makes row b."""
    return _draw(torch.rand, tuple(shape), generator, device, torch.get_default_dtype())


def _draw(
    draw: Callable[..., Tensor],
    shape: tuple[int, ...],
    generator: Generators,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    if generator is None:
        return draw(shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"one generator per row is needed: got {len(generator)} for {shape[0]} rows")
    return torch.stack([draw(shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]).to(device)
