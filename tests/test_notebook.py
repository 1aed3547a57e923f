"""The notebook of docs/, cell by cell."""

import json

import matplotlib.pyplot as plt
import pytest
from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "quickstart.ipynb"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_results():
    code = cells("code")
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capfd):
    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    names: dict = {"__name__": "notebook"}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    quality, y, samples = names["psnr"], names["y"], names["samples"]
    assert quality(names["mean"]) > quality(names["sampler"](y, names["physics"], sigma_y=0.01)[:, 0])
    seen = names["rows"].A(names["x0"])
    assert quality(samples.mean(1)) > quality(seen.repeat_interleave(2, dim=-2)) + 1
    assert (tmp_path / "runs" / "quickstart" / "export" / "config.json").is_file()
    assert "PSNR of y" in capfd.readouterr().out
