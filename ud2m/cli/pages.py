"""Names of pages and models that a command is given, checked before PyTorch is imported."""

import math
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ud2m.cli import as_override, plain
from ud2m.cli.settings import AppSettings, EvaluateSettings, SampleSettings, TrainSettings, check
from ud2m.cli.words import check_added, entry_words, is_text, quoted
from ud2m.names import flattened, unknown
from ud2m.priors.shipped import check_reference

LABEL = "label="
PLACE = "{physics}"


def check_training(config: DictConfig) -> None:
    """Refuse settings that are none, and a prior or a model to start from that cannot be there."""
    check(config, TrainSettings)
    check_added(given_words())
    follow_steps(config)
    if config.architecture is None:
        check_reference("prior", str(config.prior))
    start = OmegaConf.select(config, "training.start_from")
    if start is not None:
        check_reference("prior" if "unet" in config.training else "model", str(start))


def check_sampling(config: DictConfig) -> None:
    """Refuse settings that are none, and a model, a prior or a pipeline that cannot be there."""
    check(config, SampleSettings)
    check_added(given_words())
    if config.get("sampler") is not None:
        for key in ("reference", "image_reference"):
            if config.sampler.get(key) is not None:
                check_reference("pipeline", str(config.sampler[key]))
        return
    for key in ("prompt", "pipeline", "image_pipeline", "estimate"):
        if config[key]:
            raise ValueError(f"{key}=... belongs to a latent prior: add sampler=latino, or another of conf/sampler")
    check_reference("model", str(config.model))
    if config.prior is not None:
        check_reference("prior", str(config.prior))


def check_evaluation(config: DictConfig) -> None:
    """Refuse settings that are none, entries that no page explains, and models that are not there."""
    check(config, EvaluateSettings)
    for name in ("methods", "operators", "datasets", "metrics"):
        if len(set(config[name])) < len(config[name]):
            raise ValueError(f"{name} must name none twice, got {list(config[name])}")
    check_reference("prior", str(config.prior))
    for data in config.datasets:
        part("data", data)
    for operator in config.operators:
        part("physics", operator)
        pages = {entry: method_page(entry, operator) for entry in config.methods}
        labels = [label(entry, page["label"]) for entry, page in pages.items()]
        if len(set(labels)) < len(labels):
            raise ValueError(f"methods need labels of their own, got {', '.join(labels)}; add {LABEL}... to an entry")
        for model in (page["target"].get("model") for page in pages.values()):
            if model is not None:
                check_reference("model", str(model))


def check_app(config: DictConfig) -> None:
    """Refuse settings that are none, a model that cannot be there, a want of Gradio, and a port that is taken."""
    check(config, AppSettings)
    check_reference("model", str(config.model))
    if find_spec("gradio") is None:
        raise ValueError("ud2m app needs Gradio, which is not installed: pip install 'ud2m[app]'")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: one that has ended takes no port
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            place = f"port={config.port} of host={config.host}"
            raise ValueError(f"{place} cannot be listened on ({error.strerror}); choose another one") from error


def given_words() -> list[str]:
    """Return the settings on the command line of this call."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def follow_steps(config: DictConfig) -> None:
    """Let ``steps=...``, given alone, bring the ``validate_every`` that divides it and is nearest to the page's."""
    given = {word.partition("=")[0].lstrip("+") for word in given_words()}
    if "steps" in given and "validate_every" not in given and config.steps % config.validate_every:
        divisors = [d for d in range(1, config.steps + 1) if config.steps % d == 0]
        config.validate_every = min(divisors, key=lambda d: abs(math.log(d / config.validate_every)))
        print(f"validate_every={config.validate_every} follows steps={config.steps}")


def method_page(entry: str, operator: str) -> dict[str, Any]:
    """Return the page of a method, with the name of the operator's page in its place."""
    kind = entry_words(operator)[0]
    # filled before too: in an override of Hydra a brace begins a dictionary
    return filled(part("method", filled(entry, kind)), kind)


def part(group: str, entry: str) -> dict[str, Any]:
    """Return a configuration ``NAME [key=value ...]`` of a group as plain values.

    Raises:
        ValueError: for an unknown name or key.
    """
    name, *overrides = [word for word in entry_words(entry) if not word.startswith(LABEL)] or [""]
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    if name not in known:
        raise ValueError(unknown(group, name, known))
    fixed = ["data.samples_per_epoch=1", "data.num_workers=0", "data.seed=0"] if group == "data" else []
    try:
        words = [quoted(text) if is_text(text.partition("=")[0]) else text for text in overrides]
        given = [override for text in words for override in _overrides(group, text)]
        composed = compose(overrides=[f"+{group}={name}", *fixed, *given])
    except HydraException as error:
        keys = flattened(part(group, name))
        for key in (text.partition("=")[0] for text in overrides):
            if key not in keys:
                raise ValueError(f"{entry!r}: {unknown(f'setting of {group} {name}', key, keys)}") from error
        raise ValueError(f"{entry!r}: {str(error).splitlines()[0]}") from error
    return plain(composed[group])


def _overrides(group: str, text: str) -> list[str]:
    """Return the overrides of Hydra for ``key=value`` of a page; ``tune=...`` is a grid in place of the page's."""
    override = as_override(f"{group}.{text}")
    return [f"{group}.tune=null", f"++{override}"] if text.startswith("tune=") else [override]


def filled(value: Any, physics: str) -> Any:
    """Return a page with ``{physics}``, the name of the operator's page, replaced in all its texts."""
    if isinstance(value, Mapping):
        return {key: filled(item, physics) for key, item in value.items()}
    return value.replace(PLACE, physics) if isinstance(value, str) else value


def label(entry: str, default: str) -> str:
    """Return how a method is called: ``label=...`` of its entry, with blanks for ``_``, or its name and settings."""
    words = entry_words(entry)[1:]
    given = [word.removeprefix(LABEL) for word in words if word.startswith(LABEL)]
    if given:
        return given[0].replace("_", " ")
    words = [word.removeprefix("target.") for word in words if not word.startswith(("tune=", "tune."))]
    return f"{default} ({', '.join(words)})" if words else default
