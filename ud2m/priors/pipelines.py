"""Pipelines of diffusers from folders and the hub: of known classes, with whole, finite weights, or one clear line."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub import hf_hub_download
from torch import nn

from ud2m.priors.shipped import SCHEDULER_FILE, check_reference, shipped_folder
from ud2m.priors.store import PIPELINE_FILE, UNET_FILE, check_finite, load_network, locate, read_object, stored_weights

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
CLASS = "_class_name"
"""The key of options that names the class, as in the configurations of diffusers."""


def load_pipeline(where: str, dtype: torch.dtype, **given: Any) -> DiffusionPipeline:
    """Return the pipeline of a folder or hub id, with some of its networks given.

    Each network is loaded by itself: diffusers loads a whole pipeline without a word on weights that are missing.

    Raises:
        FileNotFoundError: when something is missing or cannot be reached.
        ValueError: for a damaged file, a class that is not known, or weights that do not fit (``load_network``).
    """
    if not Path(where).is_dir():
        check_reference("pipeline", where)
    kind, parts = pipeline_classes(where)
    check_parts(where, kind.__name__, [*given, *parts], (*PARTS, ("tokenizer",)))
    folder = Path(where) if Path(where).is_dir() else Path(_tried(DiffusionPipeline.download, where, **given))
    networks = {
        name: load_network(kind, str(folder / name), dtype=dtype)
        for name, kind in parts.items()
        if issubclass(kind, nn.Module) and name not in given
    }
    pipeline = _tried(DiffusionPipeline.from_pretrained, str(folder), **networks, **given)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in networks | given:
            raise ValueError(f"{folder / PIPELINE_FILE} has a class for {name} that is not known here")
        if name.startswith("tokenizer") and part is not None:
            _check_vocabulary(part, pipeline.components.get(name.replace("tokenizer", "text_encoder")), folder / name)
    return pipeline


def pipeline_classes(where: str | Path) -> tuple[type[DiffusionPipeline], dict[str, type]]:
    """Return the class of a pipeline and those of its parts, by the ``model_index.json`` of a folder or hub id.

    They are classes of diffusers and transformers alone, and nothing is called here. The parts of a folder lie in it,
    and the files that configure them are JSON objects.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: for other classes, and damaged files.
    """
    path = locate("pipeline", str(where), PIPELINE_FILE)
    index, folder = read_object(path), Path(where)
    pipeline = getattr(diffusers, str(index.get(CLASS)), None)
    if not isinstance(pipeline, type) or not issubclass(pipeline, DiffusionPipeline):
        raise ValueError(f"{path} names no pipeline of diffusers, but {index.get(CLASS)!r}")
    taken = inspect.signature(pipeline).parameters
    parts: dict[str, type] = {}
    for name, entry in index.items():
        if name not in taken or not isinstance(entry, list) or entry == [None, None]:
            continue
        library, kind = entry if len(entry) == 2 else (None, None)
        module = LIBRARIES.get(str(library)) or getattr(diffusers.pipelines, str(library), None)
        if not inspect.ismodule(module) or not isinstance(kind, str):
            raise ValueError(f"{path} has {entry!r} for {name}; allowed are classes of {', '.join(LIBRARIES)}")
        for file in (folder / name).glob("*config.json"):
            read_object(file)
        found = getattr(module, kind, None)  # names of old classes are left to diffusers
        if isinstance(found, type) and (not folder.is_dir() or (folder / name).is_dir()):
            parts[name] = found
    return pipeline, parts


PARTS = (("vae",), ("text_encoder",), ("unet", "transformer"))
"""Parts of a pipeline that a latent prior needs: one of each group, whose names begin so."""


def check_parts(reference: str, kind: str, names: Collection[str], needed: Sequence[tuple[str, ...]]) -> None:
    """Raise ValueError when a pipeline of class ``kind`` with parts ``names`` lacks a needed one."""
    missing = [" or ".join(group) for group in needed if not any(name.startswith(group) for name in names)]
    if missing:
        raise ValueError(f"{reference} is a {kind} without {', '.join(missing)}, which a latent prior needs")


def _check_vocabulary(tokenizer: Any, text_encoder: Any, where: Path) -> None:
    size = getattr(getattr(text_encoder, "config", None), "vocab_size", math.inf)
    if len(tokenizer) > size:
        raise ValueError(f"{where} has {len(tokenizer)} tokens, and its text model knows {size}: they do not fit")


def assemble_on_meta(folder: Path) -> DiffusionPipeline:
    """Return the pipeline of a diffusers folder without values and without tokenizers; no weights need to be there.

    Raises:
        FileNotFoundError: as ``pipeline_classes``.
        ValueError: as ``pipeline_classes``, and for options that a part cannot take.
    """
    pipeline, parts = pipeline_classes(folder)
    made: dict[str, Any] = {"tokenizer": None, "tokenizer_2": None, "safety_checker": None, "feature_extractor": None}
    for name, kind in parts.items():
        file = folder / name / (SCHEDULER_FILE if name == "scheduler" else UNET_FILE)
        if file.is_file() and (name == "scheduler" or issubclass(kind, nn.Module)):
            made[name] = _tried(_without_values, file, kind=kind)
    taken = inspect.signature(pipeline).parameters
    return _tried(lambda _: pipeline(**{name: part for name, part in made.items() if name in taken}), folder)


def _without_values(file: Path, kind: Any) -> Any:
    options = read_object(file)
    if not issubclass(kind, nn.Module):
        return kind.from_config(options)
    with torch.device("meta"):
        return kind.from_config(options) if issubclass(kind, ModelMixin) else kind(kind.config_class.from_dict(options))


# --- autoencoders ------------------------------------------------------------------------------------------------


def load_vae(reference: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the autoencoder of its own folder, of a pipeline's, or of a hub id with either.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: for another network, a damaged one (``load_network``), or one without a scale of its latents.
    """
    where = str(shipped_folder(reference) or reference)
    file, inside = _vae_file(where, reference)
    name = read_object(file).get(CLASS)
    kind: Any = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, ModelMixin) or not hasattr(kind, "decode"):
        raise ValueError(f"{reference} holds a {name!r}; an autoencoder of diffusers is needed")
    vae = load_network(kind, where, reference, inside, dtype)
    check_scale(vae, reference)
    return vae


