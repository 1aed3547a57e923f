"""Several processes that share pictures (gloo on the CPU): what they write is what one process writes, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from processes import ranks
from tiny import SIZE, adapted, save_tiny_prior, tiny_network
from tiny_training import write_images

from ud2m.cli import evaluate, sample
from ud2m.evaluation.scores import Draws, build_score
from ud2m.evaluation.team import ALONE, Team
from ud2m.physics import Denoising, Observation
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

PICTURES = 5
MEASURED = ("seconds_per_image", "peak_memory")
"""Numbers that belong to the machine."""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A micro model and a folder of small pictures."""
    folder = tmp_path_factory.mktemp("material")
    prior = adapted(Prior.from_pretrained(save_tiny_prior(folder / "prior")))
    info = {"physics": {"operator": {"class": "ud2m.physics.Inpainting"}, "sigma_y": 0.05}}
    PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=2, info=info)).save_pretrained(folder / "model")
    for split in ("train", "val", "test"):
        write_images(folder / "pictures" / split, PICTURES, SIZE)
    return folder


def started(count, page, main, settings):
    """Run a command in this process, or in several ones as torchrun starts them; return their exit codes."""

    def run():
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            main(compose(page, [*settings, f"devices={count}", "device=cpu", "precision=float32"]))

    if count == 1:
        run()
        return [0]
    processes = ranks(count, run)
    try:
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def sampling(material, out, *more):
    return [f"model={material}/model", "lpips=null", "num_samples=2", f"output={out}", *more]


def own(material, out):
    return sampling(material, out, f"input={material}/pictures/test", "show=2")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory):
    """What one process writes for a folder of pictures."""
    out = tmp_path_factory.mktemp("alone") / "out"
    started(1, "sample", sample.main, own(material, out))
    return out


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(material, alone, tmp_path):
    assert started(2, "sample", sample.main, own(material, tmp_path / "out")) == [0, 0]
    made, expected = contents(tmp_path / "out"), contents(alone)
    assert made.keys() == expected.keys()
    assert len(list((tmp_path / "out").glob("*/numbers.json"))) == PICTURES
    assert [name for name in expected if made[name] != expected[name]] == []


def without_times(found: Any) -> Any:
    """Return results without what is never the same twice."""
    if isinstance(found, list):
        return [without_times(part) for part in found]
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in MEASURED}
    return found


@pytest.mark.slow
def test_scores_of_test_images_and_tuned_rivals_are_those_of_one_process(material, tmp_path):
    data = ["data=folder", f"data.root={material}/pictures", f"data.crop_size={SIZE}", "data.batch_size=2"]
    rival = ["compare=true", "~method@methods.latino", "show=1", "tune_samples=1"]
    rows = {}
    for count in (1, 3):
        out = tmp_path / str(count)
        assert started(count, "sample", sample.main, sampling(material, out, *data, *rival)) == [0] * count
        found = json.loads((out / "metrics.json").read_text())
        rows[count] = without_times(found)
    assert rows[1] == rows[3]
    assert "psnr_mean" in rows[1][-1]


@pytest.mark.slow
def test_cells_of_an_evaluation_are_those_of_one_process(material, tmp_path):
    settings = {
        "name": "shared",
        "prior": f"{material}/prior",
        "datasets": f'["folder root={material}/pictures crop_size={SIZE} batch_size=2"]',
        "operators": "[inpainting]",
        "methods": f'["dps target.num_steps=2","ud2m target.model={material}/model"]',
        "metrics": "[psnr,residual,coverage]",
        "num_samples": "13",
        "tune_images": "2",
        "tune_samples": "1",
        "show": "3",
    }
    found = {}
    for count in (1, 2):
        values = [f"{key}={value}" for key, value in (settings | {"results": str(tmp_path / str(count))}).items()]
        assert started(count, "evaluate", evaluate.main, values) == [0] * count
        folder = tmp_path / str(count) / "shared"
        rows = json.loads((folder / "metrics.json").read_text())
        cells = sorted((folder / "cells").glob("*.json"))
        found[count] = (
            without_times(rows),
            [(path.name, without_times(json.loads(path.read_text())["curves"])) for path in cells],
            [path.read_bytes() for path in sorted((folder / "cells").glob("*.safetensors"))],
        )
    assert found[1] == found[2]
    assert len(found[1][0]) == 2


