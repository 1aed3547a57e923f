"""The roof: the only readers of Hydra configurations."""

import math
import secrets
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

PLACES = ("data.root", "data.held_out", "data.cache")
"""Keys that say where images lie: a run that goes on takes other ones."""

OPEN = ("physics.parameters.",)
"""Beginnings of keys that go on with any name: arguments of classes that are not ours."""


def as_override(word: str) -> str:
    """Return ``KEY=VALUE`` as Hydra takes it, which wants to be told that a key is a new one."""
    return f"++{word}" if word.startswith(OPEN) else word


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def describe(node: Any) -> Any:
    """Return a configuration as plain values with ``class`` for ``_target_``, so that nothing instantiates it."""
    if isinstance(node, DictConfig):
        return {"class" if key == "_target_" else key: describe(value) for key, value in node.items()}
    return [describe(value) for value in node] if isinstance(node, ListConfig) else node


OmegaConf.register_new_resolver("mul", lambda *factors: math.prod(int(factor) for factor in factors), replace=True)
OmegaConf.register_new_resolver("floordiv", lambda a, b: int(a) // int(b), replace=True)
OmegaConf.register_new_resolver(
    "if_among", lambda value, names, then, other: OmegaConf.create(then if value in names else other), replace=True
)
OmegaConf.register_new_resolver("is_among", lambda value, names: value in names, replace=True)
OmegaConf.register_new_resolver(
    "boundary_of", lambda degraded: "valid" if degraded is True else "circular", replace=True
)
OmegaConf.register_new_resolver(
    "first_of", lambda *values: next((value for value in values if value is not None), None), replace=True
)
# one per composed configuration
OmegaConf.register_new_resolver("random_id", lambda: secrets.token_hex(4), use_cache=True, replace=True)
# as a configuration again: --cfg job --resolve takes no plain dictionaries
OmegaConf.register_new_resolver("describe", lambda node: OmegaConf.create(describe(node)), replace=True)
