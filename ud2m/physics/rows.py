"""Parameters per sample: of a call, and of an operator."""

import copy
from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ud2m.physics.data_term import DataTerm
from ud2m.physics.immutable import Immutable

AnyPhysics = TypeVar("AnyPhysics", bound=DataTerm)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """Return ``value`` in the dtype and on the device of ``like`` [B, ...], shaped to broadcast against it.

    Args:
        value: a number or a tensor of one element (the same for all samples), or [B] or [B, 1, 1, 1].
        like: any batch.

    Raises:
        ValueError: when there are neither 1 nor B elements.
    """
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.numel() == 1:
        return value.reshape(())
    if value.numel() != len(like) or len(value) != len(like):
        raise ValueError(
            f"a parameter per sample must be one number or have the shape of the batch, [{len(like)}], "
            f"got {list(value.shape)}"
        )
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: that of the tensors together, but not below float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@singledispatch
def select_samples(physics: AnyPhysics, index: Tensor) -> AnyPhysics:
    """Return the operator of the samples ``index`` (int64, may repeat) of the batch it was drawn for.

    For example ``arange(B).repeat_interleave(S)`` serves S samples per measurement. An operator of this package says
    what it has for each sample (``Immutable.per_sample``), others register; of an operator of deepinv it is found out
    by ``adopt``. What all samples share is not copied.

    Raises:
        ValueError: when it is not known which parameters belong to one sample.
    """
    if not isinstance(physics, Immutable) or not isinstance(physics, nn.Module):
        raise ValueError(
            f"it is not known which parameters of {type(physics).__name__} belong to one sample each; make it an "
            "Observation.of(y, physics, sigma_y) first, which finds out"
        )
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in physics.named_modules()
        for name in getattr(module, "per_sample", ())
    }
    return with_tensors(physics, lambda name, t: t[index.to(t.device)] if name in names and len(t) > 1 else t)


def with_tensors(module: AnyModule, change: Callable[[str, Tensor], Tensor]) -> AnyModule:
    """Return a copy of a module with ``change(name, tensor)`` for its buffers and parameters; the others are shared."""
    shared: list[Any] = [value for part in module.modules() for value in vars(part).values()]
    # deepcopy takes these for copies it has already made; of generators it can make none
    memo: dict[int, Any] = {id(value): value for value in shared if isinstance(value, torch.Generator)}
    memo |= {id(t): change(name, t) for name, t in (*module.named_buffers(), *module.named_parameters())}
    return copy.deepcopy(module, memo=memo)
