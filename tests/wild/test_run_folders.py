"""Run folders: one run at a time; one line for a killed loader, a checkpoint that was cut, and images that moved."""

import importlib
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from conftest import REPOSITORY
from processes import start
from tiny import save_tiny_prior
from tiny_training import Break, assert_equal, command_line, everything, tiny_overrides, write_images
from torch import multiprocessing

from ud2m.data.crops import RandomCrops
from ud2m.files import locked

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")
FORK = multiprocessing.get_context("fork")


def hold(folder, ready, child):
    with locked(folder):
        if child is not None:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            child.value = pid
        ready.set()
        signal.pause()


@pytest.fixture
def held():
    """Let another process hold the lock of a folder."""
    holders = []

    def begin(folder, child=None):
        ready = FORK.Event()
        folder.mkdir(parents=True, exist_ok=True)
        holders.append(start(hold, folder, ready, child))
        assert ready.wait(60)
        return holders[-1]

    yield begin
    for holder in holders:
        holder.kill()
        holder.join()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def tiny(images, tmp_path_factory):
    return tiny_overrides(save_tiny_prior(tmp_path_factory.mktemp("prior") / "prior"), images)


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A run that stopped half-way."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ud2m.cli.train.StepProgress", lambda: Break(1, 0, OSError("power cut")))
        assert command_line(*tiny, f"run_dir={folder}") == 1
    return folder


@pytest.fixture
def run(begun, tmp_path, capsys):
    capsys.readouterr()
    return shutil.copytree(begun, tmp_path / "run")


def only_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_lock_lasts_as_long_as_its_process(held, tmp_path):
    holder = held(tmp_path)
    for _ in range(2):
        reason = f"{tmp_path} is in use by process {holder.pid} on .+; wait until"
        with pytest.raises(OSError, match=reason), locked(tmp_path):
            pass
    holder.kill()
    holder.join()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_child_of_a_killed_process_does_not_hold_its_lock(held, tmp_path):
    # Loaders' workers notice after seconds that nobody waits for them.
    child = FORK.Value("i")
    holder = held(tmp_path, child)
    holder.kill()
    holder.join()
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child.value, signal.SIGKILL)


@pytest.mark.slow
def test_two_runs_at_once(held, tiny, run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    holder = held(run)
    for words in (["resume=true"], [*tiny, "resume=auto"], tiny):
        assert command_line(*words, f"run_dir={run}") == 1
        assert f"{run} is in use by process {holder.pid}" in only_line(capsys)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_two_make_shards_at_once(held, images, tmp_path):
    out = tmp_path / "shards"
    holder = held(out)
    with pytest.raises(OSError, match=f"{out} is in use by process {holder.pid}"):
        make_shards.make_shards(images, out, make_shards.Settings(16), workers=1)
    holder.kill()
    holder.join()
    assert make_shards.make_shards(images, out, make_shards.Settings(16), workers=1).images == 6


def test_a_killed_loader_worker(tiny, run, monkeypatch, capsys):
    def die(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(RandomCrops, "__getitem__", die)
    assert command_line("resume=true", f"run_dir={run}", "data.num_workers=1") == 1
    line = only_line(capsys)
    assert re.search(
        r"DataLoader worker .* (Killed|exited unexpectedly).*: a process that loads images was ended", line
    )
    assert "data.num_workers" in line


@pytest.mark.parametrize("part", ["optimizer_states", "loops", "callbacks", "state_dict"])
def test_a_checkpoint_that_was_cut_down(part, run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    del content[part]
    torch.save(content, last)
    assert command_line("resume=true", f"run_dir={run}") == 1
    line = only_line(capsys)
    assert str(last) in line
    assert part == "state_dict" or f"has no {part}, without which a run cannot go on" in line


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("optimizer_states", [{"nothing": 1}], r"the run cannot go on from .*last.ckpt, which does not fit it: \w+: "),
        ("loops", {"fit_loop": {}}, "the checkpoint counts 0 batches, and its parameters have taken 2 steps of 1"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit(part, value, message, run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    torch.save(torch.load(last, weights_only=True) | {part: value}, last)
    assert command_line("resume=true", f"run_dir={run}") == 1
    assert re.search(message, only_line(capsys))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["resume=true", "resume=auto"])
def test_images_that_moved(how, tiny, run, images, tmp_path, capsys):
    moved = images.rename(tmp_path / "moved")
    try:
        words = ["resume=true"] if how == "resume=true" else [*tiny, how]
        assert command_line(*words, f"run_dir={run}") == 1
        assert "data.root" in only_line(capsys)
        assert command_line(*words, f"data.root={moved}", f"run_dir={run}") == 0
    finally:
        moved.rename(images)
    unbroken = tmp_path / "unbroken"
    if how == "resume=true":
        assert command_line(*tiny, f"run_dir={unbroken}") == 0
        last = "checkpoints/last.ckpt"
        assert_equal(everything(run / last), everything(unbroken / last))
