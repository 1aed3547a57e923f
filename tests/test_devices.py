"""Devices and precisions of sampling."""

import pytest
import torch
from torch import nn

from ud2m.physics import GaussianBlur, observe
from ud2m.precision import find_device, network_precision
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
    assert torch.equal(exact, draw(sampler, precision="float32"))
    assert 0 < (low - exact).abs().mean() < 0.02


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
