"""Photographs: exact splits, crops found again in the pictures, and batches of them."""

import socket
from collections import Counter

import numpy as np
import pytest
import torch
from finding_crops import places_of
from PIL import Image
from streams_of_data import equal

from ud2m.data import PhotoData
from ud2m.data import photos as photos_module
from ud2m.data.crops import RandomCrops, Tiles, downscale
from ud2m.data.image_store import MemoryImages
from ud2m.data.module import EvenSubset
from ud2m.data.photos import PHOTOS, Photo, load_photos

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
