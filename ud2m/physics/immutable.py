"""Refusal of deepinv's in-place updates."""

from typing import Any

SOLVER = ("solver", "max_iter", "tol")
"""How deepinv's own prox would be iterated, which RAM says in its calls; those here are exact or know by themselves."""


class Immutable:
    """Operator whose parameters cannot be changed by a call.

    deepinv's operators accept new parameters in any call (``A(x, mask=...)``) and keep them. With such hidden
    state the results of a shared operator depend on who used it last.
    """

    def update_parameters(self, **parameters: Any) -> None:
        """Raise ValueError when a parameter of the operator is given; deepinv passes None for "unchanged"."""
        changed = {name: value for name, value in parameters.items() if value is not None and name not in SOLVER}
        given = [name for name in changed if hasattr(self, name)]
        if given:
            raise ValueError(f"{type(self).__name__} cannot be changed ({', '.join(given)}): make a new operator")
