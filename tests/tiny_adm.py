"""A small network of guided-diffusion: its checkpoint, the options that describe it, and the converter."""

import importlib
import sys

import torch
from adm import weights
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "data_prep"))
convert_prior = importlib.import_module("convert_prior")
adm_architecture = importlib.import_module("adm_architecture")
Architecture, PUBLISHED = adm_architecture.Architecture, adm_architecture.PUBLISHED
expected_shapes, read_architecture = adm_architecture.expected_shapes, adm_architecture.read_architecture

GIVEN = {
    "head_width": 16,
    "qkv_order": "legacy",
    "dropout": 0.0,
    "schedule": "linear",
    "steps": 1000,
    "prediction": "epsilon",
}
SMALL = Architecture(
    in_channels=3,
    out_channels=6,
    model_channels=32,
    widths=(32, 64),
    num_res_blocks=1,
    attention=(False, True),
    residual_resampling=True,
    scale_shift=True,
    num_classes=None,
)
FACTS = {"heads": None, "head_width": 16, "rescale_timesteps": False} | {
    name: value for name, value in GIVEN.items() if name != "head_width"
}


def small_state(architecture=SMALL):
    return weights(expected_shapes(architecture))


def save(state, path):
    torch.save(state, path)
    return path


def deviation(found, expected):
    """max |difference| / std, the measure of the reference outputs."""
    return ((found - expected).abs().max() / expected.std()).item()
