"""Webdataset shards as ``data_prep/make_shards.py`` writes them."""

import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ud2m.data.augmentation import Augmentation
from ud2m.data.captions import CAPTION_SUFFIX, parse_captions
from ud2m.data.crops import (
    PROBABILITIES,
    SCALES,
    Tiles,
    check_candidates,
    check_levels,
    choices,
    detailed_crop,
    downscale,
)
from ud2m.data.module import ImageDataModule, NamedImages, Split, position
from ud2m.data.remote import CACHE, fetch_index, is_address, shard_path, wrong_in_cache
from ud2m.data.sampler import StreamSampler
from ud2m.data.shard_index import IMAGE_SUFFIXES, ShardIndex, faults, key_name, quick_faults, read_index
from ud2m.files import plain_name
from ud2m.images import decode_image
from ud2m.raster import read_header

MID_EPOCH = ("readers", "buffer")
"""Settings that decide the order within an epoch, but not which samples it has."""
HELD_OUT_CACHE = 2**28
"""Bytes of decoded validation or test images that a process keeps."""
ENOUGH_CAPTIONS = 100_000
"""Captions of so many images tell the words of all: shards are mixtures, and those behind an address are large."""


class ShardData(ImageDataModule):
    """``data=webdataset``: trains on random crops of the images in shards, validates and tests on other shards.

    The training samples of epoch e are those of `ShardStream` at the positions [e S, (e + 1) S), S =
    samples_per_epoch rounded down to whole batches; `ShardSampler` splits them over the readers (a reader is one
    loader process of one rank). What a sample looks like depends on (shards, settings, seed, position) alone.
    Unlike with the other data sets, the order within an epoch also depends on ``buffer``, ranks and workers. A
    run may go on from a checkpoint anywhere in an epoch without repeating or leaving out a sample; with other
    ranks, workers or buffer only from the end of an epoch, and elsewhere it is refused.

    Args:
        root: folder of finished shards to train on, or an address of one (``remote.fetch_index``).
        held_out: another one, of other images. Its images number 0, 2, 4, ... (over all shards) are for
            validation, 1, 3, 5, ... for the test, as tiles of side ``tile_size``.
        val_list: file that names the held-out images of validation instead, one per line (what follows a blank is
            ignored, as are folders and endings), in the order in which they are used.
        test_list: the same for the test. Where only this one is given, validation has the even ones of the others.
        scales: pyramid levels of the training crops.
        probabilities: their shares (see ``RandomCrops``).
        augment: keyword arguments of ``Augmentation``.
        candidates: places per crop (see ``RandomCrops``).
        buffer: samples among which each reader shuffles, on top of the order of shards that each pass draws; 1 keeps
            the order within the shards.
        check_hashes: compare the SHA-256 of all shards with the index before anything starts. Otherwise only that
            they are there and have the right size; those behind an address are compared when they come.
        cache: folder that shards behind an address are kept in.
        captions: items are pairs of a crop and the captions of its image, one a line; shards made with ``--captions``.
        common: the arguments of ``ImageDataModule``; ``channels`` 1 turns colour into grey.
    """

    def __init__(
        self,
        root: str | Path,
        held_out: str | Path,
        val_list: str | Path | None = None,
        test_list: str | Path | None = None,
        scales: Sequence[float] = SCALES,
        probabilities: Sequence[float] = PROBABILITIES,
        augment: Mapping[str, float] | None = None,
        candidates: int = 1,
        buffer: int = 1000,
        check_hashes: bool = False,
        cache: str | Path = CACHE,
        captions: bool = False,
        **common: Any,
    ):
        super().__init__(**common)
        self.root, self.held_out, self.cache = root, held_out, Path(cache).expanduser()
        self.lists: dict[str, str | Path | None] = {"val": val_list, "test": test_list}
        self.scales, self.probabilities = tuple(scales), tuple(probabilities)
        self.augmentation, self.candidates = Augmentation(**(augment or {})), candidates
        self.buffer, self.check_hashes, self.captions = buffer, check_hashes, captions

    @cached_property
    def train_index(self) -> ShardIndex:
        """The index of the training shards, which have been found to be there."""
        return self._index(self.root, self.crop_size)

    def train_set(self) -> "ShardCrops":
        """Return endless crops by their position in the stream."""
        return ShardCrops(
            ShardStream(self.train_index, self.seed),
            ShardReader(self.train_index, self.channels),
            self.crop_size,
            self.seed,
            self.scales,
            self.probabilities,
            self.augmentation,
            self.candidates,
            self.captions,
        )

    def all_captions(self) -> Sequence[str]:
        """Return the captions of the first training images, of whole shards: ``ENOUGH_CAPTIONS`` where there are more.

        Raises:
            ValueError: without ``captions``.
        """
        if not self.captions:
            return super().all_captions()
        reader, found = ShardReader(self.train_index, self.channels), list[str]()
        for shard, entry in enumerate(self.train_index.shards):
            found += [reader.captions(shard, number) for number in range(entry.images)]
            if len(found) >= ENOUGH_CAPTIONS:
                break
        return found

    def train_sampler(self, dataset: Dataset[Tensor]) -> "ShardSampler":
        """Return the positions of this rank from the trainer's position on.

        Raises:
            ValueError: for fewer shards than readers, and for a checkpoint that was made with other settings.
        """
        self._check_resumed()
        index = self.train_index
        samples = index.images if self.samples_per_epoch is None else self.samples_per_epoch
        epoch, batches_done = (0, 0) if self.trainer is None else position(self.trainer)
        rank = 0 if self.trainer is None else self.trainer.global_rank
        check_readers(len(index.shards), self._world_size, self._workers)
        return ShardSampler(
            samples, self.batch_size, self.seed, self._workers, self.buffer, rank, self._world_size, epoch, batches_done
        )

    def all_images(self, split: Split) -> NamedImages:
        """Return the tiles of the held-out images of a split: listed ones, or even numbers (``val``) and odd ones.

        Raises:
            FileNotFoundError: when a list is missing.
            ValueError: when one names an image twice, or one that is not there.
        """
        index = self._index(self.held_out, self.tile_size)
        listed = {kind: listed_numbers(index, Path(file)) for kind, file in self.lists.items() if file is not None}
        numbers: Sequence[int] = range(0 if split == "val" else 1, index.images, 2)
        if split in listed:
            numbers = listed[split]
        elif listed:
            taken = {number for found in listed.values() for number in found}
            numbers = [number for number in numbers if number not in taken]
        images = ShardImages(index, numbers, self.channels)
        return Tiles(images, self.tile_size, HELD_OUT_CACHE, images.captions() if self.captions else None)

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the training batches besides the position."""
        readers = f"{self._world_size} ranks x {self._workers} workers"
        own = {"shards": self.train_index.digest, "readers": readers, "buffer": self.buffer}
        return {**super().state_dict(), **own}

    def _index(self, place: str | Path, side: int) -> ShardIndex:
        if is_address(place):
            index = fetch_index(str(place), self.cache)
            found = wrong_in_cache(index) if self.check_hashes else []
        else:
            index = read_index(Path(place).expanduser())
            found = faults(index) if self.check_hashes else quick_faults(index)
        if self.captions and not index.settings.get("captions"):
            raise ValueError(f"the shards in {index.folder} hold no captions; make them again with --captions")
        return checked(index, side, found)

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _workers(self) -> int:
        return max(1, self.num_workers)  # with 0 the training process reads

    def _check_resumed(self) -> None:
        if self.trainer is not None and position(self.trainer)[1] == 0:
            self.resumed = {key: value for key, value in self.resumed.items() if key not in MID_EPOCH}
        super()._check_resumed()


# ------------------------------------------------------------------------------------------------------- order


class ShardStream:
    """The endless sequence of images: passes over all shards, each in a random order of the shards.

    Pass t visits the shards in a permutation drawn from (seed, t), and the images of a shard as they lie in it. Thus
    nothing comes twice before everything came once, wherever epochs end.
    """

    def __init__(self, index: ShardIndex, seed: int):
        self.seed = seed
        self.counts = np.array([shard.images for shard in index.shards])
        self.images = int(self.counts.sum())
        self.turn, self.order, self.ends = -1, self.counts, self.counts

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return the number of the shard and the number of the image in it."""
        turn, place = divmod(position, self.images)
        if turn != self.turn:
            self.turn, self.order = turn, np.random.default_rng([self.seed, turn]).permutation(len(self.counts))
            self.ends = np.cumsum(self.counts[self.order])
        which = int(np.searchsorted(self.ends, place, side="right"))
        shard = int(self.order[which])
        return shard, int(place - (self.ends[which] - self.counts[shard]))


