"""The discriminator whose trunk is the frozen prior: what it sees, what it leaves alone, and that it learns."""

from functools import partial

import pytest
import torch
from tiny import LORA, perturb, tiny_prior
from tiny_training import composed, distillation
from torch.nn.functional import softplus

from ud2m.cli.objects import build
from ud2m.losses import (
    Adversarial,
    Discriminator,
    DiscriminatorLoss,
    FeatureDiscriminator,
    FeatureDistance,
    Perceptual,
    Prediction,
    gradient_square,
)
from ud2m.priors.prior import LoraSpec, Prior


@pytest.fixture
def prior():
    return tiny_prior()


@pytest.fixture
def double():
    prior = tiny_prior()
    discriminator = FeatureDiscriminator(3, prior.features, width=4)
    prior.double()
    return discriminator.double()


def pairs(count, side=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, count, 3, side, side, generator=generator, dtype=dtype)


def test_a_logit_stands_for_every_location_of_every_resolution_and_samples_do_not_see_each_other(double):
    x, condition = pairs(3)
    logits = double(x, condition)
    assert logits.shape == (3, 16 * 16 + 8 * 8)
    alone = torch.cat([double(x[i : i + 1], condition[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(logits, alone)
    assert not torch.allclose(logits, double(x, x))


def test_heads_see_relations_of_features_and_not_their_scale(prior):
    x, condition = pairs(2, dtype=torch.float32)
    scaled = FeatureDiscriminator(3, lambda x: [100 * f for f in prior.features(x)], width=4)
    plain = FeatureDiscriminator(3, prior.features, width=4)
    plain.load_state_dict(scaled.state_dict())
    torch.testing.assert_close(plain(x, condition), scaled(x, condition))


def test_the_trunk_is_no_part_of_it_and_stays_frozen(prior):
    prior.add_lora(LoraSpec(**LORA))
    discriminator = FeatureDiscriminator(3, prior.features, width=4)
    assert {name.split(".")[0] for name in discriminator.state_dict()} == {"heads"}
    x, condition = pairs(2, dtype=torch.float32)
    before = discriminator(x, condition)
    perturb(p for p in prior.parameters() if p.requires_grad)  # the adapter is trained; the trunk has none
    torch.testing.assert_close(discriminator(x, condition), before)
    discriminator(x, condition).sum().backward()
    assert all(p.grad is None for p in prior.parameters())


def test_the_penalty_is_differentiated_twice_through_the_attention_of_the_trunk(double):
    # along a random direction of the heads' weights, against central differences
    x, condition = pairs(2)
    parameters = list(double.parameters())
    gradients = torch.autograd.grad(gradient_square(double, x, condition).sum(), parameters, allow_unused=True)
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    found = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        found.append(gradient_square(double, x, condition).sum().item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
    assert slope.item() == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-5)


def test_a_step_with_penalty_works_in_float32_where_fused_attention_has_no_second_derivative(prior_folder):
    module = distillation(prior_folder, discriminator=partial(FeatureDiscriminator, width=4))
    assert isinstance(module.discriminator, FeatureDiscriminator)
    x0 = pairs(2, dtype=torch.float32)[0]
    total, values = module.losses(x0, [torch.Generator().manual_seed(i) for i in range(2)])
    total.backward()
    assert values["gradient_penalty"] > 0
    assert all(torch.isfinite(p.grad).all() for p in module.discriminator.parameters() if p.grad is not None)


def draw(seed):
    """Return clean smooth images, conditions with noise of .03 about them, and generated ones with other noise."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(8, 3, 4, 4, generator=generator)
    clean = torch.nn.functional.interpolate(corners, (32, 32), mode="bicubic").clamp(0, 1)
    noise = 0.03 * torch.randn(2, *clean.shape, generator=generator)
    return clean, clean + noise[0], clean + noise[1]


def loss_after(discriminator, steps=40):
    """Return D's loss on images that it has not seen; log 4 if it cannot tell them."""
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, betas=(0.5, 0.99))
    for step in range(steps + 1):
        real, condition, fake = draw(step)
        loss = softplus(-discriminator(real, condition)).mean() + softplus(discriminator(fake, condition)).mean()
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


@pytest.mark.slow
def test_it_decides_within_steps_in_which_patches_of_pixels_stay_undecided():
    torch.manual_seed(0)
    assert loss_after(FeatureDiscriminator(3, Prior.from_pretrained("photos_prior").features, width=16)) < 0.9
    assert loss_after(Discriminator(3, (16, 32, 64))) > 1.3


def test_autocast_takes_nothing_from_what_compares_images(prior):
    """Images that differ by .002 are told apart in float32; bfloat16 has steps of .004 near 1."""
    x, condition = pairs(2, dtype=torch.float32)
    x = 0.9 + 0.1 * x
    outputs = x.unsqueeze(1) + 0.002 * torch.randn(2, 2, *x.shape[1:], generator=torch.Generator().manual_seed(2))
    prediction = Prediction(x, outputs, torch.full((2,), 0.1), condition)
    discriminators = FeatureDiscriminator(3, prior.features, width=4), Discriminator(3, (4, 8))
    terms = [Perceptual(FeatureDistance(prior.features)), *map(Adversarial, discriminators)]

    def values():
        streams = [torch.Generator().manual_seed(i) for i in range(2)]
        own = [DiscriminatorLoss(1.0)(d, prediction, streams)[0] for d in discriminators]
        return torch.stack([*own, *(term(prediction) for term in terms)]).detach()

    expected = values()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(values(), expected, rtol=1e-6, atol=0)


def test_the_page_builds_it_from_the_prior_of_the_run(prior_folder, tmp_path):
    chosen = ["discriminator=features", "discriminator.width=4", "loss.adversarial=0.1"]
    with composed("experiment=photos_gaussian_blur", *chosen, folder=tmp_path) as config:
        config.prior = prior_folder
        module = build(config.training, "training")
    assert isinstance(module.discriminator, FeatureDiscriminator)
    assert module.discriminator.features == module.prior.features
    assert len(module.discriminator.heads) == 2


def test_impossible_widths_and_inputs_are_refused(prior):
    with pytest.raises(ValueError, match="width=0"):
        FeatureDiscriminator(3, prior.features, width=0)
    discriminator = FeatureDiscriminator(3, prior.features, width=4)
    with pytest.raises(ValueError, match="3 channels"):
        discriminator(torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16))
