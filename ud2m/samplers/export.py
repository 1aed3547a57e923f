"""The export folder of a trained sampler."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file

from ud2m.files import atomic_folder, parse_json
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.priors.shipped import PSI_FILE, check_reference, shipped_folder
from ud2m.priors.store import read_weights
from ud2m.samplers.config import SamplerConfig
from ud2m.unfolded.network import UnfoldedNetwork, build_network

CONFIG_FILE = "config.json"
FORMAT = 1
PSI_MEANS = ("num_blocks", "rule")
"""Parts of a network's description without which psi means nothing."""


def write_export(folder: str | Path, network: UnfoldedNetwork, config: SamplerConfig, overwrite: bool = False) -> None:
    """Write ``config.json``, the adapter (peft), the other trained parameters (safetensors), the prior by reference.

    Args:
        folder: to be made, whole or not at all.
        network: whose description and parameters are written, and the adapter, reference and fingerprint of its prior.
        config: of sampling.
        overwrite: replace an export that is there.

    Raises:
        OSError: when the place cannot be written, or is taken.
    """
    prior = cast(Prior, network.denoiser)
    content = {
        "format": FORMAT,
        "network": network.spec,
        "lora": (prior.lora or LoraSpec(rank=0)).to_dict(),
        "prior": {"reference": prior.reference, "fingerprint": prior.fingerprint},
        "sampler": config.stored(),
    }
    with atomic_folder(folder, overwrite=overwrite) as partial:
        prior.save_adapter(partial)
        save_file({k: v.detach().cpu().contiguous() for k, v in network.own_state().items()}, partial / PSI_FILE)
        (partial / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read


def read_export(reference: str, prior: str | Path | None = None) -> tuple[UnfoldedNetwork, SamplerConfig]:
    """Return the frozen network of an export, the adapter of its prior merged, and its configuration.

    Args:
        reference: name of a shipped model, export folder or hub id.
        prior: where the prior is, when it moved since the export.

    Raises:
        FileNotFoundError: when nothing is there.
        ValueError: when the export is damaged or made for another prior.
    """
    folder = _export_folder(reference)
    content = _read_config(folder)
    try:
        lora = LoraSpec(**content["lora"])
        config = SamplerConfig(**content["sampler"])
        where, expected = content["prior"]["reference"], content["prior"]["fingerprint"]
        spec = content["network"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not a complete export: {error}; export the model again") from error
    base = _load_prior(folder, prior or where)
    if base.fingerprint != expected:
        raise ValueError(
            f"the export {folder} was trained on a prior with fingerprint {expected[:12]}, but "
            f"{base.reference} has {base.fingerprint[:12]}; pass the folder of the right prior"
        )
    try:
        base.load_adapter(folder, lora)
        network = build_network(base, spec)
        network.load_own_state(read_weights(folder / PSI_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(f"the export {folder} is damaged or incomplete ({error}); export the model again") from error
    base.merge_adapter()
    return network.requires_grad_(False).eval(), config


def start_from(network: UnfoldedNetwork, reference: str | Path) -> None:
    """Give a network, whose prior has an adapter, the trained parameters of a model: to train it further.

    Args:
        network: the one to be trained.
        reference: name of a shipped model, export folder or hub id. Operator, noise level and warm start may be others;
            a learned warm start goes on from the model's where that has the same weights, and else begins anew. So may
            be the prior's weights, as after its own training went on, and the number of modules, the rule or the
            features of psi. psi is taken with slopes of 0 for new features, and begins by its rule where it means
            something else; a warning says so. The rank of the adapter may be higher than the model's
            (``Prior.read_adapter``).

    Raises:
        FileNotFoundError: when nothing is there.
        ValueError: when it has another architecture of the prior, or adapter.
    """
    folder = _export_folder(str(reference))
    content = _read_config(folder)
    prior = cast(Prior, network.denoiser)
    lora = prior.lora or LoraSpec(rank=0)
    try:
        theirs, theirs_lora = content["prior"]["fingerprint"], LoraSpec(**content["lora"])
        if theirs_lora.rank > lora.rank or replace(theirs_lora, rank=lora.rank, alpha=lora.alpha) != lora:
            raise ValueError(f"it has another lora: {theirs_lora.to_dict()}")
        features = tuple(content["network"].get("conditioning", ()))
        other = [part for part in PSI_MEANS if content["network"].get(part) != network.spec.get(part)]
        other += ["conditioning"] if set(features) - set(network.conditioning) else []
        prior.read_adapter(folder, theirs_lora)
        if not other:
            network.load_own_state(network.fitted(read_weights(folder / PSI_FILE), features))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"a run cannot start from the model {reference} ({error})") from error
    if other:
        warnings.warn(
            f"the model {reference} has another {' and '.join(other)} than this run: its adapter is taken, and psi "
            "begins by its rule",
            stacklevel=2,
        )
    if theirs != prior.fingerprint:
        warnings.warn(
            f"the model {reference} was trained on a prior with other weights (fingerprint {theirs[:12]}; "
            f"{prior.reference} has {prior.fingerprint[:12]}); its adapter is a good start where one is "
            "the other trained on",
            stacklevel=2,
        )


def _export_folder(reference: str) -> Path:
    folder = shipped_folder(reference) or Path(reference)
    if folder.is_dir():
        return folder
    check_reference("model", reference)
    try:
        return Path(snapshot_download(reference))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no model at {reference!r}: it is neither an existing folder nor a hub repository that can be "
            f"reached from here ({type(error).__name__})"
        ) from error


def _load_prior(folder: Path, reference: str | Path | None) -> Prior:
    if reference is None:
        raise ValueError(f"the export {folder} does not say where its prior is; give its folder with prior=...")
    try:
        return Prior.from_pretrained(reference)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the export {folder} needs its prior: {error}; say where it is with prior=..."
        ) from error


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    try:
        content = parse_json(path.read_text())
    except OSError as error:
        raise FileNotFoundError(f"{folder} is not an export: it has no readable {CONFIG_FILE}") from error
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not JSON ({error}); export the model again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not an export of format {FORMAT}; got {str(content)[:80]}")
    return content


def refer_to_prior(folder: Path, reference: str) -> dict[str, Any]:
    """Write into an export where its prior is; return the content of its config."""
    content = parse_json((folder / CONFIG_FILE).read_text())
    content["prior"]["reference"] = reference
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    adapter = folder / CONFIG_NAME
    if adapter.is_file():
        stored = parse_json(adapter.read_text()) | {"base_model_name_or_path": reference}
        adapter.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    return content


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a ``metrics.json``; raises ValueError when it holds none."""
    try:
        rows = parse_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of scores; give the metrics.json of a run or of sample.py")
    return rows
