"""Turn images into webdataset shards: tar files of resized images, read in sequence by ``data=webdataset``.

    python data_prep/make_shards.py /path/to/images shards --size 256
    python data_prep/make_shards.py ILSVRC2012_img_train.tar shards --size 256 --format jpg --quality 95 --workers 8
    python data_prep/make_shards.py --verify shards

The source is a folder, searched with its subfolders, or a tar file. Tars inside it, also tars inside a tar, are read
where they lie: nothing is unpacked. They must not be compressed. LMDB folders, as LSUN comes in, are read too (with the
package lmdb); there the key is the name of an image.

Images are reduced as those that the published ADM priors were trained on: halved by box averaging while the shorter
side is at least twice the wanted one, then brought to it by bicubic interpolation, then cropped to a square. Their
order is shuffled, so that a shard holds a mixture of classes. In a shard, image number n of this order is
``NNNNNNNN-name.png`` (or ``.jpg``), and the number of its class ``NNNNNNNN-name.cls``: the place of its folder, or of
the tar around it, in the list ``classes`` of ``index.json``. Without any such folders there are no ``.cls`` files. With
``--captions`` each image has a text file of its name beside it, captions one a line, which becomes
``NNNNNNNN-name.txt``.

The same source and settings give the same bytes. Started again after an interruption, the script goes on behind the
last whole shard. ``index.json`` is written last: a folder without it is unfinished. Images that cannot be read are
listed in ``broken.txt``.
"""

