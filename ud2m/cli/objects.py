"""Objects from configurations: the one place where a ``_target_`` becomes a call.

A configuration may have come with somebody else's run folder. So it names classes of a short list alone, and a command
to be run counts only where the user has written it on the command line of this very call.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from ud2m.cli.errors import USER_ERRORS
from ud2m.data.remote import COMMAND
from ud2m.names import as_written, check_names, check_types

TARGET, PARTIAL, CONVERT = "_target_", "_partial_", "_convert_"
OWN = "ud2m"
ALLOW = "UD2M_ALLOW"
"""Environment variable: packages of the user's own, separated by commas, whose classes are built too."""
LATENT = (
    "latent_latino.LatentLatino",
    "latent_rivals.Ldps",
    "latent_rivals.P2l",
    "latent_rivals.Psld",
    "latent_rivals.Treg",
    "latino_pro.LatinoPro",
    "latino_scores.LatinoScores",
    "lvtino.Lvtino",
    "video_rivals.FrameLatino",
    "video_rivals.VisionXl",
)
FUNCTIONS = {
    "ud2m.losses.build_generator_loss",
    "ud2m.samplers.bridge.BridgeSampler.from_pretrained",
    *(f"ud2m.samplers.{name}.from_pretrained" for name in LATENT),
    "ud2m.samplers.ud2m.PosteriorSampler.from_pretrained",
    "ud2m.training.build_distillation",
}
"""What the pages call besides classes."""
WANDB = {"save_dir", "project", "entity", "name", "id", "group", "tags", "resume", "offline"}
OTHERS: dict[str, set[str] | None] = {
    "lightning.Trainer": None,
    "lightning.pytorch.loggers.CSVLogger": None,
    "lightning.pytorch.loggers.TensorBoardLogger": None,
    "lightning.pytorch.loggers.WandbLogger": WANDB,  # its settings name a server, which gets the user's key
    "lightning.pytorch.strategies.DDPStrategy": None,
    "lightning.pytorch.strategies.FSDPStrategy": None,
}
"""Classes of other packages, and which of their arguments a configuration may give; None: all."""


def build(node: Any, at: str = "", kind: type = object, only: type = object, **extra: Any) -> Any:
    """Return the object that a configuration describes, with the objects inside it.

    A ``_target_`` is a class of this package, one of ``FUNCTIONS`` or ``OTHERS``, or belongs to a package that the
    environment variable ``UD2M_ALLOW`` names. All of them are looked at before the first is called.

    Args:
        node: configuration or plain values; without a ``_target_`` its values are returned, built.
        at: its key, for messages.
        kind: what the result must be an instance of.
        only: what all objects inside it must be instances of, too.
        extra: further arguments of the outermost call; they come before those of the configuration.

    Raises:
        ValueError: for what may not be built, a command that does not stand on the command line, and for what the
            classes cannot take; errors of the classes that a user can correct.
    """
    values = resolved(node)
    for key, value in leaves(values, at):
        if key.rpartition(".")[2] == TARGET:
            _check_kind(value, only)
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{key} is no number, got nan")
        elif isinstance(value, str) and value.startswith(COMMAND) and value not in commands_given():
            raise ValueError(
                f"{key} is a command, {value!r}, and commands are run only when they stand on the command line of this "
                f"very call: repeat it there, {key}=..."
            )
    given = values if not isinstance(values, Mapping) else {k: v for k, v in values.items() if k not in extra}
    _check_arguments(given, at)
    made = _built(values, extra)
    if not isinstance(made, kind):
        raise ValueError(f"{at or 'it'} describes no {kind.__name__}, got a {type(made).__name__}")
    return made


def resolved(node: Any) -> Any:
    """Return a configuration as plain values, its references resolved."""
    if isinstance(node, DictConfig | ListConfig):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    if isinstance(node, Mapping):
        return {key: resolved(value) for key, value in node.items()}
    return [resolved(value) for value in node] if isinstance(node, list | tuple) else node


def in_words(value: Any) -> str:
    """Return ``GaussianBlur(width=1.6)`` for a description with that class; arguments that are null are left out."""
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    if not isinstance(value, Mapping):
        return as_written(value) if value is None or isinstance(value, bool) else str(value)
    name = str(value.get(TARGET, value.get("class", ""))).rpartition(".")[2]
    arguments = {k: v for k, v in value.items() if k not in (TARGET, "class", PARTIAL, CONVERT) and v is not None}
    return f"{name}({', '.join(f'{key}={in_words(argument)}' for key, argument in arguments.items())})"


