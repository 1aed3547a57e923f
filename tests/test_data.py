"""Data sets: exact splits, crops found again in the pictures, and batches that survive workers, ranks and resumes."""

import socket
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from omegaconf import OmegaConf
from PIL import Image
from streams_of_data import INTERRUPTIONS, RankRecorder, equal, fit, two_processes
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST

import ud2m.cli  # noqa: F401  registers the resolvers that the configurations use
from ud2m.data import FolderData, ImageDataModule, MnistData, PhotoData
from ud2m.data import photos as photos_module
from ud2m.data.crops import RandomCrops, Tiles, downscale
from ud2m.data.folder import files_of, image_size
from ud2m.data.image_store import MemoryImages
from ud2m.data.module import EvenSubset
from ud2m.data.photos import PHOTOS, Photo, load_photos
from ud2m.data.sampler import StreamSampler

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")  # advice about loaders and callbacks

# ---------------------------------------------------------------------------------------------- photographs


@pytest.fixture(scope="module")
def photographs():
    return {split: load_photos(split) for split in ("train", "val", "test")}


def test_split_is_the_one_asked_for(photographs):
    assert set(photographs["test"]) == {"chelsea", "coffee"}
    assert set(photographs["val"]) == {"china"}
    assert set(photographs["train"]) == {
        *("astronaut", "motorcycle_left", "motorcycle_right", "rocket", "flower", "grace_hopper"),
        *("hubble", "retina", "ihc"),
    }


def test_photographs_have_the_sizes_of_the_list_and_no_pixels_in_common(photographs):
    sizes = {name: tuple(image.shape) for split in photographs.values() for name, image in split.items()}
    assert sizes == {  # width x height in the list of photographs
        "astronaut": (3, 512, 512),
        "motorcycle_left": (3, 500, 741),
        "motorcycle_right": (3, 500, 741),
        "rocket": (3, 427, 640),
        "flower": (3, 427, 640),
        "grace_hopper": (3, 600, 512),
        "hubble": (3, 872, 1000),
        "retina": (3, 1411, 1411),
        "ihc": (3, 512, 512),
        "china": (3, 427, 640),
        "chelsea": (3, 300, 451),
        "coffee": (3, 400, 600),
    }
    fingerprints = [image.numpy().tobytes() for split in photographs.values() for image in split.values()]
    assert len(set(fingerprints)) == len(PHOTOS) == 12
    assert all(image.dtype == torch.uint8 for split in photographs.values() for image in split.values())


def test_photograph_is_that_of_the_package(photographs):
    import skimage.data

    assert np.array_equal(photographs["test"]["chelsea"].permute(1, 2, 0).numpy(), skimage.data.chelsea())


def test_photographs_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for split in ("train", "val", "test"):
        load_photos(split)


def test_missing_photograph_names_package_and_version(monkeypatch):
    def gone():
        raise OSError("no such file")

    monkeypatch.setattr(photos_module, "PHOTOS", (Photo("china", "scikit-learn", gone, "val", ""),))
    with pytest.raises(FileNotFoundError, match=r"china is missing from the installed scikit-learn.*1\.9"):
        load_photos("val")
    with pytest.raises(ValueError, match="'validation'"):
        load_photos("validation")


# ---------------------------------------------------------------------------------------------------- crops


def places_of(crop: np.ndarray, image: np.ndarray) -> list[tuple[int, int]]:
    """Find a crop [C, s, s] in an image [C, H, W], both uint8, by comparing four corners and then everything."""
    side = crop.shape[1]
    height, width = image.shape[1] - side + 1, image.shape[2] - side + 1
    alike = np.ones((height, width), dtype=bool)
    for row in (0, side - 1):
        for column in (0, side - 1):
            window = image[:, row : row + height, column : column + width]
            alike &= (window == crop[:, row, column, None, None]).all(0)
    return [(y, x) for y, x in np.argwhere(alike) if np.array_equal(image[:, y : y + side, x : x + side], crop)]


