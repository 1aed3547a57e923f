"""The converter of guided-diffusion and improved-diffusion checkpoints, and what priors need for them."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from adm import Reference, gaussian, weights
from conftest import REPOSITORY
from diffusers import UNet2DModel
from safetensors.torch import load_file

from ud2m.priors.adm import AdmUNet2DModel
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.priors.schedule import VPSchedule

sys.path.insert(0, str(REPOSITORY / "data_prep"))
convert_prior = importlib.import_module("convert_prior")
adm_architecture = importlib.import_module("adm_architecture")
Architecture, PUBLISHED = adm_architecture.Architecture, adm_architecture.PUBLISHED
expected_shapes, read_architecture = adm_architecture.expected_shapes, adm_architecture.read_architecture

WEIGHTS = "diffusion_pytorch_model.safetensors"
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


def small_state(architecture=SMALL):
    return weights(expected_shapes(architecture))


def save(state, path):
    torch.save(state, path)
    return path


def deviation(found, expected):
    """max |difference| / std, the measure of the reference outputs."""
    return ((found - expected).abs().max() / expected.std()).item()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(small_state(), tmp_path_factory.mktemp("checkpoint") / "small.pt")


# --- the outputs of the published code -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["micro16", "small32", "small32_legacy_a", "small32_legacy_b"])
def published_code(request, shared, tmp_path_factory):
    """(description, arrays, weights, converted folder) of one network with known outputs."""
    spec = json.loads((shared / "adm" / f"{request.param}.json").read_text())
    with np.load(shared / "adm" / f"{request.param}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    state = weights(dict(spec["keys"]))
    folder = tmp_path_factory.mktemp(request.param)
    flags = spec["flags"]
    width = flags["num_head_channels"]
    given = GIVEN | {
        "heads": flags["num_heads"] if width == -1 else None,
        "head_width": None if width == -1 else width,
        "qkv_order": "new" if flags["use_new_attention_order"] else "legacy",
    }
    convert_prior.convert(save(state, folder / "checkpoint.pt"), folder / "prior", given)
    return spec, arrays, state, folder / "prior", given


@pytest.mark.parametrize("times", ["", "_fractional", "_zero"])
def test_the_outputs_are_those_of_the_published_code(published_code, times):
    _, arrays, _, folder, _ = published_code
    unet = Prior.from_pretrained(folder).unet
    x, t = arrays["x"], arrays["timesteps" + times]
    with torch.no_grad():
        single = unet(x, t).sample
        double = unet.double()(x.double(), t).sample
    assert deviation(single, arrays["output" + times]) < 1e-4
    # away from t = 0 the embedding depends on how float32 rounds exp, sin and cos
    assert deviation(double, arrays[f"output{times}_float64"]) < (1e-9 if times == "_zero" else 1e-4)


def test_the_tensors_are_those_of_the_published_code(published_code):
    spec, _, _, _, _ = published_code
    found = read_architecture(dict(spec["keys"]))
    assert [[name, list(shape)] for name, shape in expected_shapes(found).items()] == spec["keys"]
    resolved = spec["resolved"]
    assert (found.model_channels, found.num_res_blocks) == (resolved["model_channels"], resolved["num_res_blocks"])
    assert (found.residual_resampling, found.scale_shift) == (
        spec["flags"]["resblock_updown"],
        spec["flags"]["use_scale_shift_norm"],
    )


def test_the_reference_of_these_tests_is_the_published_code(published_code):
    spec, arrays, state, _, given = published_code
    state = {name: value.double() for name, value in state.items()}
    found = Reference(
        state, spec["flags"]["num_res_blocks"], given["heads"], given["head_width"], given["qkv_order"] == "new"
    )(arrays["x"].double(), arrays["timesteps_zero"])
    assert deviation(found, arrays["output_zero_float64"]) < 1e-9


def test_a_wrong_option_would_be_seen(published_code, tmp_path):
    _, arrays, state, _, given = published_code
    other = {"legacy": "new", "new": "legacy"}[given["qkv_order"]]
    wrong = {name: value for name, value in given.items() if not name.startswith("head")} | {"heads": 2}
    for number, options in enumerate([given | {"qkv_order": other}, wrong]):
        folder = tmp_path / str(number)
        convert_prior.convert(save(state, tmp_path / "checkpoint.pt"), folder, options)
        with torch.no_grad():
            output = Prior.from_pretrained(folder).unet(arrays["x"], arrays["timesteps"]).sample
        assert deviation(output, arrays["output"]) > 1e-2


# --- networks beyond these four --------------------------------------------------------------------------------------

THREE_LEVELS = {"widths": (32, 64, 96), "attention": (False, True, True)}
NETWORKS = {
    "class-conditional": (replace(SMALL, num_classes=5), {}, UNet2DModel),
    "new order": (replace(SMALL, num_classes=5, num_res_blocks=3), {"qkv_order": "new"}, UNet2DModel),
    "fixed heads": (replace(SMALL, **THREE_LEVELS, num_classes=5), {"heads": 4}, AdmUNet2DModel),
    "fixed heads, new order": (
        replace(SMALL, **THREE_LEVELS, residual_resampling=False, out_channels=3),
        {"heads": 4, "qkv_order": "new"},
        AdmUNet2DModel,
    ),
    "first multiplier 1/2": (
        replace(SMALL, model_channels=64, widths=(32, 64, 64), attention=(False, False, True), num_classes=5),
        {},
        AdmUNet2DModel,
    ),
    "rescaled times": (
        replace(SMALL, residual_resampling=False),
        {"heads": 4, "schedule": "cosine", "steps": 4000, "rescale_timesteps": True},
        AdmUNet2DModel,
    ),
    "unscaled times": (
        replace(SMALL, attention=(False, False)),
        {"steps": 4000, "rescale_timesteps": False},
        UNet2DModel,
    ),
    "one level": (replace(SMALL, widths=(32,), attention=(True,), num_res_blocks=2), {}, UNet2DModel),
    "grey": (replace(SMALL, in_channels=1, out_channels=2), {}, UNet2DModel),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, tmp_path_factory):
    """(architecture, given, class, state, converted folder) of a network that only this file's reference knows."""
    architecture, changes, kind = NETWORKS[request.param]
    given = {name: value for name, value in GIVEN.items() if name != "head_width" or "heads" not in changes} | changes
    folder = tmp_path_factory.mktemp("network")
    state = small_state(architecture)
    convert_prior.convert(save(state, folder / "checkpoint.pt"), folder / "prior", given)
    return architecture, given, kind, state, folder / "prior"