import argparse
import hashlib
import io
import signal
import sys
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ud2m.data.captions import CAPTION_SUFFIX, parse_captions
from ud2m.data.shard_index import (
    IMAGE_SUFFIXES,
    INDEX_FILE,
    Shard,
    ShardIndex,
    faults,
    file_sha256,
    key_name,
    read_index,
)
from ud2m.files import is_full, locked, parse_json, sync, unwritable, write_bytes, write_json
from ud2m.listing import list_files
from ud2m.raster import FORMATS, open_limited
from ud2m.raster import decode as decode_levels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CROPS = ("center", "random", "none")
LMDB_FILE = "data.mdb"
PROGRESS_FILE, BROKEN_FILE = "progress.json", "broken.txt"
READ_AHEAD = 16  # images per worker that may wait for the writer

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards, besides the source.

    Args:
        size: shorter side in pixels. crop: ``center``, ``random`` (place by seed) or ``none`` (not square).
        format: ``png`` or ``jpg``.
        quality: of JPEG, 1 to 100, from 90 on without subsampling of colours; 95 for PNG, where it means nothing.
        shard_mb: a shard is closed before its images would take more than so many MiB; a larger image has one alone.
        seed: of the order and of random crops. pillow: version of the library that resizes and encodes.
        captions: whether each image has captions beside it, which go along.

    Raises:
        ValueError: for numbers and words that are not allowed.
    """

    size: int = 256
    crop: str = "center"
    format: str = "png"
    quality: int = 95
    shard_mb: float = 256.0
    seed: int = 0
    pillow: str = PIL.__version__
    captions: bool = False

    def __post_init__(self) -> None:
        require(self.size >= 1, "--size must be at least 1 pixel", self.size)
        require(self.crop in CROPS, f"--crop must be one of {', '.join(CROPS)}", self.crop)
        require(self.format in IMAGE_SUFFIXES, f"--format must be one of {', '.join(IMAGE_SUFFIXES)}", self.format)
        require(1 <= self.quality <= 100, "--quality must lie in 1 ... 100", self.quality)
        require(self.shard_mb > 0, "--shard-mb must be positive", self.shard_mb)
        require(self.seed >= 0, "--seed must be at least 0", self.seed)


@dataclass(frozen=True, slots=True)  # there are millions of them
class Entry:
    """One image of the source: a whole file, or ``length`` bytes of a tar from ``offset`` on.

    ``name`` is its path inside the source, with ``/``; a tar counts as a folder of its name without ``.tar``. Where
    ``path`` is an LMDB folder, ``key`` says which of its values the image is. ``caption`` is the file of its captions.
    """

    name: str
    path: Path
    offset: int
    length: int
    key: bytes = b""
    caption: "Entry | None" = None

    @property
    def class_name(self) -> str:
        """Folder of the image inside the source; empty for none."""
        return self.name.rpartition("/")[0]

    def read(self) -> bytes:
        """Return the encoded image, or the text."""
        if self.key:
            with kept_lmdb(self.path).begin() as transaction:
                return transaction.get(self.key)
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.length)


@dataclass(frozen=True)
class Made:
    """Image number ``number`` of the order, encoded, with captions; or, with empty ``data``, why it is ``broken``."""

    number: int
    entry: Entry
    data: bytes = b""
    broken: str = ""
    captions: bytes = b""


# ------------------------------------------------------------------------------------------------- the source


def list_source(source: Path, captions: bool = False) -> list[Entry]:
    """Return all images of a folder or tar, with their captions if asked, sorted by name; hidden ones are passed over.

    Raises:
        FileNotFoundError: when the source does not exist.
        ValueError: when it is neither a folder nor an uncompressed tar, holds no images, or lacks captions of some.
    """
    suffixes = (*SUFFIXES, CAPTION_SUFFIX) if captions else SUFFIXES
    if not source.exists():
        raise FileNotFoundError(f"no such folder or tar of images: {source} (looked in {Path.cwd()})")
    if source.is_dir():
        entries = list(folder_entries(source, suffixes))
    elif source.suffix.lower() == ".tar":
        with source.open("rb") as stream:
            entries = list(tar_entries(stream, source, 0, "", suffixes))
    else:
        raise ValueError(f"{source} is neither a folder nor a .tar file; name the folder that the images lie in")
    if captions:
        entries = captioned_entries(entries, source)
    if not entries:
        raise ValueError(f"no image in {source}; expected files that end in {', '.join(SUFFIXES)}, or tars of them")
    return sorted(entries, key=lambda entry: (entry.name, entry.offset))


def captioned_entries(entries: Sequence[Entry], source: Path) -> list[Entry]:
    """Return the images among images and texts, each with the text of its name.

    Raises:
        ValueError: for images without one.
    """
    texts = {entry.name[: -len(CAPTION_SUFFIX)]: entry for entry in entries if is_text(entry)}
    images = [replace(e, caption=texts.get(e.name.rpartition(".")[0])) for e in entries if not is_text(e)]
    bare = [entry.name for entry in images if entry.caption is None]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(images)} images in {source} have no captions: {', '.join(bare[:4])}; write them into "
            f"a {CAPTION_SUFFIX} file of the same name beside each, one a line, or leave --captions out"
        )
    return images


def is_text(entry: Entry) -> bool:
    """Whether an entry holds captions."""
    return not entry.key and entry.name.lower().endswith(CAPTION_SUFFIX)


def folder_entries(folder: Path, suffixes: Sequence[str]) -> Iterator[Entry]:
    """Yield the files of some endings below a folder and in the tars below it; what is passed over is printed."""
    found = list_files(folder, (*suffixes, ".tar", LMDB_FILE))
    if found.passed:
        print(f"{folder}: passed over {found.others}", flush=True)
    for name in found.names:
        path = folder / name
        if path.name == LMDB_FILE:
            yield from lmdb_entries(path.parent, name[: -len(LMDB_FILE)])
        elif path.suffix.lower() == ".tar":
            with path.open("rb") as stream:
                yield from tar_entries(stream, path, 0, name[: -len(".tar")] + "/", suffixes)
        elif path.suffix.lower() in suffixes:
            yield Entry(name, path, 0, path.stat().st_size)


def lmdb_entries(folder: Path, prefix: str) -> Iterator[Entry]:
    """Yield the values of an LMDB folder, by their keys behind ``prefix``.

    Raises:
        ValueError: when it is damaged, or the package lmdb is not there.
    """
    kept_lmdb.cache_clear()  # a process may open it once only, and must not take it through a fork
    with open_lmdb(folder) as environment, environment.begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            name = bytes(key).decode("ascii", "backslashreplace").replace("/", "_")
            yield Entry(prefix + name, folder, 0, len(value), bytes(key))


def open_lmdb(folder: Path) -> Any:
    """Return an LMDB folder to read from."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(f"{folder} is an LMDB, which the package lmdb reads: pip install lmdb") from error
    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"{folder} is no whole LMDB: {error}; fetch it again") from error


