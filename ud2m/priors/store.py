"""Where priors come from and go to: shipped folders, diffusers folders and the hub, and their fingerprints."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ud2m.files import parse_json, read_tensors
from ud2m.priors.adm import ADM_OPTIONS
from ud2m.priors.schedule import VPSchedule
from ud2m.priors.shipped import SCHEDULER_FILE, check_reference

UNET_FILE, PIPELINE_FILE = "config.json", "model_index.json"
PARTS = {"unet", "scheduler"}
"""Of a pipeline that is a prior."""
WEIGHTS = re.compile(r"(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")
"""Files that diffusers and transformers load, the safe ones where there are any."""
FLOATS = ("F", "BF", "float", "bfloat")
"""Beginnings of the names of floats, of safetensors and of torch."""
FINGERPRINTED = ("act_fn", "attention_head_dim", "flip_sin_to_cos", "freq_shift", "norm_eps", "norm_num_groups")
LABEL = "class_label"
"""Key of the scheduler's file that names the fixed class of a class-conditional prior."""


def load_network(
    network: Any,
    where: str,
    reference: str | None = None,
    inside: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return a network of a folder or hub id whose weights are all there, all of its own, and finite floats.

    Args:
        network: class of diffusers or transformers.
        where: the folder, or the hub id.
        reference: its name in messages, where that is not ``where``.
        inside: the subfolder that it lies in.
        dtype: of the weights.

    Raises:
        ValueError: when it is damaged, or other weights are stored than the network has.
    """
    name = "/".join(filter(None, (reference or where, inside)))
    try:
        # transformers warns of the name that diffusers gives to the type of the weights
        kind = "torch_dtype" if issubclass(network, ModelMixin) else "dtype"
        part = {} if inside is None else {"subfolder": inside}
        loaded, loading = network.from_pretrained(where, output_loading_info=True, **part, **{kind: dtype})
        folder = locate("network", where, "/".join(filter(None, (inside, UNET_FILE)))).parent
        _check_stored(folder, loaded)
    except Exception as error:  # of any class, since what reads damaged files is neither ours nor of one library
        raise ValueError(f"cannot load the weights of {name}: {' '.join(str(error).split())[:300]}") from error
    # they would go on with random weights where some are missing
    odd = {kind: sorted(map(str, names))[:3] for kind, names in loading.items() if names}
    if odd:
        raise ValueError(f"the weights of {name} do not fit its {UNET_FILE}: {odd}")
    check_finite({key: value for key, value in loaded.state_dict().items() if value.is_floating_point()}, name)
    return loaded


def _check_stored(folder: Path, network: nn.Module) -> None:
    """Raise ValueError where the files of a network hold other numbers than floats, which libraries would convert."""
    counts = {key.rpartition(".")[2] for key, value in network.named_buffers() if not value.is_floating_point()}
    files = [file for file in sorted(folder.iterdir()) if WEIGHTS.fullmatch(file.name)]
    safe = [file for file in files if file.suffix == ".safetensors"]
    for file in safe or files:
        for key, kind in _stored_types(file).items():
            if not kind.startswith(FLOATS) and key.rpartition(".")[2] not in counts:
                raise ValueError(f"{key} in {file.name} holds {kind}; weights are floats")


def _stored_types(file: Path) -> dict[str, str]:
    if file.suffix != ".safetensors":
        return {key: str(value.dtype).removeprefix("torch.") for key, value in stored_weights(file).items()}
    with safe_open(file, "pt") as stream:
        return {key: stream.get_slice(key).get_dtype() for key in stream.keys()}  # noqa: SIM118  # it is no dictionary


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of weights: safetensors, or by another ending those of torch.

    Raises:
        ValueError: as ``check_finite``, and when it is damaged.
        OSError: when it is not there.
    """
    state = stored_weights(path)
    check_finite(state, str(path))
    return state


def stored_weights(path: Path) -> dict[str, Any]:
    """Return what a file of weights holds by name: safetensors, or by another ending a file of torch.

    Raises:
        ValueError: when it is damaged.
        OSError: when it is not there.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_tensors(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no tensors by name, but a {type(state).__name__}")
    return state


def check_finite(state: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where weights are no finite floats: what is trained never is anything else."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{name} in {where} holds {getattr(value, 'dtype', type(value))}; weights are floats")
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
    if not Path(reference).is_dir():
        check_reference("prior", reference)
    try:
        return locate("prior", reference, UNET_FILE), locate("prior", reference, SCHEDULER_FILE), None
    except FileNotFoundError:
        try:
            pipeline = read_object(locate("prior", reference, PIPELINE_FILE))
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
    return (
        locate("prior", reference, f"unet/{UNET_FILE}"),
        locate("prior", reference, f"scheduler/{SCHEDULER_FILE}"),
        "unet",
    )


def locate(kind: str, reference: str, file: str) -> Path:
    """Return the path of a file in a folder, or in a hub repository.

    Args:
        kind: what it belongs to, for the message.
        reference: folder or hub id.
        file: name, perhaps in a subfolder.

    Raises:
        FileNotFoundError: when it is not there.
    """
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"the {kind} folder {folder} has no {file}; is it a folder of diffusers?")
        return folder / file
    try:
        if "/" not in reference:
            raise HFValidationError("a hub id is OWNER/NAME")
        return Path(hf_hub_download(reference, file))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no {kind} at {reference!r}: it is neither an existing folder, nor shipped, nor a hub repository that can "
            f"be reached from here ({type(error).__name__}); fetch it where there is a network, and give the folder"
        ) from error


def read_object(path: Path) -> dict:
    """Return the JSON object of a file.

    Raises:
        ValueError: when it is damaged, or holds another thing.
        OSError: when it is not there.
    """
    try:
        content = parse_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {str(content)[:80]}")
    return content