@pytest.fixture
def lost(monkeypatch):
    """Rank 1 is killed at its second picture."""
    draw, seen = sample.SamplingRun.sample, []

    def until_killed(self, case, *rest):
        seen.append(case)
        if os.environ.get("RANK") == "1" and len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, case, *rest)

    monkeypatch.setattr(sample.SamplingRun, "sample", until_killed)
    return seen


@pytest.mark.slow
def test_a_lost_process_loses_nothing_that_is_written(material, alone, lost, tmp_path, capfd):
    out = tmp_path / "out"
    assert started(2, "sample", sample.main, own(material, out)) == [1, -signal.SIGKILL]
    told = capfd.readouterr().err
    assert "error: process 0 of 2 lost the connection to another one" in told
    assert "the same command with output=" in told
    assert "Traceback" not in told
    left = tmp_path / "out.unfinished"
    written = {path.parent.name for path in left.glob("*/numbers.json")}
    assert len(written) == PICTURES - 1  # three of rank 0, one of two of rank 1
    assert started(1, "sample", sample.main, own(material, out)) == [0]
    assert len(lost) == 1
    assert lost[0].name not in written
    made, expected = contents(out), contents(alone)
    assert [name for name in expected if made[name] != expected[name]] == []


def test_impossible_devices_are_refused_in_one_line(material, tmp_path, capsys):
    for words, reason in {
        ("devices=0",): "devices must be an integer of at least 1, got 0",
        ("devices=two",): "devices must be an integer of at least 1, got 'two'",
        ("num_nodes=0",): "num_nodes must be an integer of at least 1, got 0",
    }.items():
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            config = compose("sample", [*own(material, tmp_path / "out"), "device=cpu", *words])
        with pytest.raises(SystemExit):
            sample.main(config)
        assert capsys.readouterr().err.strip() == f"error: {reason}"


class OneOf(Team):
    """A member of a team whose other members have handed in already."""

    def __init__(self, rank, handed_in):
        self.rank, self.size, self.handed_in = rank, len(handed_in), handed_in

    def gathered(self, own):
        return self.handed_in


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_what_was_dealt_comes_back_in_order(size):
    items = list(range(5))
    parts = [OneOf(rank, [items] * size).dealt(items) for rank in range(size)]
    assert sorted(item for part in parts for item in part) == items
    assert OneOf(0, parts).in_order(parts) == items
    assert ALONE.in_order([ALONE.dealt(items)]) == items


def test_a_score_that_has_seen_no_batch_knows_all_after_sharing():
    """Coverage's number of samples travels with what is gathered: a process without a batch can tell it too."""
    x0 = torch.rand(2, 1, 8, 8)
    physics = Denoising().draw(2, (1, 8, 8))
    full, fresh = build_score("coverage"), build_score("coverage")
    full.add(Draws(x0, Observation.of(x0, physics, 0.1), 0.1, torch.rand(2, 13, 1, 8, 8)))
    fresh.gathered = full.gathered
    assert fresh.numbers() == full.numbers()


@pytest.mark.slow
@pytest.mark.parametrize("program", [("-m", "ud2m", "sample"), ("sample.py",)], ids=["ud2m sample", "sample.py"])
def test_a_command_starts_its_other_processes_itself(program, material, alone, tmp_path):
    out = tmp_path / "out"
    words = [*own(material, out), "devices=2", "device=cpu", "precision=float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *program, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    made, expected = contents(out), contents(alone)
    assert [name for name in expected if made[name] != expected[name]] == []