kept_lmdb = cache(open_lmdb)
"""The same, kept open by the process that reads images."""


def tar_entries(stream: IO[bytes], path: Path, start: int, prefix: str, suffixes: Sequence[str]) -> Iterator[Entry]:
    """Yield the files of some endings in a tar that lies ``start`` bytes from the beginning of ``path``.

    Args:
        stream: the bytes of the tar alone. prefix: goes before the names.

    Raises:
        ValueError: when it is damaged or compressed.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = prefix + member.name.removeprefix("./")
                suffix = PurePosixPath(name).suffix.lower()
                if not member.isreg() or is_hidden(name):
                    continue
                if suffix in suffixes:
                    yield Entry(name, path, start + member.offset_data, member.size)
                elif suffix == ".tar" and (inner := tar.extractfile(member)) is not None:
                    yield from tar_entries(
                        inner, path, start + member.offset_data, name[: -len(".tar")] + "/", suffixes
                    )
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole uncompressed tar: {error}; fetch it again or decompress it") from error


def is_hidden(name: str) -> bool:
    """Whether the name or a folder in it begins with a dot."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def source_digest(entries: Sequence[Entry]) -> str:
    """Return the SHA-256 of names and sizes in bytes of images and captions: no path of this machine, no times."""
    digest = hashlib.sha256()
    for entry in (part for image in entries for part in (image, image.caption) if part is not None):
        digest.update(f"{entry.length}\t{entry.name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- one image


def make_image(settings: Settings, item: tuple[int, Entry]) -> Made:
    """Read, resize, crop and encode one image. What cannot be read is reported, not raised."""
    number, entry = item
    try:
        image = decode(entry.read())
        texts = "" if entry.caption is None else parse_captions(entry.caption.read(), entry.caption.name)
    except UnidentifiedImageError:
        return Made(number, entry, broken=f"not an image of {', '.join(FORMATS)}")
    except Exception as error:  # Pillow raises errors of many types for damaged files; each is listed and counted
        return Made(number, entry, broken=" ".join(str(error).split()) or type(error).__name__)
    image = crop(resize(image, settings.size), settings, number)
    return Made(number, entry, encode(image, settings), captions=texts.encode())


def decode(data: bytes) -> Image.Image:
    """Return an upright RGB image of 8 bits per channel; 16 bits are rounded to these.

    Raises:
        ValueError: for what ``raster.decode`` refuses.
        OSError: and others of Pillow, for what is no image or a damaged one.
    """
    with open_limited(data) as image:
        levels = decode_levels(image, data)
    if levels.dtype == np.uint16:
        levels = np.round(levels / 257).astype(np.uint8)
    return Image.fromarray(levels if levels.shape[2] == 3 else levels.repeat(3, axis=2))


def resize(image: Image.Image, size: int) -> Image.Image:
    """Bring the shorter side to ``size`` pixels as ADM does: halvings by box averaging, then bicubic.

    A side of odd length loses half a pixel per halving, as there: the box filter spans the whole image.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    return image if image.size == target else image.resize(target, Image.Resampling.BICUBIC)


def crop(image: Image.Image, settings: Settings, number: int) -> Image.Image:
    """Cut a square of ``settings.size`` pixels: from the centre (rounded to the top left) or a place by the seed."""
    if settings.crop == "none":
        return image
    room = (image.width - settings.size, image.height - settings.size)
    if settings.crop == "center":
        left, top = room[0] // 2, room[1] // 2
    else:
        rng = np.random.default_rng([settings.seed, number])
        left, top = (int(rng.integers(pixels + 1)) for pixels in room)
    return image.crop((left, top, left + settings.size, top + settings.size))


def encode(image: Image.Image, settings: Settings) -> bytes:
    """Return PNG or JPEG bytes without metadata."""
    buffer = io.BytesIO()
    plain = Image.frombytes("RGB", image.size, image.tobytes())  # profiles and comments would be written along
    if settings.format == "png":
        plain.save(buffer, format="PNG")
    else:
        plain.save(buffer, format="JPEG", quality=settings.quality, subsampling=0 if settings.quality >= 90 else 2)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------- the shards


class Progress:
    """What is finished in the output folder, kept in ``progress.json`` until ``index.json`` takes its place.

    Args:
        folder: the output folder. identity: settings and source; a folder of other ones is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path, self.identity = folder / PROGRESS_FILE, identity
        self.shards: list[Shard] = []
        self.ends: list[int] = []  # number of the first image behind each shard
        self.broken: list[tuple[int, str]] = []  # number of the image, its line in broken.txt
        if self.path.is_file():
            self._load()

    @property
    def next_number(self) -> int:
        """The first image of the order that is in no finished shard."""
        return self.ends[-1] if self.ends else 0

    def add(self, shard: Shard, end: int, broken: Sequence[tuple[int, str]]) -> None:
        """Remember a shard that lies in its place, and the broken images before ``end``."""
        self.shards.append(shard)
        self.ends.append(end)
        self.broken = list(broken)
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        shards = [asdict(shard) for shard in self.shards]
        content = {"identity": self.identity, "shards": shards, "ends": self.ends, "broken": self.broken}
        write_json(self.path, content)

    def _load(self) -> None:
        try:
            content = parse_json(self.path.read_bytes())
            identity, broken = content["identity"], [(int(number), str(line)) for number, line in content["broken"]]
            done = [(Shard(**shard), int(end)) for shard, end in zip(content["shards"], content["ends"], strict=True)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); remove {self.path.parent} and start again") from error
        check_identity(self.path.parent, identity, self.identity)
        for shard, end in done:  # whole shards up to the first that is not what was written
            path = self.path.parent / shard.name  # a plain name, as every shard has
            if not path.is_file() or file_sha256(path) != shard.sha256:
                print(f"{shard.name} is missing or not as it was written: going on from there")
                break
            self.shards.append(shard)
            self.ends.append(end)
        self.broken = [(number, line) for number, line in broken if number < self.next_number]


class ShardWriter:
    """One growing tar beside its place; ``finish`` moves it there."""

    def __init__(self, folder: Path, number: int):
        self.place = folder / f"shard-{number:06d}.tar"
        self.work = folder / f".{self.place.name}.incomplete"
        self.stream = self.work.open("wb")
        self.tar = tarfile.TarFile(fileobj=self.stream, mode="w", format=tarfile.USTAR_FORMAT)
        self.images = 0

    @property
    def length(self) -> int:
        """Bytes so far, without the end marks of a tar."""
        return self.tar.offset

    def add(self, files: Sequence[tuple[str, bytes]]) -> None:
        """Append the files of one image."""
        for name, data in files:
            header = tarfile.TarInfo(name)  # time, owner and group are 0 and empty
            header.size = len(data)
            self.tar.addfile(header, io.BytesIO(data))
        self.images += 1

    def finish(self) -> Shard:
        """Close the tar, move it into place and return its line in the index."""
        self.tar.close()
        self.stream.close()
        shard = Shard(self.place.name, self.images, self.work.stat().st_size, file_sha256(self.work))
        sync(self.work)
        self.work.replace(self.place)
        return shard

    def drop(self) -> None:
        """Remove an unfinished tar."""
        with suppress(OSError):  # fails again where the disk is full
            self.stream.close()
        self.work.unlink(missing_ok=True)


def make_shards(source: Path, out: Path, settings: Settings, workers: int = 2, max_broken: int = 10) -> ShardIndex:
    """Write the images of ``source`` as shards into ``out``, or go on with it, and return the index.

    Args:
        source: folder or tar. out: a new or empty folder, or one that was begun with the same settings.
        workers: processes that resize; 1 resizes in this one. max_broken: unreadable images that are skipped.

    Raises:
        FileNotFoundError: when the source does not exist.
        ValueError: for an empty source, an output folder of something else, bad numbers, or when more images
            than ``max_broken`` cannot be read (``broken.txt`` lists them; what is finished is kept).
        OSError: when the place cannot be written, or another process is writing there.
    """
    require(workers >= 1, "--workers must be at least 1", workers)
    require(max_broken >= 0, "--max-broken must be at least 0", max_broken)
    entries = list_source(source, settings.captions)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"the output {out} lies inside the source {source}; choose a folder outside of it")
    identity = {"settings": asdict(settings), "source": {"digest": source_digest(entries), "images": len(entries)}}
    if (out / INDEX_FILE).is_file():
        return finished(out, identity)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        progress = Progress(out, identity)
        progress.save()
        write_shards(entries, out, settings, progress, workers, max_broken)
        return write_index(entries, out, settings, progress)


