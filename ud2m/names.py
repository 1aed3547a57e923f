"""Names that a user writes, against those that there are."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message about a name that is not there: the nearest one, and all that are.

    Args:
        kind: what it names, as ``model``.
        name: what was written.
        known: what could have been.
    """
    names = list(known)
    nearest = get_close_matches(name, names, n=1)
    return f"unknown {kind} {name!r}{f' (did you mean {nearest[0]}?)' if nearest else ''}; known: {', '.join(names)}"


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flattened(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return found
