"""Where priors come from and go to: shipped folders, diffusers folders and the hub, and their fingerprints."""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from ud2m.files import parse_json
from ud2m.priors.adm import ADM_OPTIONS
from ud2m.priors.schedule import VPSchedule
from ud2m.priors.shipped import SCHEDULER_FILE, check_reference

UNET_FILE, PIPELINE_FILE = "config.json", "model_index.json"
PARTS = {"unet", "scheduler"}
"""Of a pipeline that is a prior."""
FINGERPRINTED = ("act_fn", "attention_head_dim", "flip_sin_to_cos", "freq_shift", "norm_eps", "norm_num_groups")
LABEL = "class_label"
"""Key of the scheduler's file that names the fixed class of a class-conditional prior."""


def load_unet(
    network: type[UNet2DModel], where: str, reference: str | None = None, inside: str | None = None
) -> UNet2DModel:
    """Return the network of a folder or hub id in float32; raises ValueError when its weights are not whole.

    ``reference`` is its name in messages, where that is not ``where``; ``inside`` the subfolder that it lies in.
    """
    reference = reference or where
    try:
        unet, loading = network.from_pretrained(
            where, subfolder=inside, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load the weights of {reference}: {error}") from error
    # diffusers would go on with random weights where some are missing
    odd = {kind: names for kind, names in loading.items() if names}
    if odd:
        raise ValueError(f"the weights of {reference} do not fit its {UNET_FILE}: {odd}")
    check_finite(unet.state_dict(), reference)
    return unet


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of weights.

    Raises:
        ValueError: as ``check_finite``.
        OSError: when it is not there.
        SafetensorError: when it is damaged.
    """
    state = load_file(path)
    check_finite(state, str(path))
    return state


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError where weights are no finite floats: what is trained never is anything else."""
    for name, value in state.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} in {where} holds {value.dtype}; weights are floats")
        if not value.float().isfinite().all():
            raise ValueError(f"{name} in {where} holds NaN or infinity")


def save_prior(unet: UNet2DModel, scheduler: dict, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a prior folder that ``Prior.from_pretrained`` (and diffusers) loads: safetensors, config, noise table."""
    # nn.Module's own cast: that of diffusers warns about modules to keep in float32, of which this class has none.
    nn.Module.to(copy.deepcopy(unet), dtype).save_pretrained(str(folder), safe_serialization=True)
    (Path(folder) / SCHEDULER_FILE).write_text(json.dumps(scheduler, indent=2) + "\n")


def fingerprint(unet: UNet2DModel, schedule: VPSchedule, prediction: str = "epsilon", label: int | None = None) -> str:
    """Return a SHA-256 of all that makes the denoiser: which prior this is.

    Of the weights (name, shape, float32 values), of the noise table, of the prediction type, of those options of the
    architecture that shapes cannot tell, and of the class.
    """
    options = {name: unet.config[name] for name in FINGERPRINTED}
    # only where there are any: the fingerprints of all other priors stay what they were
    options |= {name: unet.config[name] for name in ADM_OPTIONS if name in unet.config}
    options |= {} if label is None else {LABEL: label}
    digest = hashlib.sha256(json.dumps([prediction, options], sort_keys=True).encode())
    return weights_fingerprint(unet.state_dict() | {"log_sigmas": schedule.log_sigmas}, digest)


def weights_fingerprint(state: Mapping[str, Tensor], digest: Any = None) -> str:
    """Return a SHA-256 of names, shapes and float32 values, after what ``digest`` (of hashlib) has seen already."""
    digest = digest or hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_files(reference: str) -> tuple[Path, Path, str | None]:
    """Return the files of a prior that describe network and noise, and the subfolder of the network, if it has one.

    They lie side by side, as ``save_prior`` writes them, or as ``DDPMPipeline`` does.

    Raises:
        FileNotFoundError: when they are not there.
        ValueError: for a pipeline with more parts than a network of pixels and its noise.
    """
    try:
        return _locate(reference, UNET_FILE), _locate(reference, SCHEDULER_FILE), None
    except FileNotFoundError:
        try:
            pipeline = _read_json(_locate(reference, PIPELINE_FILE))
        except FileNotFoundError:
            pipeline = None
        if pipeline is None:
            raise
    parts = {name for name in pipeline if not name.startswith("_")}
    if parts != PARTS:
        raise ValueError(
            f"{reference} holds a pipeline of {', '.join(sorted(parts))}; a prior has {' and '.join(sorted(PARTS))} "
            "alone, and works on pixels"
        )
    return _locate(reference, f"unet/{UNET_FILE}"), _locate(reference, f"scheduler/{SCHEDULER_FILE}"), "unet"


def _locate(reference: str, file: str) -> Path:
    """Return the path of a file of the prior, in its folder or from the hub."""
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"the prior folder {folder} has no {file}; is it a diffusers UNet2DModel folder?")
        return folder / file
    check_reference("prior", reference)
    try:
        return Path(hf_hub_download(reference, file))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no prior at {reference!r}: it is neither an existing folder nor a hub repository "
            f"that can be reached from here ({type(error).__name__})"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        content = parse_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(content)[:80]}")
    return content
