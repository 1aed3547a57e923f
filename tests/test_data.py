"""The data module: a stream in which nothing repeats, and batches that survive workers, ranks and resumes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from omegaconf import OmegaConf
from streams_of_data import INTERRUPTIONS, RankRecorder, equal, fit, two_processes
from torch.utils.data import DataLoader

import ud2m.cli  # noqa: F401  registers the resolvers that the configurations use
from ud2m.data import ImageDataModule
from ud2m.data.crops import RandomCrops, Tiles
from ud2m.data.image_store import MemoryImages
from ud2m.data.sampler import StreamSampler

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")  # advice about loaders and callbacks

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


@pytest.mark.slow
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


def test_crops_without_an_end_need_an_epoch():
    with pytest.raises(ValueError, match="samples_per_epoch must be a number"):
        ToyData(samples_per_epoch=None).train_dataloader()


def test_evaluation_loader_keeps_the_order():
    data = ToyData(val_limit=7, num_workers=2)
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    assert torch.equal(torch.cat(list(loader)), torch.stack([data.evaluation_set("val")[k] for k in range(7)]))


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