def write_shards(
    entries: Sequence[Entry], out: Path, settings: Settings, progress: Progress, workers: int, max_broken: int
) -> None:
    """Write all shards that are not finished yet."""
    classes = {name: number for number, name in enumerate(class_names(entries))}
    order = np.random.default_rng(settings.seed).permutation(len(entries))
    first = progress.next_number
    todo = ((number, entries[order[number]]) for number in range(first, len(entries)))
    broken = list(progress.broken)
    limit = settings.shard_mb * 2**20
    writer: ShardWriter | None = None
    bar = tqdm(total=len(entries), initial=first, unit="image", smoothing=0.05, mininterval=1, disable=None)
    try:
        for made in in_order(partial(make_image, settings), todo, workers):
            bar.update()
            if made.broken:
                broken.append((made.number, f"{made.entry.name}\t{made.broken}"))
                check_broken(broken, max_broken, out)
                continue
            files = files_of(made, settings, classes)
            if writer is not None and writer.length + tar_bytes(files) > limit:
                progress.add(writer.finish(), made.number, broken)
                writer = None
            writer = writer or ShardWriter(out, len(progress.shards))
            writer.add(files)
        if writer is not None:
            progress.add(writer.finish(), len(entries), broken)
            writer = None
        progress.broken = broken  # those behind the last shard of a resumed run too
    except OSError as error:
        if is_full(error):
            raise unwritable(error, out) from error
        raise
    finally:
        bar.close()
        if writer is not None:
            writer.drop()


