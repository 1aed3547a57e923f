"""Bridges from degraded to clean images: closed forms by integration, exact networks, training and export."""

import json

import pytest
import torch
from tiny import SIZE, perturb, save_tiny_prior
from tiny_training import fit
from torch import nn

from ud2m.physics import Denoising, Inpainting, Jpeg, Observation, observe
from ud2m.priors.prior import Prior
from ud2m.samplers.bridge import Bridge, BridgeSampler, BridgeSchedule
from ud2m.training import BridgeModule
from ud2m.training.random_streams import row_streams
from ud2m.unfolded.warm_start import SmoothingStart

TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)


def integral(schedule, first, last, count=4001):
    """Trapezoidal rule for beta, images in [0, 1]."""
    t = torch.linspace(first, last, count, dtype=torch.float64)
    ramp = schedule.beta_min**0.5 + (schedule.beta_max**0.5 - schedule.beta_min**0.5) * torch.minimum(t, 1 - t)
    return torch.trapezoid(ramp**2 / 4, t)


@pytest.mark.parametrize("schedule", [BridgeSchedule(), BridgeSchedule(0.2, 0.2), BridgeSchedule(1e-3, 2.0)])
def test_variances_and_marginals_are_those_of_the_integrated_diffusion(schedule):
    forward = torch.stack([integral(schedule, 0.0, t.item()) for t in TIMES])
    backward = torch.stack([integral(schedule, t.item(), 1.0) for t in TIMES])
    torch.testing.assert_close(schedule.variance(TIMES), forward, atol=1e-7, rtol=1e-6)
    # The product of the two Gaussians around x0 and x1.
    share, deviation = schedule.marginal(TIMES)
    torch.testing.assert_close(share, forward / (forward + backward), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(deviation**2, forward * backward / (forward + backward), atol=1e-7, rtol=1e-5)


def test_steps_keep_the_marginal():
    """x_s drawn from x_t and x0, with x_t drawn from both ends, has the law of x_s given both ends."""
    schedule = BridgeSchedule()
    for k in range(1, len(TIMES)):
        late, early = TIMES[k : k + 1], TIMES[k - 1 : k]
        share, deviation = schedule.marginal(late)
        kept, fresh = schedule.step(late, early)
        expected_share, expected_deviation = schedule.marginal(early)
        torch.testing.assert_close(kept * share, expected_share)
        torch.testing.assert_close(((kept * deviation) ** 2 + fresh**2).sqrt(), expected_deviation)


class ExactBridge(Bridge):
    """The best network for pixels x0 ~ N(0.4, v) and x1 = x0 + n, n ~ N(0, q); its degraded end is y itself."""

    def __init__(self, v=0.02, q=0.03):
        nn.Module.__init__(self)
        self.schedule, self.v, self.q = BridgeSchedule(), v, q

    def degraded(self, observation):
        return observation.y

    def expectation(self, x_t, t):
        share, deviation = (value.view(-1, 1, 1, 1) for value in self.schedule.marginal(t))
        return 0.4 + self.v / (self.v + share**2 * self.q + deviation**2) * (x_t - 0.4)

    def forward(self, x_t, t):
        return (x_t - self.expectation(x_t, t)) / self.schedule.variance(t).sqrt().view(-1, 1, 1, 1)


def pixels(count=40, side=16):
    x0 = 0.4 + 0.02**0.5 * torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(0))
    return x0, x0 + 0.03**0.5 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))


def test_one_step_is_the_posterior_mean():
    bridge, (_, y) = ExactBridge(), pixels(2)
    physics = Denoising().draw(2, (1, 16, 16))
    drawn = BridgeSampler(bridge, 1)(y, physics, 0.1)[:, 0]
    expected = 0.4 + 0.02 / 0.05 * (y - 0.4)
    torch.testing.assert_close(drawn, expected.clamp(0, 1))


def test_many_steps_draw_from_the_law_of_clean_images():
    bridge, (_, y) = ExactBridge(), pixels()
    physics = Denoising().draw(len(y), (1, 16, 16))
    sampler = BridgeSampler(bridge, 100, chunk_size=16)
    streams = row_streams("cpu", list(range(len(y))), 0, "test")
    drawn = sampler.draw(Observation.of(y, physics, 0.1), streams)
    count = drawn.numel()
    assert abs(drawn.mean() - 0.4) < 4 * (0.05 / count) ** 0.5
    assert abs(drawn.var() / 0.02 - 1) < 0.06  # 100 steps, and the Monte Carlo error of 0.014
    one_step = sampler.bridge.expectation(y, torch.ones(len(y)))
    assert one_step.var() < 0.5 * 0.02  # regression to the mean, which the steps undo


