"""The three trainings of a latent prior, in miniature: losses against their formulas, exports, and resumption."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_latent
import torch
from conftest import REPOSITORY
from diffusers import StableDiffusionPipeline
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import composed, write_images
from torch import nn

import ud2m.cli  # noqa: F401  # its resolvers
from ud2m.data import FolderData, MnistData, ShardData
from ud2m.data.mnist import captions_of
from ud2m.priors.latent import LatentPrior
from ud2m.priors.latent_parts import learn_tokenizer, merges_of, most_frequent, tokenizer_of
from ud2m.priors.prior import LoraSpec
from ud2m.random import randn_like
from ud2m.training import AutoencoderModule, ConsistencyModule, LatentModule
from ud2m.training.consistency import energy_distance
from ud2m.training.latent_training import warn_of_drift
from ud2m.training.random_streams import row_streams

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")

VAE = {
    "sample_size": 16,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
TEXT = {"vocab_size": 520, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CAPTIONS = ("a red square\na square", "a blue disc")


def streams(count: int):
    return row_streams("cpu", list(range(count)), 0, "test")


@pytest.fixture
def vae_folder(tmp_path) -> Path:
    tiny_latent.vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def latent_module(vae_folder: Path, **options) -> LatentModule:
    torch.manual_seed(0)
    unet = {key: tiny_latent.unet().config[key] for key in ("sample_size", "block_out_channels", "down_block_types")}
    unet |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4}
    unet |= {"cross_attention_dim": 16, "attention_head_dim": 4}
    scheduler = tiny_latent.TABLE | {"prediction_type": "v_prediction"}
    text = TEXT | {"max_position_embeddings": 10}
    module = LatentModule(str(vae_folder), unet, text, scheduler, prompt_length=10, **options)
    module.tokenizer = module.tokenizer or learn_tokenizer(CAPTIONS, 520, 10)
    return module


# --- captions and words ------------------------------------------------------------------------------------------


def test_captions_of_a_folder_lie_beside_its_images(tmp_path):
    for name, text in zip("ab", CAPTIONS, strict=True):
        Image.new("RGB", (16, 16), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{text}\n\n")
    data = FolderData(
        tmp_path, captions=True, channels=3, crop_size=16, batch_size=2, scales=[1.0], probabilities=[1.0]
    )
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        for file in [*tmp_path.glob("*.png"), *tmp_path.glob("*.txt")]:
            (tmp_path / split / file.name).write_bytes(file.read_bytes())
    assert data.all_captions() == list(CAPTIONS)
    items = [data.train_set()[i] for i in range(8)] + [data.evaluation_set("val")[i] for i in range(2)]
    assert {text for _, text in items} == set(CAPTIONS)
    for crop, text in items:
        assert (crop[0].mean() > 0.5) == text.startswith("a red")
    (tmp_path / "train" / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png has no captions: write them into b\.txt"):
        data.train_set()
    plain = FolderData(tmp_path, channels=3, crop_size=16, batch_size=2)
    with pytest.raises(ValueError, match=r"data\.captions=true"):
        plain.all_captions()


def test_captions_of_shards_follow_their_images(tmp_path):
    source, colours = tmp_path / "source", {"red": 0, "lime": 1, "blue": 2}
    source.mkdir()
    for number in range(12):
        name = list(colours)[number % 3]
        Image.new("RGB", (16, 16), name).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"a {name} square\nnumber {number}")
    settings = make_shards.Settings(size=16, shard_mb=0.01, captions=True)
    for place in ("train", "held_out", "bare"):
        chosen = replace(settings, captions=place != "bare")
        shards = make_shards.make_shards(source, tmp_path / place, chosen, workers=1)
    assert len(shards.shards) > 1
    given = {"channels": 3, "crop_size": 16, "batch_size": 3, "samples_per_epoch": 12}
    data = ShardData(
        tmp_path / "train", tmp_path / "held_out", scales=[1.0], probabilities=[1.0], captions=True, **given
    )
    assert sorted(data.all_captions()) == sorted((source / f"{k}.txt").read_text() for k in range(12))
    crops, held_out = data.train_set(), data.evaluation_set("val")
    items = [crops[i] for i in range(24)] + [held_out[i] for i in range(6)]
    for crop, text in items:
        assert crop.flatten(1).mean(1).argmax() == colours[text.split()[1]]
    assert len({text for _, text in items[:12]}) == 12  # a pass has each of them once
    images, texts = next(iter(data.train_dataloader()))
    assert images.shape == (3, 3, 16, 16)
    assert all(text[-1].isdigit() for text in texts)
    with pytest.raises(ValueError, match="hold no captions; make them again with --captions"):
        ShardData(tmp_path / "bare", tmp_path / "held_out", captions=True, **given).train_set()
    with pytest.raises(ValueError, match=r"data\.captions=true"):
        ShardData(tmp_path / "train", tmp_path / "held_out", **given).all_captions()


def test_digits_are_named_by_their_captions(shared):
    data = MnistData(shared / "data" / "mnist", captions=True, channels=1, crop_size=32, batch_size=4)
    digit, text = data.train_set()[0]
    assert digit.shape == (1, 32, 32)
    assert text == captions_of(5)  # the first digit of MNIST is a five
    assert text.split("\n") == ["a photo of the digit five"] * 3 + ["a photo of a digit"]


def test_words_become_tokens_and_no_text_is_unknown():
    tokenizer = learn_tokenizer([captions_of(k) for k in range(10)], 600, 12)
    words = tokenizer.tokenize("a photo of the digit seven")
    assert words == ["a</w>", "photo</w>", "of</w>", "the</w>", "digit</w>", "seven</w>"]
    for text in ("a cat", "Köln, 7 €"):
        assert tokenizer.unk_token not in tokenizer.tokenize(text)
    again = tokenizer_of([tuple(pair) for pair in merges_of(tokenizer)], 12)
    assert again("a photo of a cat").input_ids == tokenizer("a photo of a cat").input_ids


# --- the autoencoder ---------------------------------------------------------------------------------------------


def test_the_autoencoders_loss_is_its_formula():
    module = AutoencoderModule(VAE, kl=0.25)
    x0, (x, posterior) = torch.rand(2, 3, 16, 16), (None, None)
    loss, _ = module.losses(x0, streams(2))
    x = 2 * x0 - 1
    mean, logvar = module.vae.quant_conv(module.vae.encoder(x)).chunk(2, 1)
    z = mean + (logvar / 2).exp() * randn_like(mean, streams(2))
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).mean()
    torch.testing.assert_close(loss, (module.vae.decode(z).sample - x).square().mean() + 0.25 * kl)


# --- the text-to-image model -------------------------------------------------------------------------------------


def test_the_models_loss_is_zero_for_the_true_velocity(vae_folder):
    module = latent_module(vae_folder)
    x0, t = torch.rand(2, 3, 16, 16), torch.tensor([900, 100])
    z, eps = module.vae.encode(2 * x0 - 1).latent_dist.mean * module.vae.config.scaling_factor, streams(2)
    noise, abar = randn_like(z, eps), (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)[t]
    a, b = (root.view(2, 1, 1, 1) for root in (abar.sqrt(), (1 - abar).sqrt()))

    class TrueVelocity(nn.Module):
        def forward(self, z_t, time, encoder_hidden_states):
            torch.testing.assert_close(z_t, a * z + b * noise)
            assert torch.equal(time, t)
            return type("Output", (), {"sample": a * noise - b * z})

    embeds = module.embedded(["a", "b"])
    module.network = TrueVelocity()
    errors = module.errors(x0, t, embeds, streams(2))
    torch.testing.assert_close(errors, torch.zeros(2), atol=1e-6, rtol=0)


def test_a_checkpoint_holds_the_tokenizer_and_the_export_needs_diffusers_alone(vae_folder, tmp_path):
    module = latent_module(vae_folder)
    module.captions = most_frequent(["seldom", "often", "often"])
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    other = latent_module(vae_folder)
    other.tokenizer = None
    other.restore(tmp_path / "last.ckpt")
    other.export(tmp_path / "pipe")
    assert {v.dtype for v in other.network.state_dict().values()} == {torch.float32}
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    assert LatentPrior.from_pretrained(tmp_path / "pipe").captions == ("often", "seldom")
    (tmp_path / "pipe" / "captions.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"captions\.txt must be text in UTF-8"):
        LatentPrior.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer("a red disc", padding="max_length", return_tensors="pt").input_ids
    expected = module.embedded(["a red disc"])
    torch.testing.assert_close(pipe.text_encoder(ids)[0], expected)
    assert pipe("a red disc", num_inference_steps=2, guidance_scale=1.0).images[0].size == (16, 16)


def test_a_training_begins_with_the_networks_of_a_pipeline_and_all_of_them_learn(vae_folder, tmp_path):
    first = latent_module(vae_folder)
    first.captions = ("a red square",)
    first.export(tmp_path / "pipe")
    x0, texts = torch.rand(2, 3, 16, 16), ["a square", "a red"]
    begun = latent_module(vae_folder, start_from=str(tmp_path / "pipe"))
    again = LatentPrior.from_pretrained(tmp_path / "pipe")
    assert begun.captions == first.captions
    assert begun.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    torch.testing.assert_close(begun.embedded(texts), again.encode_prompt(texts).embeds)
    for ours, theirs in zip(begun.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    loss, _ = begun.losses((x0, texts), streams(2))
    loss.backward()
    learning = [*begun.network.parameters(), *begun.text_encoder.parameters()]
    assert all(parameter.requires_grad for parameter in learning)
    assert sum(bool(p.grad is not None and p.grad.any()) for p in learning) > 0.8 * len(learning)


@pytest.mark.slow
def test_a_training_does_not_begin_with_the_networks_of_other_latents_or_noise(vae_folder, tmp_path):
    pipe = tmp_path / "pipe"
    first = latent_module(vae_folder)
    first.captions = ("a red square",)
    first.export(pipe)
    file = pipe / "scheduler" / "scheduler_config.json"
    written = json.loads(file.read_text())
    for wrong, said in (
        ({"prediction_type": "epsilon"}, "has learnt epsilon with"),
        ({"beta_end": 2 * written["beta_end"]}, "or other noise at them"),
    ):
        file.write_text(json.dumps(written | wrong))
        with pytest.raises(ValueError, match=said):
            latent_module(vae_folder, start_from=str(pipe))
    file.write_text(json.dumps(written))
    index = json.loads((pipe / "model_index.json").read_text())
    (pipe / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    with pytest.raises(ValueError, match="is distilled into few steps"):
        latent_module(vae_folder, start_from=str(pipe))
    (pipe / "model_index.json").write_text(json.dumps(index))
    weights = pipe / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: 1.01 * value for key, value in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="the latents of another autoencoder than"):
        latent_module(vae_folder, start_from=str(pipe))
    assert latent_module(str(pipe), start_from=str(pipe)).captions == first.captions


# --- the consistency model ---------------------------------------------------------------------------------------


def consistency(folder: Path, **options) -> ConsistencyModule:
    tiny_latent.pipeline("sd_v").save_pretrained(folder)
    return ConsistencyModule(str(folder), guidance=1.0, drop_caption=0.0, **options)


def test_the_consistency_loss_is_its_formula(tmp_path):
    module = consistency(tmp_path / "pipe", skip=50)
    x0, texts = torch.rand(3, 3, 16, 16), ["a", "b", "c"]
    loss, _ = module.losses((x0, texts), streams(3))
    # with diffusers' own tables
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    numbers = streams(3)
    t = 1 + (torch.stack([torch.rand(3, generator=g) for g in numbers])[:, 0] * 999).long()
    s = (t - 50).clamp(min=0)
    abar, vae = pipe.scheduler.alphas_cumprod, pipe.vae
    a, b = ((abar[t].sqrt().view(-1, 1, 1, 1)), (1 - abar[t]).sqrt().view(-1, 1, 1, 1))
    a_s, b_s = ((abar[s].sqrt().view(-1, 1, 1, 1)), (1 - abar[s]).sqrt().view(-1, 1, 1, 1))
    with torch.no_grad():
        embeds = pipe.encode_prompt(texts, "cpu", 1, False)[0]
        z = vae.encode(2 * x0 - 1).latent_dist.mean * vae.config.scaling_factor
        z_t = a * z + b * randn_like(z, numbers)
        v = pipe.unet(z_t, t, encoder_hidden_states=embeds).sample
        z0, eps = a * z_t - b * v, a * v + b * z_t
        z_s = a_s * z0 + b_s * eps
        v_s = pipe.unet(z_s, s, encoder_hidden_states=embeds).sample

        def f(z, v, a, b, time):
            time = 10 * time.view(-1, 1, 1, 1)
            return 0.25 / (time**2 + 0.25) * z + time / (time**2 + 0.25).sqrt() * (a * z - b * v)

        d = f(z_t, v, a, b, t) - f(z_s, v_s, a_s, b_s, s)
    torch.testing.assert_close(loss, ((d**2 + 1e-6).sqrt() - 1e-3).mean(), rtol=1e-3, atol=1e-6)


def test_the_student_alone_learns_and_is_exported(tmp_path):
    module = consistency(tmp_path / "pipe")
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == {"trained", "ema"}  # nothing frozen is in a checkpoint
    before = {k: v.clone() for k, v in module.teacher.network.state_dict().items()}
    loss, _ = module.losses((torch.rand(2, 3, 16, 16), ["a", "b"]), streams(2))
    loss.backward()
    with torch.no_grad():
        for parameter in module.trained:
            parameter -= 0.01 * parameter.grad.sign() if parameter.grad is not None else 0
    module.ema.update()
    assert all(torch.equal(before[k], v) for k, v in module.teacher.network.state_dict().items())
    with module.ema.applied():
        expected = {k: v.clone() for k, v in module.prior.network.state_dict().items()}
    module.teacher.captions = ("a", "b")
    module.export(tmp_path / "student")
    prior = LatentPrior.from_pretrained(tmp_path / "student")
    assert prior.distilled
    assert prior.captions == ("a", "b")
    for name, value in prior.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="distilled already"):
        ConsistencyModule(str(tmp_path / "student"))


def test_a_lora_begins_at_the_teacher_and_comes_back(tmp_path):
    module = consistency(tmp_path / "pipe", lora=LoraSpec(2, 2.0, output_conv=False))
    z_t, prompt = torch.randn(2, 4, 8, 8), module.prior.encode_prompt(["a", "b"])
    scaled = module.prior.estimate(z_t, 500, prompt)
    torch.testing.assert_close(scaled, module.teacher.estimate(z_t, 500, prompt), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for parameter in module.trained:
            parameter.normal_()
    module.ema.update()
    with module.as_teacher():
        torch.testing.assert_close(module.prior.estimate(z_t, 500, prompt), scaled)
    module.export(tmp_path / "lora")
    with module.ema.applied():
        expected = module.prior.estimate(z_t, 500, prompt)
    assert (expected - scaled).abs().max() > 1e-2
    prior = LatentPrior.from_pretrained(tmp_path / "pipe", lora=str(tmp_path / "lora"), scheduler="lcm")
    torch.testing.assert_close(prior.estimate(z_t, 500, prompt), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("experiment", ["digits_latent", "digits_consistency", "latent_consistency"])
def test_experiments_that_begin_with_another_ones_export_take_a_step(experiment, tmp_path, request):
    digits = experiment.startswith("digits")
    tiny_latent.pipeline("sd_v", channels=1 if digits else 3).save_pretrained(tmp_path / "before")
    if digits:
        data = [f"data.root={request.getfixturevalue('shared') / 'data' / 'mnist'}"]
    else:
        write_images(tmp_path / "images", 6, side=16)
        for file in (tmp_path / "images").glob("*.png"):
            file.with_suffix(".txt").write_text("a cat")
        data = [f"data.root={tmp_path / 'images'}", "data.crop_size=16"]
    before = "training.vae" if experiment == "digits_latent" else "training.start_from"
    given = [f"experiment={experiment}", *data, "data.batch_size=2", f"{before}={tmp_path / 'before'}"]
    with composed(*given, "data.num_workers=0", folder=tmp_path) as config:
        data, module = instantiate(config.data, _convert_="all"), instantiate(config.training, _convert_="all")
    if experiment == "digits_latent":
        module.tokenizer = learn_tokenizer(data.all_captions(), 600, 12)
    images, captions = next(iter(data.train_dataloader()))
    captions = [text if digits else text.split()[1] for text in captions]  # the tiny tokenizer takes few letters
    if experiment == "digits_consistency":
        captions = ["a"] * len(images)
    total, _ = module.losses((images, captions), streams(2))
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_the_energy_distance_of_gaussians_is_the_known_one():
    """In one dimension, of N(0, 1) and N(m, 1): 2 E|N(m, 2)| - 2 E|N(0, 2)|."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    m, phi = 1.5, torch.distributions.Normal(0.0, 1.0)
    folded = 2 / torch.pi**0.5 * torch.exp(torch.tensor(-(m**2) / 4)) + m * (2 * phi.cdf(torch.tensor(m / 2**0.5)) - 1)
    expected = 2 * folded - 4 / torch.pi**0.5
    assert abs(energy_distance(x, y + m).item() - expected.item()) < 0.05


def moving_square(frames: int) -> torch.Tensor:
    """A bright square that goes to the right and comes back [1, 1, T, 32, 32]."""
    clip = torch.zeros(1, 1, frames, 32, 32)
    for t in range(frames):
        left = 4 + abs(t % 16 - 8)
        clip[:, :, t, 12:20, left : left + 8] = 1
    return clip


def test_videos_that_are_longer_than_those_of_the_autoencoder_are_said(recwarn):
    # its latents drift beyond the 9 frames of its training
    vae = LatentPrior.from_pretrained("moving_digits").vae
    warn_of_drift(vae, moving_square(9))
    warn_of_drift(vae, moving_square(1))
    assert not [w for w in recwarn if "autoencoder" in str(w.message)]
    with pytest.warns(UserWarning, match=r"the second with .* dB: it was trained on shorter ones; .*data.frames=17"):
        warn_of_drift(vae, moving_square(17))
