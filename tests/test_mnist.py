"""``data=mnist``: splits, pixels, and clear errors."""

import struct
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import MNIST

from ud2m.data import MnistData


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
