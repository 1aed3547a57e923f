"""Names of pages and models that a command is given, checked before PyTorch is imported."""

from collections.abc import Mapping
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ud2m.cli import as_override, plain
from ud2m.names import flattened, unknown
from ud2m.priors.shipped import check_reference

LABEL = "label="
PLACE = "{physics}"


def check_training(config: DictConfig) -> None:
    """Refuse a prior or a model to start from that cannot be there."""
    if config.architecture is None:
        check_reference("prior", str(config.prior))
    start = OmegaConf.select(config, "training.start_from")
    if start is not None:
        check_reference("prior" if "unet" in config.training else "model", str(start))


def check_sampling(config: DictConfig) -> None:
    """Refuse a model, a prior or a pipeline that cannot be there."""
    if config.get("sampler") is not None:
        check_reference("pipeline", str(config.pipeline))
        return
    for key in ("prompt", "estimate"):
        if config[key]:
            raise ValueError(f"{key}=... belongs to a latent prior: add sampler=latino or sampler=latino_pro")
    check_reference("model", str(config.model))
    if config.prior is not None:
        check_reference("prior", str(config.prior))


def check_evaluation(config: DictConfig) -> None:
    """Refuse entries without a page, settings that a page does not have, and models that cannot be there."""
    check_reference("prior", str(config.prior))
    for data in config.datasets or []:
        part("data", data)
    for operator in config.operators or []:
        part("physics", operator)
        for entry in config.methods or []:
            model = method_page(entry, operator)["target"].get("model")
            if model is not None:
                check_reference("model", str(model))


def method_page(entry: str, operator: str) -> dict[str, Any]:
    """Return the page of a method, with the name of the operator's page in its place."""
    kind = operator.split()[0]
    # filled before too: in an override of Hydra a brace begins a dictionary
    return filled(part("method", filled(entry, kind)), kind)


def part(group: str, entry: str) -> dict[str, Any]:
    """Return a configuration ``NAME [key=value ...]`` of a group as plain values.

    Raises:
        ValueError: for an unknown name or key.
    """
    name, *overrides = [word for word in entry.split() if not word.startswith(LABEL)] or [""]
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    if name not in known:
        raise ValueError(unknown(group, name, known))
    fixed = ["data.samples_per_epoch=1", "data.num_workers=0", "data.seed=0"] if group == "data" else []
    try:
        composed = compose(
            overrides=[f"+{group}={name}", *fixed, *(as_override(f"{group}.{text}") for text in overrides)]
        )
    except HydraException as error:
        keys = flattened(part(group, name))
        first = str(error).splitlines()[0]
        raise ValueError(f"{entry!r}: {first}; settings of {group} {name} are {', '.join(keys)}") from error
    return plain(composed[group])


def filled(value: Any, physics: str) -> Any:
    """Return a page with ``{physics}``, the name of the operator's page, replaced in all its texts."""
    if isinstance(value, Mapping):
        return {key: filled(item, physics) for key, item in value.items()}
    return value.replace(PLACE, physics) if isinstance(value, str) else value


def label(entry: str, default: str) -> str:
    """Return how a method is called: ``label=...`` of its entry, with blanks for ``_``, or its name and settings."""
    words = entry.split()[1:]
    given = [word.removeprefix(LABEL) for word in words if word.startswith(LABEL)]
    if given:
        return given[0].replace("_", " ")
    words = [word.removeprefix("target.") for word in words if not word.startswith("tune=")]
    return f"{default} ({', '.join(words)})" if words else default
