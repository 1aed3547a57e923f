import csv
import json
import re
import xml.etree.ElementTree

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tiny import save_tiny_prior
from tiny_training import STEPS, command_line, composed, tiny_overrides, write_images

from ud2m.cli.sweep import collect, write_table
from ud2m.reports.sweep_plot import sweep_page


def table(folder):
    with open(folder / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def make_run(folder, overrides, metrics=None, error=None):
    folder.mkdir(parents=True)
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(overrides))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if error is not None:
        (folder / "error.txt").write_text(f"{error}\n")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder, exit code and output of a sweep over a loss weight, one value of which is impossible."""
    place = tmp_path_factory.mktemp("place")
    tiny = tiny_overrides(save_tiny_prior(place / "prior"), write_images(place / "images"))
    folder = place / "sweep"
    options = ["loss.l2=1,-1,0", f"hydra.sweep.dir={folder}", f"steps={STEPS}"]
    code = command_line("-m", *tiny, *options)
    return folder, code, lambda: command_line("-m", *tiny, *options)


def test_a_failing_run_does_not_stop_the_sweep_and_the_exit_code_tells(sweep):
    folder, code, _ = sweep
    assert code == 1
    assert (folder / "0" / "export" / "config.json").is_file()
    assert (folder / "2" / "export" / "config.json").is_file()
    assert not (folder / "1" / "export").exists()
    assert "must be a finite number >= 0" in (folder / "1" / "error.txt").read_text()


def test_the_table_names_the_winner_and_the_failure(sweep):
    folder, _, _ = sweep
    rows = table(folder)
    assert [row["rank"] for row in rows] == ["1", "2", "-"]
    assert {row["run"]: row["loss.l2"] for row in rows} == {"0": "1", "1": "-1", "2": "0"}
    scores = {run: json.loads((folder / run / "metrics.json").read_text())[-1]["score"] for run in ("0", "2")}
    winner = max(scores, key=lambda run: scores[run])
    assert rows[0]["run"] == winner
    assert float(rows[0]["score"]) == pytest.approx(scores[winner], rel=1e-3)
    assert "the loss weight 'l2'" in rows[2]["error"]
    text = (folder / "sweep.md").read_text()
    assert f"best score: run {winner}" in text
    assert "failed: 1 of 3 runs" in text


def test_the_plot_has_a_line_per_run_with_a_score(sweep):
    folder, _, _ = sweep
    text = (folder / "sweep.html").read_text()
    assert text.count("<polyline") == 2
    assert "2 runs, and 1 that failed" in text
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched
    assert "default-src 'none'" in text


def test_lines_of_the_plot_pass_where_the_values_are():
    rows = [
        {"run": "0", "lr": "1e-5", "net": "<vgg>", "seed": "1", "score": 10.0},
        {"run": "1", "lr": "1e-3", "net": "alex", "seed": "1", "score": 20.0},
        {"run": "2", "lr": "1e-1", "net": "alex", "seed": "1", "score": 15.0},
        {"run": "3", "lr": "1", "net": "alex", "seed": "1", "score": None},
    ]
    text = sweep_page("A & B", rows, ["lr", "net", "seed"])
    svg = xml.etree.ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    axes = [float(line.get("y2")) - float(line.get("y1")) for line in svg.iter("line")]
    assert len(axes) == 3  # the seed does not vary
    lines = {}
    for line in svg.iter("polyline"):
        run = re.match(r"run (\d)", line.find("title").text).group(1)
        lines[run] = [float(point.split(",")[1]) for point in line.get("points").split()]
    top, height = 60, axes[0]
    shares = {run: [1 - (y - top) / height for y in line] for run, line in lines.items()}
    # lr over four orders of magnitude: by its logarithm; names in alphabetical order; the score linearly
    assert shares == {"0": pytest.approx([0, 0, 0]), "1": pytest.approx([0.5, 1, 1]), "2": pytest.approx([1, 1, 0.5])}
    assert "&lt;vgg&gt;" in text
    assert "<vgg>" not in text


@pytest.mark.slow
def test_optuna_looks_for_high_scores(tmp_path):
    tiny = tiny_overrides(save_tiny_prior(tmp_path / "prior"), write_images(tmp_path / "images"))
    folder = tmp_path / "sweep"
    optuna = ["hydra/sweeper=optuna_score", "hydra.sweeper.n_trials=4"]
    space = ["training.optimizer.lr=tag(log,interval(1e-9,1e-1))", "lora.rank=choice(-1,2)"]  # no rank is below 0
    assert command_line("-m", *tiny, *optuna, *space, f"steps={STEPS}", f"hydra.sweep.dir={folder}") in (0, 1)
    rows = table(folder)
    assert len(rows) == 4
    assert {row["rank"] == "-" for row in rows if row["lora.rank"] == "-1"} <= {True}
    best = OmegaConf.load(folder / "optimization_results.yaml")
    scores = [json.loads(path.read_text())[-1]["score"] for path in folder.glob("*/metrics.json")]
    assert best.best_value == max(scores) > min(scores)
    assert (folder / "sweep.html").read_text().count("<polyline") == len(scores)


def test_the_wrong_direction_is_refused(tmp_path, capsys):
    assert command_line("-m", "hydra/sweeper=optuna", "seed=0,1", f"hydra.sweep.dir={tmp_path}") == 1
    assert "a higher score is better: add hydra.sweeper.direction=maximize" in capsys.readouterr().err


def test_slurm_takes_the_runs_of_a_sweep(tmp_path):
    with composed("hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=4", folder=tmp_path):
        launcher = HydraConfig.get().launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.gpus_per_node == 4


def test_a_run_of_a_sweep_is_a_run(sweep):
    folder, _, _ = sweep
    assert {"checkpoints", "config.yaml", "export", "metrics.json"} <= {p.name for p in (folder / "0").iterdir()}
    assert command_line("resume=true", f"run_dir={folder / '0'}") == 0


def test_another_sweep_does_not_mix_with_it(sweep, capsys):
    folder, _, again = sweep
    before = (folder / "sweep.csv").read_bytes()
    assert again() == 1
    assert f"error: {folder} holds the runs of another sweep" in capsys.readouterr().err
    assert (folder / "sweep.csv").read_bytes() == before


def test_a_sweep_does_not_ignore_run_dir(tmp_path, capsys):
    assert command_line("-m", "seed=0,1", f"run_dir={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path}") == 1
    assert "the runs of a sweep go to hydra.sweep.dir" in capsys.readouterr().err


@pytest.mark.slow
def test_a_defect_of_the_program_is_a_failed_run_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ud2m.cli.train.run", lambda config, folder: {}["defect"])
    assert command_line("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}") == 1
    assert [row["error"] for row in table(tmp_path)] == ["KeyError: 'defect'"] * 2
    assert "Traceback" in capsys.readouterr().err


def test_runs_are_ranked_by_score_and_numbered_runs_keep_their_order(tmp_path):
    scores = [20.0, None, 30.0, 20.0, 25.0]
    for k, score in enumerate(scores):
        metrics = [
            {"method": "baseline", "score": 99.0},
            {"method": "UD2M", "score": score, "psnr": score, "ssim": 1.0},
        ]
        make_run(tmp_path / str(k), [f"loss.l2={k}", "+x=1=2"], metrics)
    make_run(tmp_path / "10", ["loss.l2=10"], error="no prior at 'x|y'\nlook again")
    make_run(tmp_path / "9", ["loss.l2=9"])
    rows = collect(tmp_path)
    assert [row["run"] for row in rows] == ["2", "4", "0", "3", "1", "9", "10"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, None, None, None]
    assert rows[0] == {"rank": 1, "run": "2", "loss.l2": "2", "+x": "1=2", "score": 30.0, "psnr": 30.0}
    assert rows[5]["error"] == "it ended without metrics.json"
    write_table(tmp_path, rows)
    assert [row["rank"] for row in table(tmp_path)] == ["1", "2", "3", "4", "-", "-", "-"]
    assert table(tmp_path)[6]["error"] == "no prior at 'x|y'\nlook again"
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[2].startswith("| 1 | 2 | 2 | 1=2 | 30 |")
    assert len({line.replace("\\|", "").count("|") for line in lines[:9]}) == 1  # every row has every cell
    assert lines[-3:] == ["best score: run 2", "", "failed: 3 of 7 runs"]


def test_the_table_shows_what_varies_with_digits_that_tell_runs_apart(tmp_path):
    scores = [31.23456, 31.23459, 30.0, 30.0]
    for k, score in enumerate(scores):
        make_run(tmp_path / str(k), ["steps=10", "network=paper", f"loss.l2={k}"], [{"score": score, "psnr": 1.5}])
    write_table(tmp_path, collect(tmp_path))
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[0] == "| rank | run | loss.l2 | score | psnr |"
    assert lines[2:4] == ["| 1 | 1 | 1 | 31.23459 | 1.5 |", "| 2 | 0 | 0 | 31.23456 | 1.5 |"]
    assert lines[-3:] == ["the same score: runs 2, 3", "", "best score: run 1"]
    assert [row["steps"] for row in table(tmp_path)] == ["10"] * 4


def test_a_table_of_failures_has_no_winner(tmp_path):
    make_run(tmp_path / "0", ["a=1"], error="no")
    write_table(tmp_path, collect(tmp_path))
    assert "best score" not in (tmp_path / "sweep.md").read_text()