class ShardSampler(StreamSampler):
    """Positions of a `ShardStream` for one rank, such that each loader process reads a piece of its own.

    The positions of an epoch are cut into one piece per reader, rank by rank and worker by worker, of as many whole
    (shares of) batches as the reader has to load. Pieces are runs of neighbouring positions: a reader goes through its
    shards from front to back, and shares at most the first and the last one with its neighbours. It shuffles within a
    buffer. ``DataLoader`` gives batch k of a rank to worker k mod ``workers``: that is where its positions come from.
    (After a resume within an epoch the workers may have swapped their pieces, which costs nothing.)

    Args:
        samples_per_epoch: positions per epoch, over all ranks.
        batch_size: samples of a batch over all ranks together; a multiple of ``world_size``.
        seed: another seed is another order within the buffers.
        workers: loader processes per rank.
        buffer: positions that wait in it to be drawn from, at least 1.
        rank: this process.
        world_size: number of processes.
        epoch: the first epoch.
        batches_done: batches of it to leave out; later epochs are whole.

    Raises:
        ValueError: for a buffer below 1; for batches as in ``StreamSampler``.
    """

    def __init__(
        self,
        samples_per_epoch: int,
        batch_size: int,
        seed: int = 0,
        workers: int = 1,
        buffer: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        batches_done: int = 0,
    ):
        super().__init__(samples_per_epoch, batch_size, seed, None, rank, world_size, epoch, batches_done)
        if buffer < 1:
            raise ValueError(f"buffer, the samples to shuffle among, must be at least 1 (no shuffling), got {buffer}")
        self.workers, self.buffer = workers, buffer

    def __iter__(self) -> Iterator[int]:
        epoch, batches_done = self.epoch, self.batches_done  # of now: set_epoch may come while this iterator lives
        share = self.batch_size // self.world_size
        pieces = [self._shuffled(worker, epoch) for worker in range(self.workers)]
        for batch in range(self.batches):
            positions = list(islice(pieces[batch % self.workers], share))
            if batch >= batches_done:
                yield from positions

    def piece(self, worker: int, epoch: int) -> range:
        """Return the positions that a worker of this rank reads in an epoch, in the order of the stream."""
        share = self.batch_size // self.world_size
        lengths = [len(range(k, self.batches, self.workers)) * share for k in range(self.workers)]
        start = epoch * self.batches * self.batch_size + self.rank * self.batches * share + sum(lengths[:worker])
        return range(start, start + lengths[worker])

    def _shuffled(self, worker: int, epoch: int) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, epoch, self.rank, worker])
        return shuffled(self.piece(worker, epoch), self.buffer, rng)