def leaves(values: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything in plain values that is no dictionary and no list."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value, f"{at}.{key}" if at else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from leaves(value, f"{at}.{number}" if at else str(number))
    else:
        yield at, values


def find(target: Any) -> Callable[..., Any]:
    """Return what a ``_target_`` names.

    Raises:
        ValueError: when it may not be built, or is not there.
    """
    packages = [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]
    if not _inside(target, [OWN, *packages, *OTHERS]):
        raise _refused(target)
    found = _located(target)
    of = getattr(found, "__module__", None) or ""
    if target in OTHERS or target in FUNCTIONS or (isinstance(found, type) and _inside(of, [OWN])):
        return found
    # a module of theirs shows what it imports, too: that is not theirs
    if callable(found) and _inside(target, packages) and _inside(of, [OWN, *packages]):
        return found
    raise _refused(target)


def commands_given() -> set[str]:
    """Return the texts on the command line of this call, and what is behind a ``=`` in their words."""
    if not HydraConfig.initialized():
        return set()
    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    texts = {str(value) for override in parsed for _, value in leaves(_unquoted(override.value()))}
    return texts | {word.partition("=")[2] for text in texts for word in text.split()}


def _unquoted(value: Any) -> Any:
    """Return a value of Hydra's parser with its quoted strings as strings."""
    if isinstance(value, Mapping):
        return {str(key): _unquoted(item) for key, item in value.items()}
    return [_unquoted(item) for item in value] if isinstance(value, list) else getattr(value, "text", value)


def _check_kind(target: Any, only: type) -> None:
    found = find(target)
    if only is not object and not (isinstance(found, type) and issubclass(found, only)):
        raise ValueError(f"{target} is no {only.__name__}; only these are made here")


def _check_arguments(values: Any, at: str) -> None:
    """Compare all plain values with the type hints of what they are arguments of."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, Mapping):
        return
    arguments = {key: value for key, value in values.items() if key not in (TARGET, PARTIAL, CONVERT)}
    for key, value in arguments.items():
        _check_arguments(value, f"{at}.{key}")
    if TARGET in values:
        plain = {key: value for key, value in arguments.items() if not _holds_target(value)}
        check_names(find(values[TARGET]), arguments, at)
        check_types(find(values[TARGET]), plain, at)


def _holds_target(value: Any) -> bool:
    return any(key.rpartition(".")[2] == TARGET for key, _ in leaves(value))


def _inside(name: Any, packages: list[str]) -> bool:
    return isinstance(name, str) and any(name == package or name.startswith(f"{package}.") for package in packages)


def _refused(target: Any) -> ValueError:
    return ValueError(
        f"_target_ {target!r} is not built: allowed are classes of {OWN}, {', '.join(OTHERS)}, and what belongs to "
        f"packages that you name yourself, {ALLOW}=my_package (docs/security.md)"
    )


def _located(target: str) -> Any:
    first, *rest = target.split(".")
    name = first
    try:
        found = import_module(first)
        for part in rest:
            name = f"{name}.{part}"
            if not hasattr(found, part):
                import_module(name)
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_ {target!r} is not there: {error}") from error
    return found


def _built(values: Any, extra: Mapping[str, Any]) -> Any:
    if isinstance(values, list):
        return [_built(value, {}) for value in values]
    if not isinstance(values, Mapping):
        return values
    arguments = {key: _built(value, {}) for key, value in values.items() if key not in (TARGET, PARTIAL, CONVERT)}
    arguments |= extra
    return arguments if TARGET not in values else _called(values[TARGET], arguments, values.get(PARTIAL, False))


def _called(target: str, arguments: Mapping[str, Any], later: bool) -> Any:
    function, known = find(target), OTHERS.get(target)
    unknown = [] if known is None else sorted(set(arguments) - known)
    if unknown:
        raise ValueError(
            f"{target} is not built with {', '.join(unknown)}; allowed are {', '.join(sorted(known or ()))}"
        )
    try:
        return partial(function, **arguments) if later else function(**arguments)
    except USER_ERRORS:
        raise
    except Exception as error:
        raise ValueError(f"{target} cannot be made: {type(error).__name__}: {error}") from error
