"""ud2m evaluate: what it writes, what it does not do twice, and what it says about bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from tiny import SIZE, adapted, save_tiny_prior, tiny_network
from tiny_training import write_images

from ud2m.cli.commands import TASKS
from ud2m.cli.methods import combinations
from ud2m.cli.pages import part
from ud2m.cli.words import is_text
from ud2m.evaluation import comparison
from ud2m.evaluation.cells import images_digest
from ud2m.images import read_image
from ud2m.priors.prior import Prior
from ud2m.samplers.bridge import Bridge, BridgeSchedule
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig
from ud2m.unfolded.warm_start import SmoothingStart


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A micro prior, models for two operators, and a folder of small pictures."""
    folder = tmp_path_factory.mktemp("material")
    for name in ("gaussian_blur", "inpainting"):
        prior = adapted(Prior.from_pretrained(save_tiny_prior(folder / "prior")), scale=0.1 + len(name) / 100)
        PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=2)).save_pretrained(folder / name)
    for split in ("train", "val", "test"):
        write_images(folder / "pictures" / split, 4, SIZE)
    return folder


def overrides(material: Path, results: Path, **changes: str) -> list[str]:
    values = {
        "name": "tiny",
        "results": str(results),
        "prior": str(material / "prior"),
        "datasets": f'["folder root={material}/pictures crop_size={SIZE} batch_size=3"]',
        "operators": '["gaussian_blur operator.width=0.8",inpainting]',
        "methods": f'[pinv,"ud2m target.model={material}/{{physics}}"]',
        "metrics": "[psnr,residual]",
        "num_samples": "2",
        "tune_images": "2",
        "tune_samples": "1",
        "show": "2",
    }
    return [f"{key}={value}" for key, value in (values | changes).items()]


def run(material: Path, results: Path, **changes: str) -> list[dict]:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        TASKS["evaluate"](compose("evaluate", overrides(material, results, **changes)))
    return json.loads((results / "tiny" / "metrics.json").read_text())


def refusal(capsys, material: Path, results: Path, **changes: str) -> str:
    """Return the one line that a refused call prints; nothing was measured."""
    with pytest.raises(SystemExit) as stopped:
        run(material, results, **changes)
    assert stopped.value.code == 1
    assert not list(results.glob("*/cells/*"))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.fixture
def measured(monkeypatch):
    """The labels of the methods that are really run."""
    calls = []
    measure = comparison.measure

    def spy(method, problem, batches, *rest, **options):
        calls.append((type(method).__name__, type(problem.operator).__name__))
        return measure(method, problem, batches, *rest, **options)

    monkeypatch.setattr(comparison, "measure", spy)
    return calls


@pytest.mark.slow
def test_every_method_is_measured_on_every_operator_and_everything_is_written(material, tmp_path, capsys):
    rows = run(material, tmp_path)
    assert [(row["method"], row["operator"].split()[0]) for row in rows] == [
        ("A^dagger y", "gaussian_blur"),
        (f"UD2M (model={material}/{{physics}})", "gaussian_blur"),
        ("A^dagger y", "inpainting"),
        (f"UD2M (model={material}/{{physics}})", "inpainting"),
    ]
    assert [row["nfe"] for row in rows] == [0, 6, 0, 6]
    assert all(row["psnr_mean_low"] <= row["psnr_mean"] <= row["psnr_mean_high"] for row in rows)
    assert all(isinstance(value, int | float | str | None) for row in rows for value in row.values())
    assert (rows[1]["images"], rows[1]["samples"], rows[1]["seed"], rows[1]["size"]) == (4, 2, 0, "16x16")
    folder = tmp_path / "tiny"
    for name in ("table.md", "table.tex", "report.html", "settings.json"):
        assert "ud2m" in (folder / name).read_text().lower()
    settings = json.loads((folder / "settings.json").read_text())
    assert {cell["seed"] for cell in settings["cells"]} == {0}
    # Oracle: the model itself, on the same observations
    from ud2m.physics import Inpainting
    from ud2m.physics.problem import Problem

    x0 = torch.stack([read_image(p) for p in sorted((material / "pictures" / "test").iterdir())])
    sampler = PosteriorSampler.from_pretrained(str(material / "inpainting"))
    problem, values = Problem(Inpainting(0.7), 0.01), []
    for first in (0, 3):
        part = x0[first : first + 3]
        observation = problem.observe(part, first)
        y, physics = observation.y, observation.physics
        samples = sampler(y, physics, 0.01, 2, generator=problem.sampling_generator(first), tile=1024)
        values.append(-10 * (samples.mean(1) - part).square().flatten(1).mean(1).log10())
    assert rows[3]["psnr_mean"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-4)
    assert images_digest([x0]) == settings["cells"][3]["images"]
    assert "report:" in capsys.readouterr().out


