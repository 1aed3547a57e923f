"""The pages of conf/method: samplers by name, with the settings to choose from."""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ud2m.cli.objects import TARGET, build, find
from ud2m.precision import AUTO
from ud2m.samplers.base import Sampler


def build_sampler(
    target: Mapping[str, Any],
    prior: nn.Module,
    device: torch.device | str,
    precision: str = AUTO,
    compile: str | None = None,
) -> Sampler:
    """Return the sampler of a page's ``target``.

    It gets the prior and the device where it has such an argument, and the precision where the page leaves it open.
    ``compile`` is for a network that it brings itself (``Sampler.compile``).
    """
    extra: dict[str, Any] = {"prior": prior} if shares_prior(target) else {}
    if "device" in _arguments(target):
        extra["device"] = device
    if target.get("precision", precision) is None:
        extra["precision"] = precision
    sampler: Sampler = build(target, "method.target", **extra)
    return sampler if compile is None or shares_prior(target) else sampler.compile(compile)


def shares_prior(target: Mapping[str, Any]) -> bool:
    """Return whether a target takes a prior as a network; trained models bring theirs, and may take its name."""
    argument = _arguments(target).get("prior")
    return argument is not None and argument.annotation is nn.Module


def _arguments(target: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(find(target[TARGET])).parameters


def combinations(target: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the target with every combination of the values of dotted keys.

    Raises:
        ValueError: for a key that the target does not have.
    """
    for values in itertools.product(*grid.values()):
        changed = copy.deepcopy(dict(target))
        for key, value in zip(grid, values, strict=True):
            *path, last = key.split(".")
            node = changed
            for step in path:
                node = node.get(step, {})
            if last not in node:
                raise ValueError(f"tune names {key!r}, which the method does not have; it has {', '.join(node)}")
            node[last] = value
        yield changed