def test_crops_are_pieces_of_the_photographs(photographs):
    images = {name: image.numpy() for name, image in photographs["test"].items()}
    crops = RandomCrops(MemoryImages(photographs["test"]), 32, scales=(1.0,), probabilities=(1.0,))
    kinds = Counter()
    for i in range(40):
        crop = crops[i]
        assert crop.dtype == torch.float32
        pixels = (crop * 255).round().to(torch.uint8).numpy()
        assert np.array_equal(pixels.astype(np.float32) / 255, crop.numpy())
        found = [
            (name, flipped)
            for name, image in images.items()
            for flipped in (False, True)
            if places_of(pixels[:, :, ::-1] if flipped else pixels, image)
        ]
        assert len(found) == 1
        kinds[found[0]] += 1
    assert len(kinds) == 4  # both photographs, flipped and not


def test_levels_are_antialiased_reductions(photographs):
    image = photographs["test"]["chelsea"]
    level = downscale(image.float() / 255, 0.5)
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    oracle = np.asarray(whole.resize((level.shape[2], level.shape[1]), Image.Resampling.BICUBIC))
    assert np.abs(level.permute(1, 2, 0).numpy() * 255 - oracle).max() < 1.5  # Pillow rounds twice
    assert level.shape == (3, 150, 226)
    assert level.min() >= 0
    assert level.max() <= 1


