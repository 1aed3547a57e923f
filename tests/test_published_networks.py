"""The converter knows the published networks: their options, widths, heads and numbers of parameters."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from tiny_adm import (
    FACTS,
    PUBLISHED,
    SMALL,
    Architecture,
    adm_architecture,
    convert_prior,
    expected_shapes,
    read_architecture,
    save,
    small_state,
)

from ud2m.priors.adm import AdmUNet2DModel
from ud2m.priors.prior import LoraSpec
from ud2m.priors.schedule import VPSchedule

ADM_FLAGS = "--diffusion_steps 1000 --learn_sigma True --resblock_updown True --use_scale_shift_norm True"
ADM_256_FLAGS = f"{ADM_FLAGS} --attention_resolutions 32,16,8 --image_size 256 --num_channels 256 --num_res_blocks 2"
LSUN_FLAGS = f"{ADM_256_FLAGS} --num_head_channels 64 --noise_schedule linear"
P2_FLAGS = (
    f"{ADM_FLAGS} --attention_resolutions 16 --image_size 256 --noise_schedule linear --num_channels 128 "
    "--num_head_channels 64 --num_res_blocks 1"
)
IMPROVED = (
    "--num_heads 4 --attention_resolutions 16,8 --use_scale_shift_norm True --rescale_timesteps True "
    "--learn_sigma True --num_res_blocks 3"
)
IMPROVED_64 = f"{IMPROVED} --image_size 64 --diffusion_steps 4000 --noise_schedule cosine"
IMPROVED_LSUN = (
    f"{IMPROVED} --image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --use_scale_shift_norm False "
    "--attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear --rescale_timesteps False"
)
FLAGS = {
    "64x64_diffusion.pt": f"{ADM_FLAGS} --attention_resolutions 32,16,8 --class_cond True --dropout 0.1 "
    "--image_size 64 --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--use_new_attention_order True",
    "128x128_diffusion.pt": f"{ADM_256_FLAGS} --image_size 128 --class_cond True --num_heads 4 --noise_schedule linear",
    "256x256_diffusion.pt": f"{LSUN_FLAGS} --class_cond True",
    "256x256_diffusion_uncond.pt": LSUN_FLAGS,
    "512x512_diffusion.pt": f"{LSUN_FLAGS} --class_cond True --image_size 512",
    "lsun_bedroom.pt": f"{LSUN_FLAGS} --dropout 0.1",
    "lsun_cat.pt": f"{LSUN_FLAGS} --dropout 0.1",
    "lsun_horse.pt": f"{LSUN_FLAGS} --dropout 0.1",
    "lsun_horse_nodropout.pt": LSUN_FLAGS,
    "ffhq_10m.pt": P2_FLAGS,
    "ffhq_baseline.pt": P2_FLAGS,
    "ffhq_p2.pt": P2_FLAGS,
    "imagenet64_uncond_100M_1500K.pt": f"{IMPROVED_64} --num_channels 128",
    "imagenet64_uncond_vlb_100M_1500K.pt": f"{IMPROVED_64} --num_channels 128",
    "imagenet64_cond_270M_250K.pt": f"{IMPROVED_64} --num_channels 192 --class_cond True --rescale_timesteps False",
    "cifar10_uncond_50M_500K.pt": f"{IMPROVED_64} --image_size 32 --num_channels 128 --dropout 0.3",
    "cifar10_uncond_vlb_50M_500K.pt": f"{IMPROVED_64} --image_size 32 --num_channels 128 --dropout 0.3",
    "lsun_uncond_100M_1200K_bs128.pt": IMPROVED_LSUN,
    "lsun_uncond_100M_2400K_bs64.pt": IMPROVED_LSUN,
}
"""Flags of the published commands (READMEs of the repositories), with improved-diffusion's defaults written out."""

MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
MULTIPLIERS[32] = (1, 2, 2, 2)
PARAMETERS = {  # in millions; round numbers are those of the names: 270M, 100M, 50M
    "256x256_diffusion_uncond.pt": (552.8, 0.05),
    "64x64_diffusion.pt": (295.9, 0.05),
    "ffhq_10m.pt": (93.6, 0.05),
    "imagenet64_cond_270M_250K.pt": (270, 5),
    "imagenet64_uncond_100M_1500K.pt": (120, 20),
    "cifar10_uncond_50M_500K.pt": (50, 5),
    "lsun_uncond_100M_1200K_bs128.pt": (110, 10),
}
LORA = {"256x256_diffusion_uncond.pt": 566_790, "64x64_diffusion.pt": 524_934, "ffhq_10m.pt": 88_838}
"""Trainable parameters of the paper's adapter and the output convolution."""


