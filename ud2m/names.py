"""What a user writes, names and plain values, against what there is: known names, and the type hints of functions."""

import inspect
import json
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo


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


def made(function: Callable[..., Any], values: Mapping[str, Any], at: str) -> Any:
    """Call a function or class with plain values, all of them checked before.

    Args:
        function: whose names and type hints count.
        values: its keyword arguments.
        at: their key, for messages.

    Raises:
        ValueError: for a name that it does not have, a value of another type, or one that is missing.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{at} must be a dictionary, got {as_written(values)}")
    check_names(function, values, at)
    check_types(function, values, at)
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in values and parameter.default is parameter.empty and parameter.kind not in _REST
    ]
    if missing:
        raise ValueError(f"{at} lacks {', '.join(missing)}")
    return function(**values)


def check_names(function: Callable[..., Any], names: Iterable[str], at: str) -> None:
    """Raise ValueError for names that a function or class has no argument of."""
    known, takes_more = _parameters(function)
    for name in names:
        if name not in known and not takes_more:
            called = getattr(function, "__qualname__", str(function))
            raise ValueError(f"{at + ': ' if at else ''}{unknown(f'argument of {called}', name, known)}")


def check_types(function: Callable[..., Any], values: Mapping[str, Any], at: str) -> None:
    """Raise ValueError for plain values that the type hints of a function or class do not take."""
    known, takes_more = _parameters(function)
    owner = getattr(function, "__self__", None)
    if takes_more and isinstance(owner, type):  # as from_pretrained, which hands on what it does not know itself
        known = _parameters(owner)[0] | known
    for name, value in values.items():
        if name in known and not fits(value, known[name]):
            raise ValueError(f"{at}.{name} must be {allowed(known[name])}, got {as_written(value)}")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value is one of a type, as JSON is read: no text is a number, and no number is true."""
    try:
        adapter: TypeAdapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type of other libraries that says nothing of values
        return True
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the hints of all arguments, and whether others are taken; our classes pass ``**options`` to parents."""
    calls = list(_calls(function))
    found: dict[str, Any] = {}
    for call in calls:
        parameters = inspect.signature(call).parameters.values()
        try:
            hints = get_type_hints(call, include_extras=True)
        except NameError:  # names that only type checkers see: nothing is known of the values
            hints = {}
        named = [p.name for p in parameters if p.name != "self" and p.kind not in _REST]
        found = {name: hints.get(name, Any) for name in named} | found
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return found, False
    return found, bool(calls)


def _calls(function: Any) -> Iterator[Any]:
    """Yield what is called: a function, or the constructor of a class and, while they are ours, of its parents."""
    if not isinstance(function, type):
        yield function
        return
    for parent in (c for c in function.__mro__ if "__init__" in vars(c)):
        ours = parent.__module__.startswith("ud2m.")
        if not ours and function.__module__.startswith("ud2m."):
            return
        yield vars(parent)["__init__"]
        if not ours:
            return


def as_written(value: Any) -> str:
    """Return a value as messages show it: in YAML's words."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )


def allowed(hint: Any) -> str:
    """Return in words what values a type hint takes."""
    if isinstance(hint, FieldInfo):
        return hint.description or allowed(hint.annotation)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        described = [d.description for d in arguments[1:] if isinstance(d, FieldInfo) and d.description]
        return described[0] if described else allowed(arguments[0])
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(allowed(argument) for argument in arguments)
        return " or ".join(words)
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    return _PLAIN_WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))


_PLAIN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a text",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
    Collection: "a list",
    dict: "a dictionary",
    Mapping: "a dictionary",
}
