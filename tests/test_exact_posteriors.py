"""The experiment with known posteriors: its prior, its judgement, and a training of seconds."""

import importlib
import json
import sys

import pytest
import torch
from conftest import REPOSITORY

from ud2m.physics import Inpainting
from ud2m.priors.gaussian_mixture import AdaptedMixture, GaussianMixture
from ud2m.samplers.deepinv import Langevin

sys.path[:0] = [str(REPOSITORY / "benchmarks")]
exact_posteriors = importlib.import_module("exact_posteriors")

SHAPE = (1, 4, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def mixture():
    root = torch.randn(2, 16, 16, generator=generator(), dtype=torch.float64)
    covariances = 0.02 * root @ root.transpose(1, 2) / 16 + 1e-3 * torch.eye(16, dtype=torch.float64)
    return GaussianMixture(torch.ones(2), 0.3 + 0.4 * torch.rand(2, *SHAPE, generator=generator(1)), covariances)


class Changed:
    """Exact draws, pulled towards their mean and moved."""

    networks = ()

    def __init__(self, mixture, width=1.0, shift=0.0):
        self.exact, self.width, self.shift = exact_posteriors.Exact(mixture), width, shift

    def __call__(self, *arguments, **options):
        drawn = self.exact(*arguments, **options)
        mean = drawn.mean(1, keepdim=True)
        return (mean + self.width * (drawn - mean) + self.shift).clamp(0, 1)


def judged(mixture, method):
    return exact_posteriors.judged(method, mixture, Inpainting(0.5), 0.1, 12, 64)


def test_exact_draws_are_at_the_floor_and_cover_as_they_should(mixture):
    row = judged(mixture, exact_posteriors.Exact(mixture))
    assert row["w2 / floor"] == pytest.approx(1, abs=0.05)
    assert row["w2_debiased_low"] < 0 < row["w2_debiased_high"]
    assert row["coverage_90"] == pytest.approx(0.9, abs=0.02)
    assert row["std"] == pytest.approx(row["exact std"], rel=0.05)


def test_narrow_draws_pass_below_the_floor_and_are_found_out_by_the_others(mixture):
    row = judged(mixture, Changed(mixture, width=0.6))
    assert row["w2 / floor"] < 1  # why the ratio alone does not judge
    assert row["w2_debiased_low"] > 0
    # Oracle: the normal law, 2 Phi(0.6 * 1.645) - 1
    assert row["coverage_90"] == pytest.approx(0.676, abs=0.03)


def test_a_shift_has_the_distance_of_its_length(mixture):
    row = judged(mixture, Changed(mixture, shift=0.05))
    assert row["w2_debiased"] == pytest.approx(0.05 * 16**0.5, rel=0.1)


def test_a_mixture_is_kept_and_fitted_once(tmp_path, monkeypatch):
    first = exact_posteriors.fitted(tmp_path, 4, 2, 200)
    monkeypatch.setattr(GaussianMixture, "fit", lambda *arguments: pytest.fail("fitted again"))
    again = exact_posteriors.fitted(tmp_path, 4, 2, 200)
    x = torch.rand(3, *SHAPE, generator=generator())
    sigma = torch.tensor([0.05, 0.2, 2.0])
    torch.testing.assert_close(again(x, sigma), first(x, sigma), atol=1e-6, rtol=0)
    torch.testing.assert_close(again.log_density(x), first.log_density(x), atol=1e-6, rtol=1e-9)
    with pytest.raises(FileNotFoundError, match="fit one first"):
        GaussianMixture.load(tmp_path / "nothing")
    (tmp_path / "broken").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="holds no Gaussian mixture"):
        GaussianMixture.load(tmp_path / "broken")


def test_patches_are_grey_pieces_of_photographs_and_the_same_every_time():
    found = exact_posteriors.patches(8, 30)
    assert found.shape == (30, 1, 8, 8)
    assert 0 <= found.min() < 0.2 < 0.6 < found.max() <= 1
    assert torch.equal(found, exact_posteriors.patches(8, 30))
    assert not torch.equal(found[0], found[9])


def test_a_correction_starts_at_the_exact_denoiser_and_is_all_that_is_trained(mixture):
    adapted = AdaptedMixture(mixture)
    x, sigma = torch.rand(3, *SHAPE, generator=generator()), torch.tensor([0.02, 0.2, 20.0])
    assert torch.equal(adapted(x, sigma), mixture(x, sigma))
    adapted(x, sigma).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())
    assert {name.split(".")[0] for name, _ in adapted.named_parameters()} == {"correction"}


@pytest.mark.slow
def test_long_langevin_runs_reach_the_posterior(mixture):
    physics = Inpainting(0.5).draw(1, SHAPE, generator(2))
    y = physics.A(mixture.sample(1, generator(3)).float())
    posterior = mixture.posterior(y, physics, 0.1)
    drawn = Langevin(mixture, 600, sigma=0.03, step=0.2)(y, physics, 0.1, 400, generator=generator(4))[0]
    deviation = posterior.covariance().diagonal().sqrt().mean().item()
    assert (drawn.mean(0) - posterior.mean()).abs().mean().item() < 0.25 * deviation
    assert drawn.std(0).mean().item() == pytest.approx(deviation, rel=0.15)


def test_unknown_terms_and_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown loss term 'gan'; known: energy, l2"):
        exact_posteriors.read_loss("energy=1 gan=2")
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        exact_posteriors.main(["fit", "--samples", "1"])


@pytest.mark.slow
def test_training_brings_samples_nearer_to_the_posterior_and_is_kept(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path), "--side", "4", "--components", "2", "--patches", "400", "--operator"]
    arguments += ["super_resolution", "--observations", "8", "--samples", "64", "--blocks", "2", "--steps", "2"]
    rows = {}
    for iterations in ("2", "300"):
        exact_posteriors.main(
            ["table", *arguments, "--iterations", iterations, "--leave-out", *exact_posteriors.rivals(None)]
        )
        rows[iterations] = json.loads((tmp_path / "table.json").read_text())
    floor, before = rows["2"]
    _, after = rows["300"]
    assert floor["w2 / floor"] == pytest.approx(1, abs=0.1)
    assert after["nfe"] == 4
    assert abs(after["coverage_90"] - 0.9) < abs(before["coverage_90"] - 0.9)
    assert after["w2_debiased"] < before["w2_debiased"]
    assert len(list((tmp_path / "networks").iterdir())) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    exact_posteriors.main(["table", *arguments, "--iterations", "300", "--leave-out", *exact_posteriors.rivals(None)])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    assert "| UD2M (K=2, N=2, energy=1) | 4 |" in capsys.readouterr().out
    # every loss trains
    for loss in ("l2=1 adversarial=0.1", "mean_l2=1"):
        weights, prior = exact_posteriors.read_loss(loss), exact_posteriors.fitted(tmp_path, 4, 2, 400)
        network = exact_posteriors.train(prior, Inpainting(0.5), 0.05, 1, weights, 2, 8)
        assert all(p.isfinite().all() for p in network.parameters())
