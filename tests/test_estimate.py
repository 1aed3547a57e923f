"""estimate=true: parameters, operations and memory against counts of another kind."""

import json
import sys

import pytest
import torch
from conftest import REPOSITORY
from diffusers.models.attention_processor import Attention
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import SIZE, save_tiny_prior
from tiny_training import command_line, composed
from torch.nn.attention import SDPBackend, sdpa_kernel

from ud2m.cli.estimate import estimate
from ud2m.priors.prior import Prior
from ud2m.priors.shipped import ARCHITECTURES
from ud2m.priors.store import fingerprint
from ud2m.training.cost import Estimate

BATCH = 6
TINY = [
    "network=paper",
    "network.num_blocks=1",
    "lora=paper",
    f"data.crop_size={SIZE}",
    f"data.batch_size={BATCH}",
    "accumulate=2",
    "trainer.devices=3",
    "device_tflops=0.5",
    "loss.energy=0",
    "loss.l2=1",
    "training.validation.lpips=null",
]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return save_tiny_prior(tmp_path_factory.mktemp("prior") / "tiny")


def estimated(*overrides, folder):
    with composed(*overrides, folder=folder) as config:
        return estimate(config)


class Counted:
    """Multiplications and additions of every layer that is evaluated, by its shapes; forward and backward.

    Backward, a layer computes the gradient of its input, and where it is trained also that of its weights.
    """

    def __init__(self, module):
        self.total = 0
        for layer in module.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                layer.register_forward_hook(self.layer)
            elif isinstance(layer, Attention):
                layer.register_forward_hook(self.attention)

    def layer(self, layer, inputs, output):
        per_output = layer.weight[0].numel()
        passes = 2 + layer.weight.requires_grad
        self.total += passes * 2 * per_output * output.numel()

    def attention(self, layer, inputs, output):
        batch, channels, height, width = output.shape
        # q k^T and its product with v; the gradients of both factors of both
        self.total += 3 * 2 * 2 * batch * channels * (height * width) ** 2


def one_image(folder, *overrides):
    """Return a real module and what one step on one image computes and keeps."""
    with composed(*overrides, folder=folder) as config:
        config.physics.operator = OmegaConf.create({"_target_": "ud2m.physics.Denoising"})
        module = instantiate(config.training, _convert_="all")
    counted = Counted(module)
    kept = []
    for images in (1, 2):
        x0 = torch.rand(images, 3, SIZE, SIZE)
        with sdpa_kernel(SDPBackend.MATH):  # attention in parts, as on the meta device, keeps a little more than in one
            total, _ = module.losses(x0, [torch.Generator().manual_seed(k) for k in range(images)])
        kept.append(saved_bytes(total.grad_fn, module))
        if images == 1:
            flops = counted.total
    return module, flops, kept[1] - kept[0]


