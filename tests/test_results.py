"""Stored results: collected whole, shown in the documents, and nothing else is stored."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from ud2m.evaluation.cells import CellStore, Result

sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "data_prep")]
results = importlib.import_module("results")

ROWS = [
    {"method": "A | b", "data": "photos", "size": "32x32", "nfe": 0, "psnr": 20.004, "r": None, "setting": "x"},
    {"method": "ours", "data": "photos", "size": "32x32", "nfe": 9, "psnr": 30.0, "r": 0.5, "setting": None},
]


def output_folder(path: Path, rows: list[dict], **config: object) -> Path:
    """Write what sample.py leaves behind."""
    trained = {
        "sigma_y": 0.01,
        "info": {"physics": {"operator": {"class": "ud2m.physics.GaussianBlur"}, "sigma_y": 0.01}},
    }
    settings = {
        "data": {"_target_": "ud2m.data.PhotoData", "crop_size": 32, "tile_size": None},
        "physics": None,
        "sigma_y": None,
        "output": str(path),
        "trained": trained,
    }
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(rows))
    (path / "config.json").write_text(json.dumps(settings | config))
    return path


def test_documents_show_the_stored_results():
    assert results.DOCUMENT.read_text() == results.render_document(), "run: python benchmarks/results.py render"
    for page in results.PAGES:
        text = page.read_text()
        assert text == results.render_page(text), "run: python benchmarks/results.py render"


def test_every_stored_result_is_whole_and_shown():
    names = {section.name for section in results.SECTIONS}
    for path in results.RESULTS.glob("*.json"):
        assert path.stem in names
        content = results.load(path.stem)
        assert content["command"]
        assert content["machine"]
        assert not re.search(r'[" =]/\w', path.read_text()), "an absolute path"


def test_pages_show_sections_that_exist():
    names = {section.name for section in results.SECTIONS}
    for page in results.PAGES:
        shown = [name for match in results.MARKED.finditer(page.read_text()) for name in match["names"].split(",")]
        assert shown, page
        assert set(shown) <= names, page


def test_a_table_has_the_formats_of_the_report():
    assert results.table(ROWS, ["method", "nfe", "psnr", "r"]).splitlines() == [
        "| Method | NFE | PSNR [dB] | r |",
        "| --- | ---: | ---: | ---: |",
        "| A \\| b | 0 | 20.00 | – |",
        "| ours | 9 | **30.00** | 0.50 |",
    ]


def test_levels_of_denoising_get_headings_and_winners():
    rows = [{"method": "a", "psnr@0.05": 30.123}, {"method": "b", "psnr@0.05": 31.0}]
    assert results.table(rows).splitlines() == [
        "| Method | σ = 0.05 |",
        "| --- | ---: |",
        "| a | 30.12 |",
        "| b | **31.00** |",
    ]


def test_missing_results_are_named(tmp_path):
    text = "a\n<!-- results:prior,losses method psnr -->\nold\n<!-- /results -->\nz\n"
    expected = (
        "a\n<!-- results:prior,losses method psnr -->\nNot measured yet: `prior`, `losses`.\n<!-- /results -->\nz\n"
    )
    assert results.render_page(text, tmp_path) == expected
    assert results.render_document(tmp_path).count(results.NOT_MEASURED) == len(results.SECTIONS)
    results.store("prior", "python x.py", {}, ROWS, folder=tmp_path)
    once = results.render_page(text, tmp_path)
    assert "| ours | **30.00** |" in once
    assert "\n\nNot measured yet: `losses`.\n" in once
    assert "old" not in once
    assert results.render_page(once, tmp_path) == once
    assert "```bash\npython x.py\n```" in results.render_document(tmp_path)


def test_collecting_takes_all_rows_or_the_last_one_under_a_label(tmp_path):
    whole = output_folder(tmp_path / "a", [{"method": "LATINO", "psnr": 1.0}, {"method": "UD2M", "psnr": 2.0}])
    labelled = output_folder(
        tmp_path / "b",
        [{"method": "LATINO", "psnr": 3.0}, {"method": "UD2M", "psnr": 4.0}],
        sigma_y=0.05,
        physics={"operator": {"_target_": "ud2m.physics.SuperResolution"}, "sigma_y": 0.02},
        data={"_target_": "ud2m.data.MnistData", "crop_size": 32, "tile_size": 64},
    )
    rows, configs = results.collect([str(whole), f"UD2M, sigma_y = 0.05={labelled}"])
    assert [(row["method"], row["psnr"]) for row in rows] == [
        ("LATINO", 1.0),
        ("UD2M", 2.0),
        ("UD2M, sigma_y = 0.05", 4.0),
    ]
    settings = [tuple(row[key] for key in results.SETTING) for row in rows]
    assert settings[0] == settings[1] == ("photos", "32x32", "Gaussian blur", 0.01)
    assert settings[2] == ("mnist", "64x64", "Super resolution", 0.05)
    assert set(configs) == {"a", "b"}
    assert "output" not in configs["a"]
    with pytest.raises(FileNotFoundError, match="output folder of sample"):
        results.collect([str(tmp_path / "c")])


def test_an_evaluation_is_collected_and_shown_with_its_intervals(tmp_path):
    common = {"data": "photos", "size": "32x32", "sigma_y": 0.01, "images": 5, "samples": 2, "seed": 0, "nfe": 9}
    common |= {"lpips": 0.1, "lpips_backend": "alex 1", "peak_memory": 77.0}
    rows = [
        {"method": name, "operator": operator, "psnr": psnr, "psnr_low": psnr - 1, "psnr_high": psnr + 1} | common
        for operator in ("blur", "jpeg")
        for name, psnr in (("a", 30.0), ("b", 31.0))
    ]
    folder = tmp_path / "evaluated"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(rows))
    (folder / "settings.json").write_text(json.dumps({"config": {"name": "evaluated"}, "cells": [{}] * 4}))
    found, configs = results.collect([str(folder)])
    assert found == rows
    assert configs == {"evaluated": {"name": "evaluated"}}
    content = {"rows": found, "note": "", "command": "python x.py", "machine": "m"}
    text = results.render_section(results.SECTIONS[0], content)
    assert "| blur | b | 9 | **31.00 [30.00, 32.00]** | 0.100 |" in text.replace("**0.100**", "0.100")
    assert (
        "lpips: network alex 1; data photos, size 32x32, sigma_y 0.01, images 5, samples 2, seed 0; in brackets" in text
    )
    assert "77" not in text


def test_curves_of_an_evaluation_are_stored_with_their_rows_for_figures(tmp_path):
    plots = importlib.import_module("plots")
    (tmp_path / "evaluated").mkdir()
    cells = CellStore(tmp_path / "evaluated" / "cells")
    rows = [{"method": "UD2M", "operator": name, "energy": energy} for name, energy in (("blur", 1.0), ("jpeg", 2.0))]
    curves = {1.0: [[0.01, 0.02, 0.75], [0.1, 0.1, 0.25]], 2.0: [[0.02, 0.02, 1.0]]}
    (tmp_path / "evaluated" / "metrics.json").write_text(json.dumps(rows))
    settings = {"config": {}, "cells": [{"operator": row["operator"]} for row in rows]}
    (tmp_path / "evaluated" / "settings.json").write_text(json.dumps(settings))
    cells.save({"tuning": True}, Result({}, {"rows": [], "spatial": [[1, 1, 1]]}, {}))
    for cell, (energy, curve) in zip(settings["cells"], curves.items(), strict=True):
        cells.save(cell, Result({"energy": energy}, {"spatial": curve, "energy_values": [3.0]}, {}))
    found, _ = results.collect([str(tmp_path / "evaluated")])
    assert [row["spatial"] for row in found] == list(curves.values())
    assert "energy_values" not in found[0]
    (axis,) = plots.draw_spatial(found).axes
    assert len(plots.draw_spatial(found * 4).axes) == 1  # more operators than colours that are not the page's own
    lines = {line.get_label(): np.array(line.get_xydata()).tolist() for line in axis.lines}
    assert lines["blur"] == [[0.01, 0.02], [0.1, 0.1]]
    assert lines["calibrated"] == [[0.01, 0.01], [0.1, 0.1]]


def test_folders_of_photographs_are_stored_by_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOGRAPHS", f"{tmp_path}/photographs/")
    rows = [{**ROWS[0], "data": f"folder root={tmp_path}/photographs crop_size=64"}]
    path = results.store("prior", "python x.py", {"root": f"{tmp_path}/photographs"}, rows, folder=tmp_path)
    content = json.loads(path.read_text())
    assert content["rows"][0]["data"] == "folder root=FOLDER crop_size=64"
    assert content["config"] == {"root": "FOLDER"}
    monkeypatch.setenv("PHOTOGRAPHS", "photographs")
    path = results.store("prior", "python x.py", {"prior": "photographs_prior"}, ROWS, folder=tmp_path)
    assert json.loads(path.read_text())["config"] == {"prior": "photographs_prior"}


def test_what_must_not_be_stored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="paths of this machine"):
        results.store("prior", "python x.py --prior /somewhere/else", {}, ROWS, folder=tmp_path)
    with pytest.raises(ValueError, match="no section"):
        results.store("priors", "python x.py", {}, ROWS, folder=tmp_path)
    path = results.store("prior", f"python {REPOSITORY}/x.py", {}, ROWS, folder=tmp_path)
    assert json.loads(path.read_text())["command"] == "python x.py"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="measure it again"):
        results.load("prior", tmp_path)


def test_figures_take_single_samples_and_means_from_their_rows(tmp_path):
    plots = importlib.import_module("plots")

    def row(method: str, samples: int, lpips: float, psnr: float) -> dict:
        return {
            "method": method,
            "samples": samples,
            "lpips": lpips,
            "psnr": psnr,
            "lpips_mean": lpips + samples,
            "psnr_mean": psnr + samples,
        }

    rows = [
        row("UD2M mean 8", 8, 0.1, 25.0),
        row("UD2M mean 2", 2, 0.2, 26.0),
        row("UD2M step scale 0.7", 2, 0.3, 27.0),
        row("LATINO a", 2, 0.4, 28.0),
        row("DDRM eta 0.5", 2, 0.5, 29.0),
        row("LATINO b", 2, 0.6, 30.0),
    ]
    assert plots.means_of_samples(rows) == [(0.1, 25.0, "S = 1"), (2.2, 28.0, "2"), (8.1, 33.0, "8")]
    assert plots.step_scales(rows) == [(0.3, 27.0, "0.7"), (0.1, 25.0, "1")]
    found = {name: [one[:2] for one, _ in settings] for name, settings in plots.rivals(rows)}
    assert found == {"LATINO": [(0.4, 28.0), (0.6, 30.0)], "DDRM": [(0.5, 29.0)]}
    assert [axis.get_title() for axis in plots.draw_tradeoff({"blur": rows, "holes_2": rows}).axes] == [
        "blur",
        "holes 2",
    ]


def test_the_figure_of_evaluations_compares_lpips_with_ours_on_the_same_pictures():
    plots = importlib.import_module("plots")

    def table(ours: float, *others: tuple[str, float]) -> dict[str, list[dict]]:
        rows = [
            {"method": name, "nfe": 9, "lpips": lpips, "reference": "UD2M"} for name, lpips in (("UD2M", ours), *others)
        ]
        return {"blur": rows}

    first = table(0.1, ("DDRM, best PSNR", 0.4), ("DDRM, best LPIPS", 0.05))
    other = table(0.2, ("I2SB", 0.3))
    assert [point[0] for point in plots.relative_lpips(first["blur"])] == ["UD2M", "DDRM, best LPIPS"]
    axis = plots.draw_evaluations([first, other], {"blur": table(0.1, ("UD2M, one step", 0.15))["blur"]}).axes[0]
    hollow = [float(line.get_ydata()[0]) for line in axis.lines if line.get_fillstyle() == "none"]
    assert hollow == pytest.approx([1.0, 1.5])
    heights = {line.get_label(): float(line.get_ydata()[0]) for line in axis.lines[:3]}
    assert heights == pytest.approx(
        {
            "UD2M": 1.0,
            "DDRM, best LPIPS": 0.5,
            "I2SB": 1.5,
        }
    )


def test_a_figure_of_what_was_not_measured_is_refused():
    with pytest.raises(FileNotFoundError, match=r"run_results\.sh nothing"):
        importlib.import_module("plots").by_operator("nothing")