def write_index(entries: Sequence[Entry], out: Path, settings: Settings, progress: Progress) -> ShardIndex:
    """Write ``broken.txt``, if there is something to list, and ``index.json``, which ends the progress."""
    write_broken(progress.broken, out)
    if not progress.shards:
        raise ValueError(f"none of the {len(entries)} images can be read; see {out / BROKEN_FILE}")
    source = {**progress.identity["source"], "broken": len(progress.broken)}
    index = ShardIndex(out, asdict(settings), source, tuple(class_names(entries)), tuple(progress.shards))
    write_json(out / INDEX_FILE, index.as_dict())
    progress.path.unlink()
    return index


def finished(out: Path, identity: dict[str, Any]) -> ShardIndex:
    """Return the index of a finished folder, if it was made of the same source with the same settings."""
    index = read_index(out)
    source = {key: index.source[key] for key in identity["source"]}
    check_identity(out, {"settings": index.settings, "source": source}, identity)
    (out / PROGRESS_FILE).unlink(missing_ok=True)  # of a run that was killed right after it wrote the index
    return index


def check_folder(out: Path) -> None:
    """Raise ValueError when the output is a file or a folder of something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output {out} is a file; choose the name of a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / PROGRESS_FILE).is_file():
        raise ValueError(f"the output folder {out} already holds other files; choose a new or an empty one")


def check_identity(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ValueError when a folder was begun with other settings or of another source."""
    settings = old["settings"]
    other = [
        f"{key} {settings.get(key)}, now {value}"
        for key, value in new["settings"].items()
        if settings.get(key, getattr(Settings, key)) != value  # what is younger than the folder had its default
    ]
    other += [] if old["source"] == new["source"] else ["another list of source images"]
    if other:
        raise ValueError(f"{out} was begun with {'; '.join(other)}; use the same ones or another output folder")


