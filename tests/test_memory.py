"""Options that save memory: the same gradients, float32 where it counts, and fewer bytes."""

import sys
from functools import partial

import pytest
import torch
from conftest import REPOSITORY
from tiny import SIZE, perturb, trained
from tiny_training import distillation, fit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ud2m.losses.adversarial import Adversarial, gradient_square
from ud2m.losses.generator import build_generator_loss
from ud2m.losses.terms import EnergyScore, FeatureDistance, FeatureEnergyScore, Perceptual
from ud2m.physics import GaussianBlur, Inpainting, SuperResolution
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.training.random_streams import row_streams

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from memory import peak, run


def module_of(prior, num_blocks=3, **options):
    """Every kind of loss: some see features with the adapter off, between modules that see it on."""

    def loss(features, discriminator):
        terms = {
            "energy": {"weight": 1.0, "term": lambda: EnergyScore(patch_size=4)},
            "perceptual": {"weight": 0.1, "term": lambda features: Perceptual(FeatureDistance(features))},
            "feature_energy": {"weight": 0.1, "term": FeatureEnergyScore},
            "adversarial": {"weight": 0.1, "term": Adversarial},
        }
        return build_generator_loss(terms, features, discriminator)

    network = {"num_blocks": num_blocks, "rule": {"name": "annealed"}, "warm_start": {"name": "pinv"}}
    module = distillation(prior, loss=loss, network=network, **options)
    perturb(trained(module).values(), 0.02)
    return module


def gradients(module, precision=None):
    x0 = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", precision, enabled=precision is not None):
        total, _ = module.losses(x0, row_streams("cpu", [0, 1], 3, "distillation"))
    total.backward()
    return {name: parameter.grad for name, parameter in trained(module).items()}


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(("checkpointing", "kept"), [("modules", 1), ("modules", 2), ("all", 1)])
def test_checkpointing_gives_the_same_gradients_from_more_evaluations(checkpointing, kept, precision, prior):
    expected = gradients(module_of(prior), precision)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in expected.values())
    module, calls = module_of(prior, checkpointing=checkpointing, kept_modules=kept), []
    module.prior.register_forward_pre_hook(lambda *_: calls.append(None))
    found = gradients(module, precision)
    assert len(calls) == 3 + 3 - kept  # the last modules are not evaluated again
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_modules(prior):
    x0 = torch.rand(1, 3, SIZE, SIZE)

    def growth(checkpointing, kept=1):
        options = {"checkpointing": checkpointing, "kept_modules": kept}
        few, many = (peak(partial(run, module_of(prior, count, **options).step, x0)) for count in (2, 6))
        return many / few

    assert growth("none") > 1.8
    assert growth("modules") < 1.25
    assert growth("modules", kept=2) < 1.25


@pytest.mark.slow
def test_residual_blocks_save_memory_beside_modules(prior):
    x0 = torch.rand(2, 3, SIZE, SIZE)
    modules, every = (
        peak(partial(run, module_of(prior, 2, checkpointing=kind).step, x0)) for kind in ("modules", "all")
    )
    assert every < 0.9 * modules


def test_an_unknown_kind_of_checkpointing_is_refused(prior):
    with pytest.raises(ValueError, match="checkpointing must be one of none, modules, all, got 'some'"):
        distillation(prior, checkpointing="some")
    with pytest.raises(ValueError, match="kept_modules must be at least 1, got 0"):
        distillation(prior, checkpointing="modules", kept_modules=0)


class Watch(TorchDispatchMode):
    """Note operations with a result in bfloat16 outside of networks, but for the views and casts at their doors."""

    def __init__(self, networks):
        super().__init__()
        self.inside, self.found, self.seen = 0, set(), 0
        for network in networks:
            network.register_forward_pre_hook(lambda *_: self.enter(1))
            network.register_forward_hook(lambda *_: self.enter(-1))

    def enter(self, change):
        self.inside += change

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
                self.seen += 1
                if not self.inside and function is not torch.ops.aten.alias.default:
                    self.found.add(str(function))
        return result


OPERATORS = [Inpainting(0.5), GaussianBlur(1.0), SuperResolution(2)]


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
def test_prox_schedule_and_losses_stay_in_float32_under_autocast(operator, prior):
    module = module_of(prior, operator=operator)
    frozen = module.prior.frozen_network()
    parts = [*frozen.down_blocks, frozen.conv_in, frozen.time_embedding]
    watch = Watch([module.prior.unet, module.discriminator, *parts])
    x0 = torch.rand(2, 3, SIZE, SIZE)
    with watch, torch.autocast("cpu", torch.bfloat16):
        total, values = module.losses(x0, row_streams("cpu", [0, 1], 3, "distillation"))
    assert watch.found == set()
    assert watch.seen > 100
    assert {value.dtype for value in [total, *values.values()]} == {torch.float32}


@pytest.mark.slow
def test_frozen_weights_in_bfloat16_are_half_the_bytes_and_train(prior, tmp_path):
    module = distillation(prior, frozen_bfloat16=True)
    plain = distillation(prior)
    frozen = {name: p for name, p in module.prior.named_parameters() if not p.requires_grad}
    layers = {name: p for name, p in frozen.items() if p.dtype == torch.bfloat16}
    norms = sum(p.numel() for m in module.prior.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters())
    assert sum(p.numel() for p in layers.values()) == sum(p.numel() for p in frozen.values()) - norms
    assert all(p.dtype == torch.float32 for p in trained(module).values())
    assert module.prior.fingerprint == plain.prior.fingerprint
    x = torch.rand(2, 3, SIZE, SIZE)
    sigma = torch.tensor([0.1, 0.5])
    ours, theirs = module.prior(x, sigma), plain.prior(x, sigma)
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).abs().max() < 0.02
    fit(module, tmp_path, precision="bf16-mixed")
    assert all(p.dtype == torch.bfloat16 for p in layers.values())
    assert module.scores["psnr"] > 0
    module.export(tmp_path / "export")
    assert PosteriorSampler.from_pretrained(tmp_path / "export").prior.in_bfloat16 is False


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_the_gradient_penalty_is_that_of_full_precision(precision, prior):
    generator = torch.Generator().manual_seed(0)
    x, condition = torch.rand(2, 2, 3, SIZE, SIZE, generator=generator)
    discriminator = module_of(prior).discriminator
    expected = gradient_square(discriminator, x, condition)
    with torch.autocast("cpu", precision):
        found = gradient_square(discriminator, x, condition)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_channels_last_changes_nothing_but_the_layout(prior, tmp_path):
    expected = gradients(module_of(prior))
    module = module_of(prior, channels_last=True)
    convolution = next(m for m in module.prior.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.weight.is_contiguous()
    found = gradients(module)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
    fit(module, tmp_path)
    module.export(tmp_path / "export")
    y = torch.rand(1, 3, SIZE, SIZE)
    physics = Inpainting(0.5).draw(1, (3, SIZE, SIZE), torch.Generator().manual_seed(0))
    with module.ema.applied():
        one, other = (
            sampler(y, physics, 0.05, generator=torch.Generator().manual_seed(1))
            for sampler in (module.sampler, PosteriorSampler.from_pretrained(tmp_path / "export"))
        )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "modules"])
def test_a_compiled_network_has_the_same_gradients(checkpointing, prior):
    expected = gradients(module_of(prior))
    found = gradients(module_of(prior, compile="aot_eager", checkpointing=checkpointing))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_backend_that_torch_does_not_have_is_refused(prior):
    with pytest.raises(ValueError, match=r"torch\.compile has no backend or mode 'turbo'; it has .*inductor"):
        distillation(prior, compile="turbo")
