import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from measuring import evaluate
from operators import generator
from skimage.metrics import peak_signal_noise_ratio

from ud2m.evaluation import scores
from ud2m.evaluation.features import LPIPSDistance
from ud2m.evaluation.measure import Measurement
from ud2m.evaluation.metrics import calibration_ratio, spread_and_error, ssim
from ud2m.evaluation.scores import build_score, fitting_scores
from ud2m.physics import GaussianBlur, Inpainting, SuperResolution
from ud2m.physics.problem import Problem
from ud2m.random import randn_like

SHAPE = (3, 16, 16)
FAMILIES = [GaussianBlur(), SuperResolution(), Inpainting()]
each_family = pytest.mark.parametrize("family", FAMILIES)


def images(count=5, seed=0):
    return torch.rand(count, *SHAPE, generator=generator(seed))


class Prepared:
    """A sampler that hands out samples made before and keeps what it was given."""

    networks = ()

    def __init__(self, samples=None):
        self.samples, self.position, self.calls = samples, 0, []

    def __call__(self, y, physics, sigma_y, num_samples=1, *, generator=None):
        self.calls.append(SimpleNamespace(y=y, physics=physics, sigma_y=sigma_y, generator=generator))
        start, self.position = self.position, self.position + len(y)
        if self.samples is None:
            return torch.zeros(len(y), num_samples, *SHAPE)
        assert self.samples.shape[1] == num_samples
        return self.samples[start : self.position]


def prepared(x0, num_samples, spread=0.1):
    noise = spread * torch.randn(len(x0), num_samples, *SHAPE, generator=generator(3))
    offset = spread * torch.randn(len(x0), 1, *SHAPE, generator=generator(4))
    return x0.unsqueeze(1) + noise + offset


@each_family
@pytest.mark.parametrize("sizes", [[5], [3, 2], [1, 1, 3]])
def test_scores_are_those_computed_directly(family, sizes):
    x0, problem = images(), Problem(family, 0.05, seed=3)
    samples = prepared(x0, 4)
    method = Prepared(samples)
    distances = {"worst": lambda x, reference: (x - reference).abs().flatten(1).amax(1)}
    row = evaluate(method, x0.split(sizes), problem, num_samples=4, distances=distances)

    reference, drawn = x0.double().numpy(), samples.double().numpy()
    pairs = [(drawn[i, s], reference[i]) for i in range(5) for s in range(4)]
    assert row["psnr"] == pytest.approx(
        np.mean([peak_signal_noise_ratio(r, x, data_range=1) for x, r in pairs]), abs=1e-4
    )
    means = [peak_signal_noise_ratio(reference[i], drawn[i].mean(0), data_range=1) for i in range(5)]
    assert row["psnr_mean"] == pytest.approx(np.mean(means), abs=1e-4)
    assert row["psnr_mean"] > row["psnr"] + 1
    assert row["ssim"] == pytest.approx(np.mean([ssim(samples[:, s], x0).mean().item() for s in range(4)]), abs=1e-5)
    assert row["worst"] == pytest.approx(np.mean([abs(x - r).max() for x, r in pairs]), abs=1e-5)
    residuals = []
    for call, part in zip(method.calls, samples.split(sizes), strict=True):
        for s in range(4):
            error = call.physics.A(part[:, s]) - call.y
            # of an inpainting only the known pixels are measurements
            count = call.physics.mask.flatten(1).sum(1) * 3 if isinstance(family, Inpainting) else error[0].numel()
            residuals.append(error.flatten(1).norm(dim=1) / (0.05 * torch.as_tensor(count).sqrt()))
    assert row["residual"] == pytest.approx(torch.cat(residuals).mean().item(), rel=1e-5)


@pytest.mark.parametrize("num_samples", [2, 8])
@pytest.mark.parametrize("sizes", [[6], [4, 2]])
def test_r_is_the_calibration_ratio_of_all_images_together(num_samples, sizes):
    x0 = images(6)
    samples = prepared(x0, num_samples)
    samples[0] += 0.5  # a ratio of means is not a mean of ratios
    row = evaluate(Prepared(samples), x0.split(sizes), Problem(GaussianBlur(), 0.05), num_samples=num_samples)
    assert row["r"] == pytest.approx(calibration_ratio(*spread_and_error(samples, x0)), rel=1e-5)
    assert not any(name.startswith("_") for name in row)