def reference(network, dtype=torch.float64):
    architecture, given, _, state, _ = network
    state = {name: value.to(dtype) for name, value in state.items()}
    return Reference(
        state, architecture.num_res_blocks, given.get("heads"), given.get("head_width"), given["qkv_order"] == "new"
    )


def test_other_networks_compute_the_same(network):
    architecture, given, kind, _, folder = network
    label = None if architecture.num_classes is None else 3
    unet = Prior.from_pretrained(folder, label).double().unet
    assert type(unet) is kind
    x = torch.from_numpy(gaussian("input", (2, architecture.in_channels, 16, 16))).double()
    labels = None if label is None else torch.tensor([4, 1])
    factor = 1000 / given["steps"] if given.get("rescale_timesteps") else 1
    for t, tolerance in (([0.0, 0.0], 1e-9), ([3.0, 741.0], 1e-4), ([2.5, 740.5], 1e-4)):
        t = torch.tensor(t)
        with torch.no_grad():
            found = unet(x, t, class_labels=labels).sample
        assert deviation(found, reference(network)(x, factor * t, labels)) < tolerance


def test_the_prior_denoises_as_the_reference(network):
    """x0_hat = x_sigma - sigma eps, the variance ignored; the time is that of the noise table of the training."""
    architecture, given, _, _, folder = network
    label = None if architecture.num_classes is None else 2
    prior = Prior.from_pretrained(folder, label).double()
    x = torch.from_numpy(gaussian("image", (2, architecture.in_channels, 16, 16))).double()
    steps = given["steps"]
    if given["schedule"] == "linear":
        betas = np.linspace(0.1 / steps, 20 / steps, steps)
    else:
        signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    t = np.array([17, 600])
    signal = torch.from_numpy(np.cumprod(1 - betas)[t])
    sigma = ((1 - signal) / signal).sqrt() / 2
    factor = 1000 / steps if given.get("rescale_timesteps") else 1
    labels = None if label is None else torch.full((2,), label)
    x_t = signal.sqrt().view(-1, 1, 1, 1) * (2 * x - 1)
    eps = reference(network)(x_t, factor * torch.from_numpy(t), labels)[:, : x.shape[1]]
    with torch.no_grad():
        found = prior(x, sigma)
    assert found.shape == x.shape
    assert deviation(found, x - sigma.view(-1, 1, 1, 1) * eps) < 1e-4


