"""``sample.py sampler=latino``, with tiny pipelines."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_latent
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from ud2m.cli.latent_estimate import latent_estimate
from ud2m.cli.pages import check_sampling
from ud2m.cli.sample import main
from ud2m.cli.sample_latent import LatentRun
from ud2m.images import read_image, write_image
from ud2m.priors.latent import LatentPrior


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipe") / "pipe"
    tiny_latent.pipeline("distilled").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path) -> str:
    write_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)), tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


def sample(*overrides: str) -> None:
    given = ["lpips=null", "physics=super_resolution", "physics.operator.factor=2", *overrides]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("sample", given)
        check_sampling(config)
        main(config, LatentRun)


def test_latino_samples_a_file(pipe, picture, tmp_path):
    out = tmp_path / "out"
    common = [f"pipeline={pipe}", f"input={picture}", "sampler=latino", "prompt=a cat", "num_samples=2"]
    sample(*common, f"output={out}")
    row = json.loads((out / "metrics.json").read_text())[0]
    assert (row["method"], row["nfe"]) == ("LATINO", 8)
    assert {"psnr", "residual"} <= row.keys()
    report = (out / "report.html").read_text()
    assert "LATINO: a cat" in report
    sample(*common, f"output={tmp_path / 'again'}", "chunk_size=1")
    for k in range(2):
        first, again = (read_image(folder / "samples" / f"00{k}.png") for folder in (out, tmp_path / "again"))
        assert (first - again).abs().max() <= 1 / 255


@pytest.mark.slow
def test_an_estimated_prompt_is_written_shown_and_taken_again(pipe, picture, tmp_path):
    out, common = tmp_path / "out", [f"pipeline={pipe}", f"input={picture}", "num_samples=2"]
    sample(*common, "sampler=latino_pro", "prompt=a b", "sampler.num_chains=2", f"output={out}")
    assert json.loads((out / "metrics.json").read_text())[0]["nfe"] == 2 * 4 + 8
    report = (out / "report.html").read_text()
    assert "Residual of the chains" in report
    saved = load_file(out / "prompt.safetensors")["embeds"]
    assert saved.shape == (1, tiny_latent.LENGTH, tiny_latent.WIDTH)
    sample(*common, "sampler=latino", f"prompt={out / 'prompt.safetensors'}", f"output={tmp_path / 'with'}")
    sample(
        *common,
        "sampler=latino_pro",
        "prompt=a b",
        "sampler.candidates=[a cat,a dog]",
        "sampler.num_chains=1",
        f"output={tmp_path / 'simplex'}",
    )
    scores = ["sampler=latino_scores", "prompt=a b", "sampler.candidates=[a cat,a dog]", "sampler.pairs=2"]
    sample(*common, *scores, f"output={tmp_path / 'scores'}")
    for name in ("simplex", "scores"):
        assert "Weights of the prompts: a " in (tmp_path / name / "report.html").read_text()
    chosen = load_file(tmp_path / "scores" / "prompt.safetensors")["embeds"]
    prior = LatentPrior.from_pretrained(pipe)
    assert any(torch.equal(chosen, prior.encode_prompt(text).embeds) for text in ("a cat", "a dog"))


@pytest.mark.slow
def test_the_estimate_of_sdxl_has_the_published_sizes(capsys):
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("sample", ["sampler=latino", "pipeline=sdxl_dmd2", "precision=bfloat16", "estimate=true"])
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in latent_estimate(config).splitlines())
    # as their authors and hub pages have them
    assert rows["parameters, unet"] == "2,567,463,684"
    assert rows["parameters, vae"] == "83,653,863"
    assert rows["parameters, text_encoder"] == "123,060,480"
    assert rows["parameters, text_encoder_2"] == "694,659,840"
    assert rows["image"] == "1024x1024, 3 channels"
    assert float(rows["memory of one image"].split()[0]) < 24


def test_bad_input_is_one_line_and_nothing_is_written(pipe, picture, tmp_path, capsys):
    others, odd, without = tmp_path / "other.safetensors", tmp_path / "odd.png", {}
    other = LatentPrior(tiny_latent.pipeline("distilled", seed=1))
    other.save_prompt(other.encode_prompt("a"), others)
    write_image(torch.rand(3, 20, 20), odd)
    for name in ("vae", "text_encoder", "tokenizer"):
        without[name] = Path(shutil.copytree(pipe, tmp_path / f"without_{name}"))
        shutil.rmtree(without[name] / name)
    good = [f"pipeline={pipe}", f"input={picture}", "prompt=a", "sampler=latino", f"output={tmp_path / 'out'}"]
    for change, message in (
        ("prompt=null", "needs prompt="),
        ("prompt=nine letters here", "the model's tokenizer takes 8"),
        ("sampler.guidance=3", "distilled into it"),
        ("sampler.guidance=0.5", "at least 1"),
        ("precision=float16", "float16 on a CPU"),
        ("sampler.vae_dtype=float16", "float16 on a CPU"),
        (f"prompt={others}", "made by another model"),
        (f"input={odd}", "multiples of 8, got 20x20"),
        (f"pipeline={without['vae']}", "without vae, which a latent prior needs"),
        (f"pipeline={without['text_encoder']}", "without text_encoder"),
        (f"pipeline={without['tokenizer']}", "without tokenizer"),
        ("sampler=latino_scores", "must be two at least"),
        ("sampler.times=[1,2]", "whole numbers that fall"),
        ("sampler.final=none", "prox, autoencoded"),
        ("compare=true", "ud2m evaluate"),
        ("physics.operator.factor=16", "kernel"),
    ):
        with pytest.raises(SystemExit):
            sample(*good, change)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
        assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match=r"unknown pipeline 'digit'.*sdxl_dmd2"):
        sample(*good, "pipeline=digit")
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("sample", ["prompt=a"])
    with pytest.raises(ValueError, match="belongs to a latent prior"):
        check_sampling(config)
