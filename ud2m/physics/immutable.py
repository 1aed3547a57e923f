"""Refusal of deepinv's in-place updates."""

from typing import Any


class Immutable:
    """Operator whose parameters cannot be changed by a call.

    deepinv's operators accept new parameters in any call (``A(x, mask=...)``) and keep them. With such hidden
    state the results of a shared operator depend on who used it last.
    """

    def update_parameters(self, **parameters: Any) -> None:
        """Raise ValueError when a parameter of the operator is given; deepinv passes None for "unchanged"."""
        given = [name for name, value in parameters.items() if value is not None and hasattr(self, name)]
        if given:
            raise ValueError(f"{type(self).__name__} cannot be changed ({', '.join(given)}): make a new operator")
