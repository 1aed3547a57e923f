"""``LatentPrior``: every kind of pipeline, against the networks called by hand."""

import pytest
import tiny_latent
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file, save_file

from ud2m.priors.latent import LatentPrior


@pytest.fixture(params=tiny_latent.KINDS)
def prior(request):
    return LatentPrior(tiny_latent.pipeline(request.param))


def latents(count: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(1))


def by_hand(prior: LatentPrior, z_t, t, embeds, pooled):
    """Return the network's output, called without any pipeline."""
    more = {}
    if prior.takes_guidance:
        pipe = prior.pipeline
        weight = torch.tensor(prior.guidance - 1).repeat(len(z_t))
        more["timestep_cond"] = pipe.get_guidance_scale_embedding(weight, prior.network.config.time_cond_proj_dim)
    if pooled is not None:
        side = float(z_t.shape[-1] * prior.factor)
        ids = torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(z_t), 1)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return prior.network(z_t, t, encoder_hidden_states=embeds, **more).sample


@torch.no_grad()
def test_estimate_is_the_direct_call_of_the_network(prior):
    z_t, t = latents(), torch.tensor([999, 500, 124])
    prompt = prior.encode_prompt(["a cat"]).expand(3)
    output = by_hand(prior, z_t, t, prompt.embeds, prompt.pooled)
    # diffusers' own tables and formulas, time by time
    scheduler = prior.pipeline.scheduler
    if isinstance(scheduler, LCMScheduler):
        scheduler.set_timesteps(timesteps=[999, 500, 124])
        expected = torch.cat([scheduler.step(output[k : k + 1], t[k], z_t[k : k + 1]).denoised for k in range(3)])
    else:
        ddim = DDIMScheduler(**tiny_latent.TABLE, prediction_type=scheduler.config.prediction_type, clip_sample=False)
        ddim.set_timesteps(1000)
        steps = [ddim.step(output[k : k + 1], t[k], z_t[k : k + 1]).pred_original_sample for k in range(3)]
        expected = torch.cat(steps)
    torch.testing.assert_close(prior.estimate(z_t, t, prompt), expected, rtol=1e-4, atol=1e-5)
    # and to the last bit with the prior's own table
    assert torch.equal(prior.estimate(z_t, t, prompt), prior.table.z0(output, z_t, t))


@torch.no_grad()
def test_guidance_is_that_of_two_calls():
    prior = LatentPrior(tiny_latent.pipeline("sd"), guidance=3.0).double()
    z_t, t, prompt = latents().double(), torch.tensor([999, 500, 124]), prior.encode_prompt("a cat")
    with_text, without = (
        prior.network(z_t, t, encoder_hidden_states=prior.encode_prompt(text).embeds.expand(3, -1, -1)).sample
        for text in ("a cat", "")
    )
    expected = prior.table.z0(without + 3.0 * (with_text - without), z_t, t)
    torch.testing.assert_close(prior.estimate(z_t, t, prompt), expected)


@torch.no_grad()
def test_encode_and_decode_are_the_scaled_autoencoder(prior):
    x, vae = torch.rand(2, 3, 16, 16), prior.pipeline.vae
    mean = vae.encode(2 * x - 1).latent_dist.mean
    assert torch.equal(prior.encode(x), mean * vae.config.scaling_factor)
    torch.testing.assert_close(prior.decode(prior.encode(x)), (vae.decode(mean).sample + 1) / 2)


def test_a_sample_does_not_depend_on_its_batch(prior):
    z_t, prompt = latents(), prior.encode_prompt(["a", "b", "c"])
    whole = prior.estimate(z_t, torch.tensor([999, 500, 124]), prompt)
    alone = prior.estimate(z_t[1:2], 500, prompt.rows(torch.tensor([1])))
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "lcm", "sdxl"])
def test_gradients_reach_the_prompt_with_and_without_checkpoints(kind):
    prior = LatentPrior(tiny_latent.pipeline(kind)).double()
    tiny_latent.check_prompt_gradients(prior, latents(2).double(), h=1e-5, rtol=1e-4, atol=1e-7)