@pytest.mark.slow
def test_differences_from_a_reference_are_those_of_each_image(material, tmp_path, capsys, measured):
    once = run(material, tmp_path)
    rows = run(material, tmp_path, reference="'A^dagger y'")
    assert len(measured) == 4  # the cells did not change
    assert [{k: v for k, v in row.items() if "_difference" not in k and k != "reference"} for row in rows] == once
    model, pinv = rows[1], rows[0]
    for name in ("psnr_mean", "psnr", "residual"):
        assert model[f"{name}_difference"] == pytest.approx(model[name] - pinv[name])
        assert model[f"{name}_difference_low"] <= model[f"{name}_difference"] <= model[f"{name}_difference_high"]
        assert f"{name}_difference" not in pinv
    assert "Differences from A^dagger y" in (tmp_path / "tiny" / "table.md").read_text()
    other = tmp_path / "other"
    assert "reference must be one of the methods A^dagger y, UD2M" in refusal(capsys, material, other, reference="pinv")


def test_a_reference_that_cannot_take_an_operator_is_refused_before_anything_is_measured(material, tmp_path, capsys):
    skipping = {"unsupported": "skip", "operators": "[inpainting,jpeg]", "methods": "[pinv,ddrm]", "reference": "DDRM"}
    error = refusal(capsys, material, tmp_path, **skipping)
    assert "the reference DDRM cannot take jpeg; leave this operator out, or take another reference" in error


@pytest.mark.slow
def test_bridges_are_methods_whose_steps_are_tuned(material, tmp_path):
    bridge = Bridge(
        Prior.from_pretrained(save_tiny_prior(material / "prior")).unet, BridgeSchedule(), SmoothingStart([4])
    )
    bridge.save(material / "bridge")
    methods = ",".join(f'"{name} target.model={material}/bridge"' for name in ("i2sb", "cddb"))
    rows = run(material, tmp_path, methods=f"[{methods}]", operators="[inpainting]")
    assert [row["nfe"] in (1, 3, 9) for row in rows] == [True, True]
    assert rows[1]["residual"] < 0.9 * rows[0]["residual"]


@pytest.mark.slow
def test_a_finished_cell_is_not_measured_again_and_others_are_never_taken_for_it(material, tmp_path, measured):
    one = {"operators": "[inpainting]"}
    first = run(material, tmp_path, **one)
    assert len(measured) == 2
    # one more method: only that one
    run(material, tmp_path, methods=f'[pinv,"ud2m target.model={material}/{{physics}} target.num_steps=1"]', **one)
    assert [name for name, _ in measured[2:]] == ["PosteriorSampler"]
    one["methods"] = "[pinv]"
    for count, change in enumerate(({"seed": "1"}, {"metrics": "[psnr]"}), start=4):
        assert run(material, tmp_path, **one, **change) != first[:1]
        assert len(measured) == count
    assert run(material, tmp_path, **one) == first[:1]
    assert len(measured) == 5


