import json
import shutil

import peft
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, LORA, SCHEDULER, SIZE, adapted, perturb, save_tiny_prior, tiny_prior, tiny_unet, trained

from ud2m.priors.adm import build_unet
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.priors.schedule import VPSchedule, abar
from ud2m.priors.store import fingerprint

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the prior's folder to damage."""
    return shutil.copytree(saved, tmp_path / "prior")


def images(batch=3, seed=0, dtype=torch.float32, channels=3, size=(SIZE, SIZE)):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SIGMA = torch.tensor([0.02, 0.4, 30.0])


# --- the denoiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("out_channels", [3, 6])
@pytest.mark.parametrize("time", [0, 57, 444, 999])
def test_denoiser_is_the_x0_of_the_scheduler(prediction, out_channels, time):
    prior = tiny_prior(prediction=prediction, out_channels=out_channels).double()
    scheduler = DDPMScheduler.from_config(
        SCHEDULER
        | {"prediction_type": prediction, "clip_sample": False}
        | {"variance_type": "learned" if out_channels == 6 else "fixed_small"}
    )
    x_t = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = prior.unet(x_t, time).sample
        expected = scheduler.step(output, time, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
        t = torch.full((2,), float(time), dtype=torch.float64)
        sigma = prior.schedule.sigma(t)
        x_sigma = (x_t / abar(sigma).sqrt().view(-1, 1, 1, 1) + 1) / 2
        x0_hat = prior(x_sigma, sigma)
    # the scheduler's table is float32, and abar^(-1/2) = 158 at the largest time
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(2 * x0_hat - 1, expected, rtol=0, atol=1e-4 * scale)


def test_each_image_has_its_own_level():
    prior = tiny_prior()
    x = images()
    with torch.no_grad():
        together = prior(x, SIGMA)
        alone = torch.cat([prior(x[i : i + 1], SIGMA[i : i + 1]) for i in range(3)])
        other = prior(x, SIGMA.flip(0))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], other[0], atol=1e-3)


