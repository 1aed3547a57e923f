"""Parameters per sample: of a call, and of an operator."""

import copy
from functools import singledispatch
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ud2m.physics.data_term import DataTerm

AnyPhysics = TypeVar("AnyPhysics", bound=DataTerm)


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

    For example ``arange(B).repeat_interleave(S)`` serves S samples per measurement. Works on any deepinv
    operator that keeps parameters per sample as buffers [B, C, H, W], others register; what all samples share is not
    copied.
    """
    replaced = {
        id(buffer): buffer[index.to(buffer.device)] if buffer.ndim >= 4 and len(buffer) > 1 else buffer
        for buffer in cast(nn.Module, physics).buffers()
    }
    # deepcopy takes these replacements for copies it has already made
    return copy.deepcopy(physics, memo=replaced)