def test_crops_follow_weights_and_probabilities():
    dark, light = torch.zeros(1, 40, 40, dtype=torch.uint8), torch.full((1, 40, 40), 255, dtype=torch.uint8)
    crops = RandomCrops(MemoryImages({"dark": dark, "light": light}), 8, weights=(1, 3))
    share = np.mean([crops[i].mean().item() for i in range(2000)])
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5

    ramp = torch.arange(40, dtype=torch.uint8).expand(1, 40, 40).contiguous()  # steeper in smaller levels
    crops = RandomCrops(MemoryImages({"ramp": ramp}), 8, scales=(1.0, 0.5), probabilities=(0.7, 0.3))
    steps = np.array([255 * (crops[i][0, 0, 4] - crops[i][0, 0, 3]).item() for i in range(2000)])
    assert abs(np.mean(np.abs(steps) < 1.5) - 0.7) < 4 * (0.7 * 0.3 / 2000) ** 0.5
    assert abs(np.mean(steps < 0) - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_crops_reach_every_place_and_never_stand_on_their_head():
    image = torch.arange(81, dtype=torch.uint8).view(1, 9, 9)
    crops = RandomCrops(MemoryImages({"image": image}), 8)
    seen = Counter(
        (round(255 * crop[0, 0, 0].item()), round(255 * crop[0, 7, 0].item()))
        for crop in map(crops.__getitem__, range(800))
    )
    corners = [(top * 9 + left, top * 9 + left + 63) for top in (0, 1) for left in (0, 1, 7, 8)]
    assert set(seen) == set(corners)
    assert min(seen.values()) > 100 - 4 * 10


def test_levels_without_room_are_skipped():
    image = torch.randint(0, 256, (3, 33, 50), dtype=torch.uint8)
    crops = RandomCrops(MemoryImages({"image": image}), 32)
    for i in range(20):
        pixels = (crops[i] * 255).round().to(torch.uint8).numpy()
        assert places_of(pixels, image.numpy()) or places_of(pixels[:, :, ::-1], image.numpy())


def test_an_item_depends_on_seed_and_number_alone():
    images = MemoryImages({"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)})
    one, same, other = RandomCrops(images, 8, seed=3), RandomCrops(images, 8, seed=3), RandomCrops(images, 8, seed=4)
    forward = [one[i] for i in range(50)]
    backward = [same[i] for i in reversed(range(50))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not any(torch.equal(forward[i], other[i]) for i in range(50))
    assert len({crop.numpy().tobytes() for crop in forward}) > 45


def test_a_crop_does_not_share_memory_with_the_image():
    crops = RandomCrops(MemoryImages({"image": torch.zeros(1, 8, 8, dtype=torch.uint8)}), 8)
    for i in range(4):
        assert crops[i].add_(1).min() == 1


def test_a_small_cache_changes_nothing_but_memory():
    images = MemoryImages({str(k): torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for k in range(5)})
    all_kept, few_kept = RandomCrops(images, 8), RandomCrops(images, 8, cache_bytes=50_000)
    for i in range(60):
        assert torch.equal(all_kept[i], few_kept[i])
        assert few_kept.pyramid.kept_bytes == sum(v.nbytes for v in few_kept.pyramid.kept.values()) <= 50_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": 33}, r"32x40|40x32"),
        ({"crop_size": 0}, "at least 1 pixel.*got 0"),
        ({"crop_size": 8, "scales": (0.5,), "probabilities": (1.0,)}, r"contain 1\.0"),
        ({"crop_size": 8, "scales": (1.0, 2.0), "probabilities": (1.0, 1.0)}, r"\(0, 1\]"),
        ({"crop_size": 8, "scales": (1.0, 0.5), "probabilities": (1.0,)}, "one per scale"),
        ({"crop_size": 8, "scales": (1.0, 0.5), "probabilities": (1.0, 0.0)}, "must be positive"),
    ],
)
def test_impossible_crops_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomCrops(MemoryImages({"image": torch.zeros(3, 32, 40, dtype=torch.uint8)}), **settings)


def test_tiles_put_together_are_the_photograph(photographs):
    tiles = Tiles(MemoryImages({"chelsea": photographs["test"]["chelsea"]}), 32)
    rows, columns = 300 // 32, 451 // 32
    assert len(tiles) == rows * columns
    assert tiles.names[:2] + tiles.names[-1:] == ["chelsea-r0-c0", "chelsea-r0-c1", "chelsea-r8-c13"]
    whole = torch.cat([torch.cat([tiles[r * columns + c] for c in range(columns)], 2) for r in range(rows)], 1)
    assert torch.equal(whole, photographs["test"]["chelsea"][:, : rows * 32, : columns * 32] / 255)


def test_even_subset_spreads_over_the_set():
    tiles = Tiles(MemoryImages({"image": torch.arange(100, dtype=torch.uint8).view(1, 10, 10)}), 1)
    subset = EvenSubset(tiles, 4)
    assert [round(255 * subset[k].item()) for k in range(len(subset))] == [0, 25, 50, 75]
    assert subset.names == ["image-r0-c0", "image-r2-c5", "image-r5-c0", "image-r7-c5"]
    assert len(EvenSubset(tiles, None)) == len(EvenSubset(tiles, 1000)) == 100
    with pytest.raises(ValueError, match="got 0"):
        EvenSubset(tiles, 0)


# -------------------------------------------------------------------------------------------------- sampler


def epochs_of(sampler: StreamSampler, count: int) -> list[int]:
    items = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        items += list(sampler)
    return items


def test_nothing_comes_twice_before_everything_came_once():
    items = epochs_of(StreamSampler(8, 4, seed=1, size=10), 5)  # 40 positions: 4 permutations, across epochs
    turns = [items[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(turn) == list(range(10)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 4
    assert items != epochs_of(StreamSampler(8, 4, seed=2, size=10), 5)


def test_endless_epochs_do_not_repeat_and_drop_the_incomplete_batch():
    assert epochs_of(StreamSampler(11, 4), 3) == list(range(24))


@pytest.mark.parametrize("size", [None, 30])
def test_ranks_together_see_the_batches_of_one_process(size):
    single = np.reshape(epochs_of(StreamSampler(12, 6, 5, size), 4), (-1, 6))
    ranks = [np.reshape(epochs_of(StreamSampler(12, 6, 5, size, rank, 3), 4), (-1, 2)) for rank in range(3)]
    assert [len(StreamSampler(12, 6, 5, size, rank, 3)) for rank in range(3)] == [4, 4, 4]
    assert np.array_equal(np.sort(np.concatenate(ranks, 1), 1), np.sort(single, 1))


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match=r"all processes \(3\).*got 8"):
        StreamSampler(12, 8, world_size=3)
    with pytest.raises(ValueError, match="12 samples holds no batch of 16"):
        StreamSampler(12, 16)


# ---------------------------------------------------------------------- the data module under a real trainer


class ToyData(ImageDataModule):
    """Crops of one random picture: 4 batches of 4 in an epoch."""

    def __init__(self, **settings):
        super().__init__(**{"channels": 3, "crop_size": 8, "batch_size": 4, "samples_per_epoch": 18} | settings)
        pixels = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(1))
        self.images = MemoryImages({"image": pixels.to(torch.uint8)})

    def train_set(self):
        return RandomCrops(self.images, self.crop_size, self.seed)

    def all_images(self, split):
        return Tiles(self.images, self.tile_size)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    batches = fit(tmp_path_factory.mktemp("unbroken"), ToyData())
    assert len({batch.numpy().tobytes() for batch in batches}) == len(batches) == 12
    return batches


# (how the checkpoint is made, after how many batches the one resumed from was made)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_resumed_run_sees_the_batches_of_the_unbroken_one(tmp_path, unbroken, interruption, num_workers):
    how, settings, done = INTERRUPTIONS[interruption]
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **how)
    seen = fit(tmp_path, ToyData(num_workers=num_workers), saver, **settings)
    assert equal(seen, unbroken)
    resume = tmp_path / f"step={done}.ckpt"
    rest = fit(tmp_path, ToyData(num_workers=num_workers), resume=resume, **settings)
    assert equal(rest, unbroken[done:])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fail_at", [6, 7])
def test_run_goes_on_after_a_crash(tmp_path, unbroken, fail_at, num_workers):
    seen = fit(tmp_path, ToyData(num_workers=num_workers), OnExceptionCheckpoint(tmp_path), fail_at=fail_at)
    rest = fit(tmp_path, ToyData(num_workers=num_workers), resume=tmp_path / "on_exception.ckpt")
    assert equal(seen + rest, unbroken)


def test_resume_with_other_settings_is_refused(tmp_path):
    fit(tmp_path, ToyData(), ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1))
    resume = tmp_path / "step=6.ckpt"
    with pytest.raises(ValueError, match="seed 0, now 1; batch_size 4, now 2"):
        fit(tmp_path, ToyData(seed=1, batch_size=2), resume=resume)


def test_resume_that_lightning_miscounts_is_refused(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_on_train_epoch_end=True)
    fit(tmp_path, ToyData(), saver, max_epochs=1)
    with pytest.raises(ValueError, match="use max_epochs"):
        fit(tmp_path, ToyData(), resume=tmp_path / "step=4.ckpt", max_epochs=-1, max_steps=12)


@pytest.mark.slow
def test_two_processes_share_the_batches_of_one(tmp_path, unbroken):
    trainer = two_processes(tmp_path)
    trainer.fit(RankRecorder(), ToyData(num_workers=1))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    together = [torch.stack(pair, 1).flatten(0, 1) for pair in zip(*ranks, strict=True)]
    assert equal(together, unbroken)


# ------------------------------------------------------------------------------------------- data=photos


def test_photo_batches_are_the_same_with_workers_and_leave_global_randomness_alone():
    settings = {"channels": 3, "crop_size": 32, "batch_size": 4, "samples_per_epoch": 12, "seed": 7}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    alone = list(PhotoData(**settings, num_workers=0).train_dataloader())
    helped = list(PhotoData(**settings, num_workers=2).train_dataloader())
    other = list(PhotoData(**settings | {"seed": 8}).train_dataloader())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert equal(alone, helped)
    assert len(alone) == 3
    assert not any(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    assert all(batch.shape == (4, 3, 32, 32) and batch.min() >= 0 and batch.max() <= 1 for batch in alone)


def test_photo_weights_are_shares_of_scenes():
    data = PhotoData(channels=3, crop_size=32, batch_size=4, samples_per_epoch=4)
    crops = data.train_set()
    shares = Counter()
    for (image, scale), mass in zip(crops.choices, np.diff(crops.cumulative, prepend=0.0), strict=True):
        shares[crops.pyramid.images.names[image]] += mass
        shares[scale] += mass
    unit = 1 / 5.75  # astronaut, the motorcycle, rocket, flower, grace_hopper and three quarters
    assert shares["astronaut"] == pytest.approx(unit)
    assert shares["motorcycle_left"] == pytest.approx(unit / 2)
    assert shares["retina"] == pytest.approx(unit / 4)
    assert shares[1.0] == pytest.approx(0.5)


def test_photo_evaluation_sets_are_limited_and_named():
    data = PhotoData(channels=3, crop_size=32, batch_size=8, tile_size=128, val_limit=6)
    assert data.evaluation_set("test").names[:4] == [f"chelsea-r0-c{c}" for c in range(3)] + ["chelsea-r1-c0"]
    assert len(data.evaluation_set("test")) == 2 * 3 + 3 * 4
    assert [len(batch) for batch in data.val_dataloader()] == [6]
    assert [tuple(batch.shape) for batch in data.test_dataloader()] == [(8, 3, 128, 128)] * 2 + [(2, 3, 128, 128)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 1}, "channels must be 3, got 1"),
        ({"channels": 4}, "channels must be 1 .* got 4"),
        ({"seed": -1}, "got -1"),
        ({"num_workers": -2}, "got -2"),
    ],
)
def test_bad_numbers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PhotoData(**{"channels": 3, "crop_size": 32, "batch_size": 4, "samples_per_epoch": 4} | settings)


