"""estimate=true: parameters, operations and memory against counts of another kind."""

import importlib
import json
import re
import sys

import pytest
import torch
from conftest import REPOSITORY
from diffusers.models.attention_processor import Attention
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import SIZE, save_tiny_prior
from tiny_training import command_line, composed
from torch import nn

from ud2m.cli.estimate import estimate
from ud2m.priors.prior import Prior
from ud2m.priors.shipped import ARCHITECTURES
from ud2m.priors.store import fingerprint
from ud2m.training.cost import ADVICE, Counter, Estimate, as_on_a_gpu, duration

sys.path[:0] = [str(REPOSITORY / "benchmarks")]
memory = importlib.import_module("memory")

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
    "trainer.precision=32-true",
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
        # q k^T and its product with v; the gradients of both factors of both, for which q k^T is computed again
        self.total += 7 * 2 * batch * channels * (height * width) ** 2


def one_step(module, images):
    """Run a real step."""
    total, _ = module.losses(
        torch.rand(images, 3, SIZE, SIZE), [torch.Generator().manual_seed(k) for k in range(images)]
    )
    total.backward()
    module.zero_grad(set_to_none=True)


def real(folder, *overrides):
    """Return a real module, what one step on one image computes, and what each further image makes a step hold."""
    with composed(*overrides, folder=folder) as config:
        config.physics.operator = OmegaConf.create({"_target_": "ud2m.physics.Denoising"})
        module = instantiate(config.training, _convert_="all")
    counted = Counted(module)
    one_step(module, 1)
    flops = counted.total
    one, three = (memory.peak(lambda count=count: one_step(module, count)) for count in (1, 3))
    return module, flops, (three - one) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "excess"), [("none", 0.05), ("all", 0.4)])
def test_operations_and_memory_are_those_of_a_real_step(checkpointing, excess, prior, tmp_path):
    """The fewer activations are kept, the more do the gradients weigh, which the estimate sums up in new memory."""
    overrides = [*TINY, f"prior={prior}", "network.num_blocks=3", f"training.checkpointing={checkpointing}"]
    module, flops, held = real(tmp_path, *overrides)
    found = estimated(*overrides, folder=tmp_path)
    # layers that are evaluated again are seen again by the hooks, which also count a backward pass with them
    assert found.flops == flops if checkpointing == "none" else found.flops < flops
    assert 0.98 * held < found.activations < (1 + excess) * held
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert (found.trained, found.discriminator) == (trained, 0)
    assert found.frozen == sum(p.numel() for p in Prior.from_pretrained(prior).parameters())
    assert found.communicated == 4 * trained


@pytest.mark.parametrize(("dtype", "bytes_per_number"), [(None, 12), (torch.bfloat16, 8)])
def test_memory_under_autocast_is_that_of_a_gpu(dtype, bytes_per_number):
    """Normalisation takes and gives float32, and so does what follows it; the convolution keeps its input in less."""
    with torch.device("meta"):
        network = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)).requires_grad_(False)
        x = torch.empty(64, 8, 32, 32, requires_grad=True)
    with Counter() as counter, as_on_a_gpu(network, dtype):
        y = network(x)
    assert y.dtype == (dtype or torch.float32)
    # what the normalisation makes, for SiLU; what SiLU makes, for the convolution, rounded where it asks for it; and y
    assert counter.held == pytest.approx(bytes_per_number * x.numel(), rel=0.01)
    assert counter.peak == pytest.approx(12 * x.numel(), rel=0.01)  # what SiLU makes lives until y is there
    del y  # and with it what it keeps for a backward pass
    assert counter.held == 0


def test_time_and_memory_of_a_device_follow():
    found = Estimate(
        frozen=1000,
        trained=100,
        discriminator=10,
        weights=4000.0,
        flops=6e9,
        activations=5000.0,
        shared=77.0,
        precision="32-true",
        checkpointing="none",
        batch=24,
        accumulate=2,
        devices=3,
        tflops=0.5,
    )
    assert found.seconds == pytest.approx(1000 * 24 * 6e9 / (3 * 0.5e12))
    # the moments of AdamW of both, and the average of the generator
    assert found.memory == 4000 + 4 * (2 * 110 + 100) + 77 + 5000 * 4
    assert found.communicated == 440


@pytest.mark.slow
def test_a_step_holds_all_batches_and_all_outputs(prior, tmp_path):
    one = estimated(*TINY, f"prior={prior}", folder=tmp_path)
    two = estimated(*TINY, f"prior={prior}", "loss.energy=1", folder=tmp_path)
    assert (one.batch, one.devices, one.tflops) == (2 * BATCH, 3, 0.5)
    assert two.flops == 2 * one.flops  # two outputs per image, each a forward and a backward pass
    assert two.memory > one.memory


@pytest.mark.slow
def test_computing_again_costs_a_forward_pass_and_keeps_one_evaluation(prior, tmp_path):
    common = [*TINY, f"prior={prior}"]
    kept, again = (
        {
            k: estimated(*common, f"network.num_blocks={k}", f"training.checkpointing={kind}", folder=tmp_path)
            for k in (1, 3)
        }
        for kind in ("none", "modules")
    )
    assert kept[3].flops < again[3].flops < 1.6 * kept[3].flops
    assert kept[3].activations > 2.2 * kept[1].activations
    assert again[3].activations < 1.4 * again[1].activations


@pytest.mark.slow
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
    again = estimated("experiment=imagenet256", "training.checkpointing=modules", folder=tmp_path)
    forward = (again.flops - found.flops) / 2  # of three modules the last one is kept
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
    assert found.memory > found.activations > 0


def test_the_command_prints_the_table_and_leaves_nothing(prior, tmp_path, capsys):
    run = tmp_path / "run"
    assert command_line("experiment=demo", *TINY, f"prior={prior}", "estimate=true", f"run_dir={run}") == 0
    printed = capsys.readouterr().out
    for words in ("parameters, frozen", "FLOPs per step", "activations per image", "time per 1000 steps", "gradients"):
        assert words in printed
    assert "as of a CPU" in printed
    assert "If the memory does not fit" in printed
    assert not run.exists()


def test_the_advice_names_settings_that_there_are(tmp_path):
    words = dict(re.findall(r"([a-z_.]+)=([\w-]+)", ADVICE))
    assert words["trainer"] == "ddp"
    assert words.pop("trainer.devices") == "N"
    with composed(*(f"{key}={value}" for key, value in words.items()), folder=tmp_path) as config:
        assert config.training.checkpointing in ("modules", "all")
        assert config.trainer.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.5, "0.5 s"), (59, "59 s"), (60, "1 min"), (3599, "60 min"), (7200, "2 h")]
)
def test_times_are_in_units_of_their_size(seconds, words):
    assert duration(seconds) == words


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


PIXEL_SPACE = sorted(path.parent for path in ARCHITECTURES.glob("*/scheduler_config.json"))


@pytest.mark.parametrize("path", PIXEL_SPACE, ids=lambda path: path.name)
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