def test_saving_again_keeps_the_network(network, tmp_path):
    architecture, _, kind, _, folder = network
    label = None if architecture.num_classes is None else 0
    first = Prior.from_pretrained(folder, label)
    first.unet.save_pretrained(str(tmp_path))
    (tmp_path / "scheduler_config.json").write_bytes((folder / "scheduler_config.json").read_bytes())
    second = Prior.from_pretrained(tmp_path, label)
    assert type(second.unet) is kind
    assert second.fingerprint == first.fingerprint


def test_what_only_the_subclass_tells_is_in_the_fingerprint(tmp_path):
    state = small_state(replace(SMALL, **THREE_LEVELS))
    path = save(state, tmp_path / "checkpoint.pt")
    options = {name: value for name, value in GIVEN.items() if name != "head_width"} | {"qkv_order": "new"}
    prints = set()
    for heads in (2, 4):
        done = convert_prior.convert(path, tmp_path / str(heads), options | {"heads": heads})
        assert done.fingerprint == Prior.from_pretrained(tmp_path / str(heads)).fingerprint
        prints.add(done.fingerprint)
    assert len(prints) == 2


def test_a_number_of_heads_that_does_not_fit_is_refused_by_the_class():
    with pytest.raises(ValueError, match="64 channels has no 7 heads"):
        AdmUNet2DModel(num_heads=7, **convert_prior.unet_arguments(SMALL, convert_prior.Facts(**FACTS)))


# --- class labels ----------------------------------------------------------------------------------------------------

CONDITIONAL = replace(SMALL, num_classes=5)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    path = save(small_state(CONDITIONAL), folder / "checkpoint.pt")
    convert_prior.convert(path, folder / "open", GIVEN)
    return folder, convert_prior.convert(path, folder / "fixed", GIVEN, label=3)


def test_a_label_is_fixed_in_the_folder_or_given(conditional):
    folder, done = conditional
    x, sigma = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5])
    fixed = Prior.from_pretrained(folder / "fixed")
    given = Prior.from_pretrained(folder / "open", label=3)
    other = Prior.from_pretrained(folder / "fixed", label=4)
    with torch.no_grad():
        assert torch.equal(fixed(x, sigma), given(x, sigma))
        assert deviation(other(x, sigma), fixed(x, sigma)) > 1e-2
    assert done.fingerprint == fixed.fingerprint == given.fingerprint != other.fingerprint


def test_features_see_the_label(conditional):
    folder, _ = conditional
    prior = Prior.from_pretrained(folder / "fixed")
    x, level = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.05])
    caught = []
    prior.unet.down_blocks[-1].attentions[-1].register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        prior(x, level)
        torch.testing.assert_close(prior.features(x, 0.05)[-1], caught[0])
        other = Prior.from_pretrained(folder / "fixed", label=0).features(x, 0.05)[-1]
    assert deviation(other, caught[0]) > 1e-2


def test_an_adapter_keeps_the_label(conditional):
    prior = Prior.from_pretrained(conditional[0] / "fixed")
    x, sigma = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([0.3])
    with torch.no_grad():
        expected, features = prior(x, sigma), prior.features(x)
        prior.add_lora(LoraSpec())
        assert torch.equal(prior(x, sigma), expected)
        assert all(torch.equal(a, b) for a, b in zip(prior.features(x), features, strict=True))


@pytest.mark.parametrize("label", [None, -1, 5, "3", True, 1.0])
def test_a_label_that_is_no_class_is_refused(conditional, label):
    with pytest.raises(ValueError, match="class-conditional and needs a label from 0 to 4"):
        Prior.from_pretrained(conditional[0] / "open", label=label)


def test_a_label_without_classes_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"no class 3 \(--label\); allowed: none, it is not class-conditional"):
        convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN, label=3)
    convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN)
    with pytest.raises(ValueError, match="not class-conditional, but got the label 3"):
        Prior.from_pretrained(tmp_path / "prior", label=3)


def test_a_label_out_of_range_is_refused_by_the_converter(tmp_path):
    path = save(small_state(CONDITIONAL), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"no class 5 \(--label\); allowed: 0 to 4"):
        convert_prior.convert(path, tmp_path / "prior", GIVEN, label=5)


# --- published networks ----------------------------------------------------------------------------------------------

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

FACTS = {"heads": None, "head_width": 16, "rescale_timesteps": False} | {
    name: value for name, value in GIVEN.items() if name != "head_width"
}


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


