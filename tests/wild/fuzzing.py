"""Damage files at random and open them with every reader: ``python tests/wild/fuzzing.py FIRST COUNT``.

Case number n is a pure function of n. The number is printed before the case is tried, so that one which ends the
process is known. The last line counts how the cases ended. Allowed are "read" and "told": one line that names the file.
"""

import importlib
import io
import json
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from png_files import COLOURS, chunk, container, header, interlaced, png, random_levels, rows_of

from ud2m.data.folder import image_size
from ud2m.data.shard_index import read_index
from ud2m.data.shards import ShardReader
from ud2m.images import decode_image, pixel_format, read_image
from ud2m.physics import DeepinvOperator, Jpeg, KernelFile, MaskCollection, MaskFile
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "data_prep"), str(TESTS)]
make_shards = importlib.import_module("make_shards")

SIDE = 24
SCENE = (np.add.outer(np.arange(SIDE), np.arange(SIDE))[..., None] * np.array([3, 5, 2]) % 256).astype(np.uint8)


# --- whole files ------------------------------------------------------------------------------------------------------


def saved(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(SCENE).save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned():
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags.tobytes()


def array(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def masks():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{"20-30% freeform": random_levels(np.uint8, 4 * 256 * 256 // 8)})
    return buffer.getvalue()


DEEP = SCENE * np.uint16(257)
PICTURES = {
    "plain.png": saved("PNG", exif=turned()),
    "palette.png": png(SCENE[..., :1], late=chunk(b"tEXt", b"a\0b")),
    "alpha.png": png(np.dstack([SCENE, np.full((SIDE, SIDE), 255, np.uint8)]), filters=(0, 1, 2, 3, 4)),
    "passes.png": interlaced(SCENE),
    "deep.png": png(DEEP, late=chunk(b"eXIf", turned()[6:]), filters=(4, 3, 2)),
    "deep grey.png": png(DEEP[..., :1]),
    "deep passes.png": interlaced(DEEP),
    "baseline.jpg": saved("JPEG", exif=turned()),
    "progressive.jpg": saved("JPEG", progressive=True, quality=60),
    "blocks.jpg": saved("JPEG", subsampling=0),
    "several.jpg": saved("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    "lossy.webp": saved("WEBP"),
    "lossless.webp": saved("WEBP", lossless=True, exif=turned()),
    "plain.bmp": saved("BMP"),
}
ARRAYS = {"image.npy": array(SCENE / 255), "mask.npy": array(SCENE[..., 0] > 99), "kernel.npy": array(np.ones((5, 7)))}


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(data, rng):
    """Return bytes with some of them flipped, overwritten, cut, taken out, put in, repeated or swapped."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place, length = int(rng.integers(len(out) + 1)), int(rng.integers(1, 1 + max(4, len(out) // 8)))
        piece = out[place : place + length]
        kind = rng.integers(8)
        if kind == 0 and out:
            out[place % len(out)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[place : place + len(piece)] = rng.bytes(len(piece))
        elif kind == 2:
            out[place : place + len(piece)] = bytes([int(rng.choice([0, 255]))]) * len(piece)
        elif kind == 3:
            del out[place:]
        elif kind == 4:
            del out[place : place + length]
        elif kind == 5:
            out[place:place] = rng.bytes(length)
        elif kind == 6:
            out[place:place] = piece
        else:
            out[place : place + 4] = int(rng.integers(2**16)).to_bytes(4, "big")
    return bytes(out)


def right_outside(rng):
    """Return a PNG whose checksums are right and whose header, rows or stream are not."""
    dtype, channels = rng.choice([np.uint8, np.uint16]), int(rng.choice(list(COLOURS)))
    levels = rng.integers(0, np.iinfo(dtype).max + 1, (int(rng.integers(1, 9)), int(rng.integers(1, 9)), channels))
    levels = levels.astype(dtype)
    rows = rows_of(levels, tuple(rng.integers(0, 5, 3)))
    height, width, bits, colour = *levels.shape[:2], 8 * levels.dtype.itemsize, COLOURS[channels]
    kind = rng.integers(5)
    if kind == 0:
        rows = damaged(rows, rng)
    if kind == 1:
        height, width = (int(side) for side in rng.integers(1, 12, 2))
    if kind == 2:
        bits, colour = int(rng.choice([1, 2, 4, 8, 16])), int(rng.choice([0, 2, 3, 4, 6]))
    head = header(width, height, bits, colour, interlaced=bool(rng.integers(2)))
    palette = chunk(b"PLTE", rng.bytes(3 * int(rng.integers(1, 257)))) if colour == 3 else b""
    extra = chunk(rng.choice([b"tRNS", b"eXIf", b"iCCP", b"tEXt", b"acTL"]), rng.bytes(int(rng.integers(0, 30))))
    data = container(head, rows, palette + (extra if rng.integers(2) else b""))
    if kind == 3:
        stream = zlib.compress(rows)
        data = data.replace(chunk(b"IDAT", stream), chunk(b"IDAT", damaged(stream, rng)))
    return data


# --- readers ----------------------------------------------------------------------------------------------------------


def as_shard(path):
    entry = make_shards.Entry(path.name, path, 0, path.stat().st_size)
    made = make_shards.make_image(make_shards.Settings(size=8), (0, entry))
    if made.broken:
        raise ValueError(f"{path}: {made.broken}")


def every_image(folder):
    index = read_index(folder)
    reader = ShardReader(index, 3)
    for shard, entry in enumerate(index.shards):
        for number in range(entry.images):
            reader.load(shard, number)


PICTURE_READERS = [
    read_image,
    lambda path: decode_image(path.read_bytes(), path, 1),
    pixel_format,
    image_size,
    MaskFile,
    KernelFile,
    as_shard,
    lambda path: Jpeg().read_observation(path, 3, "cpu"),
]
ARRAY_READERS = [
    read_image,
    pixel_format,
    image_size,
    MaskFile,
    KernelFile,
    lambda path: DeepinvOperator("Inpainting", {"mask": str(path)}),
]


def save_sampler(folder):
    tiny = importlib.import_module("tiny")
    prior = tiny.adapted(Prior.from_pretrained(tiny.save_tiny_prior(folder / "prior")))
    PosteriorSampler(tiny.tiny_network(prior)).save_pretrained(folder / "export")


OPENED = {
    "export": lambda folder: PosteriorSampler.from_pretrained(str(folder)),
    "prior": lambda folder: Prior.from_pretrained(str(folder)),
}


class Cases:
    """Files in a folder, damaged by number."""

    def __init__(self, folder):
        self.folder = folder
        source = folder / "images"
        source.mkdir()
        for number in range(3):
            (source / f"{number}.png").write_bytes(saved("PNG"))
        make_shards.make_shards(source, folder / "shards", make_shards.Settings(size=16), workers=1)
        self.shards = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
        self.masks = masks()
        save_sampler(folder)
        self.weights = {p: p.read_bytes() for top in OPENED for p in sorted((folder / top).iterdir()) if p.is_file()}

    def run(self, number):
        """Make a file and open it with each of its readers; yield how each ended."""
        rng = np.random.default_rng([19, number])
        kind = number % 9
        if kind < 5:
            name = str(rng.choice(list(PICTURES)))
            data = right_outside(rng) if kind < 2 else damaged(PICTURES[name], rng)
            yield from self.opened("a.png" if kind < 2 else name, data, PICTURE_READERS)
        elif kind == 5:
            name = str(rng.choice(list(ARRAYS)))
            yield from self.opened(name, damaged(ARRAYS[name], rng), ARRAY_READERS)
        elif kind == 6:
            yield from self.opened("masks.npz", damaged(self.masks, rng), [MaskCollection])
        elif kind == 7:
            path = list(self.weights)[rng.integers(len(self.weights))]
            path.write_bytes(damaged(self.weights[path], rng))
            yield ending(OPENED[path.parent.name], path.parent)
            path.write_bytes(self.weights[path])
        else:
            name = str(rng.choice(list(self.shards)))
            for other, data in self.shards.items():
                (self.folder / "shards" / other).write_bytes(data)
            (self.folder / "shards" / name).write_bytes(damaged(self.shards[name], rng))
            yield ending(every_image, self.folder / "shards")

    def opened(self, name, data, readers):
        path = self.folder / name
        path.write_bytes(data)
        yield from (ending(read, path) for read in readers)


def ending(read, path):
    """Return "read", "told", or what else happened."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for library in ("PIL", "diffusers", "peft"):  # of what they take all the same
                warnings.filterwarnings("ignore", module=library)
            read(path)
    except (ValueError, OSError) as error:
        text = str(error)
        right = "\n" not in text and str(path) in text and len(text) < 600
        return "told" if right else f"a message of another kind ({type(error).__name__}: {text[:300]})"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "read"


def main(first, count):
    ends = Counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder))
        for number in range(first, first + count):
            print(f"case {number}", flush=True)
            for end in cases.run(number):
                ends[end if end in ("read", "told") else "wrong"] += 1
                if end not in ("read", "told"):
                    print(f"case {number} ended in {end}", flush=True)
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
