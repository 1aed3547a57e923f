"""Numbers that callers give: those of Python, and the scalars of numpy, which mean the same."""

from numbers import Integral, Real
from typing import Any, TypeGuard


def is_whole(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number, infinity included; truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_python(value: Any) -> Any:
    """Return a number of numpy as the same of Python, which JSON can hold, and all else as it is."""
    if is_whole(value):
        return int(value)
    return float(value) if is_number(value) else value