def test_r_of_draws_from_the_same_law_is_one():
    draws = torch.randn(40, 9, *SHAPE, generator=generator(5)) * 0.1
    row = evaluate(Prepared(draws[:, 1:]), [draws[:, 0]], Problem(GaussianBlur(), 0.05), num_samples=8)
    assert row["r"] == pytest.approx(1, abs=0.02)


def test_one_sample_has_no_r():
    x0 = images()
    row = evaluate(Prepared(prepared(x0, 1)), [x0], Problem(GaussianBlur(), 0.05), num_samples=1)
    assert "r" not in row
    assert row["psnr"] == pytest.approx(row["psnr_mean"])


@each_family
def test_the_truth_scores_as_truth(family):
    x0 = images()
    row = evaluate(Prepared(x0.unsqueeze(1).expand(-1, 2, *SHAPE)), [x0], Problem(family, 0.05), num_samples=2)
    assert row["psnr"] == math.inf
    assert row["ssim"] == pytest.approx(1)
    assert row["residual"] == pytest.approx(1, abs=0.15)
    assert row["r"] is None


# --- the problem ---------------------------------------------------------------------------------------------


def given(problem, x0, sizes):
    """Return y [B, ...] and masks (or None) that a method is given."""
    method = Prepared()
    evaluate(method, x0.split(sizes), problem, num_samples=2)
    masks = [getattr(call.physics, "mask", None) for call in method.calls]
    masks = torch.cat(masks) if isinstance(problem.operator, Inpainting) else None
    return torch.cat([call.y for call in method.calls]), masks


@each_family
def test_noise_and_masks_do_not_depend_on_batches_or_methods(family):
    x0 = images(6)
    expected, masks = given(Problem(family, 0.05), x0, [6])
    for sizes in ([6], [1] * 6, [4, 2]):
        y, other = given(Problem(family, 0.05), x0, sizes)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
        assert masks is None or torch.equal(other, masks)


@each_family
def test_noise_and_masks_differ_between_images_and_seeds(family):
    x0 = images(1).expand(3, *SHAPE)
    y, masks = given(Problem(family, 0.05), x0, [3])
    other, other_masks = given(Problem(family, 0.05, seed=1), x0, [3])
    assert not torch.allclose(y[0], y[1], atol=0.01)
    assert not torch.allclose(y, other, atol=0.01)
    if masks is not None:
        assert not torch.equal(masks[0], masks[1])
        assert not torch.equal(masks, other_masks)


@each_family
def test_noise_has_the_level_of_the_problem(family):
    x0 = images(60)
    observation = Problem(family, 0.05).observe(x0)
    y, physics = observation.y, observation.physics
    noise = y - physics.A(x0)
    measured = physics.mask.expand_as(noise) == 1 if isinstance(family, Inpainting) else torch.ones_like(y) == 1
    assert noise[measured].std() == pytest.approx(0.05, rel=4 / (2 * measured.sum().item()) ** 0.5)
    assert (noise[~measured] == 0).all()


def test_observations_are_numbered_through_a_set():
    x0, problem = images(4), Problem(Inpainting(), 0.05)
    whole, tail = problem.observe(x0), problem.observe(x0[2:], first=2)
    assert torch.equal(tail.y, whole.y[2:])
    assert torch.equal(tail.physics.mask, whole.physics.mask[2:])
    assert torch.equal(whole.rows(torch.tensor([3, 2])).physics.mask, tail.physics.mask[[1, 0]])


def test_the_sampler_gets_the_noise_level_that_it_is_told():
    method, x0 = Prepared(), images()
    evaluate(method, [x0], Problem(GaussianBlur(), 0.07, noise=0.0), num_samples=3)
    torch.testing.assert_close(method.calls[0].sigma_y, torch.full((5,), 0.07))
    assert torch.equal(method.calls[0].y, method.calls[0].physics.A(x0))


