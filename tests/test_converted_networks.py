"""Converted networks compute what the published code computes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from adm import Reference, gaussian, weights
from diffusers import UNet2DModel
from tiny_adm import (
    FACTS,
    GIVEN,
    SMALL,
    convert_prior,
    deviation,
    expected_shapes,
    read_architecture,
    save,
    small_state,
)

from ud2m.priors.adm import AdmUNet2DModel
from ud2m.priors.prior import Prior

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
