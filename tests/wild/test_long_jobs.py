"""Long jobs are not lost at the end: inputs are checked first, results written at once, and interrupted runs go on."""

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import REPOSITORY
from html_pages import Page
from hydra import compose, initialize_config_dir
from tiny import SIZE, adapted, save_tiny_prior, tiny_network

from ud2m.cli import sample
from ud2m.cli.sample import kept
from ud2m.files import resumable_folder
from ud2m.images import read_image, write_image
from ud2m.priors.prior import Prior
from ud2m.reports.figures import MAX_SIDE, figure
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    prior = adapted(Prior.from_pretrained(save_tiny_prior(folder / "prior")))
    info = {"physics": {"operator": {"class": "ud2m.physics.SuperResolution", "factor": 2}, "sigma_y": 0.05}}
    PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=1, info=info)).save_pretrained(folder / "export")
    return str(folder / "export")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three good pictures, a.png to c.png."""
    (tmp_path / "in").mkdir()
    for number, name in enumerate("abc"):
        x0 = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(number))
        write_image(x0, tmp_path / "in" / f"{name}.png")
    return tmp_path / "in"


def run(model: str, pictures: Path, output: Path, *overrides: str) -> None:
    words = ["lpips=null", "num_samples=2", f"model={model}", f"input={pictures}", f"output={output}", *overrides]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        sample.main(compose("sample", words))


@contextmanager
def watched(stop_at: str = "", error: BaseException | None = None) -> Iterator[list[str]]:
    """Yield the names of the pictures that are sampled; at one of them the run is interrupted."""
    names: list[str] = []
    draw = sample.SamplingRun.sample

    def counting(job, case, bar):
        if case.name == stop_at:
            raise error or KeyboardInterrupt
        names.append(case.name)
        return draw(job, case, bar)

    with patch.object(sample.SamplingRun, "sample", counting):
        yield names


def refused(capsys, *call: object) -> str:
    """Return the one line of a call that ends before the first picture is sampled, and leaves nothing."""
    before = set(Path(call[2]).parent.rglob("*"))
    with watched() as names, pytest.raises(SystemExit) as stopped:
        run(*call)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert (stopped.value.code, len(lines), names) == (1, 1, [])
    assert set(Path(call[2]).parent.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize("name", ["z.png", "report.html.png", "metrics.json.png", "config.json.png", "a.bmp"])
def test_what_cannot_be_sampled_is_found_before_the_first_is(name, model, pictures, tmp_path, capsys):
    """The last one is too small; others would take the place of the report, or of another picture."""
    side = 2 if name == "z.png" else SIZE
    write_image(torch.rand(3, side, side), pictures / "new.png")
    (pictures / "new.png").rename(pictures / name)
    assert Path(name).stem in refused(capsys, model, pictures, tmp_path / "out")


def test_a_file_that_is_cut_off_is_found_before_the_first_is_sampled(model, pictures, tmp_path, capsys):
    (pictures / "z.png").write_bytes((pictures / "c.png").read_bytes()[:-200])
    assert "z.png" in refused(capsys, model, pictures, tmp_path / "out")


@pytest.mark.parametrize("part", ["write_pictures", "samples_page"])
def test_what_follows_the_sampling_is_tried_before(part, model, pictures, tmp_path, monkeypatch, capsys):
    """Whatever it is that could not take a picture of this shape: here, one that is wider than high."""
    write_image(torch.rand(3, SIZE, 2 * SIZE), pictures / "z.png")
    function = getattr(sample, part)

    def narrow(*arguments):
        entries = [section.entries[0] for section in getattr(arguments[0], "sections", ())] or [arguments[1]]
        if entries[0].mean.shape[2] > SIZE:
            raise ValueError("too wide")
        return function(*arguments)

    monkeypatch.setattr(sample, part, narrow)
    assert refused(capsys, model, pictures, tmp_path / "out") == "error: z: too wide"


@pytest.mark.parametrize("shape", [(12000, 16), (16, 12000), (1, 513), (8, 8)])
def test_pictures_of_any_shape_are_shown(shape):
    shown = figure(torch.full((3, *shape), 0.5), "", "")
    assert min(shown["width"], shown["height"]) >= 1
    assert max(shown["width"], shown["height"]) <= MAX_SIDE


def test_a_picture_below_the_windows_of_the_scores(model, pictures, tmp_path):
    write_image(torch.rand(3, 8, 8), pictures / "small.png")
    run(model, pictures, tmp_path / "out")
    assert "ssim" not in json.loads((tmp_path / "out" / "small" / "numbers.json").read_text())["numbers"]
    assert "psnr" in json.loads((tmp_path / "out" / "small" / "numbers.json").read_text())["numbers"]


def test_more_samples_than_memory_holds(model, pictures, tmp_path, capsys):
    line = refused(capsys, model, pictures, tmp_path / "out", "num_samples=1000000000")
    assert "a: num_samples=1000000000" in line
    assert "of memory are free" in line


OTHER_ERRORS = [
    pytest.param(error, marks=pytest.mark.slow) for error in (OSError("no power"), RuntimeError("a defect"))
]


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), *OTHER_ERRORS], ids=repr)
def test_an_interrupted_run_goes_on_with_the_next_picture(error, model, pictures, tmp_path, capsys):
    run(model, pictures, tmp_path / "whole")
    with watched("b", error), pytest.raises((SystemExit, RuntimeError)):
        run(model, pictures, tmp_path / "out")
    left = tmp_path / "out.unfinished"
    assert not (tmp_path / "out").exists()
    assert (left / "a" / "mean.png").read_bytes() == (tmp_path / "whole" / "a" / "mean.png").read_bytes()
    assert f"the same command with output={tmp_path / 'out'} goes on" in capsys.readouterr().err
    with watched() as names:
        run(model, pictures, tmp_path / "out")
    assert names == ["b", "c"]
    assert not left.exists()
    same = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == same
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_what_is_left_belongs_to_its_settings_and_files(model, pictures, tmp_path, capsys):
    with watched("c"), pytest.raises(SystemExit):
        run(model, pictures, tmp_path / "out")
    line = refused(capsys, model, pictures, tmp_path / "out", "seed=3")
    assert "(other data.seed, seed)" in line
    write_image(1 - read_image(pictures / "a.png"), pictures / "a.png")
    with watched() as names:
        run(model, pictures, tmp_path / "out")
    assert names == ["a", "c"]
    with watched("c"), pytest.raises(SystemExit):
        run(model, pictures, tmp_path / "out", "overwrite=true")
    with watched() as names:
        run(model, pictures, tmp_path / "out", "overwrite=true", "seed=3")
    assert names == ["a", "b", "c"]


def test_folders_of_others_are_not_taken_for_unfinished_work(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="did not write"), resumable_folder(tmp_path / "out", {}, overwrite=True):
        pytest.fail("entered")
    assert (tmp_path / "out.unfinished" / "mine.txt").read_text() == "keep"


def test_two_at_once_do_not_mix(tmp_path):
    with resumable_folder(tmp_path / "out", {"seed": 0}) as work:
        (work / "a").touch()
        with (
            pytest.raises(OSError, match="is in use by this very process"),
            resumable_folder(tmp_path / "out", {"seed": 0}),
        ):
            pytest.fail("entered")
    assert (tmp_path / "out" / "a").exists()


def test_memory_and_report_do_not_grow_with_the_pictures(model, pictures, tmp_path, monkeypatch):
    """Nothing of a picture's size outlives its turn, and the page links what it does not show."""
    drawn: list[weakref.ref] = []
    draw = sample.SamplingRun.sample

    def looking(job, case, bar):
        assert all(reference() is None for reference in drawn)
        samples = draw(job, case, bar)
        drawn.extend(map(weakref.ref, (samples, case.observation, case.x0)))
        return samples

    monkeypatch.setattr(sample.SamplingRun, "sample", looking)
    run(model, pictures, tmp_path / "out", "show=1")
    assert len(drawn) == 9
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert {attributes["alt"].split(":")[0] for attributes, _ in page.images() if ":" in attributes["alt"]} == {"a"}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["b/mean.png", "c/mean.png"]
    assert all((tmp_path / "out" / link).is_file() for link in links)
    numbers = json.loads((tmp_path / "out" / "c" / "numbers.json").read_text())["numbers"]
    assert f"{numbers['psnr']:.2f}" in page.rows[-1]
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_link_leads_to_the_folder_of_any_name(model, pictures, tmp_path):
    (pictures / "c.png").rename(pictures / "c #1 ü%20&.png")
    run(model, pictures, tmp_path / "out", "show=0")
    page = Page((tmp_path / "out" / "report.html").read_text())
    (link,) = [attributes["href"] for tag, attributes in page.tags if tag == "a" and attributes["href"][0] == "c"]
    assert link == "c%20%231%20%C3%BC%2520%26/mean.png"


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    path = tmp_path / "rows" / "pinv.json"
    assert kept(path, lambda: [{"psnr": 30.0}]) == [{"psnr": 30.0}]
    assert kept(path, lambda: pytest.fail("measured again")) == [{"psnr": 30.0}]
