"""What lies in a folder: the files that are wanted, and how many others are passed over.

Imports nothing heavy: ``data_prep/make_shards.py`` starts a process per core with it.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listing:
    """The files of a folder that are wanted, and what was passed over.

    Attributes:
        folder: that was searched.
        names: of the files, relative to it with ``/``, sorted.
        passed: numbers of other entries, by what they are.
    """

    folder: Path
    names: list[str]
    passed: Mapping[str, int]

    def __str__(self) -> str:
        found = f"{len(self.names)} images in {self.folder}"
        return found + (f", passed over: {self.others}" if self.passed else "")

    @property
    def others(self) -> str:
        """Numbers and kinds of what was passed over."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.passed.items()))


def list_files(folder: Path, endings: Sequence[str], below: bool = True) -> Listing:
    """Return the files of a folder whose names end so (in any case); names that begin with a dot are passed over.

    Symbolic links count as what they lead to. A folder is entered once, however many links lead to it, and by its own
    name where it has one, so that no link goes round in circles or moves files between splits.

    Args:
        folder: that exists.
        endings: in lower case, with their dots.
        below: search all its subfolders too.

    Raises:
        OSError: for a folder that may not be read.
    """
    names, passed = [], Counter[str]()
    for name, kind in _entries(folder, below):
        if kind is None and name.lower().endswith(tuple(endings)):
            names.append(name)
        else:
            passed[kind or "with other endings"] += 1
    return Listing(folder, sorted(names), passed)


def _entries(folder: Path, below: bool) -> Iterator[tuple[str, str | None]]:
    """Yield the names of all that is no folder, relative to ``folder``, and why it is passed over, if it is."""
    waiting, entered = deque([(folder, "")]), set[tuple[int, int]]()
    while waiting:
        here, prefix = waiting.popleft()
        place = here.stat()
        if (place.st_dev, place.st_ino) in entered:
            yield prefix, "links to folders that were entered already"
            continue
        entered.add((place.st_dev, place.st_ino))
        for path in sorted(here.iterdir()):
            name = prefix + path.name
            if path.name.startswith("."):
                yield name, "hidden"
            elif path.is_dir() and not below:
                yield name, "folders"
            elif path.is_dir():  # links last: a folder is found by its own name first
                (waiting.append if path.is_symlink() else waiting.appendleft)((path, f"{name}/"))
            else:
                yield name, None if path.is_file() else "broken links, pipes or devices"


def listed(broken: Sequence[str]) -> str:
    """Return the list of files that were left out, from what is wrong with each."""
    return "\n".join([f"left out, since they cannot be used: {len(broken)}", *(f"  {reason}" for reason in broken)])


def none_left(broken: Sequence[str]) -> str:
    """Return the message about a folder in which all files were left out."""
    return f"none of {len(broken)} files can be used, the first one since {broken[0]}"