class Sinusoids(torch.nn.Module):
    """Embedding of times in float64: that of diffusers rounds them to float32, too coarse for differences."""

    def __init__(self, channels):
        super().__init__()
        self.frequency = 10_000 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))

    def forward(self, t):
        return torch.cat([(t[:, None] * self.frequency).cos(), (t[:, None] * self.frequency).sin()], dim=1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_reaches_sigma(prediction):
    """Times cast to integers would cut the gradient that a learned level gets through the network."""
    prior = tiny_prior(prediction=prediction).double()
    sinusoids = Sinusoids(8)
    t = torch.tensor([0.0, 20.3, 998.7], dtype=torch.float64)
    torch.testing.assert_close(sinusoids(t), prior.unet.time_proj(t).double(), rtol=0, atol=1e-4)
    prior.unet.time_proj = sinusoids
    x, weight = images(2, 0, torch.float64), images(2, 1, torch.float64)
    sigma = torch.tensor([0.031, 0.52], dtype=torch.float64, requires_grad=True)

    def value(sigma):
        return (weight * prior(x, sigma)).sum()

    (gradient,) = torch.autograd.grad(value(sigma), sigma)
    with torch.no_grad():
        h = 1e-6 * torch.eye(2, dtype=torch.float64)
        expected = torch.stack([(value(sigma + step) - value(sigma - step)) / 2e-6 for step in h])
    assert expected.abs().min() > 0.1
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


def test_the_time_index_alone_carries_a_gradient():
    prior = tiny_prior()
    sigma = torch.tensor([0.31], requires_grad=True)
    output = prior.unet(images(1), prior.schedule.time(sigma)).sample
    (gradient,) = torch.autograd.grad(output.square().sum(), sigma)
    assert gradient.abs() > 1e-4


def test_dropout_stays_off_in_training():
    """Whatever mode the trainer asks for: dropout left on would make the prior another, random one."""
    prior = tiny_prior(dropout=0.5)
    x = images()
    expected = prior(x, SIGMA)
    torch.nn.Sequential(prior).train()
    assert torch.equal(prior(x, SIGMA), expected)
    prior.add_lora(LoraSpec(**LORA))
    torch.nn.Sequential(prior).train()
    assert torch.equal(prior(x, SIGMA), expected)
    prior.unet.train()
    assert not torch.equal(prior(x, SIGMA), expected)  # this network's dropout would show


def test_the_prior_is_frozen():
    assert not trained(tiny_prior())


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_any_size_from_the_stride_on_is_taken(levels):
    kinds = {
        "block_out_channels": [8] * levels,
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
    }
    prior = tiny_prior(**kinds)
    stride = 2 ** (levels - 1)
    for height, width in ((8, 8), (12, 20), (6, 8), (8, 6), (9, 8), (7, 7), (stride, 2 * stride)):
        prior.check_size(height, width)
        x = images(1, size=(height, width))
        assert prior(x, SIGMA[:1]).shape == x.shape
    if stride > 1:
        with pytest.raises(ValueError, match=f"at least {stride} pixels a side, got 8x{stride - 1}"):
            prior.check_size(8, stride - 1)


def test_an_odd_size_is_continued_by_reflection():
    prior, x = tiny_prior(), images(2, size=(9, 15))
    rows, columns = [*range(9), 7], [*range(15), 13]
    reflected = prior(x[:, :, rows][:, :, :, columns], SIGMA[:2])
    torch.testing.assert_close(prior(x, SIGMA[:2]), reflected[:, :, :9, :15])


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 pixels a side, got 0x8"):
        tiny_prior().check_size(0, 8)


@pytest.mark.parametrize("prior", [tiny_prior, lambda: adapted(tiny_prior())], ids=["bare", "adapted"])
def test_features_are_those_inside_the_frozen_network(prior):
    prior = prior()
    frozen = tiny_prior().unet
    caught = []
    for block in frozen.down_blocks:
        layers = getattr(block, "attentions", None) or block.resnets
        layers[-1].register_forward_hook(lambda _, __, output: caught.append(output))
    x, sigma = images(), torch.full((3,), 0.05)
    frozen(abar(sigma).sqrt().view(-1, 1, 1, 1) * (2 * x - 1), prior.schedule.time(sigma))
    features = prior.features(x, sigma=0.05)
    assert [f.shape[1:] for f in features] == [(8, SIZE, SIZE), (16, SIZE // 2, SIZE // 2)]
    for feature, expected in zip(features, caught, strict=True):
        assert torch.equal(feature, expected)


def test_features_are_differentiable_in_the_image():
    x = images(1).requires_grad_()
    sum(f.square().mean() for f in tiny_prior().features(x)).backward()
    assert (x.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_prior(prediction="score"), "unknown prediction type 'score'; allowed: epsilon"),
        (lambda: tiny_prior(out_channels=5), "maps 3 channels to 5; allowed: 3 or 6"),
        (lambda: build_unet(ARCHITECTURE | {"depth": 3}), "diffusers cannot build this UNet2DModel.*depth"),
        (lambda: build_unet(ARCHITECTURE | {"block_out_channels": [8]}), "diffusers cannot build this UNet2DModel"),
        (lambda: LoraSpec(rank=-1), "rank >= 0"),
        (lambda: LoraSpec(alpha=0), "alpha > 0"),
    ],
)
def test_wrong_descriptions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LoraSpec(), LoraSpec(**LORA), LoraSpec(rank=0)])
def test_training_starts_at_the_prior_exactly(spec):
    """With both factors of LoRA random, training would start away from the prior."""
    prior, x = tiny_prior(), images()
    expected = prior(x, SIGMA)
    assert torch.equal(prior.add_lora(spec)(x, SIGMA), expected)


@pytest.mark.parametrize("output_conv", [True, False])
def test_without_adapter_the_network_is_the_prior_bit_for_bit(output_conv):
    prior, x = tiny_prior(), images()
    expected = prior(x, SIGMA)
    adapted(prior, output_conv=output_conv)
    assert not torch.allclose(prior(x, SIGMA), expected, atol=1e-2)
    assert torch.equal(prior.frozen(x, SIGMA), expected)
    assert not torch.allclose(prior(x, SIGMA), expected, atol=1e-2)