def described(flags):
    """Return (architecture, facts, image size) of a training command."""
    words = flags.split()
    flag = dict(zip(words[::2], words[1::2], strict=True))  # the last of equal flags counts
    size, channels = int(flag["--image_size"]), int(flag["--num_channels"])
    multipliers = MULTIPLIERS[size]
    places = {size // int(resolution) for resolution in flag["--attention_resolutions"].split(",")}

    def true(name):
        return flag.get(name) == "True"

    architecture = Architecture(
        in_channels=3,
        out_channels=6 if true("--learn_sigma") else 3,
        model_channels=channels,
        widths=tuple(int(multiplier * channels) for multiplier in multipliers),
        num_res_blocks=int(flag["--num_res_blocks"]),
        attention=tuple(2**level in places for level in range(len(multipliers))),
        residual_resampling=true("--resblock_updown"),
        scale_shift=true("--use_scale_shift_norm"),
        num_classes=1000 if true("--class_cond") else None,
    )
    width = flag.get("--num_head_channels")
    facts = adm_architecture.Facts(
        heads=int(flag["--num_heads"]) if width is None else None,
        head_width=None if width is None else int(width),
        qkv_order="new" if true("--use_new_attention_order") else "legacy",
        dropout=float(flag.get("--dropout", 0)),
        schedule=flag["--noise_schedule"],
        steps=int(flag["--diffusion_steps"]),
        rescale_timesteps=true("--rescale_timesteps"),
        prediction="epsilon",
    )
    return architecture, facts, size


def on_meta(entry):
    with torch.device("meta"):
        return convert_prior.build(entry.architecture, entry.facts, entry.image_size)


def test_the_table_says_what_the_published_commands_say():
    assert {file for entry in PUBLISHED for file in entry.files} == set(FLAGS)
    for file, flags in FLAGS.items():
        (entry,) = (entry for entry in PUBLISHED if file in entry.files)
        assert (entry.architecture, entry.facts, entry.image_size) == described(flags), file


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.files[0])
def test_published_networks_are_recognised_and_built(entry):
    shapes = expected_shapes(entry.architecture)
    assert read_architecture(shapes) == entry.architecture
    for file in entry.files:
        assert adm_architecture.recognise(read_architecture(shapes), file) is entry
    renamed = adm_architecture.recognise(read_architecture(shapes), "model.pt")
    assert replace(renamed.facts, dropout=0.0) == replace(entry.facts, dropout=0.0)  # a frozen network has no dropout
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted = convert_prior.convert_state(state, entry.architecture, entry.facts)
    unet = on_meta(entry)
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in unet.state_dict().items()
    }
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == sum(math.prod(shape) for shape in shapes.values())
    if entry.files[0] in PARAMETERS:
        expected, tolerance = PARAMETERS[entry.files[0]]
        assert count / 1e6 == pytest.approx(expected, abs=tolerance)
    if entry.files[0] in LORA:
        adapted = [m for name, m in unet.named_modules() if name.endswith(LoraSpec().targets)]
        trained = sum(LoraSpec().rank * (m.in_features + m.out_features) for m in adapted)
        assert trained + sum(p.numel() for p in unet.conv_out.parameters()) == LORA[entry.files[0]]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("256x256_diffusion_uncond.pt", UNet2DModel),
        ("64x64_diffusion.pt", UNet2DModel),
        ("ffhq_10m.pt", UNet2DModel),
        ("lsun_uncond_100M_1200K_bs128.pt", UNet2DModel),
        ("128x128_diffusion.pt", AdmUNet2DModel),
        ("512x512_diffusion.pt", AdmUNet2DModel),
        ("imagenet64_uncond_100M_1500K.pt", AdmUNet2DModel),
        ("cifar10_uncond_50M_500K.pt", AdmUNet2DModel),
    ],
)
def test_heads_of_published_networks(file, kind):
    (entry,) = (entry for entry in PUBLISHED if file in entry.files)
    unet = on_meta(entry)
    assert type(unet) is kind
    layers = [module for module in unet.modules() if type(module).__name__ == "Attention"]
    assert layers
    for layer in layers:
        heads = entry.facts.heads or layer.inner_dim // 64
        assert layer.heads == heads
        assert layer.scale == pytest.approx((layer.inner_dim / heads) ** -0.5)
        assert layer.group_norm.eps == 1e-5


def test_a_recognised_checkpoint_needs_no_options_and_options_come_first(tmp_path, monkeypatch):
    entry = adm_architecture.Published(("small.pt",), SMALL, convert_prior.Facts(**FACTS), 16)
    monkeypatch.setattr(adm_architecture, "PUBLISHED", (entry,))
    path = save(small_state(), tmp_path / "renamed.pt")
    done = convert_prior.convert(path, tmp_path / "a")
    assert done.recognised == "small.pt"
    assert json.loads((tmp_path / "a" / "config.json").read_text())["sample_size"] == 16
    convert_prior.convert(path, tmp_path / "b", {"schedule": "cosine", "heads": 4})
    config = json.loads((tmp_path / "b" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "squaredcos_cap_v2"
    assert VPSchedule.from_config(config).num_times == 1000
