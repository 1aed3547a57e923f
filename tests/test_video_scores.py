"""Scores of videos, and ``ud2m evaluate`` on them."""

import json

import pytest
import tiny_latent
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from operators import generator

from ud2m.cli.commands import TASKS
from ud2m.data.mnist import FILES
from ud2m.evaluation.metrics import psnr, ssim
from ud2m.evaluation.scores import Draws, build_score, check_scores, triples_of
from ud2m.physics import Problem, SuperResolution, VideoOperator


@pytest.fixture
def draws() -> Draws:
    x0, noise = (torch.rand(3, 1, 5, 16, 16, generator=generator(k)) for k in range(2))
    samples = torch.stack([0.9 * x0 + 0.1 * noise, 0.8 * x0 + 0.2 * noise], 1)
    return Draws(x0, Problem(VideoOperator(SuperResolution(2, "box")), 0.1).observe(x0), 0.1, samples)


def test_scores_of_videos_are_means_over_frames(draws):
    for name, distance in {"psnr": psnr, "ssim": ssim}.items():
        score = build_score(name)
        score.add(draws)
        expected = [distance(draws.samples[:, s, :, t], draws.x0[:, :, t]).mean() for s in range(2) for t in range(5)]
        assert score.numbers()[name] == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)
    spread = build_score("r")
    spread.add(draws)
    variance = draws.samples.var(1).double().mean()
    error = (draws.samples.mean(1) - draws.x0).double().square().mean() - variance / 2
    assert spread.numbers()["r"] == pytest.approx((variance / error).sqrt().item(), rel=1e-5)


@pytest.mark.slow
def test_the_video_distance_sees_motion_and_the_distance_of_frames_does_not(shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "torch_home"))
    videos = torch.rand(60, 1, 1, 32, 32, generator=generator()).repeat(1, 1, 8, 1, 1)
    videos = torch.stack([torch.roll(videos[:, :, t], 3 * t, -1) for t in range(8)], 2)
    assert torch.equal(triples_of(videos)[7, 1], videos[1, 0, 2])
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    found = {}
    for name in ("frechet_alex", "frechet_video_alex"):
        score = build_score(name)
        score.check(60, 1, videos.shape[1:])
        score.add(Draws(videos, None, 0.1, videos[:, :, order].unsqueeze(1)))
        found[name] = score.numbers()[name]
    assert found["frechet_alex"] < 1e-3
    assert found["frechet_video_alex"] > 0.1


def test_scores_that_videos_or_images_do_not_allow_are_one_line():
    with pytest.raises(ValueError, match=r"psnr_motion: it needs videos of at least 2 frames, got 32x32 images"):
        check_scores(["psnr_motion"], 9, 1, (1, 32, 32))
    with pytest.raises(FileNotFoundError, match=r"fvmd cannot be computed: it follows points by the tracker PIPs\+\+"):
        build_score("fvmd")


@pytest.mark.slow
def test_videos_are_evaluated_and_play_in_the_report(shared, tmp_path, monkeypatch, capsys):
    root = shared / "data" / "mnist"
    assert all((root / "MNIST" / "raw" / name).is_file() for name in FILES)
    tiny_latent.wan(channels=1).save_pretrained(tmp_path / "video")
    tiny_latent.pipeline("distilled", channels=1).save_pretrained(tmp_path / "image")
    image = f"target.reference={tmp_path}/image target.prompt=a"
    lvtino = f"target.reference={tmp_path}/video target.image_reference={tmp_path}/image target.prompt=a"
    given = [
        f'methods=[start,admm_tv,"frame_latino {image}","vision_xl {image}","lvtino {lvtino} target.image_prompt=a"]',
        f'datasets=["moving_digits root={root} frames=8 test_limit=3 val_limit=1 batch_size=2"]',
        "operators=[video_c]",
        "metrics=[psnr,ssim,psnr_motion,residual]",
        *(f"results={tmp_path}", "name=clips", "num_samples=2", "tune=false", "show=1"),
    ]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        TASKS["evaluate"](compose("evaluate", given))
    rows = json.loads((tmp_path / "clips" / "metrics.json").read_text())
    assert [row["nfe"] for row in rows] == [0, 0, 8, 8, 7]
    assert {row["size"] for row in rows} == {"8x32x32"}
    assert all(row["psnr_motion"] > 0 and row["images"] == 3 for row in rows)
    page = (tmp_path / "clips" / "report.html").read_text()
    assert page.count('class="playing"') == 1
    assert "data:image/webp;base64," in page
