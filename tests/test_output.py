"""Nothing unfinished looks whole, and no user's files are deleted by accident."""

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from ud2m.files import atomic_folder, write_bytes, write_json


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "runs" / "out"
    with atomic_folder(target) as work:
        (work / "a.txt").write_text("a")
        assert work.parent == target.parent
        assert work.name.endswith(".incomplete")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert names(target.parent) == ["out"]


def test_the_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(1)])
def test_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as work:  # noqa: PT012
        (work / "a.txt").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as work:
        (work / "a.txt").touch()
    assert "a.txt" in names(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_old_results_need_overwrite(tmp_path):
    with atomic_folder(tmp_path / "out") as work:
        (work / "old.txt").touch()
    with pytest.raises(FileExistsError, match="overwrite=true"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    with atomic_folder(tmp_path / "out", overwrite=True) as work:
        assert (tmp_path / "out" / "old.txt").exists()
        (work / "new.txt").touch()
    assert "new.txt" in names(tmp_path / "out")
    assert "old.txt" not in names(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_failed_overwrite_keeps_the_old_results(tmp_path):
    with atomic_folder(tmp_path / "out") as work:
        (work / "old.txt").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert "old.txt" in names(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_overwrite_never_deletes_what_others_wrote(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "wedding.jpg").touch()
    refused = pytest.raises(FileExistsError, match="this program did not write")
    with refused, atomic_folder(tmp_path / "photos", overwrite=True):
        pytest.fail("the block must not run")
    assert names(tmp_path / "photos") == ["wedding.jpg"]


def test_results_that_appear_meanwhile_are_not_deleted(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "faster.txt").touch()
    assert names(tmp_path / "out") == ["faster.txt"]
    assert names(tmp_path) == ["out"]


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    refused = pytest.raises(OSError, match=r"cannot write .* is a file, not a folder")
    with refused, atomic_folder(tmp_path / "out" / "deeper"):
        pytest.fail("the block must not run")


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as work:
        (work / "a.txt").touch()
    assert (tmp_path / "link").is_symlink()
    assert "a.txt" in names(tmp_path / "real")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent(tmp_path):
    tmp_path.chmod(0o500)
    try:
        refused = pytest.raises(PermissionError, match="writing is not permitted there; choose another place")
        with refused, atomic_folder(tmp_path / "out"):
            pytest.fail("the block must not run")
        with pytest.raises(PermissionError, match="writing is not permitted there"):
            write_bytes(tmp_path / "a.txt", b"")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="/proc refuses new entries, for root too")
def test_unwritable_parent_as_any_user():
    with pytest.raises(OSError, match=r"cannot write /proc/\d+/out: "), atomic_folder("/proc/self/out"):
        pytest.fail("the block must not run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_full_disk(tmp_path):
    refused = pytest.raises(OSError, match="no space is left on the device; free some")
    with refused as caught, atomic_folder(tmp_path / "out"), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_full_disk_as_other_libraries_report_it(tmp_path):
    with pytest.raises(OSError, match="no space is left on the device"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError, match="elsewhere"), atomic_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "elsewhere")


def test_write_bytes_replaces_whole_files(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a.bin", b"old")
    write_bytes(str(tmp_path / "a.bin"), b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space is left"):
            write_bytes(tmp_path / "a.bin", b"newer")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def full(handle: int) -> None:
    """As network file systems report it: when what was written shall be kept."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_bytes_without_folder_or_onto_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        write_bytes(tmp_path / "absent" / "a.txt", b"")
    with pytest.raises(IsADirectoryError, match="it is a folder, not a file"):
        write_bytes(tmp_path, b"")
    assert names(tmp_path) == []


def test_json_is_strict_and_plain(tmp_path):
    rows = [
        {"nan": float("nan"), "inf": np.float32("inf"), "psnr": np.float64(31.5), "nfe": torch.tensor(9)},
        {"path": Path("a/b"), "list": (1, torch.tensor([1.0, float("nan")])), "none": None, "ok": True, 3: "ü\udcff"},
    ]
    write_json(tmp_path / "a.json", rows)

    def refuse(constant: str):
        pytest.fail(f"{constant} is no JSON")

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == [
        {"nan": None, "inf": None, "psnr": 31.5, "nfe": 9},
        {"path": "a/b", "list": [1, [1.0, None]], "none": None, "ok": True, "3": "ü\udcff"},
    ]


def test_json_refuses_what_it_cannot_say_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        write_json(tmp_path / "a.json", {"x": {1, 2}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]