@pytest.mark.slow
def test_another_model_under_the_same_name_is_another_cell(material, tmp_path, measured):
    model = tmp_path / "model"
    for scale in (0.1, 0.2):
        prior = adapted(Prior.from_pretrained(str(material / "prior")), scale=scale)
        PosteriorSampler(tiny_network(prior)).save_pretrained(model, overwrite=True)
        rows = run(material, tmp_path / "results", methods=f'["ud2m target.model={model}"]', operators="[inpainting]")
    assert len(measured) == 2
    assert len(rows) == 1


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(material, tmp_path, monkeypatch, measured):
    spied = comparison.measure

    def interrupted(*arguments, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        return spied(*arguments, **options)

    monkeypatch.setattr(comparison, "measure", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(material, tmp_path)
    assert stopped.value.code == 130
    assert len(list((tmp_path / "tiny" / "cells").glob("*.json"))) == 2
    monkeypatch.setattr(comparison, "measure", spied)
    del measured[:]
    assert len(run(material, tmp_path)) == 4
    assert len(measured) == 2


@pytest.mark.slow
def test_a_method_takes_the_setting_that_is_best_on_validation_images(material, tmp_path, measured):
    methods = '["ddrm target.num_steps=4 tune.eta=[0.0,1.0] tune.power=[1.0,3.0]"]'
    (row,) = run(material, tmp_path, methods=methods, operators="[inpainting]")
    assert len(measured) == 4 + 1
    assert "eta = " in row["setting"]
    chosen = dict(part.split(" = ") for part in row["setting"].split(", "))
    # Oracle: each setting by itself, on the validation images
    scores = {}
    for eta in ("0.0", "1.0"):
        for power in ("1.0", "3.0"):
            data = f'["folder root={material}/pictures crop_size={SIZE} batch_size=3 test_limit=2"]'
            alone = f'["ddrm target.num_steps=4 target.eta={eta} target.power={power}"]'
            (other,) = run(
                material, tmp_path, methods=alone, operators="[inpainting]", tune="false", datasets=data,
                num_samples="1",
            )  # fmt: skip
            scores[eta, power] = other["psnr_mean"]
    # val and test hold the same pictures here, and two of four are the same ones
    assert (chosen["eta"], chosen["power"]) == max(scores, key=scores.get)
    assert row["nfe"] == 4


@pytest.mark.slow
def test_one_search_serves_several_numbers_and_is_not_repeated(material, tmp_path, measured):
    methods = '["ddrm tune.eta=[0.0,1.0] tune.power=[1.0,3.0]",pinv]'
    one = {"methods": methods, "tune_samples": "2"}
    one |= {"operators": "[inpainting]", "tune_by": "[psnr_limit,energy]", "metrics": "[psnr,psnr_limit,energy]"}
    rows = run(material, tmp_path, **one)
    assert [row["method"] for row in rows] == ["DDRM, best PSNR", "DDRM, best Energy score", "A^dagger y"]
    assert len(measured) <= 4 + 2 + 1
    searches = json.loads((tmp_path / "tiny" / "settings.json").read_text())["searches"]
    assert [len(search["candidates"]) for search in searches] == [4]
    # Oracle: each number by itself
    for number, row in zip(("psnr_limit", "energy"), rows, strict=False):
        (alone, _) = run(material, tmp_path / number, **(one | {"tune_by": number}))
        assert alone["method"] == "DDRM"
        assert {k: v for k, v in alone.items() if k not in ("method", "seconds_per_image", "peak_memory")} == {
            k: v for k, v in row.items() if k not in ("method", "seconds_per_image", "peak_memory")
        }
    before = len(measured)
    assert run(material, tmp_path, **(one | {"metrics": "[psnr]", "num_samples": "3"}))[0]["samples"] == 3
    assert len(measured) - before <= 2  # other cells, but of A^dagger y, which draws nothing; the same search


@pytest.mark.parametrize(("word", "read"), [("tune_by=[psnr,lpips]", ["psnr", "lpips"]), ("tune_by=psnr", "psnr")])
def test_the_command_line_takes_one_number_or_a_list(word, read):
    assert not is_text("tune_by", "evaluate")  # what is, is quoted
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        assert compose("evaluate", [word]).tune_by == read


def test_the_first_of_equal_settings_is_taken_and_none_is_worst():
    rows = [{"psnr": None}, {"psnr": 3.0}, {"psnr": 3.0}, {"psnr": 2.0}]
    assert comparison.best_of("abcd", rows, "psnr") == "b"
    assert comparison.best_of("abcd", [{"lpips": value} for value in (0.3, 0.1, 0.2, 0.1)], "lpips") == "b"


def test_a_grid_of_an_entry_takes_the_place_of_the_pages(material):
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        assert set(part("method", "latino")["tune"]) == {"setting.tau_first", "setting.tau_last", "setting.width"}
        grid = part("method", "latino tune={symmetries:[1,8],setting.width:[1.0,1.4]}")["tune"]
        assert grid == {"symmetries": [1, 8], "setting.width": [1.0, 1.4]}
        assert part("method", "ud2m tune={eta:[0.0,1.0]}")["tune"] == {"eta": [0.0, 1.0]}
        assert part("method", "latino tune=null")["tune"] is None
        assert part("method", "ddrm tune.eta=[0.5]")["tune"]["eta"] == [0.5]
        with pytest.raises(ValueError, match=r"unknown setting of method pinv 'tune'"):
            part("method", "pinv tune={a:[1]}")


def test_a_method_is_called_as_its_entry_says(material, tmp_path):
    entry = f'"ud2m label=mine,_K=3 target.model={material}/{{physics}} target.num_steps=1"'
    rows = run(material, tmp_path, methods=f"[{entry},pinv]", operators="[gaussian_blur]")
    assert [(row["method"], row["nfe"]) for row in rows] == [("mine, K=3", 3), ("A^dagger y", 0)]


@pytest.mark.slow
def test_methods_that_cannot_take_an_operator_stop_it_or_are_skipped(material, tmp_path, capsys):
    operators = '["gaussian_blur operator.width=[0.6,1.2] operator.angle=30 operator.boundary=zero"]'
    changes = {"methods": "[pinv,ddrm]", "operators": operators, "tune": "false"}
    error = refusal(capsys, material, tmp_path, **changes)
    assert "Ddrm cannot take the operator BoundedBlur; it takes operators with" in error
    assert "unsupported=skip" in error
    rows = run(material, tmp_path, unsupported="skip", **changes)
    assert [row["method"] for row in rows] == ["A^dagger y"]
    assert "skipped: Ddrm cannot" in capsys.readouterr().out


def test_metrics_without_weights_are_skipped_where_that_is_asked_for(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    rows = run(material, tmp_path, methods="[pinv]", metrics="[lpips,psnr]", unsupported="skip")
    assert all("psnr" in row and "lpips" not in row for row in rows)
    assert "skipped: without lpips: the metric lpips cannot be computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"methods": "[pinv,ddrn]"},
            r"unknown method 'ddrn' \(did you mean ddrm\?\); known: admm_tv, cddb, ddrm, diffpir, dps, ",
        ),
        ({"operators": "[blur]"}, r"unknown physics 'blur' \(did you mean .*\?\); known: boxes"),
        ({"datasets": "[imagenet]"}, r"unknown data 'imagenet' \(did you mean imagenet256\?\); known: .*folder"),
        ({"metrics": "[psnr,fid]"}, "unknown metric 'fid'"),
        ({"metrics": "[psnr,coverage]"}, "the metric coverage: .* at least 13 samples"),
        ({"metrics": "[sbc]"}, "the metric sbc: .* at least 15 images"),
        ({"methods": "[]"}, "methods must be a list of texts"),
        ({"methods": "[pinv,pinv]"}, "none twice"),
        (
            {"methods": '["ddrm target.steps=3"]'},
            "unknown setting of method ddrm 'target.steps'.*; known: label, target._target_",
        ),
        ({"methods": '["ud2m target.model=nowhere"]'}, "unknown model 'nowhere'; known: photographs_gaussian_blur, "),
        (
            {"methods": "[latino]", "datasets": f'["folder root={{root}} channels=1 crop_size={SIZE}"]'},
            "latino: its prior draws images with 3 channels, .* has 1; choose other datasets",
        ),
        ({"unsupported": "maybe"}, "unsupported must be error, skip"),
        ({"tune_by": "fid"}, "tune_by: .* is no number to choose by; take one of psnr_mean"),
        ({"tune_by": "[psnr,fid]"}, "tune_by: 'fid' is no number to choose by; take one of psnr_mean"),
        ({"tune_by": "[]"}, "tune_by must be a list of texts, .*, of at least one or a text that is not empty"),
        ({"num_samples": "0"}, "num_samples must be a whole number of at least 1"),
        ({"operators": '["gaussian_blur sigma_y=0"]'}, "sigma_y must be a positive noise level"),
        ({"operators": '["super_resolution operator.factor=5"]'}, "super_resolution operator.factor=5 on folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(material, tmp_path, capsys, changes, words):
    changes = {key: value.replace("{root}", str(material / "pictures")) for key, value in changes.items()}
    assert re.search(words, refusal(capsys, material, tmp_path, **changes))


def test_a_metric_without_weights_is_refused(material, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    error = refusal(capsys, material, tmp_path, metrics="[lpips_squeeze]")
    assert "the metric lpips_squeeze cannot be computed: the weights of squeeze are missing" in error


def test_a_grid_names_settings_of_the_method():
    target = {"a": 1, "b": {"c": 2}}
    found = list(combinations(target, {"a": [1, 3], "b.c": [4]}))
    assert found == [{"a": 1, "b": {"c": 4}}, {"a": 3, "b": {"c": 4}}]
    assert target == {"a": 1, "b": {"c": 2}}
    assert comparison.difference(found[1], found) == "a = 3"
    grid = list(combinations(target, {"a": [1, 3, 2], "b.c": [5, 4]}))
    words = [comparison.difference(candidate, grid) for candidate in grid]
    edge = comparison.EDGE
    assert words == [
        f"a = 1{edge}, b.c = 5",
        f"a = 1{edge}, b.c = 4",
        f"a = 3{edge}, b.c = 5",
        f"a = 3{edge}, b.c = 4",
        "a = 2, b.c = 5",
        "a = 2, b.c = 4",
    ]
    with pytest.raises(ValueError, match=r"tune names 'b.d', which the method does not have; it has c"):
        list(combinations(target, {"b.d": [1]}))


@pytest.mark.slow
def test_the_module_runs_as_a_command(material, tmp_path):
    command = [sys.executable, "-m", "ud2m", "evaluate", *overrides(material, tmp_path, methods="[pinv]")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "report: " in done.stdout
    assert (tmp_path / "tiny" / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
