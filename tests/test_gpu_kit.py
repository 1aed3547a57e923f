"""The kit that proves the project on one GPU: its parts alone, and all of it in miniature."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from io import BytesIO

import pytest
import torch
from conftest import REPOSITORY
from tiny_training import composed, write_images

from ud2m.cli.errors import message, user_facing
from ud2m.cli.objects import build
from ud2m.images import read_image
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler

KIT = REPOSITORY / "benchmarks" / "gpu"
sys.path[:0] = [str(KIT), str(REPOSITORY / "benchmarks")]
bench, deadline, go_on, kit, pack = (importlib.import_module(n) for n in ("bench", "deadline", "go_on", "kit", "pack"))


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_program_that_ends_in_time_keeps_its_status():
    assert deadline.run_for([sys.executable, "-c", "raise SystemExit(7)"], 30) == 7


@pytest.mark.slow
def test_a_program_that_does_not_is_asked_to_end_and_then_killed(tmp_path):
    listening = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(1, flush=True); time.sleep(60)"
    )
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert deadline.run_for([sys.executable, "-c", listening], 2) == 75
    assert deadline.run_for([sys.executable, "-c", deaf], 2, grace=0.5) == -9
    assert time.monotonic() - began < 50


def test_a_program_ends_with_the_one_that_started_it(tmp_path):
    inner = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = (
        "import signal, sys; from deadline import run_for; signal.signal(15, lambda *_: sys.exit(75)); "
        f"run_for([sys.executable, '-c', {inner!r}], 60)"
    )
    environment = os.environ | {"PYTHONPATH": str(KIT)}
    process = subprocess.Popen([sys.executable, "-c", outer], env=environment)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 75
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("seconds", "each", "most", "expected"),
    [(100, 0.1, go_on.NEVER, 850), (100, 0.3, go_on.NEVER, 282), (100, 0.1, 2, 2), (0.1, 5, go_on.NEVER, 2)],
)
def test_a_run_has_the_steps_that_fit_and_two_validations(seconds, each, most, expected):
    assert go_on.steps_for(seconds, each, most) == expected


def test_settings_are_read_and_refused():
    assert kit.Settings.of(["minutes=3", "scale=tiny"]) == kit.Settings(minutes=3.0, scale="tiny")
    for words, line in (
        (["minute=3"], "unknown setting 'minute'; there are minutes=, scale=, prior="),
        (["tiny"], "unknown setting 'tiny'"),
        (["minutes=soon"], "minutes must be a number"),
        (["minutes=0"], "minutes must be positive"),
        (["minutes=nan"], "minutes must be positive"),
        (["scale=small"], "scale one of real, tiny, got 12 and 'small'"),
    ):
        with pytest.raises(ValueError, match=line):
            kit.Settings.of(words)
    with pytest.raises(ValueError, match="the part must be one of check, bench, train and all, got 'tests'"):
        kit.main(["tests"])


def test_outcomes_of_tests_are_read(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_left(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path / 'out.xml'}"]
    subprocess.run([*command, str(tmp_path / "test_it.py")], cwd=tmp_path, capture_output=True)
    found = kit.cases(tmp_path / "out.xml")
    assert {name: case["outcome"] for name, case in found.items()} == {
        "test_good": "passed",
        "test_bad": "failure",
        "test_left": "skipped",
    }
    assert "assert 1 == 2" in found["test_bad"]["message"]
    assert found["test_left"]["message"] == "no GPU"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three splits of smooth pictures of 64x64."""
    folder = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 6), ("val", 14), ("test", 3)):
        write_images(folder / split, count, side=64)
    return folder