def test_samples_do_not_depend_on_the_chunks():
    bridge, (_, y) = ExactBridge(), pixels(2)
    physics = Inpainting(0.5).draw(2, (1, 16, 16), torch.Generator().manual_seed(0))
    one, other = (
        BridgeSampler(bridge, 3, chunk_size=size)(y, physics, 0.1, 3, torch.Generator().manual_seed(4))
        for size in (2, 64)
    )
    torch.testing.assert_close(one, other)
    assert one.std(1).mean() > 0.01


@pytest.mark.parametrize("consistency", [0.5, 1.0])
def test_data_consistency_is_a_gradient_step(consistency):
    bridge, (x0, _) = ExactBridge(), pixels(1)
    physics = Inpainting(0.5).draw(1, (1, 16, 16), torch.Generator().manual_seed(0))
    y = observe(physics, x0.clamp(0, 1), 0.0)
    drawn = BridgeSampler(bridge, 1, consistency)(y, physics, 0.1)[0]
    estimate = bridge.expectation(y, torch.ones(1))
    expected = estimate - consistency * physics.A_adjoint(physics.A(estimate) - y)
    torch.testing.assert_close(drawn, expected.clamp(0, 1))


def module_of(folder, **options):
    torch.manual_seed(0)
    settings = {"num_samples": 2, "lpips": None}
    return BridgeModule(
        save_tiny_prior(folder / "prior"), Inpainting(0.5), 0.05, settings, [4, 2], 0.1, num_steps=2, **options
    )


def test_the_loss_is_that_of_the_target(tmp_path):
    module = module_of(tmp_path)
    seen = []

    class Zero(nn.Module):
        def forward(self, x_t, t):
            seen.append((x_t, t))
            return torch.zeros_like(x_t)

    x0 = torch.rand(3, 3, SIZE, SIZE)
    schedule = module.bridge.schedule
    zero = Zero()
    zero.schedule, zero.degraded = schedule, module.bridge.degraded
    del module.bridge
    module.bridge = zero
    loss, _ = module.losses(x0, row_streams("cpu", [0, 1, 2], 0, "bridge"))
    ((x_t, t),) = seen
    target = (x_t - x0) / schedule.variance(t).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(loss, target.square().mean())
    assert t.unique().numel() == 3


def test_it_trains_and_its_export_draws_the_same(tmp_path):
    module = module_of(tmp_path, lr=1e-3)
    before = {name: p.detach().clone() for name, p in module.bridge.named_parameters()}
    fit(module, tmp_path / "run")
    assert all(not torch.equal(p, before[name]) for name, p in module.bridge.named_parameters() if p.grad is not None)
    assert module.scores["psnr_mean"] > 5
    perturb(module.bridge.parameters(), 0.02)
    module.ema.update()
    module.export(tmp_path / "export")
    physics = Inpainting(0.5).draw(1, (3, SIZE, SIZE), torch.Generator().manual_seed(0))
    y = torch.rand(1, 3, SIZE, SIZE)
    with module.ema.applied():
        one, other = (
            sampler(y, physics, 0.05, 2, torch.Generator().manual_seed(1))
            for sampler in (module.sampler, BridgeSampler.from_pretrained(str(tmp_path / "export"), num_steps=2))
        )
    torch.testing.assert_close(one, other, atol=5e-3, rtol=0)  # the export is in half precision
    assert other.shape == (1, 2, 3, SIZE, SIZE)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"0 < beta_min <= beta_max, got 0\.3 and 0\.1"):
        BridgeSchedule(0.3, 0.1)
    with pytest.raises(ValueError, match="consistency must not be negative, got -1"):
        BridgeSampler(ExactBridge(), 1, -1)
    with pytest.raises(FileNotFoundError, match="holds no trained bridge"):
        BridgeSampler.from_pretrained(str(tmp_path))
    prior = save_tiny_prior(tmp_path / "prior")
    with pytest.raises(ValueError, match=r"is a DDPMScheduler, not a bridge \(train.py training=bridge\)"):
        BridgeSampler.from_pretrained(prior)
    with pytest.raises(ValueError, match="CDDB needs a linear operator, JpegCodec is none"):
        BridgeSampler(ExactBridge(), 1, 1.0).check(Jpeg().draw(1, (3, 16, 16)))
    bridge = Bridge(Prior.from_pretrained(prior).unet, BridgeSchedule(), SmoothingStart([2]))
    bridge.save(tmp_path / "bridge")
    assert json.loads((tmp_path / "bridge" / "scheduler_config.json").read_text())["scales"] == [2]
    (tmp_path / "bridge" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot load the weights of"):
        BridgeSampler.from_pretrained(str(tmp_path / "bridge"))
