"""Ctrl-C and power cuts: what was reached is written, and what is in its place is whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from tiny import save_tiny_prior
from tiny_training import At, Break, command_line, everything, tiny_overrides, write_images

from ud2m.files import atomic_folder, write_bytes, write_json


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    return tiny_overrides(save_tiny_prior(place / "prior"), write_images(place / "images"))


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts background jobs with Ctrl-C ignored, these tests among them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def steps_of(run):
    return {int(v) for k, v in everything(run / "checkpoints" / "last.ckpt").items() if "num_updates" in k}


def test_ctrl_c_writes_a_checkpoint_of_the_step_and_exits_with_130(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ud2m.cli.train.StepProgress", lambda: At(0, lambda: signal.raise_signal(signal.SIGINT)))
    assert command_line(*tiny, f"run_dir={tmp_path}") == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1] == (
        f"interrupted; go on from the last checkpoint with: python train.py resume=true run_dir={tmp_path}"
    )
    assert steps_of(tmp_path) == {1}


def test_a_second_ctrl_c_does_not_wait(tiny, tmp_path, monkeypatch, capsys):
    def twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("ud2m.cli.train.StepProgress", lambda: At(1, twice))
    assert command_line(*tiny, f"run_dir={tmp_path}") == 130
    assert "there is no checkpoint yet" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ud2m.cli.train.StepProgress", lambda: Break(0, 0, KeyboardInterrupt()))
    words = [f"hydra.sweep.dir={tmp_path}", "loss.l2=0.5,1"]
    assert command_line("-m", *tiny, *words) == 130
    assert not (tmp_path / "1").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_reaches_loaders_too(tiny, tmp_path):
    # A terminal sends it to every process of its group; a loader that ended would take the step with it.
    log = tmp_path / "log"
    words = [
        "steps=2000",
        "validate_every=1000",
        "checkpoint_every=1",
        "data.num_workers=2",
        f"run_dir={tmp_path / 'run'}",
    ]
    with open(log, "w") as file:
        command = [sys.executable, "train.py", *tiny, *words]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=file, stdout=file, process_group=0)
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert log.read_text().count("stopping with a checkpoint") == 1


@pytest.fixture
def synced(monkeypatch):
    """Keep which content was on the disk when it was renamed."""
    on_disk, renamed, fsync = {}, [], os.fsync

    def noted(handle):
        status = os.fstat(handle)
        on_disk[status.st_ino] = status.st_size
        fsync(handle)

    def renaming(rename):
        def renamed_when(self, target):
            files = [self] if self.is_file() else [path for path in self.rglob("*") if path.is_file()]
            renamed.extend((Path(target).name, on_disk.get(p.stat().st_ino) == p.stat().st_size) for p in files)
            return rename(self, target)

        return renamed_when

    monkeypatch.setattr("os.fsync", noted)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, renaming(getattr(Path, name)))
    return renamed


def test_files_are_on_the_disk_before_they_take_their_place(synced, tmp_path):
    write_bytes(tmp_path / "a.bin", bytes(100_000))
    write_json(tmp_path / "b.json", {"a": 1})
    with atomic_folder(tmp_path / "results") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "c").write_text("by somebody who knows nothing of this")
    assert {name for name, _ in synced} == {"a.bin", "b.json", "results"}
    assert all(whole for _, whole in synced)


@pytest.mark.slow
def test_checkpoints_and_exports_are_on_the_disk_before_they_take_their_place(synced, tiny, tmp_path):
    assert command_line(*tiny, f"run_dir={tmp_path}") == 0
    assert {"last.ckpt", "best.ckpt", "export", "metrics.json", "config.yaml"} <= {name for name, _ in synced}
    assert all(whole for _, whole in synced)