# --- what is refused -------------------------------------------------------------------------------------------------


def spoilt(how):
    state = small_state()
    if how == "missing":
        del state["input_blocks.3.1.proj_out.bias"], state["out.0.weight"]
    elif how == "left over":
        state |= {"input_blocks.1.1.norm.weight": torch.ones(32), "ema.decay": torch.ones(1)}
    else:
        state["middle_block.1.qkv.bias"] = torch.zeros(64)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing: input_blocks.3.1.proj_out.bias, out.0.weight$"),
        ("left over", r"left over: .*ema\.decay"),
        ("shape", r"of another shape: middle_block\.1\.qkv\.bias \[64\] instead of \[192\]"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        convert_prior.convert(save(spoilt(how), tmp_path / "checkpoint.pt"), tmp_path / "prior", GIVEN)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt"}


@pytest.mark.parametrize("name", list(expected_shapes(SMALL)))
def test_every_missing_tensor_is_named(name):
    shapes = expected_shapes(SMALL)
    del shapes[name]
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert_prior.check_shapes(shapes, expected_shapes(read_architecture(shapes)))


def test_long_lists_are_cut():
    expected = expected_shapes(SMALL)
    with pytest.raises(ValueError, match=rf"time_embed\.0\.weight, .* and {len(expected) - 12} more$"):
        convert_prior.check_shapes({}, expected)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (
            {},
            "--heads or --head-width, --qkv-order, --dropout, --schedule, --steps, --prediction",
        ),
        (GIVEN | {"head_width": None, "dropout": None}, "--heads or --head-width, --dropout"),
        (GIVEN | {"steps": 4000}, "--rescale-timesteps or --no-rescale-timesteps"),
    ],
)
def test_options_are_not_guessed(checkpoint, tmp_path, given, missing):
    with pytest.raises(ValueError, match=rf"no published network.*Missing: {missing}\. "):
        convert_prior.convert(checkpoint, tmp_path / "prior", given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4}, "--heads or --head-width, not both"),
        ({"head_width": 48}, "--head-width 48 does not divide an attention layer of 64 channels"),
        ({"head_width": 0}, "--head-width 0 does not divide"),
        ({"head_width": None, "heads": -2}, "--heads -2 does not divide"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"steps": 1}, "--steps must be at least 2, got 1"),
    ],
)
def test_impossible_options_are_refused(checkpoint, tmp_path, change, message):
    facts = {"rescale_timesteps": False}
    with pytest.raises(ValueError, match=message):
        convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN | facts | change)


