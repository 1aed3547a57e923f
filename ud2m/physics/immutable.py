"""Operators without hidden state: deepinv's in-place updates are refused, and workers can be sent them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

SOLVER = ("solver", "max_iter", "tol")
"""How deepinv's own prox would be iterated, which RAM says in its calls; those here are exact or know by themselves."""


class Immutable:
    """Operator whose parameters cannot be changed by a call. It can be pickled.

    deepinv's operators accept new parameters in any call (``A(x, mask=...)``) and keep them. With such hidden
    state the results of a shared operator depend on who used it last.

    ``per_sample`` names the buffers that hold a row for each sample, [B, ...], or one row for all.
    """

    per_sample: tuple[str, ...] = ()

    def update_parameters(self, **parameters: Any) -> None:
        """Raise ValueError when a parameter of the operator is given; deepinv passes None for "unchanged"."""
        changed = {name: value for name, value in parameters.items() if value is not None and name not in SOLVER}
        given = [name for name in changed if hasattr(self, name)]
        if given:
            raise ValueError(f"{type(self).__name__} cannot be changed ({', '.join(given)}): make a new operator")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple["_Packed"]]:
        return _unpacked, (_packed(cast(nn.Module, self)),)


@dataclass
class _Packed:
    """A module as its class and attributes, the modules inside it in the same form."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    modules: dict[str, "_Packed | None"]


def unchanged(x: Any, **kwargs: Any) -> Any:
    """Return x: what deepinv's default functions do, which are local ones and cannot be pickled."""
    return x


def _packed(module: nn.Module) -> _Packed:
    attributes = {name: _by_name(value) for name, value in vars(module).items() if name != "_modules"}
    return _Packed(type(module), attributes, {k: m if m is None else _packed(m) for k, m in module._modules.items()})


def _by_name(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return None  # operators draw when they are made
    returns_its_argument = isinstance(value, FunctionType) and value.__code__.co_code == unchanged.__code__.co_code
    return unchanged if returns_its_argument else value


def _unpacked(packed: _Packed) -> nn.Module:
    module = packed.kind.__new__(packed.kind)
    module.__setstate__(packed.attributes)
    module._modules = {k: m if m is None else _unpacked(m) for k, m in packed.modules.items()}
    return module