def shuffled(items: Iterable[int], size: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield all items; each is drawn from the ``size`` next ones that have not been drawn yet."""
    waiting: list[int] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == size:
            yield _draw(waiting, rng)
    while waiting:
        yield _draw(waiting, rng)


def _draw(waiting: list[int], rng: np.random.Generator) -> int:
    place = int(rng.integers(len(waiting)))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()


# ------------------------------------------------------------------------------------------------------ images


class ShardReader:
    """Images by shard and number. The headers of a shard are read when it is first used, and then kept.

    Args:
        index: of the folder.
        channels: 1 or 3.
    """

    def __init__(self, index: ShardIndex, channels: int):
        self.index, self.channels = index, channels
        self.suffix = IMAGE_SUFFIXES[index.settings["format"]]
        self.members: dict[int, list[tuple[str, int, int]]] = {}  # name, offset and length of each image of a shard
        self.texts: dict[int, dict[str, tuple[int, int]]] = {}  # offset and length of captions, by the key of the image

    def load(self, shard: int, number: int) -> Tensor:
        """Return an image, float32 [C, H, W] in [0, 1]."""
        name = f"{self.name(shard, number)} in {self.path(shard)}"
        return decode_image(self.read(shard, number), name, self.channels)

    def read(self, shard: int, number: int) -> bytes:
        """Return the encoded image."""
        return self._bytes(shard, *self._members(shard)[number][1:])

    def captions(self, shard: int, number: int) -> str:
        """Return the captions of an image, one a line.

        Raises:
            ValueError: when there are none.
        """
        key = self.name(shard, number)
        name, place = f"{key}{CAPTION_SUFFIX} in {self.path(shard)}", self.texts[shard].get(key)
        if place is None:
            raise ValueError(f"there is no {name}; {ADVICE}")
        return parse_captions(self._bytes(shard, *place), name)

    def name(self, shard: int, number: int) -> str:
        """Return the key of an image: its name in the shard without the ending."""
        return self._members(shard)[number][0].removesuffix(self.suffix)

    def path(self, shard: int) -> Path:
        """Return the file of a shard, which may have to be fetched."""
        return shard_path(self.index, self.index.shards[shard])

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        with self.path(shard).open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def _members(self, shard: int) -> list[tuple[str, int, int]]:
        if shard not in self.members:
            self._scan(shard)
        return self.members[shard]

    def _scan(self, shard: int) -> None:
        path, expected = self.path(shard), self.index.shards[shard].images
        try:
            with tarfile.open(path, "r:") as tar:
                members = [(plain_name(m.name, "an image in a shard"), m.offset_data, m.size) for m in tar]
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); {ADVICE}") from error
        found = [member for member in members if member[0].endswith(self.suffix)]
        if len(found) != expected:
            raise ValueError(f"{path} holds {len(found)} images, the index says {expected}; {ADVICE}")
        texts = (member for member in members if member[0].endswith(CAPTION_SUFFIX))
        self.texts[shard] = {name.removesuffix(CAPTION_SUFFIX): (offset, size) for name, offset, size in texts}
        self.members[shard] = found


class ShardCrops(Dataset[Any]):
    """Endless random crops of the images of a stream: item q is cut from the image at position q.

    It is a pure function of (shards, settings, seed, q), and the same crop that ``RandomCrops`` of that image alone
    has as its item q: a level of the pyramid, a place, a flip, and what ``augmentation`` makes of it.

    Args:
        stream: which image comes where.
        reader: loads it.
        crop_size: side of the crops in pixels.
        seed: every seed is another endless sequence.
        scales: see ``RandomCrops``.
        probabilities: see ``RandomCrops``.
        augmentation: further random changes; none by default.
        candidates: see ``RandomCrops``.
        captions: items are pairs of a crop and the captions of its image.

    Returns (per item):
        float32 [C, crop_size, crop_size] in [0, 1].
    """

    def __init__(
        self,
        stream: ShardStream,
        reader: ShardReader,
        crop_size: int,
        seed: int = 0,
        scales: Sequence[float] = SCALES,
        probabilities: Sequence[float] = PROBABILITIES,
        augmentation: Augmentation | None = None,
        candidates: int = 1,
        captions: bool = False,
    ):
        check_levels(scales, probabilities)
        check_candidates(candidates)
        self.stream, self.reader = stream, reader
        self.crop_size, self.seed, self.candidates = crop_size, seed, candidates
        self.scales, self.probabilities = scales, probabilities
        self.augmentation, self.captions = augmentation or Augmentation(), captions

    def __getitem__(self, position: int) -> Any:
        place = self.stream[position]
        image = self.reader.load(*place)
        rng = np.random.default_rng([self.seed, position])
        which, flip = rng.random(2)
        size = (image.shape[1], image.shape[2])
        levels, cumulative = choices([size], self.crop_size, self.scales, self.probabilities)
        _, scale = levels[int(np.searchsorted(cumulative, which, side="right"))]
        level = image if scale == 1 else downscale(image, scale)
        crop = detailed_crop(level, self.crop_size, self.candidates, rng)
        item = self.augmentation(crop.flip(2) if flip < 0.5 else crop, rng)
        return (item, self.reader.captions(*place)) if self.captions else item


class ShardImages:
    """An ``ImageStore`` of some of the images of a folder of shards, by their numbers over all shards."""

    def __init__(self, index: ShardIndex, numbers: Iterable[int], channels: int):
        self.reader = ShardReader(index, channels)
        ends = np.cumsum([shard.images for shard in index.shards])
        self.places = [place_of(number, ends) for number in numbers]
        self.names = [self.reader.name(*place) for place in self.places]
        side = index.settings["size"]
        square = index.settings["crop"] != "none"
        self.sizes = [(side, side) if square else self._size(place) for place in self.places]

    def load(self, index: int) -> Tensor:
        """Return image number ``index`` of these."""
        return self.reader.load(*self.places[index])

    def captions(self) -> list[str]:
        """Return the captions of all, one a line each."""
        return [self.reader.captions(*place) for place in self.places]

    def _size(self, place: tuple[int, int]) -> tuple[int, int]:
        name = f"{self.reader.name(*place)} in {self.reader.path(place[0])}"
        header = read_header(self.reader.read(*place), name)
        return header.height, header.width


def place_of(number: int, ends: np.ndarray) -> tuple[int, int]:
    """Return the shard of image ``number``, and its number there; ``ends`` are the numbers behind each shard."""
    shard = int(np.searchsorted(ends, number, side="right"))
    return shard, number - (int(ends[shard - 1]) if shard else 0)


def listed_numbers(index: ShardIndex, file: Path) -> list[int]:
    """Return the numbers of the images that a file lists by name.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it names nothing, an image twice, or images that are not in the shards.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no list of images {file} (looked in {Path.cwd()})")
    reader = ShardReader(index, 3)
    keys = (reader.name(shard, n) for shard, entry in enumerate(index.shards) for n in range(entry.images))
    numbers: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        numbers.setdefault(key.partition("-")[2], []).append(number)
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    # a name may have blanks; lists of ImageNet have a class behind theirs
    names = [whole if (whole := key_name(line)) in numbers else key_name(line.split()[0]) for line in lines]
    odd = [name for name in names if len(numbers.get(name, ())) != 1]
    if not names or odd or len(set(names)) < len(names):
        what = f"{len(odd)} of its {len(names)} names stand for no image or several: {', '.join(odd[:4])}"
        reason = what if odd else "a name comes twice" if names else "it is empty"
        raise ValueError(f"{file} does not list images of {index.folder}: {reason}")
    return [numbers[name][0] for name in names]


# ------------------------------------------------------------------------------------------------------ checks

ADVICE = "run data_prep/make_shards.py --verify on the folder, and copy or make again what it names"


def checked(index: ShardIndex, side: int, found: Sequence[str]) -> ShardIndex:
    """Return the index of shards that are as it says and hold images large enough for crops of ``side`` pixels.

    Raises:
        ValueError: when faults were ``found``, which are listed; for images that are too small.
    """
    if found:
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise ValueError(f"{index.folder}: {'; '.join(found[:10])}{more}; {ADVICE}")
    if index.settings["size"] < side:
        raise ValueError(
            f"the images in {index.folder} have a shorter side of {index.settings['size']} pixels, too small for crops "
            f"or tiles of {side}; lower crop_size and tile_size, or make the shards again with --size {side}"
        )
    return index


def check_readers(shards: int, world_size: int, workers: int) -> None:
    """Raise ValueError when there are fewer shards than readers."""
    if shards < world_size * workers:
        raise ValueError(
            f"{shards} shards cannot be split over {world_size} ranks x {workers} workers: lower data.num_workers, "
            "or make smaller shards (--shard-mb)"
        )