def saved_bytes(node, module):
    """Return the bytes that a graph holds, by walking it."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    seen, waiting, sizes = set(), [node], {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        for name in dir(node):
            if name.startswith("_saved_"):
                values = getattr(node, name)
                for value in values if isinstance(values, tuple | list) else [values]:
                    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in own:
                        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(sizes.values())


def test_operations_and_memory_are_those_of_a_real_step(prior, tmp_path):
    overrides = [*TINY, f"prior={prior}", "network.num_blocks=2"]
    module, flops, kept = one_image(tmp_path, *overrides)
    found = estimated(*overrides, folder=tmp_path)
    assert found.flops == flops
    assert found.activations == pytest.approx(kept, rel=0.01)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert (found.trained, found.discriminator) == (trained, 0)
    assert found.frozen == sum(p.numel() for p in Prior.from_pretrained(prior).parameters())
    assert found.communicated == 4 * trained


def test_time_and_memory_of_a_device_follow():
    found = Estimate(
        frozen=1000,
        trained=100,
        discriminator=10,
        flops=6e9,
        flops_recomputing=9e9,
        activations=5000.0,
        activations_recomputing=2000.0,
        batch=12,
        devices=3,
        tflops=0.5,
    )
    assert found.seconds() == pytest.approx(1000 * 12 * 6e9 / (3 * 0.5e12))
    assert found.seconds(recomputing=True) == pytest.approx(1.5 * found.seconds())
    assert found.memory() == 4 * (1000 + 5 * 110) + 5000 * 4
    assert found.memory(recomputing=True) == 4 * (1000 + 5 * 110) + 2000 * 4
    assert found.communicated == 440


def test_a_step_holds_all_batches_and_all_outputs(prior, tmp_path):
    one = estimated(*TINY, f"prior={prior}", folder=tmp_path)
    two = estimated(*TINY, f"prior={prior}", "loss.energy=1", folder=tmp_path)
    assert (one.batch, one.devices, one.tflops) == (2 * BATCH, 3, 0.5)
    assert two.flops == 2 * one.flops  # two outputs per image, each a forward and a backward pass
    assert two.flops_recomputing == 2 * one.flops_recomputing


def test_computing_again_costs_a_forward_pass_and_keeps_one_evaluation(prior, tmp_path):
    found = {k: estimated(*TINY, f"prior={prior}", f"network.num_blocks={k}", folder=tmp_path) for k in (1, 4)}
    assert found[1].flops < found[1].flops_recomputing < 1.6 * found[1].flops
    assert found[4].activations > 3.5 * found[1].activations
    assert found[4].activations_recomputing < 1.25 * found[1].activations_recomputing


def test_the_discriminator_and_a_network_as_start_are_counted(prior, tmp_path):
    plain = estimated(*TINY, f"prior={prior}", "data.crop_size=32", folder=tmp_path)
    judged = estimated(*TINY, f"prior={prior}", "data.crop_size=32", "loss.adversarial=1", folder=tmp_path)
    started = estimated(*TINY, f"prior={prior}", "data.crop_size=32", "network=learned", folder=tmp_path)
    widths = (6, 16, 32, 64)
    kernels = (9, 16, 16)
    expected = sum(k * a * b + b for k, a, b in zip(kernels, widths, widths[1:], strict=False)) + 9 * 64 + 1
    assert judged.discriminator == expected
    assert judged.flops > plain.flops
    assert started.trained > plain.trained
    assert started.flops > plain.flops


@pytest.mark.slow
def test_the_network_of_the_paper(tmp_path):
    found = estimated("experiment=imagenet256", folder=tmp_path)
    assert found.frozen == 552_814_086
    assert found.trained == 566_790 + 9  # psi: delta, tau and lambda of three modules
    forward = (found.flops_recomputing - found.flops) / 3
    assert forward == pytest.approx(2 * 1120e9, rel=0.01)  # 1120 GMACs: Peebles and Xie, 2023, table 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "physics", "settings"),
    [
        ("imagenet256", "super_resolution", "paper_ram"),
        ("ffhq256", "gaussian_blur", "paper"),
        ("lsun_bedroom256", "inpainting", "energy"),
    ],
)
def test_experiments_are_estimated_without_any_weights(experiment, physics, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # LPIPS has none either
    chosen = [f"experiment={experiment}", f"physics={physics}", f"settings={settings}"]
    found = estimated(*chosen, "data.crop_size=64", folder=tmp_path)
    adapter = 88_838 if experiment.startswith("ffhq") else 566_790
    assert found.trained >= adapter + 9
    assert found.activations > found.activations_recomputing > 0


def test_the_command_prints_the_table_and_leaves_nothing(prior, tmp_path, capsys):
    run = tmp_path / "run"
    assert command_line("experiment=demo", *TINY, f"prior={prior}", "estimate=true", f"run_dir={run}") == 0
    printed = capsys.readouterr().out
    for words in ("parameters, frozen", "FLOPs per step", "activations per image", "time per 1000 steps", "gradients"):
        assert words in printed
    assert not run.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=photos_prior"], "of experiments that distil a prior"),
        (["device_tflops=0"], "device_tflops, TFLOP/s that a device reaches, must be positive, got 0"),
        (["data.batch_size=0"], r"data\.batch_size must be an integer of at least 1, got 0"),
        (["architecture=/nowhere/at/all"], "no prior at '/nowhere/at/all'"),
    ],
)
def test_what_cannot_be_estimated_is_refused(overrides, message, tmp_path):
    with pytest.raises(Exception, match=message):
        estimated(*overrides, folder=tmp_path)


@pytest.mark.parametrize("path", sorted(ARCHITECTURES.iterdir()), ids=lambda path: path.name)
def test_architectures_are_those_that_the_converter_writes(path, tmp_path):
    sys.path.insert(0, str(REPOSITORY / "data_prep"))
    import convert_prior

    files = {
        "imagenet256": "256x256_diffusion_uncond.pt",
        "lsun_bedroom256": "lsun_bedroom.pt",
        "ffhq256": "ffhq_10m.pt",
    }
    convert_prior.main([files[path.name], str(tmp_path / "made"), "--config-only"])
    for name in ("config.json", "scheduler_config.json"):
        made, there = (json.loads((folder / name).read_text()) for folder in (tmp_path / "made", path))
        made.pop("_diffusers_version", None), there.pop("_diffusers_version", None)
        assert made == there
    with pytest.raises(ValueError, match=r"mine\.pt is no published network"):
        convert_prior.main(["mine.pt", str(tmp_path / "other"), "--config-only"])


def test_a_prior_on_the_meta_device_has_shapes_alone(prior):
    with torch.device("meta"):
        shapes = Prior.from_pretrained(prior)
    real = Prior.from_pretrained(prior)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in shapes.parameters())
    assert shapes.fingerprint == ""
    assert real.fingerprint == fingerprint(real.unet, real.schedule)
    torch.testing.assert_close(shapes.schedule.log_sigmas, real.schedule.log_sigmas)