def without(state, *starts):
    return {name: value for name, value in state.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: small_state(replace(SMALL, in_channels=6)), "an upsampler"),
        (lambda: small_state(replace(SMALL, out_channels=4)), "maps 3 channels to 4; allowed: 3 or 6"),
        (lambda: without(small_state(), "output_blocks", "out."), "a classifier, perhaps"),
        (lambda: {"a": torch.ones(1), "b": torch.ones(1)}, "begins with a, b"),
        (
            lambda: without(
                small_state(replace(SMALL, residual_resampling=False)), "input_blocks.2", "output_blocks.1.2"
            ),
            r"input_blocks\.2 has no weights.*conv_resample=False",
        ),
        (lambda: without(small_state(), "output_blocks.3"), "are not levels of one length"),
        (lambda: {"state_dict": small_state(), "step": 3}, "state_dict, step are no tensors"),
        (lambda: [torch.ones(1)], "holds a list; a state dict"),
        (lambda: small_state() | {"out.2.bias": torch.full((6,), math.nan)}, r"not finite .*: out\.2\.bias"),
        (lambda: small_state() | {"out.2.bias": torch.ones(6, dtype=torch.int64)}, r"out\.2\.bias"),
        (lambda: small_state() | {"time_embed.0.weight": torch.ones(3)}, r"time_embed\.0\.weight has the shape \[3\]"),
    ],
)
def test_other_files_are_refused(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        convert_prior.convert(save(state(), tmp_path / "checkpoint.pt"), tmp_path / "prior", GIVEN)
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.4, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, share, zipped):
    path = tmp_path / "checkpoint.pt"
    torch.save(small_state(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*truncated, or no file of torch\.save") as error:
        convert_prior.convert(path, tmp_path / "prior", GIVEN)
    assert "\n" not in str(error.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "exploded",))

    path = save({"out.2.bias": Bomb()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        convert_prior.convert(path, tmp_path / "prior", GIVEN)
    assert not (tmp_path / "exploded").exists()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["save_file", "write_json", "load"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path, monkeypatch, moment, error):
    function = getattr(convert_prior, moment)

    def interrupted(*arguments, **options):
        function(*arguments, **options)
        raise error("stop")

    monkeypatch.setattr(convert_prior, moment, interrupted)
    with pytest.raises(error):
        convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_on_request(checkpoint, tmp_path):
    folder = tmp_path / "prior"
    convert_prior.convert(checkpoint, folder, GIVEN)
    before = (folder / "scheduler_config.json").read_text()
    with pytest.raises(FileExistsError, match=r"already holds files; .*--overwrite"):
        convert_prior.convert(checkpoint, folder, GIVEN | {"schedule": "cosine"})
    assert (folder / "scheduler_config.json").read_text() == before
    convert_prior.convert(checkpoint, folder, GIVEN | {"schedule": "cosine"}, overwrite=True)
    assert (folder / "scheduler_config.json").read_text() != before


def test_files_of_old_pytorch_and_half_precision_are_read(checkpoint, tmp_path):
    expected = convert_prior.convert(checkpoint, tmp_path / "a", GIVEN).fingerprint
    path = tmp_path / "old.pt"
    torch.save(small_state(), path, _use_new_zipfile_serialization=False)
    assert convert_prior.convert(path, tmp_path / "b", GIVEN).fingerprint == expected
    halves = {name: value.half() for name, value in small_state().items()}
    convert_prior.convert(save(halves, tmp_path / "half.pt"), tmp_path / "c", GIVEN)
    stored = load_file(tmp_path / "c" / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert torch.equal(stored["conv_in.weight"], halves["input_blocks.0.0.weight"].float())


def test_bfloat16_says_what_it_costs(checkpoint, tmp_path):
    full = convert_prior.convert(checkpoint, tmp_path / "full", GIVEN)
    half = convert_prior.convert(checkpoint, tmp_path / "half", GIVEN, torch.bfloat16)
    assert full.rounding is None
    assert {value.dtype for value in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.bfloat16}
    one, other = (Prior.from_pretrained(folder) for folder in (tmp_path / "full", tmp_path / "half"))
    assert other.fingerprint == half.fingerprint != full.fingerprint
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0])
    with torch.no_grad():
        assert half.rounding == pytest.approx(deviation(other.unet(x, t).sample, one.unet(x, t).sample), rel=1e-3)
    assert 1e-4 < half.rounding < 0.1


def test_a_converted_prior_trains_an_adapter(checkpoint, tmp_path):
    convert_prior.convert(checkpoint, tmp_path / "prior", GIVEN)
    prior = Prior.from_pretrained(tmp_path / "prior").add_lora(LoraSpec())
    x, sigma = torch.rand(1, 3, 16, 16), torch.tensor([0.3], requires_grad=True)
    prior(x, sigma).square().sum().backward()
    assert sigma.grad.abs() > 0
    # B is zero at first, so that only it has a gradient; there are four layers with attention
    trained = [name for name, p in prior.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert sum("to_out" in name for name in trained) == 4


def command_line(*arguments):
    script = [sys.executable, str(REPOSITORY / "data_prep" / "convert_prior.py"), *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.slow
def test_the_command(checkpoint, tmp_path):
    options = "--head-width 16 --qkv-order legacy --dropout 0 --schedule linear --steps 1000 --prediction epsilon"
    done = command_line(checkpoint, tmp_path / "prior", *options.split())
    assert done.returncode == 0, done.stderr
    assert Prior.from_pretrained(tmp_path / "prior").fingerprint in done.stdout
    refused = command_line(tmp_path / "nowhere.pt", tmp_path / "other")
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [f"error: there is no checkpoint {tmp_path}/nowhere.pt; name the .pt file"]


MEMORY = """
import resource, sys
sys.path.insert(0, "data_prep")
import convert_prior
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_prior.main(sys.argv[1:])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_stays_below_twice_the_checkpoint(tmp_path, dtype):
    """At full size, of ffhq_10m: above what the programs themselves take."""
    (entry,) = (entry for entry in PUBLISHED if "ffhq_10m.pt" in entry.files)
    state = {name: torch.full(shape, 0.01) for name, shape in expected_shapes(entry.architecture).items()}
    path = save(state, tmp_path / "ffhq_10m.pt")
    script = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "prior"), "--dtype", dtype]
    done = subprocess.run(script, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2.2 * path.stat().st_size
