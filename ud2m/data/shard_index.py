"""What ``index.json`` in a folder of webdataset shards says, and whether the shards are as it says.

Imports nothing heavy: ``data_prep/make_shards.py`` starts a process per core with it.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ud2m.files import parse_json, plain_name

INDEX_FILE = "index.json"
VERSION = 1
SHARD_SUFFIX = ".tar"
IMAGE_SUFFIXES = {"png": ".png", "jpg": ".jpg"}
"""Ending of the images inside a shard by the setting ``format``."""
NAME_LENGTH = 60
"""Characters of an original name inside a key; a tar header holds 100."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, the number of images in it, its size in bytes and its SHA-256.

    Raises:
        ValueError: for a name that is a path, and for numbers that are none.
    """

    name: str
    images: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not plain_name(self.name, "a shard").endswith(SHARD_SUFFIX):
            raise ValueError(f"a shard ends in {SHARD_SUFFIX}, got {self.name!r}")
        if any(type(count) is not int or count < 0 for count in (self.images, self.bytes)):
            raise ValueError(f"{self.name} has whole numbers of images and bytes, got {self.images} and {self.bytes}")


@dataclass(frozen=True)
class ShardIndex:
    """A finished folder of shards.

    Args:
        folder: where the shards lie.
        settings: what they were made with: ``size`` (shorter side in pixels), ``crop``, ``format`` and others.
        source: ``digest`` (SHA-256 of the listing of the source), its number of ``images`` and of ``broken`` ones.
        classes: names of the class folders; the number in a ``.cls`` file counts from 0 in this list.
        shards: in the order in which they were written.
        address: where shards come from that are not in ``folder`` yet; None: all are there.
    """

    folder: Path
    settings: dict[str, Any]
    source: dict[str, Any]
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    address: str | None = None

    @property
    def images(self) -> int:
        """Number of images in all shards together."""
        return sum(shard.images for shard in self.shards)

    def place(self, shard: Shard) -> Path:
        """Return where a shard lies, or will lie once it is fetched."""
        return self.folder / plain_name(shard.name, "a shard")

    @property
    def digest(self) -> str:
        """SHA-256 over the SHA-256 of all shards in their order: equal for equal images."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``index.json``."""
        return {
            "version": VERSION,
            "images": self.images,
            "bytes": sum(shard.bytes for shard in self.shards),
            "settings": self.settings,
            "source": self.source,
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }


def key_name(name: str) -> str:
    """Return what the key of an image in a shard holds of its original name: no folder, no ending, plain characters."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(name).stem)[:NAME_LENGTH]


def read_index(folder: Path) -> ShardIndex:
    """Read the ``index.json`` of a folder of shards.

    Raises:
        FileNotFoundError: when there is no such folder or no index in it.
        ValueError: when the index is damaged, of another version or names no shards.
    """
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of shards: {folder} (looked in {Path.cwd()})")
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {INDEX_FILE}: it is no folder of finished shards; "
            "make it, or go on making it, with data_prep/make_shards.py"
        )
    try:
        content = parse_json(path.read_bytes())
        version = content["version"]
        shards = tuple(Shard(**shard) for shard in content["shards"])
        index = ShardIndex(folder, dict(content["settings"]), content["source"], tuple(content["classes"]), shards)
        size, suffix = index.settings["size"], IMAGE_SUFFIXES[index.settings["format"]]
        if type(size) is not int or size < 1 or not isinstance(index.settings["crop"], str):
            raise ValueError(f"its images of {suffix} have size {size!r} and crop {index.settings['crop']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); make the shards again") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this program reads {VERSION}; make the shards again")
    if index.images == 0:
        raise ValueError(f"{path} names no images; make the shards again from a folder that holds some")
    return index


def quick_faults(index: ShardIndex) -> list[str]:
    """Return a line for each shard that is missing or has another size than the index says."""
    lines = (_quick_fault(index.place(shard), shard) for shard in index.shards)
    return [line for line in lines if line]


def faults(index: ShardIndex) -> list[str]:
    """Return a line for each shard that is missing, differs from the index, or is not in it. Reads every byte."""
    found = []
    for shard in index.shards:
        path = index.place(shard)
        line = _quick_fault(path, shard)
        if not line and file_sha256(path) != shard.sha256:
            line = f"{shard.name} is wrong: its SHA-256 is not that of the index"
        found += [line] if line else []
    known = {shard.name for shard in index.shards}
    extra = sorted(path.name for path in index.folder.glob("*.tar") if path.name not in known)
    return found + [f"{name} is not in the index" for name in extra]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _quick_fault(path: Path, shard: Shard) -> str:
    if not path.is_file():
        return f"{shard.name} is missing"
    size = path.stat().st_size
    return "" if size == shard.bytes else f"{shard.name} is wrong: it has {size} bytes, the index says {shard.bytes}"
