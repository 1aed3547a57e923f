"""Pack a folder of photographs for the way to another machine: python benchmarks/gpu/pack.py FOLDER TARGET [--mib 30].

All training images become WebP files of the highest quality that fits; of the validation and test images a few are
copied as they are, since scores must not depend on this. With the repository and the wheels beside it the whole stays
below 60 MiB, whatever ``--mib`` says.
"""

import argparse
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ud2m.data.folder import SPLITS, files_of
from ud2m.data.module import evenly_spaced
from ud2m.files import atomic_folder
from ud2m.images import read_image

REPOSITORY = Path(__file__).resolve().parents[2]
WHEELS = Path(__file__).parent / "wheels"
MIB = 2**20
WHOLE = 60 * MIB
"""Of repository, wheels and photographs."""
HELD_OUT = 12
"""Validation images, and test images."""
SAMPLE = 40
"""Training images that the quality is found with."""
QUALITIES = range(40, 101)
MARGIN = 0.98
"""Share of the room that the sample's mean may fill."""


def repository_bytes() -> int:
    """Return the size of the files that git knows or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout.split("\0")
    return sum((REPOSITORY / name).stat().st_size for name in names if name and (REPOSITORY / name).is_file())


def room(asked: int) -> int:
    """Return the bytes that photographs may take, at most ``asked``."""
    wheels = sum(path.stat().st_size for path in WHEELS.rglob("*") if path.is_file())
    return min(asked, WHOLE - repository_bytes() - wheels)


def webp(path: Path, quality: int) -> bytes:
    """Return an image as WebP, upright and in colour."""
    levels = read_image(path, 3).mul(255).round().byte().permute(1, 2, 0)
    with io.BytesIO() as file:
        Image.fromarray(levels.numpy()).save(file, "WEBP", quality=quality, method=4)
        return file.getvalue()


def best_quality(paths: Sequence[Path], each: float) -> int:
    """Return the highest quality whose files have at most ``each`` bytes in the mean.

    Raises:
        ValueError: when there is none.
    """
    low, high = QUALITIES.start - 1, QUALITIES.stop - 1  # the highest that fits lies in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        size = sum(len(webp(path, middle)) for path in paths) / len(paths)
        low, high = (middle, high) if size <= each else (low, middle - 1)
    if low < QUALITIES.start:
        raise ValueError(f"{each:.0f} bytes are too few for a photograph; give more room, or fewer photographs")
    return low


def pack(root: Path, target: Path, asked: int) -> int:
    """Write the photographs and return the quality of the training images."""
    files = {split: files_of(root, split) for split in SPLITS}
    for split in ("val", "test"):
        files[split] = [files[split][k] for k in evenly_spaced(len(files[split]), HELD_OUT)]
    kept = [(split, name) for split in ("val", "test") for name in files[split]]
    left = MARGIN * room(asked) - sum((root / name).stat().st_size for _, name in kept)
    train = files["train"]
    sample = [root / train[k] for k in evenly_spaced(len(train), SAMPLE)]
    quality = best_quality(sample, left / len(train))
    with atomic_folder(target, overwrite=True) as partial:
        for split in SPLITS:
            (partial / split).mkdir()
        for split, name in kept:
            shutil.copy(root / name, partial / split / flat(name))
        for name in train:
            (partial / "train" / f"{flat(name)}.webp").write_bytes(webp(root / name, quality))
    return quality


def flat(name: str) -> str:
    """Return the name of a file in a folder without subfolders, where names must still differ."""
    return name.replace("/", "_")


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, as for data=folder")
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=float, default=30.0, help="room for them")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack."""
    options = parser().parse_args(arguments)
    quality = pack(options.folder, options.target, int(options.mib * MIB))
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target}: {size / MIB:.1f} MiB, training images as WebP of quality {quality}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
