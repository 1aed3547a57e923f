"""The device of this machine against its CPU: run by benchmarks/gpu/run.sh check, and by a slow test without a GPU.

Without a GPU the device is the CPU itself: what compares precisions, processes and chunks still compares, the float32
cases say that a computation repeats itself, and what exists on GPUs alone is skipped.
"""

import os

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from processes import ranks
from tiny import SIZE, tiny_prior, trained
from tiny_sampler import build
from tiny_training import (
    TinyData,
    command_line,
    distillation,
    fit,
    images,
    largest_difference,
    tiny_overrides,
    write_images,
)
from torch import nn

from ud2m.data import PhotoData
from ud2m.evaluation.metrics import psnr
from ud2m.physics import GaussianBlur, Observation, observe
from ud2m.precision import network_precision
from ud2m.samplers.ud2m import PosteriorSampler

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU on this machine")
# of values in [0, 1]: the root mean square difference of samples from those of the CPU in float32
SAMPLES = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 2e-2, "float16": 5e-3}
# of gradients: |g - g_cpu| / |g_cpu|
GRADIENTS = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 0.15, "float16": 3e-2}
SCALE = 2.0**10
"""Factor on float16 losses, as a GradScaler finds one: gradients of 1e-8 are 0 there."""


@pytest.fixture
def precision(request, monkeypatch):
    """A precision of the networks; float32 without the shortcut (TF32) that convolutions take by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param == "tf32")
    return request.param


def named(precision):
    """What the options of this package call it."""
    return "float32" if precision == "tf32" else precision


def with_precision(sampler, precision):
    """The sampler with its networks in this precision."""
    return PosteriorSampler(sampler.network, sampler.config.with_options(precision=named(precision)))


def streams(count):
    """Random numbers drawn on the CPU, whatever the device: those of two devices are others."""
    return [torch.Generator().manual_seed(k) for k in range(count)]


def observed(device):
    """The same observations on any device."""
    x0 = images(4)
    y = observe(GaussianBlur(1.0).draw(4, tuple(x0.shape[1:])), x0, 0.05, streams(4))
    physics = GaussianBlur(1.0).draw(4, tuple(x0.shape[1:]), device=device)
    return Observation.of(y.to(device), physics, 0.05)


@pytest.mark.parametrize("precision", list(SAMPLES), indirect=True)
def test_samples_are_those_of_the_cpu(precision, prior_folder):
    sampler = build(prior_folder)
    with torch.no_grad():
        expected = with_precision(sampler, "float32").draw(observed("cpu"), streams(4))
        found = with_precision(sampler, precision).to(DEVICE).draw(observed(DEVICE), streams(4))
    assert found.device.type == DEVICE
    assert found.dtype == torch.float32
    error = (found.cpu() - expected).square().mean().sqrt()
    assert error < SAMPLES[precision]
    assert (error > 0) == (precision in ("bfloat16", "float16") or DEVICE != "cpu")


def gradients(prior, device, precision):
    """Return the gradient of one training step with every kind of loss, as one vector, and the loss."""
    module = distillation(prior).to(device)
    scale = SCALE if precision == "float16" else 1.0
    with network_precision(named(precision), device):
        total, _ = module.step(images(4).to(device), streams(4))
        (scale * total).backward()
    parts = [p.grad.flatten().float().cpu() / scale for p in trained(module).values() if p.grad is not None]
    return torch.cat(parts), total.item()


@pytest.mark.parametrize("precision", list(GRADIENTS), indirect=True)
def test_a_training_step_is_that_of_the_cpu(precision, prior):
    expected, loss = gradients(prior, "cpu", "float32")
    found, found_loss = gradients(prior, DEVICE, precision)
    assert len(found) == len(expected)
    assert (found - expected).norm() / expected.norm() < GRADIENTS[precision]
    assert found_loss == pytest.approx(loss, rel=GRADIENTS[precision])


def test_a_sample_depends_on_its_own_stream_alone(prior_folder):
    sampler, observation = build(prior_folder).to(DEVICE), observed(DEVICE)

    def draw(chunk, seed=3):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        options = {"chunk_size": chunk, "precision": "float32"}
        return sampler(observation.y, observation.physics, 0.05, 2, generator, **options)

    together = draw(8)
    assert torch.equal(together, draw(8))
    torch.testing.assert_close(draw(1), together, atol=SAMPLES["tf32"], rtol=0)
    assert (together - draw(8, seed=4)).abs().mean() > SAMPLES["tf32"]
    assert (together[:, 0] - together[:, 1]).abs().mean() > SAMPLES["tf32"]


def test_a_shipped_model_restores_as_well_as_on_the_cpu():
    photograph = PhotoData(channels=3, crop_size=64, batch_size=1, tile_size=64).all_images("test")[7].unsqueeze(0)
    y = observe(GaussianBlur(1.6).draw(1, (3, 64, 64)), photograph, 0.01, streams(1))
    scores = {}
    for device, precision in (("cpu", "float32"), (DEVICE, "bfloat16")):
        sampler = PosteriorSampler.from_pretrained("photos_gaussian_blur", device=device, precision=precision)
        observation = Observation.of(y.to(device), GaussianBlur(1.6).draw(1, (3, 64, 64), device=device), 0.01)
        with torch.no_grad():
            x0_hat = sampler.draw(observation, streams(1)).cpu()
        scores[precision] = psnr(x0_hat, photograph).item()
    assert scores["float32"] > psnr(y, photograph).item() + 2
    assert scores["bfloat16"] == pytest.approx(scores["float32"], abs=0.05)


def test_a_compiled_network_is_the_network(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    prior = tiny_prior().to(DEVICE)
    x, sigma = images(2).to(DEVICE), torch.tensor([0.1, 0.5], device=DEVICE)
    with torch.no_grad():
        expected = prior(x, sigma)
        # compiling for a CPU takes a compiler and a minute
        found = prior.compile_network("inductor" if DEVICE == "cuda" else "aot_eager")(x, sigma)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", ["bf16-mixed", "16-mixed"])
def test_a_run_trains_and_its_model_samples(mixed, prior, tmp_path):
    options = [*tiny_overrides(prior, write_images(tmp_path / "images")), f"trainer.precision={mixed}"]
    accelerator = "gpu" if DEVICE == "cuda" else "cpu"
    run = tmp_path / "run"
    assert command_line(*options, f"trainer.accelerator={accelerator}", f"run_dir={run}") == 0
    sampler = PosteriorSampler.from_pretrained(run / "export", device=DEVICE, precision="auto")
    physics = GaussianBlur(1.6).draw(1, (3, SIZE, SIZE), device=DEVICE)
    samples = sampler(torch.rand(1, 3, SIZE, SIZE, device=DEVICE), physics, num_samples=2)
    assert samples.isfinite().all()


def train_as(folder, prior, backend=None):
    """Train in float64, as one of several machines with one device each where a backend of DDP is named."""
    data = TinyData(4)
    data.samples_per_epoch = 8
    module = distillation(prior, optimizer={"steps": 2})
    module.network.unused = nn.Parameter(torch.ones(3))
    options = {"accelerator": "gpu" if DEVICE == "cuda" else "cpu", "precision": "64-true", "max_epochs": 1}
    world = 1 if backend is None else int(os.environ["WORLD_SIZE"])
    if backend is not None:
        strategy = DDPStrategy(process_group_backend=backend, find_unused_parameters=True, broadcast_buffers=False)
        options |= {"strategy": strategy, "num_nodes": world}
    made = fit(module, folder, data, devices=1, **options)
    state = {name: value.cpu() for name, value in module.state_dict().items()}
    torch.save(state, folder / f"{backend}-{made.global_rank}-of-{world}.pt")


@pytest.mark.parametrize(("backend", "count"), [("gloo", 2), pytest.param("nccl", 1, marks=needs_gpu)])
def test_processes_on_one_device_train_as_one_does(backend, count, prior, tmp_path):
    train_as(tmp_path, prior)
    started = ranks(count, train_as, tmp_path, prior, backend, machines=count)
    for process in started:
        process.join(180)
    assert [process.exitcode for process in started] == [0] * count
    expected = torch.load(tmp_path / "None-0-of-1.pt", weights_only=True)
    for rank in range(count):
        found = torch.load(tmp_path / f"{backend}-{rank}-of-{count}.pt", weights_only=True)
        assert largest_difference(found, expected) < 1e-9


@needs_gpu
def test_a_step_that_is_too_large_is_one_line(prior, tmp_path, capfd):
    options = [*tiny_overrides(prior, write_images(tmp_path / "images")), "trainer.accelerator=gpu"]
    free = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(20e6 / free)
    try:
        assert command_line(*options, f"run_dir={tmp_path / 'run'}") == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    shown = capfd.readouterr().err
    assert "error: out of memory: Tried to allocate" in shown
    assert "Traceback" not in shown
