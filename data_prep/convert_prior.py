"""Convert a U-Net checkpoint of guided-diffusion (ADM) or improved-diffusion into a folder that is used as prior.

    python data_prep/convert_prior.py 256x256_diffusion_uncond.pt priors/imagenet256
    python data_prep/convert_prior.py 64x64_diffusion.pt priors/imagenet64_tench --label 0
    python data_prep/convert_prior.py 256x256_diffusion_uncond.pt ud2m/architectures/imagenet256 --config-only
    python data_prep/convert_prior.py mine.pt priors/mine --head-width 64 --qkv-order legacy --dropout 0 \
        --schedule linear --steps 1000 --prediction epsilon

With --config-only the checkpoint is the name of a published one, which need not be there: config.json and
scheduler_config.json are written, for estimates of what training costs.

Published networks are recognised by the shapes of their tensors. For any other one, what shapes cannot tell must be
given. The folder appears when all of it is written and loaded again, or not at all. No code of the checkpoint runs.
"""

import argparse
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from adm_architecture import (
    NORM_GROUPS,
    PUBLISHED,
    Architecture,
    Facts,
    Layer,
    Shapes,
    expected_shapes,
    layers,
    read_architecture,
    recognise,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from ud2m.files import atomic_folder, write_json
from ud2m.priors.adm import NETWORKS, AdmUNet2DModel, UNet2DModel
from ud2m.priors.prior import Prior
from ud2m.priors.schedule import VPSchedule
from ud2m.priors.shipped import SCHEDULER_FILE
from ud2m.priors.store import LABEL, UNET_FILE

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
RECORD_FILE = "conversion.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LISTED = 12
"""Names of tensors in an error message."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """What was written: ``fingerprint`` is that of `Prior`, None for a class-conditional network without label.

    ``rounding`` is what half precision costs: max |change| / std of the output of `run`; None in float32.
    """

    folder: Path
    recognised: str | None
    parameters: int
    fingerprint: str | None
    rounding: float | None


def convert(
    checkpoint: Path,
    folder: Path,
    given: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    label: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write the diffusers folder of a checkpoint.

    Args:
        checkpoint: state dict, as ``torch.save`` writes it. folder: the folder to be made.
        given: some of `Facts`, by name; they come before those of a published network.
        dtype: float32 or bfloat16. label: fixed class of a class-conditional network.
        overwrite: replace a folder that an earlier conversion made.

    Raises:
        OSError: when a file is missing, or cannot be written.
        ValueError: when the checkpoint is damaged, of another kind, or not described well enough.
    """
    check_target(folder, overwrite)
    state = read_state(checkpoint)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    architecture = read_architecture(shapes)
    check_shapes(shapes, expected_shapes(architecture))
    check_kind(architecture, label)
    published = recognise(architecture, checkpoint.name)
    facts = complete(given or {}, published.facts if published else None, architecture)
    with torch.device("meta"):
        unet = build(architecture, facts, published.image_size if published else None)
    converted = convert_state(state, architecture, facts)
    del state  # the tensors of `converted` may still be views of it
    check_target_names(unet, converted)
    rounding = None
    if dtype != torch.float32:
        exact = run(unet, converted)
        converted = {name: value.to(dtype) for name, value in converted.items()}
        rounding = ((run(unet, converted) - exact).abs().max() / exact.std()).item()
    parameters = sum(value.numel() for value in converted.values())
    with atomic_folder(folder, overwrite) as work:
        save_file(converted, work / WEIGHTS_FILE, metadata={"format": "pt"})
        (work / WEIGHTS_FILE).chmod(0o644)  # safetensors writes files that only their owner can read
        converted.clear()
        unet.save_config(work)
        write_json(work / SCHEDULER_FILE, scheduler_config(facts, label))
        needs_label = architecture.num_classes is not None and label is None
        fingerprint = None if needs_label else load(work).fingerprint
        recognised = published.files[0] if published else None
        record = {"checkpoint": checkpoint.name, "recognised": recognised, "fingerprint": fingerprint}
        stored = {field.name: getattr(facts, field.name) for field in fields(facts)}
        write_json(work / RECORD_FILE, record | stored | {"dtype": str(dtype), "rounding_error": rounding})
    return Conversion(folder, recognised, parameters, fingerprint, rounding)


def write_config(file: str, folder: Path, overwrite: bool = False) -> None:
    """Write the folder of a published network, by the name of its file, without weights.

    Raises:
        ValueError: for a name that is not published. OSError: when the folder cannot be written.
    """
    entry = next((entry for entry in PUBLISHED if file in entry.files), None)
    if entry is None:
        names = ", ".join(name for entry in PUBLISHED for name in entry.files)
        raise ValueError(f"{file} is no published network; allowed with --config-only: {names}")
    with torch.device("meta"):
        unet = build(entry.architecture, entry.facts, entry.image_size)
    with atomic_folder(folder, overwrite) as work:
        unet.save_config(work)
        write_json(work / SCHEDULER_FILE, scheduler_config(entry.facts, None))


def load(folder: Path) -> Prior:
    """Return the prior of a folder, with its tensors left in the file.

    ``Prior.from_pretrained`` gives the same, but holds the weights twice for a while.
    """
    config, scheduler = (json.loads((folder / name).read_text()) for name in (UNET_FILE, SCHEDULER_FILE))
    with torch.device("meta"):
        unet = NETWORKS[config["_class_name"]].from_config(config)
    weights = {name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()}
    unet.load_state_dict(weights, assign=True)
    return Prior(unet, VPSchedule.from_config(scheduler), scheduler["prediction_type"], label=scheduler.get(LABEL))


# --- the checkpoint --------------------------------------------------------------------------------------------------


def read_state(path: Path) -> State:
    """Return the tensors of a checkpoint, mapped into memory where its format allows it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, or no plain dictionary of finite floating-point tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; name the .pt file")
    try:
        # files of PyTorch before 1.6 are no zip archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(
            f"cannot read the checkpoint {path}: it is truncated, or no file of torch.save that holds tensors alone "
            f"({reason}); download or save it again"
        ) from error
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds a {type(state).__name__}; a state dict (names and tensors) is needed")
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(
            f"{path} is no plain state dict: {', '.join(odd[:LISTED])} are no tensors; save the state dict alone"
        )
    bad = [name for name, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    if bad:
        raise ValueError(f"tensors of {path} are not finite floating-point numbers: {listed(bad)}")
    return dict(state)


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Raise ValueError, with the list, when names or shapes differ from those of the architecture."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if any(problems.values()):
        lists = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the tensors are not those of one U-Net of this family. {lists}")


def check_kind(architecture: Architecture, label: int | None) -> None:
    """Raise ValueError when the network is no prior of images, or the label does not fit it."""
    channels, outputs, classes = architecture.in_channels, architecture.out_channels, architecture.num_classes
    if channels == 6:
        raise ValueError(
            "the network takes 6 channels: it is an upsampler, which also sees a small image, and no prior of images"
        )
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"the network maps {channels} channels to {outputs}; allowed: {channels} or {2 * channels}")
    if label is not None and (classes is None or not 0 <= label < classes):
        allowed = "none, it is not class-conditional" if classes is None else f"0 to {classes - 1}"
        raise ValueError(f"the network has no class {label} (--label); allowed: {allowed}")


def listed(names: Sequence[str]) -> str:
    """Return the names for a message; many are cut short."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


# --- what shapes cannot tell -----------------------------------------------------------------------------------------


def complete(given: Mapping[str, Any], published: Facts | None, architecture: Architecture) -> Facts:
    """Return all facts: those given, then those of the published network.

    Raises:
        ValueError: when some are unknown (with the options that give them) or impossible.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "heads" in given and "head_width" in given:
        raise ValueError("give --heads or --head-width, not both: one follows from the other")
    if published is not None:
        base = replace(published, heads=None, head_width=None) if {"heads", "head_width"} & set(given) else published
        facts = replace(base, **given)
    else:
        missing = missing_options(given)
        if missing:
            raise ValueError(
                "this is no published network, and the shapes of its tensors do not tell everything. "
                f"Missing: {', '.join(missing)}. Take them from its training command; they are not guessed"
            )
        # with 1000 steps, the published code's rescaling changes nothing
        facts = Facts(**({"heads": None, "head_width": None, "rescale_timesteps": False} | given))
    check_facts(facts, architecture)
    return facts


def missing_options(given: Mapping[str, Any]) -> list[str]:
    """Return the command line options that an unpublished network still needs."""
    missing = [] if {"heads", "head_width"} & set(given) else ["--heads or --head-width"]
    for name in ("qkv_order", "dropout", "schedule", "steps", "prediction"):
        if name not in given:
            missing.append(f"--{name.replace('_', '-')}")
    if given.get("steps", 1000) != 1000 and "rescale_timesteps" not in given:
        missing.append("--rescale-timesteps or --no-rescale-timesteps")
    return missing


def check_facts(facts: Facts, architecture: Architecture) -> None:
    """Raise ValueError when a fact is out of range or does not fit the widths."""
    if not 0 <= facts.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {facts.dropout}")
    if facts.steps < 2:
        raise ValueError(f"--steps must be at least 2, got {facts.steps}")
    divisor, option = (facts.heads, "--heads") if facts.head_width is None else (facts.head_width, "--head-width")
    wrong = [width for width in sorted(architecture.attention_widths) if not divisor or divisor < 1 or width % divisor]
    if wrong:
        raise ValueError(f"{option} {divisor} does not divide an attention layer of {wrong[0]} channels")


def scheduler_config(facts: Facts, label: int | None) -> dict[str, Any]:
    """Return the noise table for ``scheduler_config.json``.

    Both repositories stretch the linear table of 1000 steps (1e-4 to 0.02) to ``steps``: beta falls as 1000 / steps.
    """
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": facts.steps,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[facts.schedule],
        "prediction_type": facts.prediction,
    }
    if facts.schedule == "linear":
        config |= {"beta_start": 0.1 / facts.steps, "beta_end": 20 / facts.steps}
    return config if label is None else config | {LABEL: label}


# --- the network -----------------------------------------------------------------------------------------------------


def build(architecture: Architecture, facts: Facts, image_size: int | None) -> UNet2DModel:
    """Return the network that computes what the published code computes.

    A plain ``UNet2DModel`` where it can; an ``AdmUNet2DModel`` where heads are counted over several widths, where the
    first level is not as wide as the embedding of the time, or where the times are rescaled.

    Raises:
        ValueError: when diffusers cannot build it.
    """
    extra = adm_options(architecture, facts)
    arguments = unet_arguments(architecture, facts) | {"sample_size": image_size}
    try:
        return AdmUNet2DModel(**arguments, **extra) if extra else UNet2DModel(**arguments)
    except ValueError as error:
        raise ValueError(f"diffusers cannot build this network ({architecture}): {error}") from error


def unet_arguments(architecture: Architecture, facts: Facts) -> dict[str, Any]:
    """Return the arguments of ``UNet2DModel``."""
    a = architecture
    kind = "resnet" if a.residual_resampling else "conv"
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if a.residual_resampling else ("DownBlock2D", "UpBlock2D")
    )
    return {
        "in_channels": a.in_channels,
        "out_channels": a.out_channels,
        "block_out_channels": a.widths,
        "layers_per_block": a.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if has else plain[0] for has in a.attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else plain[1] for has in reversed(a.attention)),
        "downsample_type": kind,
        "upsample_type": kind,
        "resnet_time_scale_shift": "scale_shift" if a.scale_shift else "default",
        "dropout": facts.dropout,
        "act_fn": "silu",
        "attention_head_dim": facts.head_width or a.widths[-1] // (facts.heads or 1),
        "norm_num_groups": NORM_GROUPS,
        "attn_norm_num_groups": NORM_GROUPS,  # or the attention in the middle has no norm
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,  # cosines first
        "freq_shift": 0,  # frequencies 10000^(-i / half)
        "time_embedding_dim": 4 * a.model_channels,
        "num_class_embeds": a.num_classes,
    }


def adm_options(architecture: Architecture, facts: Facts) -> dict[str, Any]:
    """Return the arguments that ``UNet2DModel`` lacks; none where it can say everything."""
    extra: dict[str, Any] = {}
    if facts.heads is not None and len(architecture.attention_widths) > 1:
        extra["num_heads"] = facts.heads
    if architecture.model_channels != architecture.widths[0]:
        extra["time_channels"] = architecture.model_channels
    if facts.rescale_timesteps and facts.steps != 1000:
        extra["time_scale"] = 1000 / facts.steps
    return extra


def convert_state(state: Mapping[str, Tensor], architecture: Architecture, facts: Facts) -> State:
    """Return the float32 tensors under their names in diffusers; those that only change their name are not copied."""
    converted: State = {}
    for layer in layers(architecture):
        if layer.kind == "qkv":
            converted |= split_qkv(state, layer, facts)
            continue
        for part in ("weight",) if layer.kind == "embedding" else ("weight", "bias"):
            value = state[f"{layer.source}.{part}"].float()
            converted[f"{layer.target}.{part}"] = value.squeeze(-1) if layer.kind == "projection" else value
    return converted


def split_qkv(state: Mapping[str, Tensor], layer: Layer, facts: Facts) -> State:
    """Return the three projections of an attention layer, from the rows of the joint one."""
    width = layer.inputs
    heads = facts.heads or width // (facts.head_width or width)
    axis = {"legacy": 1, "new": 0}[facts.qkv_order]
    order = [heads, width // heads]
    order.insert(axis, 3)
    converted: State = {}
    for part, shape in (("weight", (width, width)), ("bias", (width,))):
        rows = state[f"{layer.source}.{part}"].float().reshape(*order, *shape[1:])
        for name, value in zip(("to_q", "to_k", "to_v"), rows.unbind(axis), strict=True):
            # copies: safetensors takes no tensors that share their memory
            converted[f"{layer.target}.{name}.{part}"] = value.reshape(shape).clone()
    return converted


def check_target_names(unet: UNet2DModel, converted: Mapping[str, Tensor]) -> None:
    """Raise ValueError, with the list, when the network has other tensors than were converted."""
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    check_shapes({name: tuple(value.shape) for name, value in converted.items()}, expected)


def run(unet: UNet2DModel, state: State) -> Tensor:
    """Return the output of one float32 pass with these weights; the network itself has none, before and after.

    For one image of standard normal noise, 64 pixels a side or as small as the network allows, at the middle time.
    """
    side = max(64, 2 ** (len(unet.config.block_out_channels) - 1))
    x = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    labels = None if unet.config.num_class_embeds is None else torch.zeros(1, dtype=torch.long)
    unet.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    with torch.no_grad():
        output = unet.eval()(x, torch.tensor([500.0]), class_labels=labels).sample
    unet.to("meta")
    return output


# --- files and the command line --------------------------------------------------------------------------------------


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError when the folder holds files and may not be replaced, before anything is read."""
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} already holds files; choose another folder, or replace it with --overwrite")


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the .pt file")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--label", type=int, help="class of a class-conditional network, e.g. 207")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the stored weights")
    parser.add_argument("--config-only", action="store_true", help="no weights: the checkpoint is a published name")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that an earlier conversion made")
    facts = parser.add_argument_group("what shapes cannot tell", "needed for networks that were not published")
    facts.add_argument("--heads", type=int, help="number of attention heads (num_heads)")
    facts.add_argument("--head-width", type=int, help="channels of a head (num_head_channels)")
    facts.add_argument("--qkv-order", choices=("legacy", "new"), help="new: use_new_attention_order=True")
    facts.add_argument("--dropout", type=float, help="rate in training")
    facts.add_argument("--schedule", choices=("linear", "cosine"), help="noise_schedule")
    facts.add_argument("--steps", type=int, help="diffusion_steps")
    facts.add_argument("--rescale-timesteps", action=argparse.BooleanOptionalAction, help="rescale_timesteps")
    facts.add_argument("--prediction", choices=("epsilon", "sample"), help="sample: predict_xstart=True")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert one checkpoint."""
    options = parser().parse_args(arguments)
    if options.config_only:
        write_config(options.checkpoint.name, options.folder, options.overwrite)
        print(f"written      {options.folder}")
        return
    given = {field.name: getattr(options, field.name) for field in fields(Facts)}
    done = convert(options.checkpoint, options.folder, given, DTYPES[options.dtype], options.label, options.overwrite)
    print(f"recognised   {done.recognised or 'no published network: the options were used'}")
    print(f"parameters   {done.parameters:,}")
    if done.rounding is not None:
        print(f"rounding     max |change| / std of one output: {done.rounding:.2e} ({options.dtype})")
    print(f"fingerprint  {done.fingerprint or f'depends on the class: write {LABEL!r} into {SCHEDULER_FILE}'}")
    print(f"written      {done.folder}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