def check_broken(broken: Sequence[tuple[int, str]], limit: int, out: Path) -> None:
    """Raise ValueError, after listing them, when more images are broken than the user allows."""
    if len(broken) > limit:
        write_broken(broken, out)
        line = broken[-1][1].replace("\t", ": ")
        raise ValueError(
            f"{len(broken)} images cannot be read, at most {limit} may be skipped; the last one: {line}. "
            f"{out / BROKEN_FILE} lists them; repair or remove them, or raise --max-broken and start again"
        )


def write_broken(broken: Sequence[tuple[int, str]], out: Path) -> None:
    """List the broken images, one per line: name, tabulator, reason. Without any there is no file."""
    text = "".join(f"{line}\n" for _, line in broken)
    if text:
        write_bytes(out / BROKEN_FILE, text.encode("utf-8", "surrogateescape"))
    else:
        (out / BROKEN_FILE).unlink(missing_ok=True)


def class_names(entries: Sequence[Entry]) -> list[str]:
    """Return the sorted folders of the images; nothing when all lie at the top."""
    names = sorted({entry.class_name for entry in entries})
    return [] if names == [""] else names


def files_of(made: Made, settings: Settings, classes: dict[str, int]) -> list[tuple[str, bytes]]:
    """Return names and contents of the files of one image in a shard."""
    key = f"{made.number:08d}-{key_name(made.entry.name)}"
    files = [(key + IMAGE_SUFFIXES[settings.format], made.data)]
    files += [(key + CAPTION_SUFFIX, made.captions)] if made.captions else []
    return files + ([(key + ".cls", str(classes[made.entry.class_name]).encode())] if classes else [])


def tar_bytes(files: Sequence[tuple[str, bytes]]) -> int:
    """Return what files add to a tar: a header of 512 bytes each, and contents in whole blocks of 512."""
    return sum(512 + -(-len(data) // 512) * 512 for _, data in files)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of the items, computed by so many processes a little ahead.

    Raises:
        OSError: when a process was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque = deque()
    # Ctrl-C is for this process; the others end with it
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= READ_AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, most likely for want of memory; lower --workers and start again: "
                "finished shards are kept"
            ) from error


# ------------------------------------------------------------------------------------------------ command line


def verify(out: Path) -> list[str]:
    """Return a line for each shard of a finished folder that is missing, wrong or not in the index."""
    return faults(read_index(out))


def require(condition: bool, rule: str, value: object) -> None:
    """Raise ValueError with the rule and the value that breaks it."""
    if not condition:
        raise ValueError(f"{rule}, got {value}")


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="folder or tar of images")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the shards")
    parser.add_argument("--size", type=int, default=256, help="shorter side in pixels")
    parser.add_argument("--crop", default="center", help=f"{', '.join(CROPS)} (keeps the aspect ratio)")
    parser.add_argument("--format", default="png", help="png or jpg")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG; from 90 on colours are not subsampled")
    parser.add_argument("--shard-mb", type=float, default=256, help="size of a shard in MiB")
    parser.add_argument("--workers", type=int, default=2, help="processes that resize")
    parser.add_argument("--max-broken", type=int, default=10, help="unreadable images that are skipped and listed")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of random crops")
    parser.add_argument("--captions", action="store_true", help="text files beside the images go along")
    parser.add_argument("--verify", type=Path, metavar="OUT", help="re-check the shards of a folder by their hashes")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Make or verify shards."""
    options = parser().parse_intermixed_args(arguments)  # options between source and output too
    if options.verify is not None:
        require(options.source is None, "--verify takes one folder and no source", options.source)
        found = verify(options.verify)
        if found:
            sys.exit("\n".join(found))
        print(f"all shards of {options.verify} are as the index says")
        return
    require(options.out is not None, "name a source and an output folder, or --verify a folder", options.source)
    quality = options.quality if options.format == "jpg" else Settings.quality
    settings = Settings(
        options.size, options.crop, options.format, quality, options.shard_mb, options.seed, captions=options.captions
    )
    index = make_shards(options.source, options.out, settings, options.workers, options.max_broken)
    print(f"{index.images} images in {len(index.shards)} shards in {options.out}, {index.source['broken']} broken")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on behind the last whole shard")
