import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import sigmoid, softplus

from ud2m.losses.adversarial import Adversarial, Discriminator, DiscriminatorLoss, gradient_square
from ud2m.losses.generator import GeneratorLoss, build_generator_loss
from ud2m.losses.terms import (
    L2,
    EnergyScore,
    FeatureDistance,
    FeatureEnergyScore,
    LossTerm,
    MeanL2,
    NonFiniteLossError,
    Perceptual,
    Prediction,
)

CONF = Path(__file__).resolve().parents[1] / "conf"


def prediction(batch=3, outputs=2, channels=3, size=(8, 8), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    image = (channels, *size)
    return Prediction(rand(batch, *image), rand(batch, outputs, *image), 0.1 + rand(batch), rand(batch, *image))


class Bank(nn.Module):
    """Two layers of fixed random features."""

    def __init__(self, channels=3):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.fine = torch.randn(5, channels, 3, 3, generator=generator, dtype=torch.float64)
        self.coarse = torch.randn(4, 5, 2, 2, generator=generator, dtype=torch.float64)

    def forward(self, x):
        fine = torch.conv2d(x, self.fine, padding=1).tanh()
        return [fine, torch.conv2d(fine, self.coarse, stride=2)]


class Explode(LossTerm):
    def forward(self, prediction):
        raise AssertionError("a term of weight 0 was called")


# --- prediction and reconstruction terms ---------------------------------------------------------------------


def test_repeat_stands_beside_the_flat_outputs():
    p = prediction()
    for i, output in enumerate(p.flat_outputs):
        torch.testing.assert_close(output, p.outputs[i // 2, i % 2])
        torch.testing.assert_close(p.repeat(p.condition)[i], p.condition[i // 2])


def test_prediction_refuses_shapes():
    p = prediction()
    with pytest.raises(ValueError, match="outputs must be"):
        Prediction(p.x0, p.outputs[:, 0], p.sigma, p.condition)
    with pytest.raises(ValueError, match="outputs must be"):
        Prediction(p.x0[:2], p.outputs, p.sigma, p.condition)
    with pytest.raises(ValueError, match="sigma must be"):
        Prediction(p.x0, p.outputs, p.sigma[:1], p.condition)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("constant", lambda s: 1.0), ("epsilon", lambda s: 1 / s**2), ("edm", lambda s: (s**2 + 0.0625) / (s / 4) ** 2)],
)
def test_l2_against_a_loop(weighting, weight):
    p = prediction()
    values = [
        weight(float(p.sigma[b])) * np.mean((p.x0[b].numpy() - p.outputs[b, m].numpy()) ** 2)
        for b in range(3)
        for m in range(2)
    ]
    assert L2(weighting)(p).item() == pytest.approx(np.mean(values))


def test_l2_weighs_all_levels_alike_by_default():
    # Regression: L2 on eps weighs sigma = 0.01 ten thousand times more than sigma = 1 for the same error in x0.
    p = prediction(batch=2)
    outputs = (p.x0.unsqueeze(1) + 0.1).requires_grad_()
    L2()(Prediction(p.x0, outputs, torch.tensor([0.01, 1.0]), p.condition)).backward()
    torch.testing.assert_close(outputs.grad[0], outputs.grad[1])


@pytest.mark.parametrize("outputs", [2, 3])
def test_mean_l2_against_a_loop(outputs):
    p = prediction(outputs=outputs)
    errors = (p.x0.unsqueeze(1) - p.outputs).numpy()
    pairs = [(i, j) for i in range(outputs) for j in range(outputs) if i != j]
    expected = np.mean([(errors[:, i] * errors[:, j]).mean() for i, j in pairs])
    assert MeanL2(outputs)(p).item() == pytest.approx(expected)


def test_mean_l2_sees_the_mean_and_not_the_spread():
    """For outputs m + s n the expectation is |x0 - m|^2, whatever s: here to 5 standard errors of the estimate."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(20_000, 1, 2, 2, dtype=torch.float64)
    for spread in (0.0, 0.5, 2.0):
        noise = torch.randn(20_000, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
        estimate = MeanL2()(Prediction(x0, 0.3 + spread * noise, torch.ones(20_000), x0)).item()
        standard_error = (spread**4 + 2 * (0.3 * spread) ** 2) ** 0.5 / (4 * 20_000) ** 0.5
        assert abs(estimate - 0.09) <= 5 * standard_error + 1e-12


def test_unknown_weighting():
    with pytest.raises(ValueError, match="unknown weighting 'eps' of the L2 term; allowed: constant, epsilon, edm"):
        L2("eps")


def test_feature_distance_against_a_loop():
    p, bank = prediction(batch=2), Bank()
    for weights in (None, [0.5, 2.0]):
        expected = np.zeros(4)
        for n in range(4):
            x, r = p.flat_outputs[n : n + 1], p.x0[n // 2 : n // 2 + 1]
            for layer, (a, b) in enumerate(zip(bank(x), bank(r), strict=True)):
                a, b = a[0].numpy(), b[0].numpy()
                cells = [
                    np.sum((a[:, i, j] / np.linalg.norm(a[:, i, j]) - b[:, i, j] / np.linalg.norm(b[:, i, j])) ** 2)
                    for i in range(a.shape[1])
                    for j in range(a.shape[2])
                ]
                expected[n] += (weights[layer] if weights else 1) * np.mean(cells)
        distance = FeatureDistance(bank, weights)
        np.testing.assert_allclose(distance(p.flat_outputs, p.repeat(p.x0)), expected)
        assert Perceptual(distance)(p).item() == pytest.approx(expected.mean())
    with pytest.raises(ValueError, match="3 feature weights for 2 layers"):
        FeatureDistance(bank, [1, 1, 1])(p.x0, p.x0)


def test_feature_distance_has_a_finite_gradient_at_zero_features():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    FeatureDistance(Bank())(x, torch.rand(1, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert torch.isfinite(x.grad).all()


# --- energy score --------------------------------------------------------------------------------------------


def windows(side, patch):
    """First and last+1 rows of the patches: stride patch // 2, until the side is covered, the last one cut."""
    stride, starts = max(1, patch // 2), [0]
    while starts[-1] + patch < side:
        starts.append(starts[-1] + stride)
    return [(start, min(start + patch, side)) for start in starts]


def naive_energy(x0, outputs, patch, spread, entries=True):
    """Mean over samples and patches of the score in plain loops; ``entries``: divide by channels too."""
    scores = []
    for x, draws in zip(x0, outputs, strict=True):
        for top, bottom in windows(x.shape[1], patch):
            for left, right in windows(x.shape[2], patch):

                def norm(d, rows=slice(top, bottom), columns=slice(left, right)):
                    cut = d[:, rows, columns]
                    return np.linalg.norm(cut) / math.sqrt(cut.size if entries else cut[0].size)

                count = len(draws)
                error = np.mean([norm(x - d) for d in draws])
                pairs = [norm(draws[i] - draws[j]) for i in range(count) for j in range(count) if i != j]
                scores.append(error - spread / 2 * np.mean(pairs))
    return np.mean(scores)


@pytest.mark.parametrize("outputs", [2, 3])
@pytest.mark.parametrize(("size", "patch"), [((8, 8), 4), ((9, 11), 4), ((8, 10), 8), ((7, 7), 1), ((10, 7), 5)])
def test_energy_score_against_loops(outputs, size, patch):
    p = prediction(outputs=outputs, size=size)
    term = EnergyScore(patch, spread=0.8, num_outputs=outputs)
    expected = naive_energy(p.x0.numpy(), p.outputs.numpy(), patch, 0.8)
    assert term(p).item() == pytest.approx(expected, rel=1e-6)


def test_two_outputs_give_the_formula_of_the_design():
    p = prediction(size=(8, 8))
    x, a, b = p.x0, p.outputs[:, 0], p.outputs[:, 1]

    def norm(d):
        return d.flatten(1).norm(dim=1) / math.sqrt(d[0].numel())

    expected = (norm(x - a) / 2 + norm(x - b) / 2 - norm(a - b) / 2).mean()
    torch.testing.assert_close(EnergyScore(patch_size=8)(p), expected, rtol=1e-6, atol=0)


def gaussian_score(mean, std, spread, true_std=0.2):
    """Return the expected score of N(mean, std^2) for the truth N(0, true_std^2), in closed form (one pixel)."""
    variance = std**2 + true_std**2
    folded = math.sqrt(2 * variance / math.pi) * math.exp(-(mean**2) / (2 * variance))
    folded += mean * math.erf(mean / math.sqrt(2 * variance))
    return folded - spread / 2 * 2 * std / math.sqrt(math.pi)


def monte_carlo(noise, outputs, true_cov, model_cov, mean, spread):
    """Return the term on pixels with two channels, truth N(0, true_cov), model N(mean, model_cov)."""
    x0 = noise[:, 0] @ np.linalg.cholesky(true_cov).T
    draws = noise[:, 1 : 1 + outputs] @ np.linalg.cholesky(model_cov).T + mean
    x0, draws = (torch.as_tensor(v)[..., None, None] for v in (x0, draws))
    dummy = torch.zeros(len(x0), dtype=torch.float64)
    return EnergyScore(1, spread, outputs)(Prediction(x0, draws, dummy, x0)).item()


@pytest.mark.parametrize("spread", [1.0, 0.7])
def test_minimiser_over_a_gaussian(spread):
    # The term's Monte-Carlo value follows the closed form, whose minimiser over (mean, std) is the truth for
    # spread = 1, and has std ratio spread / sqrt(2 - spread^2) otherwise.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 3, 1, 1, 1, generator=generator, dtype=torch.float64)
    for mean, std in [(0.0, 0.2), (0.1, 0.2), (0.0, 0.05)]:
        p = Prediction(0.2 * noise[:, 0], mean + std * noise[:, 1:], torch.ones(200_000), noise[:, 0])
        expected = gaussian_score(mean, std, spread)
        assert EnergyScore(1, spread)(p).item() == pytest.approx(expected, abs=1e-3)
    grid = [(m, s) for m in np.linspace(-0.2, 0.2, 41) for s in np.linspace(0.01, 0.4, 391)]
    mean, std = min(grid, key=lambda point: gaussian_score(*point, spread))
    assert mean == pytest.approx(0, abs=1e-9)
    assert std / 0.2 == pytest.approx(spread / math.sqrt(2 - spread**2), abs=0.006)


def test_proper_score_finds_mean_std_and_correlation():
    noise = np.random.default_rng(0).standard_normal((100_000, 3, 2))

    def cov(std, correlation):
        return std**2 * np.array([[1, correlation], [correlation, 1]])

    def score(mean=0.0, std=0.2, correlation=0.8, spread=1.0):
        return monte_carlo(noise, 2, cov(0.2, 0.8), cov(std, correlation), mean, spread)

    assert min(np.linspace(-0.1, 0.1, 5), key=lambda m: score(mean=m)) == pytest.approx(0)
    assert min(np.linspace(0.1, 0.3, 9), key=lambda s: score(std=s)) == pytest.approx(0.2)
    assert min([0.0, 0.4, 0.6, 0.8, 0.9], key=lambda c: score(correlation=c)) == 0.8
    assert min(np.linspace(0.1, 0.3, 9), key=lambda s: score(std=s, spread=0.7)) <= 0.125


def test_gradients_are_finite_where_outputs_coincide():
    p = prediction()
    outputs = p.x0.unsqueeze(1).repeat(1, 2, 1, 1, 1).requires_grad_()
    same = Prediction(p.x0, outputs, p.sigma, p.condition)
    for term in (EnergyScore(4), FeatureEnergyScore(Bank())):
        (gradient,) = torch.autograd.grad(term(same), outputs)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e-6


def test_gradient_pulls_to_x0_and_pushes_outputs_apart():
    p = prediction(batch=1)
    outputs = torch.stack([p.x0, p.x0 + 0.01], 1).requires_grad_()
    EnergyScore(8, spread=1.0)(Prediction(p.x0, outputs, p.sigma, p.condition)).backward()
    # The first output is at x0, where only the second term acts: away from the other output, i.e. downwards.
    assert (outputs.grad[:, 0] > 0).all()
    torch.testing.assert_close(outputs.grad[:, 1], torch.zeros_like(p.x0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch", [1, 3])
def test_feature_energy_score_against_loops(patch):
    p, bank = prediction(), Bank()

    def unit(x):
        return [f.numpy() / np.linalg.norm(f.numpy(), axis=-3, keepdims=True) for f in bank(x)]

    draws = [f.reshape(3, 2, *f.shape[1:]) for f in unit(p.flat_outputs)]
    expected = sum(
        naive_energy(target, draw, patch, 1.0, entries=False) for target, draw in zip(unit(p.x0), draws, strict=True)
    )
    assert FeatureEnergyScore(bank, patch)(p).item() == pytest.approx(expected, rel=1e-5)


def test_feature_patches_larger_than_a_layer_are_cut_to_it():
    p = prediction(size=(4, 4))
    torch.testing.assert_close(FeatureEnergyScore(Bank(), 100)(p), FeatureEnergyScore(Bank(), 4)(p))


def test_energy_score_refuses_knobs_and_small_images():
    for knobs in ({"patch_size": 0}, {"spread": -0.1}, {"spread": 1.5}, {"num_outputs": 1}):
        with pytest.raises(ValueError, match="energy score needs"):
            EnergyScore(**knobs)
        with pytest.raises(ValueError, match="energy score needs"):
            FeatureEnergyScore(Bank(), **knobs)
    with pytest.raises(ValueError, match=r"\(9\) exceed the image, 8x8"):
        EnergyScore(9)(prediction())


# --- adversarial pair ----------------------------------------------------------------------------------------


class Linear(nn.Module):
    """D(x, condition) = <a, x> + c <condition, 1> with an optional quadratic term b |x|^2 / 2, one logit."""

    def __init__(self, shape, b=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.a = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x, condition):
        linear = (self.a * x).flatten(1).sum(1) + condition.flatten(1).sum(1)
        return linear + self.b * x.square().flatten(1).sum(1) / 2


class PatchMap(nn.Module):
    """D = 1x1 convolution w: a map of logits, whose mean has the gradient w / (H W) at every pixel."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1))

    def forward(self, x, condition):
        return torch.conv2d(x, self.w)


def penalty_of(discriminator, p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DiscriminatorLoss(10.0)(discriminator, p, generator)[1]["gradient_penalty"]


REFERENCE = 8 * 8 / 256**2 / 4  # of images of 8x8 in [0, 1] to those of 256x256 in [-1, 1]


def test_gradient_penalty_in_closed_form():
    p = prediction()
    linear, patches, quadratic = Linear((3, 8, 8)), PatchMap(), Linear((3, 8, 8), b=0.7)
    torch.testing.assert_close(penalty_of(linear, p), REFERENCE * linear.a.square().sum().detach())
    torch.testing.assert_close(penalty_of(patches, p), torch.tensor(REFERENCE * 14.0 / 64, dtype=torch.float64))
    u = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).view(3, 1, 1, 1)
    mixed = u * p.x0 + (1 - u) * p.outputs[:, 0]
    expected = (quadratic.a + 0.7 * mixed).square().sum((1, 2, 3)).mean().detach()
    torch.testing.assert_close(penalty_of(quadratic, p), REFERENCE * expected)


def test_the_penalty_depends_neither_on_the_size_of_crops_nor_on_the_range_of_images():
    torch.manual_seed(0)
    discriminator = Discriminator(3, widths=(8, 16)).double()
    found = []
    for side in (32, 64, 128):
        x = torch.rand(4, 3, side, side, dtype=torch.float64)
        found.append(gradient_square(discriminator, x, x).mean().item())
    assert max(found) < 1.15 * min(found)  # the border counts more in small crops; the plain square differs 16 times
    signed = torch.rand(1, 3, 256, 256, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    image = (signed + 1) / 2
    (gradient,) = torch.autograd.grad(discriminator(image, image.detach()).mean(), signed)
    expected = gradient.square().sum()
    torch.testing.assert_close(gradient_square(discriminator, image, image.detach())[0].detach(), expected)


def test_gradient_penalty_is_differentiable_in_the_discriminator():
    # d/da |a|^2 = 2 a, d/d(b) of the mean of |a + b x|^2 = 2 <a + b x, x>.
    p, quadratic = prediction(), Linear((3, 8, 8), b=0.7)
    generator = torch.Generator().manual_seed(0)
    total, values = DiscriminatorLoss(10.0)(quadratic, p, generator)
    plain, _ = DiscriminatorLoss(0.0)(quadratic, p)
    torch.testing.assert_close((total - plain).detach(), 10 * values["gradient_penalty"])
    (gradient,) = torch.autograd.grad(total - plain, quadratic.b)
    u = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).view(3, 1, 1, 1)
    mixed = u * p.x0 + (1 - u) * p.outputs[:, 0]
    expected = REFERENCE * 10 * (2 * (quadratic.a + 0.7 * mixed) * mixed).sum((1, 2, 3)).mean()
    torch.testing.assert_close(gradient, expected.detach())


def test_interpolation_takes_one_generator_per_sample():
    # Row b depends on generator b alone: accumulated halves equal the whole batch.
    def loss(rows):
        part = Prediction(p.x0[rows], p.outputs[rows], p.sigma[rows], p.condition[rows])
        streams = [torch.Generator().manual_seed(i) for i in range(4)[rows]]
        return DiscriminatorLoss(1.0)(quadratic, part, streams)[0]

    p, quadratic = prediction(batch=4), Linear((3, 8, 8), b=0.7)
    torch.testing.assert_close(loss(slice(0, 4)), (loss(slice(0, 2)) + loss(slice(2, 4))) / 2)


def test_no_penalty_costs_no_second_derivative(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("differentiated"))
    _, values = DiscriminatorLoss(0.0)(Linear((3, 8, 8)), prediction())
    assert values.keys() == {"discriminator", "accuracy/real", "accuracy/generated"}


def test_accuracies_are_shares_of_logits_on_the_right_side():
    p = prediction(batch=4)
    real, generated = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([-1.0, 1, 1, 1, -1, 1, 1, 1])
    _, values = DiscriminatorLoss(0.0)(lambda x, condition: real if len(x) == 4 else generated, p)
    assert (values["accuracy/real"], values["accuracy/generated"]) == (0.75, 0.25)


def test_the_two_updates_leave_each_other_alone():
    p, discriminator = prediction(), Linear((3, 8, 8), b=0.1)
    outputs = p.outputs.clone().requires_grad_()
    attached = Prediction(p.x0, 2 * outputs, p.sigma, p.condition)
    DiscriminatorLoss(10.0)(discriminator, attached)[0].backward(retain_graph=True)
    assert outputs.grad is None
    assert discriminator.a.grad is not None
    discriminator.zero_grad()
    term = Adversarial(discriminator)
    term(attached).backward()
    assert outputs.grad.abs().max() > 0
    assert discriminator.a.grad is None
    assert list(term.parameters()) == []  # registered once, by its owner


def test_adversarial_term_against_its_formula():
    p, discriminator = prediction(), Linear((3, 8, 8))
    expected = [
        math.log1p(math.exp(-discriminator(p.outputs[b, m][None], p.condition[b][None]).item()))
        for b in range(3)
        for m in range(2)
    ]
    assert Adversarial(discriminator)(p).item() == pytest.approx(np.mean(expected))
    real, fake = (
        softplus(-discriminator(p.x0, p.condition)),
        softplus(torch.stack([discriminator(p.outputs[:, m], p.condition) for m in range(2)])),
    )
    value = DiscriminatorLoss(0.0)(discriminator, p)[0]
    torch.testing.assert_close(value, real.mean() + fake.mean())


def test_undecided_discriminator_pays_log_4():
    p = prediction()
    real_is_fake = Prediction(p.x0, p.x0.unsqueeze(1), p.sigma, p.condition)
    zero = Linear((3, 8, 8))
    nn.init.zeros_(zero.a)
    zero.forward = lambda x, condition: (zero.a * x).flatten(1).sum(1)
    assert DiscriminatorLoss(0.0)(zero, real_is_fake)[0].item() == pytest.approx(math.log(4))
    # No D does better on identical data: softplus(-d) + softplus(d) >= log 4.
    assert DiscriminatorLoss(0.0)(Linear((3, 8, 8)), real_is_fake)[0].item() > math.log(4)


@pytest.mark.parametrize("squash", [False, True])
def test_loss_reaches_its_floor_on_separable_data_unless_d_is_squashed(squash):
    # Regression: with a sigmoid in D *and* in the loss the value stays above log(1 + 1/e) + log 2 = 1.006.
    torch.manual_seed(0)
    p = prediction(batch=16, channels=1, dtype=torch.float32)
    separable = Prediction(0.5 + p.x0 / 2, p.outputs / 4, p.sigma, p.condition)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    optimiser = torch.optim.Adam(layers.parameters(), 0.1)

    def discriminator(x, condition):
        return sigmoid(layers(x)) if squash else layers(x)

    for _ in range(100):
        loss, _ = DiscriminatorLoss(0.0)(discriminator, separable)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (loss.item() > 1.0) if squash else (loss.item() < 0.1)


# --- the weighted sum ----------------------------------------------------------------------------------------


def test_weighted_sum_and_values():
    p = prediction()
    total, values = GeneratorLoss({"l2": (2.0, L2()), "energy": (0.5, lambda: EnergyScore(4))})(p)
    torch.testing.assert_close(total, 2 * values["l2"] + 0.5 * values["energy"])
    torch.testing.assert_close(values["l2"], L2()(p))
    torch.testing.assert_close(values["energy"], EnergyScore(4)(p))


def test_terms_of_weight_zero_are_neither_made_nor_called():
    loss = GeneratorLoss({"l2": (1, L2()), "a": (0, Explode()), "b": (0.0, lambda: pytest.fail("made"))})
    loss(prediction(outputs=1))
    assert list(loss.terms) == ["l2"]
    assert loss.num_outputs == 1
    assert loss.discriminator is None


def test_num_outputs_is_that_of_the_most_demanding_active_term():
    loss = GeneratorLoss({"l2": (1, L2()), "energy": (1, EnergyScore(4, num_outputs=3))})
    assert loss.num_outputs == 3
    with pytest.raises(ValueError, match="needs 3 outputs per sample, got 2"):
        loss(prediction())


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "1"])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match=r"'l2' must be a finite number >= 0"):
        GeneratorLoss({"l2": (weight, L2())})
    with pytest.raises(ValueError, match=r"'gradient_penalty' must be"):
        DiscriminatorLoss(weight)


def test_a_loss_without_terms_is_refused():
    with pytest.raises(ValueError, match="no loss term has a positive weight; set one of l2"):
        GeneratorLoss({"l2": (0, L2())})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_terms_are_named(bad):
    p = prediction()
    outputs = p.outputs.clone()
    outputs[0, 0, 0, 0, 0] = bad
    broken = Prediction(p.x0, outputs, p.sigma, p.condition)
    with pytest.raises(NonFiniteLossError, match=r"'energy' is (nan|inf)") as caught:
        GeneratorLoss({"energy": (1, EnergyScore(4)), "l2": (1, L2())})(broken)
    assert caught.value.term == "energy"
    with pytest.raises(NonFiniteLossError, match="'discriminator'"):
        DiscriminatorLoss(1.0)(Linear((3, 8, 8)), broken)


# --- configuration -------------------------------------------------------------------------------------------


def configured(*overrides):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(overrides=["+loss=default", "+discriminator=small", *overrides])


def built(config, discriminator=None):
    make = hydra.utils.instantiate(config.loss.generator)
    return make(features=Bank(), discriminator=discriminator or (lambda: pytest.fail("discriminator made")))


def test_every_term_can_be_switched_on_from_the_command_line():
    # Oracle: the terms made by hand. One discriminator is made, by the partial of its own config.
    weights = ["loss.l2=1", "loss.perceptual=2", "loss.energy=3", "loss.feature_energy=4", "loss.adversarial=5"]
    config = configured(*weights, "loss.terms.energy.term.spread=0.85")
    made = []

    def discriminator():
        made.append(hydra.utils.instantiate(config.discriminator)(channels=3).double())
        return made[-1]

    loss, p, bank = built(config, discriminator), prediction(), Bank()
    assert made == [loss.discriminator]
    total, values = loss(p)
    expected = {
        "l2": L2()(p),
        "perceptual": Perceptual(FeatureDistance(bank))(p),
        "energy": EnergyScore(spread=0.85)(p),
        "feature_energy": FeatureEnergyScore(bank)(p),
        "adversarial": Adversarial(made[0])(p),
    }
    assert values == {name: pytest.approx(value.item()) for name, value in expected.items()}
    assert total.item() == pytest.approx(sum(w * v.item() for w, v in zip(range(1, 6), expected.values(), strict=True)))


def test_terms_switched_off_in_the_config_ask_for_nothing():
    loss = built(configured("loss.l2=1", "loss.energy=0", "loss/distance=lpips"))
    assert list(loss.terms) == ["l2"]


def test_lpips_is_chosen_by_group_and_missing_weights_are_named(tmp_path):
    overrides = ("loss.perceptual=0.1", "loss/distance=lpips", "loss.distance.net=alex")
    config = configured(*overrides, f"loss.distance.weights={tmp_path}/x.pth")
    with pytest.raises(Exception, match=r"x\.pth do not exist"):
        built(config)


def test_features_of_lpips_are_chosen_by_group_and_missing_weights_are_named(tmp_path):
    overrides = ("loss.feature_energy=0.1", "loss/features=lpips", "loss.features.net=alex")
    config = configured(*overrides, f"loss.features.weights={tmp_path}/x.pth")
    with pytest.raises(Exception, match=r"x\.pth do not exist"):
        built(config)


def test_gradient_penalty_and_knobs_reach_their_objects():
    config = configured("loss.gradient_penalty=0.01", "loss.terms.energy.term.spread=0.7", "loss.energy=1")
    assert hydra.utils.instantiate(config.loss.discriminator).gradient_penalty == 0.01
    assert built(config).terms["energy"].spread == 0.7
    paper = hydra.utils.instantiate(configured("discriminator=paper").discriminator)(channels=3)
    assert [m.out_channels for m in paper.modules() if isinstance(m, nn.Conv2d)] == [32, 64, 128, 256, 128, 64, 1]


def test_a_bound_part_is_not_replaced():
    mine = Bank()
    terms = {"x": {"weight": 1, "term": partial(FeatureEnergyScore, features=mine)}}
    loss = build_generator_loss(terms, features=Bank(), discriminator=lambda: pytest.fail("made"))
    assert loss.terms["x"].features is mine


def test_terms_share_one_discriminator():
    terms = {name: {"weight": 1, "term": partial(Adversarial)} for name in ("a", "b")}
    loss = build_generator_loss(terms, features=Bank(), discriminator=lambda: Linear((3, 8, 8)))
    assert loss.terms["a"].discriminator is loss.terms["b"].discriminator


def with_graph(p):
    return replace(p, outputs=p.outputs.clone().requires_grad_())


def test_measured_gradients_are_those_of_the_weighted_terms():
    p = with_graph(prediction())
    loss = GeneratorLoss({"l2": (3.0, L2()), "mean_l2": (0.5, MeanL2())})
    total, values = loss(p, measured=True)
    torch.testing.assert_close(total, loss(p)[0])
    # d/dL of 3 |x0 - L|^2 averaged over all outputs and entries
    expected = 3 * 2 * (p.outputs - p.x0.unsqueeze(1)).detach() / p.outputs.numel()
    torch.testing.assert_close(values["gradient/l2"], expected.square().mean().sqrt())
    (gradient,) = torch.autograd.grad(0.5 * MeanL2()(p), p.outputs)
    step = 1e-6 * torch.randn(p.outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = [replace(p, outputs=p.outputs.detach() + sign * step) for sign in (1, -1)]
    along = (0.5 * MeanL2()(moved[0]) - 0.5 * MeanL2()(moved[1])) / 2
    torch.testing.assert_close(along, (gradient * step).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(values["gradient/mean_l2"], gradient.square().mean().sqrt())


def test_relative_weights_are_shares_of_the_first_terms_gradient():
    p = with_graph(prediction())
    p = replace(p, condition=torch.zeros_like(p.condition))  # D near 0, where its sigmoid is not flat
    weak = Linear((3, 8, 8))  # whatever the size of D's gradient,
    with torch.no_grad():
        for weight in weak.parameters():
            weight *= 0.1
    terms = {"l2": (2.0, L2()), "adversarial": (0.3, Adversarial(weak))}
    total, values = GeneratorLoss(terms, relative=True)(p, measured=True)
    (l2,) = torch.autograd.grad(L2()(p), p.outputs)
    (adversarial,) = torch.autograd.grad(Adversarial(weak)(p), p.outputs)
    (found,) = torch.autograd.grad(total, p.outputs)
    torch.testing.assert_close(found, 2 * l2 + 0.3 * l2.norm() / adversarial.norm() * adversarial)
    torch.testing.assert_close(values["gradient/adversarial"], 0.3 / 2 * values["gradient/l2"])
    assert values["l2"] == L2()(p).detach()  # values stay as they are


def test_a_vanished_term_is_not_raised_without_bound():
    p, silent = with_graph(prediction()), Linear((3, 8, 8))
    with torch.no_grad():
        for weight in silent.parameters():
            weight *= 0
    total, _ = GeneratorLoss({"l2": (1.0, L2()), "adversarial": (1.0, Adversarial(silent))}, relative=True)(p)
    assert torch.isfinite(total)
    (found,) = torch.autograd.grad(total, p.outputs)
    torch.testing.assert_close(found, torch.autograd.grad(L2()(p), p.outputs)[0])


def test_while_the_discriminator_learns_the_sum_leaves_its_term_out():
    p, discriminator = prediction(), Linear((3, 8, 8))
    loss = GeneratorLoss({"l2": (1.0, L2()), "adversarial": (2.0, Adversarial(discriminator))})
    total, values = loss(p)
    alone, same = loss(p, judged=False)
    torch.testing.assert_close(alone, values["l2"])
    torch.testing.assert_close(total, values["l2"] + 2 * values["adversarial"])
    assert same == values
    only = GeneratorLoss({"adversarial": (2.0, Adversarial(discriminator))})
    outputs = p.outputs.clone().requires_grad_()
    only(replace(p, outputs=outputs), judged=False)[0].backward()
    assert outputs.grad.abs().max() == 0


@pytest.mark.parametrize(("relative", "measured"), [(True, False), (True, True), (False, True), (False, False)])
def test_terms_are_differentiated_once_and_the_gradient_is_the_weighted_sum(relative, measured):
    passes = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            passes.append(1)
            return gradient

    class Term(LossTerm):
        num_outputs = 1

        def __init__(self, power):
            super().__init__()
            self.power = power

        def forward(self, prediction):
            return Counted.apply(prediction.outputs).abs().pow(self.power).mean()

    p = prediction()
    loss = GeneratorLoss({"a": (2.0, Term(2)), "b": (0.5, Term(3))}, relative=relative)
    p.outputs.requires_grad_(True)
    total, values = loss(p, measured=measured)
    total.backward()
    assert len(passes) == 2
    x = p.outputs.detach()
    first, second = 2 * x / x.numel(), 3 * x.abs() * x / x.numel()
    share = (first.square().mean() / second.square().mean()).sqrt() if relative else 1.0
    torch.testing.assert_close(p.outputs.grad, 2 * first + 0.5 * share * second)
    expected = 2 * x.square().mean() + 0.5 * share * x.abs().pow(3).mean()
    torch.testing.assert_close(total.detach(), expected)
    assert ("gradient/b" in values) == measured