def _vae_file(where: str, reference: str) -> tuple[Path, str | None]:
    reason = ""
    for inside, file in ((None, UNET_FILE), ("vae", f"vae/{UNET_FILE}")):
        try:
            return locate("autoencoder", where, file), inside
        except FileNotFoundError as error:
            reason = str(error)
    raise FileNotFoundError(
        f"no autoencoder at {reference!r}: it is neither the folder of one, nor that of a pipeline, nor a hub "
        f"repository that can be reached from here ({reason})"
    )


def latent_channels(vae: Any) -> int:
    """Return the channels of the latents."""
    return int(vae.config.get("z_dim") or vae.config.latent_channels)


def check_scale(vae: Any, where: str) -> None:
    """Raise ValueError unless the configuration has numbers for ``latent_scale`` that can be undone."""
    config, channels = vae.config, latent_channels(vae)
    mean, std, scale, shift = (
        config.get(key) for key in ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    )
    by_channel = mean is not None and std is not None
    if by_channel and not (_numbers(mean, channels) and _numbers(std, channels) and min(std) > 0):
        raise ValueError(
            f"the autoencoder {where} has latents_mean={mean!r} and latents_std={std!r}; they are {channels} numbers "
            "each, those of latents_std above 0"
        )
    if not (by_channel and scale is None) and not (_numbers([scale], 1) and scale > 0):
        raise ValueError(f"the autoencoder {where} has scaling_factor={scale!r}; it is a number above 0")
    if shift is not None and not _numbers([shift], 1):
        raise ValueError(f"the autoencoder {where} has shift_factor={shift!r}; it is a number, or null")


def _numbers(values: Any, count: int) -> bool:
    listed = isinstance(values, list | tuple) and len(values) == count
    return listed and all(type(value) in (int, float) and math.isfinite(value) for value in values)


# --- other weights -----------------------------------------------------------------------------------------------


def network_name(pipeline: DiffusionPipeline) -> str:
    """Return the name of the part that predicts."""
    return "unet" if pipeline.components.get("unet") is not None else "transformer"


def take_weights(pipeline: DiffusionPipeline, place: str) -> None:
    """Give the network of a pipeline other weights: of a file, or of OWNER/NAME/FILE of the hub.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for weights that are damaged, no finite floats, or another network's.
    """
    path = Path(place)
    if not path.is_file():
        owner, _, rest = place.partition("/")
        name, _, file = rest.partition("/")
        if not (owner and name and file):
            raise FileNotFoundError(f"no weights at {place!r}: it is neither a file nor OWNER/NAME/FILE of the hub")
        path = Path(_tried(lambda repository: hf_hub_download(repository, file), f"{owner}/{name}"))
    state = _renamed(stored_weights(path))
    check_finite(state, place)
    try:
        getattr(pipeline, network_name(pipeline)).load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{place} holds no weights of the pipeline's network: {' '.join(str(error).split())[:200]}"
        ) from error


def _renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights under the names of diffusers.

    Those of CausVid lie in a dictionary under ``generator``, below the name of the wrapper that they were trained in,
    with the names of Wan's own code; diffusers knows how to rename these.
    """
    inner = state.get("generator")
    state = dict(inner if isinstance(inner, dict) else state)
    if not any(str(name).endswith("self_attn.q.weight") for name in state):
        return state
    for wrapper in ("_fsdp_wrapped_module.", "model."):
        state = {name.replace(wrapper, ""): value for name, value in state.items()}
    return convert_wan_transformer_to_diffusers(state)


def take_lora(pipeline: DiffusionPipeline, place: str) -> None:
    """Put a LoRA in the format of diffusers, of a folder, file or hub id, on the networks of a pipeline.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: for one that is damaged, no finite floats, or has layers that the networks lack.
    """
    found = _tried(pipeline.lora_state_dict, place)
    state = found[0] if isinstance(found, tuple) else found  # with the factors of some formats
    check_finite(state, place)
    before = _parameters(pipeline)
    _tried(pipeline.load_lora_weights, place)
    taken = _parameters(pipeline) - before
    if taken < len(state):  # diffusers leaves out, without a word, what fits no layer
        raise ValueError(f"the LoRA {place} was made for another model: {taken} of its {len(state)} tensors fit here")


def _parameters(pipeline: DiffusionPipeline) -> int:
    return sum(len(list(p.parameters())) for p in pipeline.components.values() if isinstance(p, nn.Module))


def _tried(load: Callable[..., Any], reference: str | Path, **arguments: Any) -> Any:
    """Return what a loader of a library finds; a missing, damaged or foreign thing is one line."""
    try:
        return load(reference, **arguments)
    # of any class: the loaders of tokenizers raise ``Exception`` itself, others what damaged values lead to
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if Path(reference).exists():
            raise ValueError(f"{reference} cannot be loaded by diffusers: {reason}") from error
        raise FileNotFoundError(
            f"nothing at {reference!r}: it is neither an existing folder, nor shipped, nor a hub repository that "
            f"can be reached from here ({reason}); fetch it where there is a network, and give the folder"
        ) from error