def test_the_samplers_noise_is_not_that_of_the_observation():
    """Else a method would draw, from the same seed, the very noise that it has to remove."""
    method, x0 = Prepared(), images(3)
    evaluate(method, x0.split(1), Problem(GaussianBlur(), 0.05, seed=2), num_samples=2)
    drawn = [randn_like(call.y, call.generator) for call in method.calls]
    for call, clean, noise in zip(method.calls, x0.split(1), drawn, strict=True):
        observed = call.y - call.physics.A(clean)
        correlation = torch.stack([observed.flatten(), noise.flatten()]).corrcoef()[0, 1]
        assert correlation.abs() < 5 / noise.numel() ** 0.5
    assert not torch.equal(drawn[0], drawn[1])


def test_the_samplers_noise_is_the_same_for_every_method():
    states = []
    for _ in range(2):
        method = Prepared()
        evaluate(method, [images()], Problem(GaussianBlur(), 0.05))
        states.append(method.calls[0].generator.get_state())
        assert method.calls[0].generator is not None
    assert torch.equal(*states)


# --- the row -------------------------------------------------------------------------------------------------


class SumOfSquares(LPIPSDistance):
    """The distance of the metrics without its weights."""

    smallest = 1

    def __init__(self, net="squeeze"):
        torch.nn.Module.__init__(self)
        self.net = net

    def forward(self, x, reference):
        return (x - reference).square().flatten(1).mean(1)


@pytest.fixture
def weights_are_there(monkeypatch):
    monkeypatch.setattr(scores, "check_weights", lambda net: None)
    monkeypatch.setattr(scores, "lpips_distance", SumOfSquares)


def test_every_lpips_comes_with_its_backend(weights_are_there):
    x0 = images()
    row = evaluate(
        Prepared(prepared(x0, 8)),
        [x0],
        Problem(GaussianBlur(), 0.05),
        distances={"other": lambda x, reference: torch.zeros(len(x))},
        metrics=["lpips", "lpips_squeeze"],
    )
    assert row["lpips_backend"].startswith("alex, lpips ")
    assert row["lpips_squeeze_backend"].startswith("squeeze, lpips ")
    assert "other_backend" not in row


def test_lpips_is_left_out_where_images_are_too_small_for_it(weights_are_there, monkeypatch):
    monkeypatch.setattr(SumOfSquares, "smallest", 1000)
    x0 = images()
    row = evaluate(Prepared(prepared(x0, 8)), [x0], Problem(GaussianBlur(), 0.05), metrics=["psnr", "lpips"])
    assert row["psnr"] > 0
    assert not [key for key in row if key.startswith("lpips")]


def test_lpips_is_used_where_its_weights_are(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert fitting_scores(["lpips"], 2, (3, 64, 64)) == []
    with pytest.raises(ValueError, match="unknown metric 'lpisp'"):
        fitting_scores(["lpisp"], 2, (3, 64, 64))


def test_the_clock_runs_while_samples_are_drawn_alone():
    class Slow(Prepared):
        def __call__(self, *args, **options):
            time.sleep(0.2)
            return super().__call__(*args, **options)

    x0 = images(6)
    begin = time.perf_counter()
    measurement = Measurement(Slow(prepared(x0, 2)), Problem(GaussianBlur(), 0.05), [build_score("psnr")], 2)
    for part in x0.split([4, 2]):
        measurement.add(part)
        time.sleep(0.2)  # what is done between batches does not count
    whole = time.perf_counter() - begin
    # twice 0.2 s for 12 samples; a busy machine makes it more, never more than all the time but the two pauses
    assert 0.4 / 12 <= measurement.row()["seconds_per_image"] <= (whole - 0.4) / 12


def test_add_returns_what_was_observed_and_drawn():
    x0, problem = images(), Problem(GaussianBlur(), 0.05)
    samples = prepared(x0, 8)
    draws = Measurement(Prepared(samples), problem, [], 8).add(x0)
    assert torch.equal(draws.observation.y, problem.observe(x0).y)
    assert torch.equal(draws.samples, samples)


@pytest.mark.parametrize("levels", [{"sigma_y": 0.0}, {"sigma_y": 0.1, "sigma_y_range": (0.2, 0.1)}])
def test_noise_levels_that_cannot_be_are_refused(levels):
    with pytest.raises(ValueError, match="positive noise level"):
        Problem(GaussianBlur(), **levels)
