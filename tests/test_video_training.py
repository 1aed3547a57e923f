"""The three trainings of a latent video prior, in miniature: losses against their formulas, exports, and commands."""

from pathlib import Path

import pytest
import tiny_latent
import torch
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, WanPipeline
from hydra.utils import instantiate
from tiny_training import composed
from torch import nn

import ud2m.cli  # noqa: F401  # its resolvers
from ud2m.data.moving_digits import MovingDigits
from ud2m.priors.latent import LatentPrior
from ud2m.priors.latent_parts import learn_tokenizer
from ud2m.random import rand, randn_like
from ud2m.training import AutoencoderModule, ConsistencyModule, LatentModule
from ud2m.training.random_streams import row_streams

VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 4,
    "z_dim": 3,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "scale_factor_spatial": 4,
}
NETWORK = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
}
TEXT = {"_class_name": "UMT5EncoderModel", "vocab_size": 520, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
TEXT |= {"num_heads": 2, "dropout_rate": 0.0}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def streams(count: int):
    return row_streams("cpu", list(range(count)), 0, "test")


def videos(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_autoencoders_export_has_latents_of_variance_one_in_each_channel(tmp_path):
    torch.manual_seed(0)
    module = AutoencoderModule(VAE, kl=0.25, clear=True)
    module.vae.decoder.conv_out.weight.data *= 0.1  # so that nothing is clipped
    x = 2 * videos() - 1
    loss, _ = module.losses(videos(), streams(2))
    posterior = module.vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * randn_like(posterior.mean, streams(2))
    gaussian = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0, 1)).mean()
    expected = (module.vae.decode(z).sample - x).square().mean() + 0.25 * kl
    torch.testing.assert_close(loss, expected)
    assert 0.2 < posterior.mean.std() < 5
    assert (posterior.std < 0.2).all()
    module.vae.decoder.conv_out.bias.data.fill_(-3.0)  # black, where all is clipped and ink is missed
    loss, _ = module.losses(videos(), streams(2))
    loss.backward()
    assert loss > 4
    assert (module.vae.decoder.conv_out.bias.grad < 0).all()
    # what a validation keeps
    z = posterior.mean.detach()
    module.latent_moments.copy_(torch.stack([z.mean((0, 2, 3, 4)), z.square().mean((0, 2, 3, 4))]))
    module.export(tmp_path / "vae")
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    m, s = (torch.tensor(vae.config[key]).view(1, 3, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    scaled = ((vae.encode(x).latent_dist.mean - m) / s).transpose(0, 1).flatten(1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(scaled.var(1, correction=0), torch.ones(3), atol=0.02, rtol=0)


def latent_module(folder: Path) -> LatentModule:
    torch.manual_seed(0)
    tiny_latent.wan().vae.save_pretrained(folder)
    module = LatentModule(str(folder), NETWORK, TEXT, FLOW, prompt_length=10)
    module.tokenizer = learn_tokenizer(["a cat"], 520, 10)
    return module


def test_the_models_loss_is_zero_for_the_true_flow(tmp_path):
    module = latent_module(tmp_path / "vae")
    x0, t = videos(), torch.tensor([900, 100])
    vae = module.vae
    m, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    z = (vae.encode(2 * x0 - 1).latent_dist.mean - m) / std
    eps, s = randn_like(z, streams(2)), (t / 1000).view(2, 1, 1, 1, 1)

    class TrueFlow(nn.Module):
        def forward(self, z_t, time, encoder_hidden_states):
            torch.testing.assert_close(z_t, (1 - s) * z + s * eps)
            assert torch.equal(time, t)
            return type("Output", (), {"sample": eps - z})

    embeds = module.embedded(["a", "a cat"])
    module.network = TrueFlow()
    torch.testing.assert_close(module.errors(x0, t, embeds, streams(2)), torch.zeros(2), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_export_is_a_pipeline_of_wan_with_the_same_words(tmp_path):
    module = latent_module(tmp_path / "vae")
    module.export(tmp_path / "pipe")
    prior = LatentPrior.from_pretrained(tmp_path / "pipe")
    assert prior.video
    assert not prior.distilled
    torch.testing.assert_close(prior.encode_prompt(["a cat"]).embeds, module.embedded(["a cat"]))
    z_t = torch.randn(1, 4, 2, 4, 4)
    expected = z_t - 0.5 * module.network(z_t, torch.tensor([500]), module.embedded(["a cat"])).sample
    found = prior.estimate(z_t, 500, prior.encode_prompt("a cat"))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # its weights are in float16


def test_the_consistency_loss_is_that_of_an_euler_step(tmp_path):
    tiny_latent.wan().save_pretrained(tmp_path / "pipe")
    module = ConsistencyModule(str(tmp_path / "pipe"), guidance=1.0, drop_caption=0.0, skip=300)
    x0, texts = videos(3), ["a", "b", "c"]
    loss, _ = module.losses((x0, texts), streams(3))
    pipe, numbers = WanPipeline.from_pretrained(tmp_path / "pipe"), streams(3)
    t = 1 + (rand((3, 3), numbers, "cpu")[:, 0] * 999).long()
    s = (t - 300).clamp(min=0)
    assert (s == 0).any() or (t > 300).all()
    with torch.no_grad():
        embeds = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=8)[0]
        m, std = (torch.tensor(pipe.vae.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        z = (pipe.vae.encode(2 * x0 - 1).latent_dist.mean - m) / std
        share, later = ((time / 1000).view(3, 1, 1, 1, 1) for time in (t, s))
        z_t = (1 - share) * z + share * randn_like(z, numbers)
        v = pipe.transformer(z_t, t, embeds).sample
        z_s = z_t + (later - share) * v
        d = (z_t - share * v) - (z_s - later * pipe.transformer(z_s, s, embeds).sample)
    torch.testing.assert_close(loss, ((d**2 + 1e-6).sqrt() - 1e-3).mean(), rtol=1e-3, atol=1e-5)
    module.export(tmp_path / "few")
    assert isinstance(WanPipeline.from_pretrained(tmp_path / "few").scheduler, FlowMatchLCMScheduler)
    with pytest.raises(ValueError, match="distilled already"):
        ConsistencyModule(str(tmp_path / "few"))


@pytest.mark.slow
def test_the_three_experiments_follow_each_other(tmp_path, monkeypatch):
    """As a user trains them, with digits that are made here and the networks of the experiments."""
    digits = torch.randint(0, 256, (8, 28, 28), dtype=torch.uint8)
    captions = ["a video of the digit five"] * 8
    monkeypatch.setattr(
        "ud2m.data.MovingDigitsData.train_set", lambda data: MovingDigits(digits, 32, "train", 5, 2, 0, captions)
    )
    before = {"vae": [], "latent": ["training.vae"], "consistency": ["training.start_from"]}
    last = None
    for name, needs in before.items():
        given = [f"experiment=moving_digits_{name}", "data.captions=true", "data.batch_size=2", "data.frames=5"]
        with composed(*given, *(f"{key}={last}" for key in needs), folder=tmp_path) as config:
            data, module = instantiate(config.data, _convert_="all"), instantiate(config.training, _convert_="all")
        if name == "latent":
            module.tokenizer = learn_tokenizer(data.all_captions(), 600, 12)
        total, _ = module.losses(next(iter(data.train_dataloader())), streams(2))
        total.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert gradients
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().sum() > 0 for g in gradients)
        last = tmp_path / name
        module.export(last)
    prior = LatentPrior.from_pretrained(last)
    assert prior.distilled
    assert sum(p.numel() for p in prior.parts.parameters()) < 1_500_000
