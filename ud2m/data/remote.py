"""Shards that lie behind an address: each is fetched whole when it is first used, checked, and kept on disk."""

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

from ud2m.data.shard_index import INDEX_FILE, Shard, ShardIndex, file_sha256, read_index
from ud2m.files import parse_json, plain_name, write_bytes

CACHE = "~/.cache/ud2m/shards"


COMMAND = "pipe:"
"""What an address begins with that is a command; a configuration has one only where the command line has it too."""
SCHEMES = ("http", "https", "gs", "hf", "ais", "sftp", "ftps", "scp")
"""Those that the webdataset package opens without a shell."""


def is_address(place: str | Path) -> bool:
    """Return whether a place is none of the file system: it has a scheme, as ``https://``, or is a ``pipe:``."""
    return "://" in str(place) or str(place).startswith(COMMAND)


def fetch_index(address: str, cache: Path) -> ShardIndex:
    """Return the index behind an address, whose shards will lie in a folder of ``cache``.

    The folder is named by the index: other shards behind the same address do not mix with those that are there.

    Args:
        address: of a folder, as ``https://server/shards/train``; a ``pipe:`` command has {} where the name of a file
            belongs, as ``pipe:ssh server cat shards/train/{}``.
        cache: folder for shards from all addresses.

    Raises:
        OSError: when it cannot be fetched.
        ValueError: when it is no index.
    """
    content = fetch(address, INDEX_FILE)
    folder = cache / hashlib.sha256(content).hexdigest()[:16]
    try:
        parse_json(content)
    except ValueError as error:
        raise ValueError(f"{located(address, INDEX_FILE)} is no index of shards ({error})") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / INDEX_FILE, content)
    return replace(read_index(folder), address=address)


def shard_path(index: ShardIndex, shard: Shard) -> Path:
    """Return the file of a shard, after fetching it where it is not there yet.

    Processes that want the same shard at once each fetch it, and the last one's file stays.

    Raises:
        OSError: when it cannot be fetched.
        ValueError: when it is not what the index says.
    """
    path = index.place(shard)
    if index.address is None or path.is_file():
        return path
    content = fetch(index.address, shard.name)
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ValueError(
            f"{located(index.address, shard.name)} is wrong: its SHA-256 is not that of the index, after "
            f"{len(content)} of {shard.bytes} bytes; upload it again"
        )
    write_bytes(path, content)
    return path


def wrong_in_cache(index: ShardIndex) -> list[str]:
    """Return a line for each shard that has been fetched and has changed since. Reads every byte of them."""
    there = [(shard, index.place(shard)) for shard in index.shards]
    wrong = (path for shard, path in there if path.is_file() and file_sha256(path) != shard.sha256)
    return [f"{path} is wrong: its SHA-256 is not that of the index; delete it" for path in wrong]


def located(address: str, name: str) -> str:
    """Return the address of a file."""
    return address.replace("{}", name) if "{}" in address else f"{address.rstrip('/')}/{name}"


def fetch(address: str, name: str) -> bytes:
    """Return the file ``name`` behind an address: what its command prints, or what the webdataset package fetches.

    Raises:
        OSError: when the file cannot be fetched.
        ValueError: for a name that is more than the name of a file.
    """
    place = located(address, plain_name(name, "a file behind an address"))
    try:
        content = _output(place.removeprefix(COMMAND)) if place.startswith(COMMAND) else _opened(place)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot fetch {place} ({error}); check the address, or copy the shards to a disk") from error
    if not content:  # a program that fails late is no error of its stream
        raise OSError(f"cannot fetch {place}: nothing came; check the address, or copy the shards to a disk")
    return content


def _output(command: str) -> bytes:
    # a shell, since the user's command may be a pipeline; names of files in it are plain
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise OSError(f"the command ended with {done.returncode}")
    return done.stdout


def _opened(place: str) -> bytes:
    from webdataset.gopen import gopen  # here alone: few runs need it

    if place.partition(":")[0] not in SCHEMES:  # it would take others for a command or a file, as PIPE:
        raise ValueError(f"no such scheme; allowed are {', '.join(SCHEMES)} and {COMMAND}")
    with gopen(place) as stream:
        return stream.read()
