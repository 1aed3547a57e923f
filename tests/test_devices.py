"""Devices and precisions of sampling."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ud2m.cli.commands import conf_folder
from ud2m.cli.methods import build_sampler, shares_prior
from ud2m.physics import DdrmSuperResolution, GaussianBlur, Separable, observe
from ud2m.precision import find_device, network_precision
from ud2m.priors.prior import Prior, denoise
from ud2m.samplers.bridge import BridgeSampler, BridgeSchedule
from ud2m.samplers.deepinv import Ddrm, DiffPir, Dps, Langevin, PnpFlow
from ud2m.samplers.latino import Latino, LatinoSetting
from ud2m.unfolded.denoisers import in_precision


def observed(sampler):
    physics = GaussianBlur(1.0).draw(2, (3, 32, 32))
    x0 = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return observe(physics, x0, 0.05, torch.Generator().manual_seed(1)), physics


def draw(sampler, **options):
    y, physics = observed(sampler)
    return sampler(y, physics, 0.05, 2, generator=torch.Generator().manual_seed(2), **options)


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_networks_alone_are_evaluated_in_less(sampler, precision, dtype):
    convolved, given = set(), set()
    convolution = next(module for module in sampler.prior.modules() if isinstance(module, nn.Conv2d))
    hooks = [
        convolution.register_forward_hook(lambda module, args, out: convolved.add(out.dtype)),
        sampler.prior.register_forward_pre_hook(lambda module, args: given.update(x.dtype for x in args)),
    ]
    try:
        low = draw(sampler, precision=precision)
    finally:
        for hook in hooks:
            hook.remove()
    assert convolved == {dtype}
    assert given == {torch.float32}
    assert low.dtype == torch.float32
    exact = draw(sampler)
    assert torch.equal(exact, draw(sampler, precision="float32"))  # what auto is in tests
    assert 0 < (low - exact).abs().mean() < 0.02


class Convolution(nn.Module):
    """A denoiser, and a bridge, whose network is one convolution; it keeps the precisions that it computes in."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Conv2d(3, 3, 3, padding=1), set()

    def forward(self, x_sigma, sigma):
        eps = self.layer(x_sigma)
        self.seen.add(eps.dtype)
        return x_sigma - 0.1 * sigma.view(-1, 1, 1, 1) * eps.to(x_sigma.dtype)

    def degraded(self, observation):
        return torch.rand(len(observation), 3, 16, 16)

    x0_hat, schedule = forward, BridgeSchedule()


METHODS = {
    "latino": lambda network, **options: Latino(network, LatinoSetting(2), **options),
    "ddrm": lambda network, **options: Ddrm(network, 2, **options),
    "diffpir": lambda network, **options: DiffPir(network, 2, **options),
    "dps": lambda network, **options: Dps(network, 3, **options),
    "pnp_flow": lambda network, **options: PnpFlow(network, 2, **options),
    "langevin": lambda network, **options: Langevin(network, 2, **options),
    "cddb": lambda network, **options: BridgeSampler(network, 2, consistency=1.0, **options),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_same_precisions_and_operators_are_never_rounded(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    rounding, product = [], Separable._scene
    monkeypatch.setattr(
        Separable, "_scene", lambda *a: rounding.append(torch.is_autocast_enabled("cpu")) or product(*a)
    )
    physics = DdrmSuperResolution(2).draw(1, (3, 16, 16))
    y = observe(physics, torch.rand(1, 3, 16, 16), 0.05)
    for options, dtype in (({}, torch.bfloat16), ({"precision": "float32"}, torch.float32)):
        network = Convolution()
        samples = METHODS[name](network, **options)(y, physics, 0.05, 2)
        assert network.seen == {dtype}
        assert samples.dtype == torch.float32
    assert rounding
    assert not any(rounding)
    with pytest.raises(ValueError, match="precision must be one of"):
        METHODS[name](Convolution(), precision="half")


def test_pages_leave_the_precision_to_the_command():
    for page in sorted((conf_folder() / "method").glob("*.yaml")):
        target = OmegaConf.to_container(OmegaConf.load(page))["target"]
        if shares_prior(target):
            assert build_sampler(target, nn.Identity(), "cpu", "float16").precision == "float16", page.name
            own = target | {"precision": "float32"}
            assert build_sampler(own, nn.Identity(), "cpu", "float16").precision == "float32"
        elif "model" in target:
            assert target["precision"] is None, page.name


def test_a_large_picture_is_computed_with_channels_side_by_side(prior):
    network, layouts = Prior.from_pretrained(prior), []
    network.unet.conv_in.register_forward_hook(
        lambda module, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    x, sigma = torch.rand(1, 3, 64, 64), torch.tensor([0.1])
    with torch.no_grad():
        whole = network(x, sigma)
        network(x[..., :32], sigma)
        torch.testing.assert_close(denoise(network.unet, network.schedule, x, sigma), whole, atol=1e-5, rtol=0)
    assert layouts == [True, False, False]


def test_what_is_left_of_a_step_is_not_rounded():
    """x_sigma - sigma eps_hat: at a low level the rounding of eps_hat is small, that of x_sigma would not be."""
    layer = nn.Conv2d(3, 3, 3, padding=1)

    def denoiser(x_sigma, sigma):
        return x_sigma - sigma.view(-1, 1, 1, 1) * layer(x_sigma).to(x_sigma.dtype)

    x, sigma = torch.rand(1, 3, 8, 8), torch.tensor([1e-4])
    with torch.no_grad():
        error = (in_precision(denoiser, "bfloat16")(x, sigma) - denoiser(x, sigma)).abs().max()
    assert error < 1e-5  # x in bfloat16 alone would be wrong by 2e-3


def test_auto_is_bfloat16_where_there_are_instructions_for_it(monkeypatch):
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        with network_precision("auto", "cpu"):
            assert torch.is_autocast_enabled("cpu") is expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with network_precision("auto", "cuda"):
        assert not torch.is_autocast_enabled("cuda")


def test_an_export_does_not_keep_the_precision_of_a_machine(sampler):
    assert "precision" not in sampler.config.with_options(precision="bfloat16").stored()


def test_what_is_no_precision_or_device_is_refused(sampler, monkeypatch):
    with pytest.raises(ValueError, match="precision must be one of auto, float32, bfloat16, float16, got 'half'"):
        draw(sampler, precision="half")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ValueError, match=f"there is no device '{name}' on this machine, which has 1 of cpu, 0 of"):
            find_device(name)
    for name in ("tpu", "", None, "cuda:x", "meta"):
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda, cuda:N or mps"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