def test_photographs_fit_and_those_that_score_are_untouched(photographs, tmp_path):
    quality = pack.pack(photographs, tmp_path / "packed", 200_000)
    assert quality == 100
    names = {split: sorted(path.name for path in (tmp_path / "packed" / split).iterdir()) for split in pack.SPLITS}
    assert {split: len(found) for split, found in names.items()} == {"train": 6, "val": pack.HELD_OUT, "test": 3}
    for name in names["test"]:
        original = photographs / name.replace("_", "/", 1)
        assert (tmp_path / "packed" / "test" / name).read_bytes() == original.read_bytes()
    for name in names["train"]:
        original = read_image(photographs / name.removesuffix(".webp").replace("_", "/", 1), 3)
        assert (read_image(tmp_path / "packed" / "train" / name, 3) - original).square().mean() < 1e-4
    data = ["data=folder", f"data.root={tmp_path / 'packed'}"]
    sizes = ["data.crop_size=32", "data.tile_size=32"]
    with composed("experiment=photographs_prior", *data, *sizes, folder=tmp_path / "run") as config:
        module = build(config.data, "data")
    assert module.train_set()[0].shape == (3, 32, 32)
    assert len(module.all_images("test")) == 3 * 4


def test_less_room_is_lower_quality_and_too_little_is_refused(photographs, tmp_path):
    files = sorted((photographs / "train").iterdir())
    sizes = {quality: sum(len(pack.webp(path, quality)) for path in files) / len(files) for quality in (50, 90, 95)}
    assert sizes[50] < sizes[90] < sizes[95]
    for quality in (50, 90):
        best = pack.best_quality(files, sizes[quality])
        assert quality <= best < 95
        mean = sum(len(pack.webp(path, best)) for path in files) / len(files)
        more = sum(len(pack.webp(path, best + 1)) for path in files) / len(files)
        assert mean <= sizes[quality] < more
    with pytest.raises(ValueError, match="10 bytes are too few for a photograph"):
        pack.best_quality(files, 10)


def test_the_room_is_what_repository_and_wheels_leave(monkeypatch, tmp_path):
    (tmp_path / "a.whl").write_bytes(bytes(1000))
    monkeypatch.setattr(pack, "WHEELS", tmp_path)
    monkeypatch.setattr(pack, "repository_bytes", lambda: pack.WHOLE - 5000)
    assert pack.room(10**9) == 4000
    assert pack.room(300) == 300


def test_a_folder_comes_back_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(go_on, "PART_BYTES", 5000)
    (tmp_path / "export").mkdir()
    content = os.urandom(20_000)
    (tmp_path / "export" / "weights").write_bytes(content)
    (tmp_path / "mine.tar.09").write_bytes(b"of an earlier run")
    names = go_on.bring(tmp_path / "export", tmp_path, "mine")
    assert sorted(names) == sorted(path.name for path in tmp_path.glob("mine.tar.*"))
    assert max((tmp_path / name).stat().st_size for name in names) == 5000
    whole = BytesIO(b"".join((tmp_path / name).read_bytes() for name in sorted(names)))
    with tarfile.open(fileobj=whole) as tar:
        assert tar.extractfile("mine/weights").read() == content


@pytest.mark.parametrize("name", ["micro_prior", "photos_prior"])
def test_a_prior_is_trained_on_whatever_its_architecture_is(name, tmp_path):
    options = [f"training.start_from={name}", *go_on.architecture(name), "data=photos"]
    with composed("experiment=photos_prior", *options, folder=tmp_path) as config:
        module = build(config.training, "training")
    expected = Prior.from_pretrained(name).unet.state_dict()
    found = module.unet.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_run_that_was_stopped_brings_the_average_of_its_last_step(tmp_path, monkeypatch):
    started = []

    def run_for(command, seconds, grace=0.0):
        started.append([*command, seconds])
        if "export=last.ckpt" in command:
            (tmp_path / "run" / "export-last").mkdir(parents=True)
        return 0 if "export=last.ckpt" in command else go_on.PREEMPTED

    monkeypatch.setattr(go_on, "run_for", run_for)
    monkeypatch.setattr(go_on, "seconds_per_step", lambda *_: 0.5)
    done = go_on.run("photos_prior", ["data=photos"], go_on.scale("real"), 100.0, tmp_path / "run")
    training, exporting = started
    assert training[2:4] == exporting[2:4] == ["experiment=photos_prior", f"run_dir={tmp_path / 'run'}"]
    assert training[5:7] == [f"steps={done['steps planned']}", f"validate_every={done['steps planned'] // 2}"]
    assert 160 <= done["steps planned"] <= 170
    assert 90 < training[-1] <= 100
    assert done["export"] == str(tmp_path / "run" / "export-last")
    assert (done["exit status"], done["scores"]) == (go_on.PREEMPTED, [])


