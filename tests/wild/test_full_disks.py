"""A full disk: one line that names the result, nothing half-written, and a run that goes on when there is space."""

import errno
import importlib
import sys

import pytest
from conftest import REPOSITORY
from tiny import save_tiny_prior
from tiny_training import assert_equal, command_line, everything, tiny_overrides, write_images

from ud2m.files import atomic_file

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")
FULL = "/dev/full"
"""A device of Linux that opens and has no space."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def tiny(place):
    return tiny_overrides(save_tiny_prior(place / "prior"), write_images(place / "images"))


def only_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
def test_a_full_disk_in_training(tiny, tmp_path, capsys):
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    words = [*tiny, "checkpoint_every=1", f"run_dir={run}"]
    checkpoints.mkdir(parents=True)
    (checkpoints / ".best.ckpt.incomplete").symlink_to(FULL)  # last.ckpt of the first step fits
    assert command_line(*words) == 1
    assert only_line(capsys) == (
        f"error: cannot write {checkpoints / 'best.ckpt'}: no space is left on the device; "
        "free some or choose another place"
    )
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]
    assert command_line("resume=true", f"run_dir={run}") == 0
    assert command_line(*words[:-1], f"run_dir={tmp_path / 'unbroken'}") == 0
    for name in ("last", "best"):
        one, other = (everything(folder / f"checkpoints/{name}.ckpt") for folder in (run, tmp_path / "unbroken"))
        assert_equal(one, other)


def test_a_full_disk_in_making_shards(place, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "shards"
    out.mkdir()
    small = make_shards.Settings(16, shard_mb=0.002)
    unbroken = make_shards.make_shards(place / "images", tmp_path / "unbroken", small, workers=1)
    with monkeypatch.context() as patch:
        open_as_it_is = make_shards.Path.open
        patch.setattr(
            make_shards.Path,
            "open",
            lambda self, *a, **k: open_as_it_is(self if "000001" not in self.name else make_shards.Path(FULL), *a, **k),
        )
        with pytest.raises(OSError, match=f"cannot write {out}: no space is left on the device; free some"):
            make_shards.make_shards(place / "images", out, small, workers=1)
    assert sorted(path.name for path in out.iterdir()) == ["progress.json", "shard-000000.tar"]
    assert make_shards.make_shards(place / "images", out, small, workers=1).shards == unbroken.shards


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),  # as torch says it
    ],
)
def test_a_full_disk_named_by_other_libraries(error, tmp_path):
    (tmp_path / "a").write_text("old")
    reason = f"cannot write {tmp_path / 'a'}: (no space|the disk quota)"
    with pytest.raises(OSError, match=reason), atomic_file(tmp_path / "a"):
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
