"""``sample.py sampler=lvtino``, with tiny pipelines."""

import json

import pytest
import tiny_latent
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir

from ud2m.cli.pages import check_sampling
from ud2m.cli.sample import main
from ud2m.cli.sample_video import VideoRun, run_of
from ud2m.data.videos import can_write_videos, read_clip, write_frames, write_video
from ud2m.evaluation.scores import Draws, motion_score
from ud2m.images import read_image, write_image
from ud2m.physics import Problem, SuperResolution, VideoOperator
from ud2m.reports.clips import strip

SIDE = 32


@pytest.fixture(scope="module")
def pipes(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pipes")
    tiny_latent.wan().save_pretrained(folder / "video")
    tiny_latent.pipeline("distilled").save_pretrained(folder / "image")
    return [f"pipeline={folder / 'video'}", f"image_pipeline={folder / 'image'}"]


def clip(frames: int = 6, side: int = SIDE) -> torch.Tensor:
    i = torch.arange(side) / side
    t = torch.arange(frames).view(-1, 1, 1) / frames
    frame = 0.5 + 0.3 * torch.sin(6 * (i + i.unsqueeze(1) + t))
    return torch.stack([frame, 1 - frame, frame**2])


@pytest.fixture
def frames(tmp_path) -> str:
    write_frames(clip(), tmp_path / "frames")
    return str(tmp_path / "frames")


OPERATOR = ["lpips=null", "physics=video_a", "physics.operator.exposure=2", "physics.operator.stride=2"]
OPERATOR += ["physics.operator.space.factor=2"]
LVTINO = ["sampler=lvtino", "prompt=a", "sampler.image_prompt=a", "sampler.times=[700,300]"]
LVTINO += ["sampler.image_times=[249]"]


def sample(*overrides: str, sampler: list[str] = LVTINO, operator: list[str] = OPERATOR) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("sample", [*operator, *sampler, *overrides])
        check_sampling(config)
        main(config, run_of(config))


def test_a_folder_of_frames_is_restored(pipes, frames, tmp_path):
    out = tmp_path / "out"
    sample(*pipes, f"input={frames}", "num_samples=2", f"output={out}")
    row = json.loads((out / "metrics.json").read_text())[0]
    assert (row["method"], row["nfe"]) == ("LVTINO", 3)
    assert {"psnr", "ssim", "psnr_motion", "psnr_motion_mean", "residual", "r"} <= row.keys()
    for name in ("samples/000", "samples/001", "mean", "std"):
        assert [path.name for path in sorted((out / name).iterdir())] == [f"{t:06d}.png" for t in range(6)]
        assert (out / f"{name}.mp4").is_file() == can_write_videos()
    assert len(list((out / "observation").iterdir())) == 3
    # the numbers are those of the files
    drawn = [read_clip(out / f"samples/00{k}").frames for k in range(2)]
    of_frames = [-10 * (d - clip()).square().mean((0, 2, 3)).log10().mean() for d in drawn]
    assert sum(of_frames) / 2 == pytest.approx(row["psnr"], abs=0.05)
    moved = [-10 * (d.diff(dim=1) - clip().diff(dim=1)).square().mean().log10() for d in drawn]
    assert sum(moved) / 2 == pytest.approx(row["psnr_motion"], abs=0.05)
    assert "LVTINO: a" in (out / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not can_write_videos(), reason="av is not installed: pip install 'ud2m[video]'")
def test_an_observed_video_is_explained_at_the_rate_of_the_clip(pipes, tmp_path):
    out = tmp_path / "out"
    write_video(clip(3, SIDE // 2), tmp_path / "y.mp4", 10)
    sample(*pipes, f"input={tmp_path / 'y.mp4'}", "degraded=true", "num_samples=1", "sigma_y=0.05", f"output={out}")
    row = json.loads((out / "metrics.json").read_text())[0]
    assert row["sigma_y"] == pytest.approx(0.05)
    assert "psnr" not in row
    restored, y = read_clip(out / "samples/000.mp4"), read_clip(out / "observation.mp4")
    assert (restored.frames.shape, restored.rate) == ((3, 6, SIDE, SIDE), 20)
    assert (y.frames.shape, y.rate) == ((3, 3, SIDE // 2, SIDE // 2), 10)


@pytest.mark.slow
def test_latino_takes_a_video_operator_too_and_a_clip_is_cut_to_what_is_taken(pipes, tmp_path, capsys):
    write_frames(clip(5, 39), tmp_path / "frames")
    common = [*pipes[:1], f"input={tmp_path / 'frames'}", "num_samples=1", f"output={tmp_path / 'out'}"]
    sample(*common, "physics.operator.stride=1", sampler=["sampler=latino", "prompt=a", "sampler.times=[700,300]"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())[0]["method"] == "LATINO"
    assert read_image(tmp_path / "out/samples/000/000004.png").shape == (3, 32, 32)
    assert "cut to 32x32" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_input_is_one_line_and_nothing_is_written(pipes, frames, tmp_path, capsys):
    out, one = tmp_path / "out", tmp_path / "one"
    one.mkdir()
    write_image(clip()[:, 0], one / "a.png")
    good = [*pipes, f"input={frames}", f"output={out}"]
    for change, message in (
        (f"input={one}", "holds one frame"),
        (f"input={tmp_path / 'none.mp4'}", "there is no video"),
        ("input=null", "an operator on videos needs input=..."),
        ("physics.operator.stride=8", "the clip has 6 frames and the operator makes one of 8"),
        ("fps=0", "fps must be a number from 0.001 to 1000 or null, got 0"),
        ("fps=1e-9", "fps must be a number from 0.001 to 1000 or null, got 1e-09"),
        ("pipeline=null", "frames of 3 channels and the clip 1"),
    ):
        with pytest.raises((SystemExit, ValueError)) as raised:
            sample(*good, change)
        error = str(raised.value) if raised.type is ValueError else capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
        assert not out.exists()
        assert not out.with_name("out.unfinished").exists()


@pytest.mark.slow
def test_admm_tv_needs_no_pipeline_and_its_clips_play(frames, tmp_path):
    out = tmp_path / "out"
    sample(f"input={frames}", f"output={out}", "sampler.iterations=5", sampler=["sampler=admm_tv"])
    row = json.loads((out / "metrics.json").read_text())[0]
    assert (row["method"], row["nfe"]) == ("ADMM-TV", 0)
    assert [path.name for path in (out / "samples").iterdir() if path.is_dir()] == ["000"]
    page = (out / "report.html").read_text()
    assert "<h1>ADMM-TV</h1>" in page
    for text in ('class="playing"', "Residual of frames of y", "Change from frame to frame"):
        assert text in page


def test_admm_tv_of_images_is_one_line(frames, capsys):
    with pytest.raises(SystemExit):
        sample(f"input={frames}", "physics=denoising", sampler=["sampler=admm_tv", "lpips=null"], operator=[])
    expected = "error: this sampler restores videos; take an operator on videos, as physics=video_a"
    assert capsys.readouterr().err.strip().splitlines()[-1] == expected


def test_images_and_videos_choose_their_run():
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        video, image = (compose("sample", ["sampler=lvtino", f"physics={p}"]) for p in ("video_c", "denoising"))
    assert run_of(video) is VideoRun
    assert run_of(image) is not VideoRun
    assert (video.sampler.reference, video.sampler.image_reference) == ("moving_digits", "digits")
    assert video.sampler.prompt == "a video of a digit"


def test_the_motion_score_ignores_what_stands_still():
    x0 = torch.rand(1, 1, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    observation = Problem(VideoOperator(SuperResolution(2, "box")), 0.1).observe(x0)
    brighter, still = x0 + 0.1, x0[:, :, :1].expand_as(x0)
    found = []
    for sample in (brighter, still):
        score = motion_score()
        score.add(Draws(x0, observation, 0.1, sample.unsqueeze(1)))
        found.append(score.numbers()["psnr_motion"])
    assert found[0] > 100
    assert found[1] == pytest.approx(-10 * x0.diff(dim=2).square().mean().log10().item(), abs=1e-4)
    assert strip(x0[0]).shape == (1, 4, 20)


@pytest.mark.slow
def test_the_shipped_pipelines_restore_a_clip_of_any_length_without_further_settings(tmp_path):
    write_frames(clip(13)[:1], tmp_path / "frames")
    out = tmp_path / "out"
    given = [f"input={tmp_path / 'frames'}", "num_samples=1", f"output={out}", "lpips=null", "physics=video_a"]
    sample(*given, "physics.operator.exposure=4", "physics.operator.stride=4", sampler=["sampler=lvtino"])
    assert json.loads((out / "metrics.json").read_text())[0]["nfe"] == 7
    assert len(list((out / "samples/000").iterdir())) == 13
    assert (out / "report.html").stat().st_size < 1_000_000