def test_memory_that_is_not_there_is_one_line(capfd):
    with pytest.raises(SystemExit) as ended:
        user_facing(lambda: torch.empty(2**50))()
    assert ended.value.code == 1
    shown = capfd.readouterr().err
    assert shown.startswith("error: out of memory: you tried to allocate 4503599627370496 bytes; take fewer images")
    assert shown.count("\n") == 1
    gpu = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.00 GiB is "
        "free. Process 1 has 138 GiB memory in use. Of the allocated memory 130.00 GiB is allocated by PyTorch."
    )
    asked = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.00 GiB is free; take"
    assert message(gpu).startswith(f"out of memory: {asked}")
    with pytest.raises(RuntimeError, match="another"):
        user_facing(lambda: (_ for _ in ()).throw(RuntimeError("another")).__next__())()


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(photographs, tmp_path_factory):
    """What ``run.sh all scale=tiny`` has left."""
    out = tmp_path_factory.mktemp("out")
    words = ["all", "scale=tiny", "prior=micro_prior", "models=photos_gaussian_blur", f"photographs={photographs}"]
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", str(KIT / "run.sh"), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_the_whole_kit_runs_in_miniature_on_a_cpu(results, tmp_path):
    read = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert read.keys() == {"check", "bench", "train", "run"}
    assert all(part["went well"] for part in read["run"]["parts"].values())
    outcomes = {name: test["outcome"] for name, test in read["check"]["tests"].items()}
    assert set(outcomes.values()) == {"passed", "skipped"}
    assert outcomes["test_a_training_step_is_that_of_the_cpu[bfloat16]"] == "passed"
    measured = read["bench"]
    assert measured["left out"] == []
    assert all(measured[part] for part in bench.PARTS)
    assert {row["method"] for row in measured["training"]} == {f"checkpointing: {kind}" for kind in bench.KINDS}
    for row in measured["training"]:
        assert row["images per second"] == pytest.approx(row["batch"] / row["seconds per step"])
    memory = {row["method"].partition(": ")[2]: row["memory [GB]"] for row in measured["training"]}
    assert memory["none"] > memory["modules"] > memory["all"]
    for row in measured["training"]:  # the CPU knows no caching allocator: what the estimate says is what is taken
        assert row["memory, estimated [GB]"] == pytest.approx(row["memory [GB]"], rel=0.15)
    # what comes back fits through narrow doors: few files, none of them large, no folders
    files = list(results.iterdir())
    assert len(files) <= 8
    assert all(path.is_file() and path.stat().st_size < 16e6 for path in files)
    priors, models = (run for run in read["train"]["runs"])
    assert read["train"]["photographs"] is True
    for run in (priors, models):
        assert run["exit status"] == 0
        content = BytesIO(b"".join((results / name).read_bytes() for name in run["files"]))
        with tarfile.open(fileobj=content) as tar:
            tar.extractall(tmp_path, filter="data")
    trained, start = Prior.from_pretrained(tmp_path / "photographs_prior"), Prior.from_pretrained("micro_prior")
    moved = [
        (one - other).abs().max().item()
        for one, other in zip(trained.unet.parameters(), start.unet.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.1
    sampler = PosteriorSampler.from_pretrained(tmp_path / "photos_gaussian_blur", prior=tmp_path / "photographs_prior")
    assert sampler.nfe() == 9
