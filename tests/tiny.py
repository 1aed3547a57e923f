"""A micro prior with random weights (seconds to build, milliseconds to run), and what tests do with it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from ud2m.priors.adm import build_unet
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.priors.schedule import VPSchedule
from ud2m.priors.store import save_prior
from ud2m.unfolded.network import UnfoldedNetwork, build_network

SIZE = 16
"""Side of the images; the operators' kernels (up to 16x16 taps) just fit."""

ARCHITECTURE: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
LORA = {"rank": 2, "alpha": 4.0, "targets": ("to_q", "to_k", "to_v", "to_out.0", "conv1"), "output_conv": True}
SPECS: dict[str, Mapping[str, Any]] = {
    "annealed": {"name": "annealed", "tau_max": 0.4, "floor": 3.0, "width": 1.0, "closing": 0.3},
    "paper": {"name": "paper"},
    "pinv": {"name": "pinv"},
    "smoothing": {"name": "smoothing", "scales": [8, 4, 2], "deviation": 0.1},
}


def tiny_unet(seed: int = 0, **overrides: Any) -> UNet2DModel:
    """Return the network with weights that depend on the seed alone; overrides of ``ARCHITECTURE``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_unet(ARCHITECTURE | overrides)


def tiny_prior(seed: int = 0, prediction: str = "epsilon", **overrides: Any) -> Prior:
    """Return the prior in memory; overrides of ``ARCHITECTURE``."""
    return Prior(tiny_unet(seed, **overrides), VPSchedule.from_config(SCHEDULER), prediction)


def save_tiny_prior(folder: Path, seed: int = 0, scheduler: Mapping[str, Any] = SCHEDULER, **overrides: Any) -> str:
    """Write the prior as a diffusers folder (fp16, as shipped) and return its path."""
    save_prior(tiny_unet(seed, **overrides), dict(scheduler), folder)
    return str(folder)


def perturb(parameters: Iterable[nn.Parameter], scale: float = 0.1, seed: int = 1) -> None:
    """Move parameters at random, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def tiny_network(
    prior: nn.Module, num_blocks: int = 3, rule: str = "annealed", warm_start: str = "smoothing"
) -> UnfoldedNetwork:
    """Return an unfolded network of named parts."""
    return build_network(prior, {"num_blocks": num_blocks, "rule": SPECS[rule], "warm_start": SPECS[warm_start]})


def adapted(prior: Prior, scale: float = 0.1, **overrides: Any) -> Prior:
    """Put LoRA on a prior and perturb it as training does."""
    prior.add_lora(LoraSpec(**(LORA | overrides)))
    perturb(trained(prior).values(), scale)
    return prior
