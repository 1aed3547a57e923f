"""How fast images reach a training at 256x256, in images per second and loader process: shards and a folder of files.

    python benchmarks/loading.py [--store]
    python benchmarks/loading.py --shards shards/imagenet256/train --folder images/train --workers 4 --batches 100

Without folders of your own, JPEG files of 500x375 pixels are cut out of the photographs of ``data=photos``, and shards
are made of them. Both readers cut crops of 256x256; the shards hold images that were brought to that size before.
"""

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from results import store
from ud2m.data import FolderData, ImageDataModule, PhotoData, ShardData

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_prep"))
make_shards = importlib.import_module("make_shards")

SIZE = 256


def example(top: Path, count: int) -> tuple[Path, Path]:
    """Make a folder of JPEG files and the shards of them; return (shards, folder)."""
    crops = PhotoData(channels=3, crop_size=375, batch_size=1, samples_per_epoch=count, tile_size=32).train_set()
    folder = top / "images"
    folder.mkdir()
    for number in range(count):
        pixels = crops[number].mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((500, 375)).save(folder / f"{number:05d}.jpg", quality=92)
    make_shards.make_shards(folder, top / "shards", make_shards.Settings(SIZE, format="jpg", shard_mb=1.0), workers=1)
    return top / "shards", folder


def speed(data: ImageDataModule, batches: int) -> float:
    """Return images per second and loader process, after a first batch that starts the processes."""
    loader = iter(data.train_dataloader())
    next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batches * data.batch_size / (time.perf_counter() - start) / max(1, data.num_workers)


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder of shards")
    parser.add_argument("--folder", type=Path, help="folder of images, with subfolders")
    parser.add_argument("--images", type=int, default=256, help="images of the example")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=30, help="batches that are timed")
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--store", action="store_true", help="write docs/results/loading.json, of the example")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both readers and print one line for each."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    config = {name: getattr(options, name) for name in ("images", "batch_size", "batches", "workers")}
    rows = []
    with tempfile.TemporaryDirectory() as work:
        if options.shards is None or options.folder is None:
            options.shards, options.folder = example(Path(work), options.images)
        common = {"channels": 3, "crop_size": SIZE, "batch_size": options.batch_size, "num_workers": options.workers}
        common |= {"samples_per_epoch": options.batch_size * (options.batches + 1), "scales": [1.0]}
        common |= {"probabilities": [1.0]}
        readers = {
            "shards": ShardData(options.shards, options.shards, **common),
            "folder": FolderData(options.folder, cache_mb=0, **common),
        }
        for name, data in readers.items():
            rows.append({"method": name, "images per second and process": f"{speed(data, options.batches):.0f}"})
            print(rows[-1])
    if options.store:
        print(store("loading", "python benchmarks/loading.py --store", config, rows))


if __name__ == "__main__":
    main()
