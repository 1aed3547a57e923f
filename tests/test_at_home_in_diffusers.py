"""Our samplers and priors inside diffusers, against what they give by themselves and against its own scheduler."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from documents import blocks
from tiny import SCHEDULER, SIZE, save_tiny_prior
from tiny_sampler import build, observation

from ud2m.priors.prior import Prior
from ud2m.samplers.pipeline import UD2MPipeline
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.unfolded.ddim import ddim_step


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def export(prior_folder, tmp_path):
    build(prior_folder).save_pretrained(tmp_path / "export")
    return str(tmp_path / "export")


def test_a_pipeline_draws_the_samples_of_the_sampler(export, tmp_path, capsys):
    y, physics = observation()
    sampler = PosteriorSampler.from_pretrained(export, precision="float32")
    expected = sampler(y, physics, 0.05, 3, generator(), num_steps=1)
    pipe = UD2MPipeline.from_pretrained(export, torch_dtype=torch.float32)
    options = {"sigma_y": 0.05, "num_samples": 3, "num_inference_steps": 1}
    capsys.readouterr()
    found = pipe(y, physics, **options, generator=generator(), output_type="pt").images
    assert torch.equal(found, expected)
    evaluations = 2 * 3 * sampler.nfe(1)
    assert f"{evaluations}/{evaluations}" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(y, physics, **options, generator=generator()).images
    assert capsys.readouterr().err == ""
    assert len(pictures) == 6
    assert np.array_equal(np.array(pictures[4]), (expected[1, 1] * 255).round().permute(1, 2, 0).numpy())
    pipe.save_pretrained(tmp_path / "again")
    again = UD2MPipeline.from_pretrained(str(tmp_path / "again"), precision="float32")
    assert torch.equal(again(y, physics, **options, generator=generator(), output_type="pt").images, expected)


def test_a_dtype_is_that_of_the_networks_alone(export):
    y, physics = observation()
    pipe, seen = UD2MPipeline.from_pretrained(export, torch_dtype=torch.bfloat16), []
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.sampler.prior.unet.conv_in.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    rough = pipe(y, physics, generator=generator(), output_type="pt").images
    assert pipe.to("cpu", torch.float32) is pipe
    fine = pipe(y, physics, generator=generator(), output_type="pt").images
    handle.remove()
    assert seen[0] == torch.bfloat16
    assert seen[-1] == torch.float32
    assert next(pipe.sampler.network.parameters()).dtype == rough.dtype == torch.float32
    assert 0 < (rough - fine).abs().mean() < 0.05
    assert pipe.to(device="meta").device.type == "meta"


def test_what_a_pipeline_refuses(export):
    y, physics = observation()
    pipe = UD2MPipeline.from_pretrained(export)
    with pytest.raises(ValueError, match="output_type must be pil or pt, got 'latent'"):
        pipe(y, physics, output_type="latent")
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'int8'"):
        pipe.to(torch.int8)
    with pytest.raises(ValueError, match="a sampler has no option guidance"):
        UD2MPipeline.from_pretrained(export, guidance=7)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_step_of_a_prior_that_was_pushed_is_ours(prediction, tmp_path):
    scheduler = SCHEDULER | {"prediction_type": prediction, "clip_sample": False}
    prior = Prior.from_pretrained(save_tiny_prior(tmp_path / "prior", scheduler=scheduler))
    prior.pipeline().save_pretrained(tmp_path / "hub")
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "hub")
    assert Prior.from_pretrained(tmp_path / "hub").fingerprint == prior.fingerprint
    abar = theirs.scheduler.alphas_cumprod.double()
    x_t = torch.randn(2, 3, SIZE, SIZE, generator=generator(1))
    for time in (2, 400, 999):
        # the same place in [0, 1], where noise is added and not mixed in
        sigma, sigma_next = (((1 - abar[t]) / abar[t]).sqrt().float() / 2 for t in (time, time - 1))
        x_sigma = (x_t / abar[time].sqrt().float() + 1) / 2
        with torch.no_grad():
            predicted = theirs.unet(x_t, time).sample
            expected = theirs.scheduler.step(predicted, time, x_t, generator=generator()).prev_sample
            found = ddim_step(x_sigma, prior(x_sigma, sigma.expand(2)), sigma, sigma_next, 1.0, generator())
        as_theirs = abar[time - 1].sqrt() * (2 * found.double() - 1)
        torch.testing.assert_close(as_theirs, expected.double(), rtol=1e-3, atol=1e-3)


def test_what_no_pipeline_of_diffusers_holds(tmp_path):
    classes = Prior.from_pretrained(save_tiny_prior(tmp_path, num_class_embeds=3), label=1)
    with pytest.raises(ValueError, match="holds a UNet2DModel without classes; upload the folder"):
        classes.pipeline()


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks(REPOSITORY / "docs" / "diffusers.md", "python"):
        exec(compile(block, "docs/diffusers.md", "exec"), scope)
    assert [picture.size for picture in scope["pictures"]] == 4 * [(32, 32)]
    assert scope["again"].fingerprint == scope["prior"].fingerprint
    assert isinstance(scope["theirs"], diffusers.DDPMPipeline)