def test_crops_without_an_end_need_an_epoch():
    with pytest.raises(ValueError, match="samples_per_epoch must be a number"):
        ToyData(samples_per_epoch=None).train_dataloader()


# -------------------------------------------------------------------------------------------- data=mnist


def read_idx(path: Path) -> np.ndarray:
    raw = path.read_bytes()
    count, height, width = struct.unpack(">III", raw[4:16])
    return np.frombuffer(raw, np.uint8, offset=16).reshape(count, height, width)


def mnist(root, **settings):
    return MnistData(root, **{"channels": 1, "crop_size": 32, "batch_size": 100} | settings)


def test_mnist_splits_and_pixels(shared):
    root = shared / "data" / "mnist"
    digits = read_idx(root / "MNIST" / "raw" / "train-images-idx3-ubyte")
    tests = read_idx(root / "MNIST" / "raw" / "t10k-images-idx3-ubyte")
    data = mnist(root)
    train, val, test = data.train_set(), data.evaluation_set("val"), data.evaluation_set("test")
    assert (len(train), len(val), len(test)) == (59000, 1000, 10000)
    pairs = [(train[5], digits[5]), (train[58999], digits[58999]), (val[0], digits[59000]), (test[7], tests[7])]
    for image, digit in pairs:
        assert image.shape == (1, 32, 32)
        assert np.array_equal(image[0].numpy(), np.pad(digit, 2).astype(np.float32) / 255)
    assert val.names[0] == "val-00000"