def test_training_moves_the_adapter_and_nothing_else():
    prior = tiny_prior().add_lora(LoraSpec(**LORA))
    before = {name: p.clone() for name, p in prior.named_parameters()}
    optimizer = torch.optim.SGD([p for p in prior.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves B alone, the gradient of A being B^T (...) = 0
        optimizer.zero_grad()
        prior(images(), SIGMA).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
    moved = {name for name, p in prior.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained(prior))
    assert all("lora_" in name or "conv_out.modules_to_save" in name for name in moved)
    assert torch.equal(prior.frozen(images(), SIGMA), tiny_prior()(images(), SIGMA))


def test_the_adapter_has_the_rank_scale_and_layers_of_its_spec():
    prior = tiny_prior().add_lora(LoraSpec(rank=3, alpha=1.5, targets=("to_q",), output_conv=False))
    names = set(trained(prior))
    assert all(".to_q.lora_" in name for name in names)
    assert len(names) == 2 * sum(name.endswith("to_q") for name, _ in tiny_unet().named_modules()) > 0
    layer = next(m for m in prior.modules() if isinstance(m, peft.tuners.lora.Linear))
    perturb(trained(prior).values())
    x = torch.randn(4, layer.in_features)
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 0.5 * update)


def test_merging_changes_nothing_but_rounding():
    prior, x = adapted(tiny_prior()), images()
    unmerged = prior(x, SIGMA)
    frozen = prior.frozen(x, SIGMA)
    prior.merge_adapter()
    assert all(layer.merged for layer in prior.modules() if isinstance(layer, peft.tuners.lora.LoraLayer))
    scale = unmerged.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(prior(x, SIGMA) / scale, unmerged / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(prior.frozen(x, SIGMA) / scale, frozen / scale, rtol=0, atol=1e-5)


def test_plain_peft_loads_the_adapter(saved, tmp_path):
    prior = adapted(Prior.from_pretrained(saved))
    prior.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(UNet2DModel.from_pretrained(saved, torch_dtype=torch.float32), tmp_path)
    x, t = images(), torch.tensor([3.0, 500.0, 999.0])
    expected = prior.unet(x, t).sample
    torch.testing.assert_close(theirs.eval()(x, t).sample, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(Prior.from_pretrained(saved).unet(x, t).sample, expected, atol=1e-2)


def test_an_adapter_round_trip_is_exact(saved, tmp_path):
    prior = adapted(Prior.from_pretrained(saved))
    prior.save_adapter(tmp_path)
    loaded = Prior.from_pretrained(saved).load_adapter(tmp_path, prior.lora)
    assert torch.equal(loaded(images(), SIGMA), prior(images(), SIGMA))
    assert loaded.lora == prior.lora


def test_a_prior_without_adapter_has_nothing_to_save(tmp_path):
    prior = tiny_prior().add_lora(LoraSpec(rank=0))
    prior.save_adapter(tmp_path)
    assert not any(tmp_path.iterdir())
    assert torch.equal(prior.merge_adapter()(images(), SIGMA), tiny_prior()(images(), SIGMA))
    tiny_prior().load_adapter(tmp_path, LoraSpec(rank=0))


@pytest.mark.parametrize("change", [{"rank": 3}, {"alpha": 5.0}, {"targets": ("to_q",)}, {"output_conv": False}])
def test_an_adapter_of_another_spec_is_refused(saved, tmp_path, change):
    adapted(Prior.from_pretrained(saved)).save_adapter(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        Prior.from_pretrained(saved).load_adapter(tmp_path, LoraSpec(**(LORA | change)))


def test_a_second_adapter_and_unknown_layers_are_refused():
    prior = tiny_prior().add_lora(LoraSpec(**LORA))
    with pytest.raises(ValueError, match="has an adapter already"):
        prior.add_lora(LoraSpec(**LORA))
    with pytest.raises(ValueError, match=r"no layer to adapt whose name ends with.*to_nowhere"):
        tiny_prior().add_lora(LoraSpec(targets=("to_nowhere",)))


# --- published configurations of diffusers, scaled down ------------------------------------------------------


def ddpm(widths, attention):
    """The configuration of a network of google/ddpm-*, with few channels."""
    kinds = ["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(widths))]
    return {
        "block_out_channels": widths,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "layers_per_block": 2,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "sample_size": 32,
    }


GOOGLE = {
    "ddpm-cifar10-32": ddpm([8, 16, 16, 16], {1}),
    "ddpm-celebahq-256, ddpm-bedroom-256, ddpm-cat-256, ddpm-church-256": ddpm([4, 4, 8, 8, 16, 16], {4}),
}


@pytest.mark.parametrize("name", GOOGLE)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("table", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_networks_of_diffusers_are_served_from_their_folder(name, prediction, table, tmp_path):
    settings = SCHEDULER | {"prediction_type": prediction, "beta_schedule": table, "clip_sample": False}
    network = tiny_unet(**GOOGLE[name])
    network.save_pretrained(tmp_path)
    scheduler = DDPMScheduler.from_config(settings)
    scheduler.save_pretrained(tmp_path)
    prior = Prior.from_pretrained(tmp_path)
    x_t = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([300.0])
    with torch.no_grad():
        output = network.eval()(x_t, t).sample
        expected = scheduler.step(output, 300, x_t).pred_original_sample
        sigma = prior.schedule.sigma(t)
        x0_hat = prior((x_t / abar(sigma).sqrt().view(-1, 1, 1, 1) + 1) / 2, sigma)
    torch.testing.assert_close(2 * x0_hat - 1, expected, rtol=1e-3, atol=1e-3)
    assert prior.add_lora(LoraSpec()).lora.rank == 5  # there are layers of these names


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_saved_prior_is_the_same_denoiser(tmp_path, prediction):
    scheduler = SCHEDULER | {"prediction_type": prediction, "beta_schedule": "scaled_linear"}
    folder = save_tiny_prior(tmp_path / "prior", scheduler=scheduler)
    unet = tiny_unet().half().float()
    expected = Prior(unet, VPSchedule.from_config(scheduler), prediction)
    loaded = Prior.from_pretrained(folder)
    assert torch.equal(loaded(images(), SIGMA), expected(images(), SIGMA))
    assert loaded.reference == folder
    assert next(loaded.parameters()).dtype == torch.float32


def test_saving_leaves_the_network_as_it_was(tmp_path):
    prior = tiny_prior()
    save_tiny_prior(tmp_path / "prior")
    assert next(prior.parameters()).dtype == torch.float32


def tiny_fingerprint() -> str:
    """The fingerprint of the micro prior as it is stored, in half precision."""
    return fingerprint(tiny_unet().half(), VPSchedule.from_config(SCHEDULER))


def test_what_shapes_do_not_tell_changes_the_fingerprint():
    unet, other_heads = tiny_unet(), tiny_unet(attention_head_dim=4)
    linear, cosine = (
        VPSchedule.from_config(SCHEDULER | {"beta_schedule": name}) for name in ("linear", "squaredcos_cap_v2")
    )
    prints = {
        fingerprint(unet, linear),
        fingerprint(unet, cosine),
        fingerprint(unet, linear, "v_prediction"),
        fingerprint(other_heads, linear),
    }
    assert len(prints) == 4


def test_any_weight_changes_the_fingerprint():
    unet = tiny_unet()
    seen = {fingerprint(unet, VPSchedule.from_config(SCHEDULER))}
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.view(-1)[-1] += 1e-6
            seen.add(fingerprint(unet, VPSchedule.from_config(SCHEDULER)))
    assert len(seen) == 1 + len(list(unet.parameters()))


def test_the_fingerprint_is_that_of_the_values_wherever_they_lie(saved, folder):
    first, moved = Prior.from_pretrained(saved), Prior.from_pretrained(folder)
    assert first.fingerprint == moved.fingerprint == tiny_fingerprint()
    assert first.fingerprint != tiny_prior(seed=1).fingerprint
    # made of the frozen network: an adapter does not change it
    assert adapted(moved).fingerprint == first.fingerprint


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prior at .*nowhere"):
        Prior.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["config.json", "scheduler_config.json"])
def test_missing_and_damaged_json_is_reported(folder, file):
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=rf"{file} is truncated or not valid JSON"):
        Prior.from_pretrained(folder)
    (folder / file).write_text("[1]")
    with pytest.raises(ValueError, match=rf"{file} must hold a JSON object"):
        Prior.from_pretrained(folder)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}; is it a folder of diffusers"):
        Prior.from_pretrained(folder)


def test_another_class_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="holds a 'UNet2DConditionModel'; a UNet2DModel is needed"):
        Prior.from_pretrained(folder)


def test_unknown_noise_tables_and_predictions_are_refused(folder):
    for change, message in (({"beta_schedule": "odd"}, "cannot be made: odd"), ({"prediction_type": "flow"}, "'flow'")):
        (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | change))
        with pytest.raises(ValueError, match=message):
            Prior.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_weights_are_reported(folder, share):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"cannot load the weights of {folder}"):
        Prior.from_pretrained(folder)


