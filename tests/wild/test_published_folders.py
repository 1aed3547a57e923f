"""Priors as others save them: folders of ``DDPMPipeline``, and schedulers whose words are read and not assumed."""

import json
import shutil

import diffusers
import pytest
import torch
from tiny import SCHEDULER, SIZE, save_tiny_prior, tiny_unet

from ud2m.priors.prior import Prior
from ud2m.priors.schedule import abar
from ud2m.priors.schedulers import VARIANCE_PRESERVING


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipeline"
    diffusers.DDPMPipeline(
        tiny_unet().half().float(), diffusers.DDPMScheduler(**without_class(SCHEDULER))
    ).save_pretrained(folder)
    return folder


def without_class(options):
    return {key: value for key, value in options.items() if not key.startswith("_")}


def changed(path, **options):
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def saved(folder, scheduler):
    """A prior whose scheduler was saved by diffusers."""
    save_tiny_prior(folder)
    (folder / "scheduler_config.json").unlink()
    scheduler.save_pretrained(folder)
    return folder


def levels(alphas_cumprod):
    return ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt() / 2


def test_a_saved_pipeline_is_the_prior_of_its_network(pipeline, tmp_path):
    prior, flat = Prior.from_pretrained(pipeline), Prior.from_pretrained(save_tiny_prior(tmp_path / "flat"))
    assert prior.fingerprint == flat.fingerprint
    x, sigma = torch.rand(2, 3, SIZE, SIZE), torch.tensor([0.1, 0.4])
    with torch.no_grad():
        assert torch.equal(prior(x, sigma), flat(x, sigma))
    with torch.device("meta"):
        assert Prior.from_pretrained(pipeline).channels == 3


def test_a_pipeline_in_latents_is_refused(pipeline):
    # A network of three latent channels would pass for one of colours.
    changed(pipeline / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ValueError, match="holds a pipeline of scheduler, unet, vqvae; a prior has scheduler and unet"):
        Prior.from_pretrained(pipeline)


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_half_a_pipeline_is_one_line(part, pipeline):
    shutil.rmtree(pipeline / part)
    with pytest.raises(FileNotFoundError, match=f"{pipeline} has no {part}/"):
        Prior.from_pretrained(pipeline)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_what_a_file_leaves_out_is_as_its_class_has_it(name, tmp_path):
    theirs = getattr(diffusers, name)
    prior = Prior.from_pretrained(saved(tmp_path, theirs()))
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    short = Prior.from_pretrained(tmp_path)
    expected = levels(theirs().alphas_cumprod)
    for read in (prior, short):
        torch.testing.assert_close(read.schedule.log_sigmas.exp(), expected, rtol=2e-3, atol=0)
        assert read.prediction == theirs().config.get("prediction_type", "epsilon")


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"trained_betas": [0.01, 0.02, 0.05, 0.2], "num_train_timesteps": 4},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"clip_sample": False, "variance_type": "learned_range", "timestep_spacing": "trailing", "thresholding": True},
    ],
)
def test_options_are_those_of_diffusers(options, tmp_path):
    scheduler = diffusers.DDPMScheduler(**options)
    prior = Prior.from_pretrained(saved(tmp_path, scheduler))
    expected = levels(scheduler.alphas_cumprod)
    finite = expected[: prior.schedule.num_times]
    assert expected[prior.schedule.num_times :].isinf().all()
    torch.testing.assert_close(prior.schedule.log_sigmas.exp(), finite, rtol=5e-3, atol=0)
    # the denoiser, by the scheduler's own formula
    t = min(300, len(finite) // 2)
    x_t = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = prior.unet(x_t, torch.tensor([float(t)])).sample
        scheduler = diffusers.DDPMScheduler(
            **(options | {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"})
        )
        expected = scheduler.step(output, t, x_t).pred_original_sample
        sigma = prior.schedule.sigma(torch.tensor([float(t)]))
        x0_hat = prior((x_t / abar(sigma).sqrt().view(-1, 1, 1, 1) + 1) / 2, sigma)
    torch.testing.assert_close(2 * x0_hat - 1, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            diffusers.ScoreSdeVeScheduler(),
            "has the scheduler 'ScoreSdeVeScheduler'; allowed are those of variance-pres",
        ),
        (diffusers.EDMEulerScheduler(), "'EDMEulerScheduler'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "'FlowMatchEulerDiscreteScheduler'"),
        (diffusers.CMStochasticIterativeScheduler(), "'CMStochasticIterativeScheduler'"),
        (diffusers.LCMScheduler(), "'LCMScheduler'"),
        (diffusers.IPNDMScheduler(), "'IPNDMScheduler'"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type='continuous'"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
    ],
)
def test_other_noise_is_refused(scheduler, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Prior.from_pretrained(saved(tmp_path, scheduler))


@pytest.mark.parametrize("name", ["os.system", "UNet2DModel", "DiffusionPipeline", 7, None])
def test_a_file_chooses_among_known_classes_alone(name, tmp_path):
    save_tiny_prior(tmp_path)
    changed(tmp_path / "scheduler_config.json", _class_name=name)
    with pytest.raises(ValueError, match="has the scheduler"):
        Prior.from_pretrained(tmp_path)