def test_mnist_epoch_is_a_permutation(shared):
    data = mnist(shared / "data" / "mnist")
    dataset = data.train_set()
    sampler = data.train_sampler(dataset)
    assert sorted(sampler) == list(range(59000))
    assert next(iter(data.train_dataloader())).shape == (100, 1, 32, 32)


def test_mnist_that_cannot_be_had_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded.*put train-images-idx3-ubyte") as caught:
        mnist(tmp_path).prepare_data()
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_mnist_is_reported(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(struct.pack(">IIII", 0x803, 10, 28, 28) + bytes(100))
    with pytest.raises(ValueError, match="damaged"):
        mnist(tmp_path).train_set()


@pytest.mark.parametrize("settings", [{"channels": 3}, {"crop_size": 27}, {"crop_size": 33}, {"tile_size": 64}])
def test_mnist_refuses_what_digits_cannot_be(tmp_path, settings):
    with pytest.raises(ValueError, match=r"grey|padded"):
        mnist(tmp_path, **settings)


# ------------------------------------------------------------------------------------------- data=folder


def folder(root, **settings):
    return FolderData(root, **{"channels": 3, "crop_size": 16, "batch_size": 2, "samples_per_epoch": 4} | settings)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_folder_splits_every_file_once_and_for_good(tmp_path):
    for k in range(150):
        (tmp_path / f"deep/{k % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"deep/{k % 7}/{k}.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    before = {split: set(files_of(tmp_path, split)) for split in ("train", "val", "test")}
    assert set.union(*before.values()) == {f"deep/{k % 7}/{k}.png" for k in range(150)}
    assert sum(map(len, before.values())) == 150
    assert all(4 <= len(before[split]) <= 30 for split in ("val", "test"))
    for k in range(30):
        (tmp_path / f"new{k}.png").touch()
    after = {split: set(files_of(tmp_path, split)) for split in ("train", "val", "test")}
    assert all(before[split] <= after[split] for split in before)


def test_small_folder_has_all_splits(tmp_path):
    for k in range(3):
        save(tmp_path / f"{k}.png", noise(20, 20, 3))
    assert [len(files_of(tmp_path, split)) for split in ("train", "val", "test")] == [1, 1, 1]


def test_folder_uses_subfolders_named_like_splits(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "cats" / "a.png", noise(20, 20, 3))
    assert files_of(tmp_path, "train") == ["train/cats/a.png"]
    assert files_of(tmp_path, "val") == ["val/cats/a.png"]
    with pytest.raises(FileNotFoundError, match="test"):
        files_of(tmp_path, "test")


def test_folder_gives_crops_and_tiles_of_its_files(tmp_path):
    picture = noise(40, 33, 3)
    for split in ("train", "val", "test"):
        save(tmp_path / split / "a.png", picture)
    data = folder(tmp_path, scales=(1.0,), probabilities=(1.0,))
    planes = picture.transpose(2, 0, 1)
    for batch in data.train_dataloader():
        for crop in (batch * 255).round().to(torch.uint8).numpy():
            assert places_of(crop, planes) or places_of(crop[:, :, ::-1], planes)
    tiles = data.evaluation_set("test")
    assert tiles.names == [f"test/a.png-r{r}-c{c}" for r in (0, 1) for c in (0, 1)]
    assert np.array_equal((tiles[3] * 255).round().numpy(), planes[:, 16:32, 16:32])


def test_folder_converts_between_grey_and_colour(tmp_path):
    save(tmp_path / "train" / "colour.png", noise(16, 16, 3))
    save(tmp_path / "val" / "grey.png", noise(16, 16))
    grey = folder(tmp_path, channels=1).train_set()[0]
    luma = noise(16, 16, 3) @ np.array([0.299, 0.587, 0.114]) / 255
    assert min(np.abs(grey[0].numpy() - oracle).max() for oracle in (luma, luma[:, ::-1])) < 1e-6
    colour = folder(tmp_path).evaluation_set("val")[0]
    assert np.array_equal(colour.numpy(), np.stack([noise(16, 16)] * 3).astype(np.float32) / 255)


def test_folder_turns_pictures_upright(tmp_path):
    lying = np.zeros((16, 48, 3), np.uint8)
    lying[:, :16] = 255  # white on the left; orientation 6 turns left to top
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "train").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(lying).save(tmp_path / "train" / name, exif=exif)
        assert image_size(tmp_path / "train" / name) == (48, 16)
    crops = folder(tmp_path).train_set()
    for image in (0, 1):
        rows = crops.pyramid.level(image, 1.0).mean((0, 2))
        assert rows[:14].min() > 0.9
        assert rows[18:].max() < 0.1


def test_sixteen_bits_are_neither_clipped_nor_rounded(tmp_path):
    deep = (np.arange(16 * 16, dtype=np.uint16) * 257 - 100 * (np.arange(256) == 200)).reshape(16, 16).astype(np.uint16)
    save(tmp_path / "val" / "deep.png", deep)
    image = folder(tmp_path, channels=1).evaluation_set("val")[0]
    assert np.abs(image[0].numpy() - deep / 65535).max() < 1e-6


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        folder(tmp_path / "nowhere").train_set()
    with pytest.raises(NotADirectoryError, match="is a file"):
        folder(save(tmp_path / "one.png", noise(20, 20, 3))).train_set()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image below"):
        folder(tmp_path / "empty").train_set()
    with pytest.raises(ValueError, match="at least 3"):
        folder(tmp_path).train_set()

    for k, (height, width) in enumerate([(20, 20), (15, 30), (30, 8)]):
        save(tmp_path / "small" / "train" / f"{k}.png", noise(height, width, 3))
    with pytest.raises(ValueError, match=r"16x16 pixels \(2\): train/1.png \(30x15\), train/2.png \(8x30\)"):
        folder(tmp_path / "small").train_set()

    save(tmp_path / "text" / "train" / "good.png", noise(20, 20, 3))
    (tmp_path / "text" / "train" / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"bad\.png is not an image that can be read"):
        folder(tmp_path / "text").train_set()

    whole = save(tmp_path / "cut" / "train" / "cut.png", noise(64, 64, 3))
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.png"):
        folder(tmp_path / "cut").train_set()[0]


# ------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("name", ["photos", "mnist", "folder"])
def test_configuration_builds_its_data_module(name, tmp_path):
    config = OmegaConf.create({"seed": 5, "validate_every": 10, "accumulate": 2})
    config.data = OmegaConf.load(Path(__file__).parents[1] / "conf" / "data" / f"{name}.yaml")
    if name != "photos":
        config.data.root = str(tmp_path)
    data = instantiate(config.data)
    assert isinstance(data, ImageDataModule)
    assert data.seed == 5
    assert data.samples_per_epoch == 10 * 2 * data.batch_size  # hence one validation per epoch
    assert data.crop_size == config.data.crop_size == 32
    assert data.channels == config.data.channels


def test_evaluation_loader_keeps_the_order():
    data = ToyData(val_limit=7, num_workers=2)
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    assert torch.equal(torch.cat(list(loader)), torch.stack([data.evaluation_set("val")[k] for k in range(7)]))