def test_missing_weights_are_reported(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"{folder}"):
        Prior.from_pretrained(folder)


def spoilt(weights, how):
    name = "conv_in.bias"
    value = weights.pop(name)
    changes = {"missing": {}, "shape": {name: value[:-1]}, "unknown": {name: value, "more.bias": value.clone()}}
    return weights | changes[how]


@pytest.mark.parametrize("how", ["missing", "shape", "unknown"])
def test_weights_that_do_not_fit_the_network_are_reported(folder, how):
    """diffusers initialises missing tensors at random with no more than a warning."""
    save_file(spoilt(load_file(folder / WEIGHTS), how), folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"weights of {folder}(?s:.*)(conv_in|more)\.bias"):
        Prior.from_pretrained(folder)


def test_checkpoints_with_the_old_names_of_attention_layers_fit(folder):
    """As of google/ddpm-cifar10-32 and its like."""
    weights = load_file(folder / WEIGHTS)
    for new, old in {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}.items():
        weights = {name.replace(new, old): value for name, value in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, folder / WEIGHTS)
    assert Prior.from_pretrained(folder).fingerprint == tiny_fingerprint()


def test_weights_in_a_pickle_run_no_code(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "exploded",))

    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.bias": Bomb()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises((ValueError, FileNotFoundError)):
        Prior.from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()