def test_noised_and_eps_are_inverse(prior):
    z, eps, t = latents(), latents() * 2 + 1, torch.tensor([999, 500, 0])
    z_t = prior.noised(z, t, eps)
    torch.testing.assert_close(prior.table.eps(z, z_t, t), eps, rtol=1e-4, atol=1e-4)
    abar = prior.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t, abar.sqrt() * z + (1 - abar).sqrt() * eps)


@pytest.mark.parametrize("kind", ["sd_v", "sdxl"])
def test_folders_of_diffusers_load_and_prompts_come_back(kind, tmp_path):
    tiny_latent.pipeline(kind).save_pretrained(tmp_path / "pipe")
    prior = LatentPrior.from_pretrained(tmp_path / "pipe")
    z_t, prompt = latents(1), prior.encode_prompt("a cat")
    prior.save_prompt(prompt, tmp_path / "cat.safetensors")
    again = prior.prompt(str(tmp_path / "cat.safetensors"))
    assert torch.equal(prior.estimate(z_t, 999, again), prior.estimate(z_t, 999, prompt))
    assert again.texts == ("a cat",)
    other = LatentPrior(tiny_latent.pipeline(kind, seed=1))
    with pytest.raises(ValueError, match="made by another model"):
        other.prompt(str(tmp_path / "cat.safetensors"))


# --- bad input ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the tests wait for no hub
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    x = torch.rand(1, 3, 20, 16)
    for call, message in (
        (lambda: prior.encode(x), "multiples of 8, got 20x16"),
        (lambda: prior.encode(torch.rand(1, 1, 16, 16)), "3 channels, got 1"),
        (lambda: prior.encode_prompt("nine letters"), "tokens and the model's tokenizer takes 8"),
        (lambda: prior.estimate(latents(), 1000, prior.encode_prompt("a")), r"\[0, 999\]"),
        (lambda: prior.estimate(latents(), 10, prior.encode_prompt(["a", "b"])), "2 prompts for 3 samples"),
        (lambda: LatentPrior(tiny_latent.pipeline("distilled"), guidance=2.0), "distilled into it"),
        (lambda: LatentPrior.from_pretrained(tmp_path, dtype="float16"), "float16 on a CPU"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json; is it a folder of diffusers\?"):
        LatentPrior.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither an existing folder, nor shipped, nor a hub"):
        LatentPrior.from_pretrained("nobody/nothing-of-this-name")
    for place in ("weights.bin", "/nowhere/dmd2/weights.bin"):
        with pytest.raises(FileNotFoundError, match="neither a file nor OWNER/NAME/FILE"):
            LatentPrior.from_pretrained("digits", unet_weights=place)


def test_a_pipeline_without_autoencoder_or_text_model_is_refused():
    for part in ("vae", "text_encoder"):
        pipe = tiny_latent.pipeline("sd")
        pipe.register_modules(**{part: None})
        with pytest.raises(ValueError, match=f"without {part}"):
            LatentPrior(pipe)


def test_values_that_are_not_finite_name_the_autoencoder():
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    prior.pipeline.vae.decoder.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="decoder of the latent prior's autoencoder"):
        prior.decode(latents(1))
    prior.vae.half()  # on this device decoding may not run at all: the message alone is of interest
    with pytest.raises(FloatingPointError, match="vae_dtype=float32"):
        prior._finite(torch.tensor([float("nan")]), "decoder")


def test_a_damaged_prompt_is_refused(tmp_path):
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    save_file({"embeds": torch.zeros(1, 8, 16)}, tmp_path / "foreign.safetensors")
    assert load_file(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"broken\.safetensors is damaged"):
        prior.load_prompt(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="another model"):
        prior.load_prompt(tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError, match="no saved prompt"):
        prior.load_prompt(tmp_path / "missing.safetensors")
