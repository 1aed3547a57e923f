"""Files: results that are never half-written, and reading what may be damaged or comes from an untrusted source."""

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

from ud2m.names import flattened

MARKER = ".ud2m"
"""Lies in every folder that `atomic_folder` made; only such folders are ever replaced."""
UNFINISHED = ".unfinished"
"""End of the name of a folder in which an interrupted call has left what it had done."""
SETTINGS = "config.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.ENOENT}
"""Errors that say that somebody holds a lock, or has just let it go: he removes its file then."""
_held: set[Path] = set()
"""Locks of this process, which POSIX would give it again, and take away with the first file that it closes."""


_REASONS = {
    errno.ENOSPC: "no space is left on the device; free some or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "writing is not permitted there; choose another place or change the permissions",
    errno.EPERM: "writing is not permitted there; choose another place or change the permissions",
    errno.ENOENT: "its folder does not exist; create it or choose another place",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another place",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another place",
    errno.EISDIR: "it is a folder, not a file; choose another name",
}


_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def is_plain(name: Any) -> bool:
    """Return whether a name is one that `plain_name` takes."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def plain_name(name: Any, of: str) -> str:
    """Return a name of one file or folder that holds letters, digits, ``_``, ``-`` and ``.`` alone.

    Args:
        name: as a user or a file gave it.
        of: what it names, for the message.

    Raises:
        ValueError: for anything else, as a path, a hidden name or none.
    """
    if not is_plain(name):
        raise ValueError(
            f"{of} has a plain name, of letters, digits, '_', '-' and '.' and without a dot in front, got {name!r}"
        )
    return name


def inside(folder: str | Path, name: str, of: str) -> Path:
    """Return the path of ``name`` in a folder, which it never leaves: what names of others become paths with.

    Args:
        folder: where it belongs.
        name: relative, of any characters; ``/`` stands between subfolders.
        of: what it names, for the message.

    Raises:
        ValueError: for an absolute name, a step upwards, or none.
    """
    parts = str(name).split("/")
    if any(part in ("", ".", "..") or Path(part).name != part or "\0" in part for part in parts):
        raise ValueError(f"{of} is a relative path without '..', got {name!r}; it would leave {folder}")
    return Path(folder, *parts)


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes ``path`` when the block succeeds and vanishes otherwise.

    The work is done in a hidden sibling ``.NAME.XXXX.incomplete`` (same file system: the final rename is
    atomic), so a killed process leaves at most a folder that says by its name that it is incomplete, and its files are
    synced to the disk before, so a power cut does too. Missing parents are created.

    Args:
        path: the folder to be made; an empty one may exist.
        overwrite: replace a folder that an earlier call made. Any other folder is left alone, since replacing
            deletes what it holds. The old one stays in place until the new one is whole.

    Raises:
        FileExistsError: when ``path`` holds files and may not be replaced.
        NotADirectoryError: when ``path`` is a file.
        OSError: when the place cannot be written or the disk is full, with what to do.
    """
    target = Path(path).resolve()  # through a symbolic link, onto the real place
    check_free(target, overwrite)
    work = _sibling(target, "incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
    except OSError as error:
        raise unwritable(error, target) from error
    try:
        yield work
        _finish(work, target, overwrite)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if is_full(error):
            raise unwritable(error, target) from error
        raise


@contextmanager
def resumable_folder(path: str | Path, settings: Mapping[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, with what an interrupted call left in it; it becomes ``path`` when the block succeeds.

    The work is done in ``NAME.unfinished`` beside it, which holds ``config.json``. When the block fails, it stays there
    for the next call with the same settings if anything else is in it.

    Args:
        path: the folder to be made, as for `atomic_folder`.
        settings: what the results depend on, plain values.
        overwrite: replace a folder that an earlier call made, and what one with other settings has left unfinished.

    Raises:
        OSError: as `atomic_folder`, and when another process is at work there.
        ValueError: for what another call has left with other settings.
    """
    target = Path(path).resolve()
    work = target.with_name(target.name + UNFINISHED)
    with locked(target):
        check_free(target, overwrite)
        try:
            work.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(error, target) from error
        try:
            _take_up(work, _strict(settings), overwrite)
            yield work
            _finish(work, target, overwrite)
        except BaseException as error:
            if work.is_dir() and {file.name for file in work.iterdir()} <= {SETTINGS}:
                shutil.rmtree(work, ignore_errors=True)
            if is_full(error):
                raise unwritable(error, target) from error
            raise


def _finish(work: Path, target: Path, overwrite: bool) -> None:
    """Let a folder that is filled take its place."""
    (work / MARKER).write_text("Written by ud2m: overwrite=true replaces this folder.\n")
    for file in work.rglob("*"):
        sync(file)
    check_free(target, overwrite)  # another process may have been faster
    move_into_place(work, target)


def _take_up(work: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    stored = work / SETTINGS
    before = parse_json(stored.read_text()) if stored.is_file() else None
    if before is None and any(work.iterdir()):
        raise FileExistsError(f"{work} holds files that this program did not write; choose another output, or move it")
    if before not in (None, settings):
        if not overwrite:
            old, new = flattened(before), flattened(settings)
            changed = [key for key in old | new if old.get(key) != new.get(key)]
            raise ValueError(
                f"{work} is what an interrupted call with other settings has left (other {', '.join(changed[:6])}); "
                "repeat these to go on with it, choose another output, or start anew with overwrite=true"
            )
        for left in work.iterdir():  # the folder itself is locked
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_json(stored, settings)


@contextmanager
def atomic_file(path: str | Path, work: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a stream whose content takes the place of ``path`` when the block succeeds, and vanishes otherwise.

    It is synced to the disk before it is renamed: after a power cut too there is the old file or the whole new one.

    Args:
        path: the file to be made.
        work: where it is written meanwhile, on the same file system; default: a hidden sibling of a new name.

    Raises:
        OSError: when the place cannot be written or the disk is full, with what to do.
    """
    target = Path(path)
    work = work or _sibling(target, "tmp")
    try:
        with work.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        work.replace(target)
        sync(target.parent)
    except BaseException as error:
        work.unlink(missing_ok=True)
        if isinstance(error, OSError) or is_full(error):
            raise unwritable(error, target) from error
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file as ``atomic_file`` does.

    Raises:
        OSError: when the place cannot be written or the disk is full, with what to do.
    """
    with atomic_file(path) as stream:
        stream.write(data)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk and not in the system's memory alone."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot, above all for folders
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; the lock ends with this process, however that ends.

    It is a lock of POSIX (``lockf``) on ``.NAME.lock`` beside the folder, which need not be there yet. So it also holds
    between machines that share a file system, and processes forked from this one, as loaders' workers, which may
    outlive it, do not inherit it. Where the system has no locks, none is kept.

    Raises:
        OSError: when another process holds it; or the place cannot be written.
    """
    folder = Path(folder).resolve()
    path = folder.with_name(f".{folder.name}.lock")
    if path in _held:
        raise OSError(f"{folder} is in use by this very process; choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise unwritable(error, folder) from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.path.samestat(path.stat(), os.fstat(stream.fileno()))
        except OSError as error:
            taken = error.errno in _TAKEN
        if taken:
            stream.seek(0)
            raise OSError(
                f"{folder} is in use by {stream.read() or 'another process'}; wait until that has ended, or choose "
                "another folder"
            )
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)
            path.unlink(missing_ok=True)


def write_json(path: str | Path, obj: Any) -> None:
    """Write strict JSON atomically.

    Numbers of numpy and torch become plain numbers and paths become text. JSON has no NaN and no infinity:
    both become ``null`` (a value that is missing), so that one undefined score does not cost the others.

    Raises:
        TypeError: when ``obj`` holds something that JSON cannot say.
        OSError: as `write_bytes`.
    """
    text = json.dumps(_strict(obj), indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: when it is damaged, or nested so deeply that Python cannot follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _strict(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _strict(value) for key, value in obj.items()}
    if isinstance(obj, Sequence) and not isinstance(obj, str | bytes):
        return [_strict(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if hasattr(obj, "tolist"):  # arrays, tensors and their scalars
        return _strict(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def check_free(path: Path, overwrite: bool) -> None:
    """Raise OSError where ``path`` is no free place for a folder, nor one whose results may be replaced."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"the output {path} is a file; choose the name of a folder")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"the output folder {path} already holds files; choose another one, or replace it with overwrite=true"
        )
    if not (path / MARKER).is_file():
        raise FileExistsError(
            f"overwrite=true does not replace {path}: it holds files that this program did not write; "
            "choose another folder or empty this one yourself"
        )


def move_into_place(work: Path, target: Path) -> None:
    """Rename a finished folder; what it replaces is moved aside before, and comes back when the renaming fails.

    Raises:
        OSError: when that cannot be.
    """
    if not target.exists():
        work.rename(target)
        sync(target.parent)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        work.rename(target)
        sync(target.parent)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def is_full(error: BaseException) -> bool:
    """Return whether an error says that there is no space left."""
    # torch and safetensors report a full disk as errors of their own, with the system's words in the text
    return (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error)


def unwritable(error: BaseException, path: Path) -> OSError:
    """Return an error of writing ``path`` that names it and says what to do."""
    code = errno.ENOSPC if is_full(error) else getattr(error, "errno", None)
    if code is None:
        return OSError(f"cannot write {path}: {error}")
    return OSError(code, f"cannot write {path}: {_REASONS.get(code, os.strerror(code))}")


def read_tensors(source: Path | BinaryIO) -> Any:
    """Return what a torch file holds, on the CPU; no code of the file is run (``weights_only``).

    Raises:
        ValueError: with the reason in one line, when it is truncated, or holds anything but tensors and plain values.
    """
    import torch  # here, since the commands answer what needs no tensors at once

    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    # what torch raises depends on the first bytes: of some files the unpickler's own KeyError or AttributeError
    except (RuntimeError, UnpicklingError, EOFError, OSError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(str(error).strip().split("\n")[0][:160] or type(error).__name__) from error
