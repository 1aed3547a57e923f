import pytest
import torch
from tiny import trained
from tiny_training import STEPS, checkpoint, distillation, fit, prior_module

from ud2m.physics import GaussianBlur
from ud2m.training.checkpoints import read_checkpoint


@pytest.mark.parametrize("term", ["energy", "discriminator"])
def test_a_loss_that_is_not_finite_stops_with_step_and_term(term, prior, tmp_path):
    module = distillation(prior)
    owner = module.step.discriminator_loss if term == "discriminator" else module.loss.terms[term]
    forward, calls = owner.forward, []

    def nan_from_step_three(*args):
        calls.append(None)
        if len(calls) <= 3:
            return forward(*args)
        if term == "discriminator":
            return forward(lambda *images: args[0](*images) * float("nan"), *args[1:])
        return forward(*args) * float("nan")

    owner.forward = nan_from_step_three
    with pytest.raises(FloatingPointError, match=f"stopped at step 3: the loss term '{term}' is nan"):
        fit(module, tmp_path)
    kept = read_checkpoint(checkpoint(tmp_path))
    assert kept["scores"]["step"] == STEPS
    assert all(v.isfinite().all() for v in kept["state_dict"].values())
    distillation(prior).restore(checkpoint(tmp_path))


def test_a_network_that_gives_nan_to_the_solver_stops_with_the_step(prior, tmp_path):
    module = distillation(prior, operator=GaussianBlur((0.4, 0.6), 30, "valid"))
    start = module.network.warm_start
    forward = start.forward
    start.forward = lambda *args: forward(*args) * (float("nan") if module.steps_done == 1 else 1)
    with pytest.raises(FloatingPointError, match=r"stopped at step 1: .* BoundedBlur got NaN or infinity in z"):
        fit(module, tmp_path)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_parameters(prior, tmp_path):
    # The loss is finite: without a check of the gradient the checkpoint of the next validation would hold nan.
    module = distillation(prior)
    parameter = module.network.blocks[0].log_tau
    parameter.register_hook(lambda gradient: gradient * float("nan") if module.steps_done == 1 else gradient)
    with pytest.raises(FloatingPointError, match="stopped at step 1: the gradient of 'generator' is nan"):
        fit(module, tmp_path)
    assert all(p.isfinite().all() for p in trained(module).values())
    assert not checkpoint(tmp_path).exists()


def test_a_validation_score_that_is_not_a_number_stops_before_a_checkpoint(prior, tmp_path, monkeypatch):
    scores = iter([20.0, float("nan")])
    monkeypatch.setattr("ud2m.training.validation.Validation.result", lambda self: ({}, next(scores)))
    with pytest.raises(FloatingPointError, match="stopped at step 4: the validation score is nan"):
        fit(distillation(prior), tmp_path)
    assert read_checkpoint(checkpoint(tmp_path))["scores"]["score"] == 20.0


def test_a_prior_that_diverges_says_so(tmp_path):
    module = prior_module()
    with torch.no_grad():
        module.unet.conv_out.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="step 0: the loss term 'noise prediction' is nan"):
        fit(module, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sigma_y": 0.0}, "sigma_y must be a positive noise level in image units, got 0"),
        ({"sigma_y": -0.1}, "sigma_y must be a positive"),
        ({"sigma_y_range": [0.0, 0.1]}, "sigma_y_range must hold two positive noise levels that rise"),
        ({"sigma_y_range": [0.2, 0.1]}, "sigma_y_range must hold"),
        ({"network": {"num_blocks": 0, "rule": {"name": "paper"}, "warm_start": {"name": "pinv"}}}, "num_blocks"),
        ({"sampling": {"num_steps": 2, "eta": 1.5}}, "eta must be"),
        ({"validation": {"num_samples": 0, "lpips": None, "metric": "psnr"}}, "num_samples must be an integer"),
        (
            {"validation": {"num_samples": 1, "lpips": None, "metric": "residual"}},
            "is no number to choose by; take one of psnr_mean",
        ),
        ({"validation": {"num_samples": 1, "lpips": None, "metric": "-psnr"}}, "is no number to choose by"),
        ({"optimizer": {"accumulate": 0}}, "accumulate must be at least 1"),
        ({"optimizer": {"clip": 0.0}}, "clip, the largest gradient norm, must be positive"),
        ({"optimizer": {"lr": 0.0}}, "learning rates must be positive"),
        ({"optimizer": {"learning_rate": 0.1}}, "unknown argument of OptimizerSettings 'learning_rate'"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(overrides, message, prior):
    with pytest.raises(ValueError, match=message):
        distillation(prior, **overrides)


@pytest.mark.parametrize("net", [None, "alex"])
def test_selection_by_lpips_needs_its_weights(net, prior, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"validation\.metric=lpips: the metric lpips cannot be computed: .*alex"):
        distillation(prior, validation={"num_samples": 1, "lpips": net, "metric": "lpips"})


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"focus": 1.5}, {"focus_max": 1e-4}, {"levels": []}])
def test_numbers_of_a_prior_are_checked(change):
    with pytest.raises(ValueError, match="must"):
        prior_module(**change)
