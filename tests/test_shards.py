"""``data=webdataset``: every image once per pass over ranks and workers, crops as ever, exact resumes, clear errors."""

import importlib
import io
import json
import sys
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from streams_of_data import INTERRUPTIONS, RankRecorder, equal, fit, two_processes
from tiny_training import composed
from torch.utils.data import DataLoader

from ud2m.data import ShardData
from ud2m.data.augmentation import Augmentation
from ud2m.data.crops import RandomCrops
from ud2m.data.image_store import MemoryImages
from ud2m.data.shard_index import read_index
from ud2m.data.shards import ShardCrops, ShardReader, ShardSampler, ShardStream, shuffled

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")  # advice about loaders and callbacks

COUNT, SIZE = 53, 12
ALL = {"scales": (1.0,), "probabilities": (1.0,), "channels": 3, "crop_size": SIZE}
READERS = [(rank, worker) for rank in (0, 1) for worker in (0, 1)]


def fill(folder, count, seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size + 5, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Training shards of 53 images, held-out shards of 9."""
    top = tmp_path_factory.mktemp("shards")
    settings = make_shards.Settings(size=SIZE, shard_mb=0.008)
    make_shards.make_shards(fill(top / "images", COUNT), top / "train", settings, workers=1)
    make_shards.make_shards(fill(top / "others", 9, seed=1), top / "held_out", settings, workers=1)
    return top


def listed(folder):
    """All images in the order of the shards, uint8 [C, H, W], read by tarfile and Pillow alone."""
    images = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            data = [tar.extractfile(member).read() for member in tar]
        images += [torch.from_numpy(np.array(Image.open(io.BytesIO(d)))).permute(2, 0, 1).contiguous() for d in data]
    return images


def data_of(folders, **settings):
    defaults = {"batch_size": 4, "samples_per_epoch": 18, "root": folders / "train", "held_out": folders / "held_out"}
    return ShardData(**{**ALL, **defaults, **settings})


def samplers(**settings):
    return [ShardSampler(24, 6, 3, workers=2, rank=rank, world_size=2, **settings) for rank in (0, 1)]


def positions(sampler, epochs):
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


# ------------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("buffer", [1, 5, 1000])
def test_ranks_and_workers_together_visit_every_position_once(buffer):
    """Epochs of 4 batches of 6; two ranks load 3 samples of each."""
    one, other = (positions(sampler, 3) for sampler in samplers(buffer=buffer))
    for epoch in range(3):
        assert len(one[epoch]) == len(other[epoch]) == 12 == len(samplers()[0])
        assert sorted(one[epoch] + other[epoch]) == list(range(24 * epoch, 24 * (epoch + 1)))


@pytest.mark.parametrize(("samples", "batch_size", "workers"), [(25, 4, 3), (7, 2, 4), (40, 8, 5)])
def test_batches_that_do_not_divide_over_workers(samples, batch_size, workers):
    ranks = [ShardSampler(samples, batch_size, 0, workers, 3, rank, 2) for rank in (0, 1)]
    found = positions(ranks[0], 2)[1] + positions(ranks[1], 2)[1]
    size = samples // batch_size * batch_size
    assert sorted(found) == list(range(size, 2 * size))


def test_every_image_comes_once_per_pass_over_2_ranks_and_2_workers(folders):
    index = read_index(folders / "train")
    crops = ShardCrops(ShardStream(index, 3), ShardReader(index, 3), SIZE, 3, (1.0,), (1.0,))
    expected = Counter(image.numpy().tobytes() for image in listed(folders / "train"))
    assert len(expected) == COUNT
    ranks = [ShardSampler(COUNT - 1, 4, 3, 2, 7, rank, 2) for rank in (0, 1)]  # epochs of 52 do not end with a pass
    visited = sorted(item for rank in ranks for epoch in positions(rank, 53) for item in epoch)
    assert visited == list(range(52 * 53))
    for turn in (0, 1, 7):
        seen = Counter()
        for place in range(turn * COUNT, (turn + 1) * COUNT):
            pixels = (crops[place] * 255).round().to(torch.uint8)
            kinds = [pixels.numpy().tobytes(), pixels.flip(2).contiguous().numpy().tobytes()]
            seen.update(kind for kind in kinds if kind in expected)
        assert seen == expected


def test_passes_visit_whole_shards_in_other_orders(folders):
    index = read_index(folders / "train")
    stream = ShardStream(index, 0)
    orders = []
    for turn in range(4):
        visits = [stream[turn * COUNT + place] for place in range(COUNT)]
        changes = [shard for k, (shard, _) in enumerate(visits) if k == 0 or visits[k - 1][0] != shard]
        assert sorted(changes) == list(range(len(index.shards)))  # each shard in one piece
        for shard, record in enumerate(index.shards):
            assert [number for s, number in visits if s == shard] == list(range(record.images))
        orders.append(tuple(changes))
    assert len(set(orders)) > 2
    assert [stream[p] for p in (100, 3, 100)] == [ShardStream(index, 0)[p] for p in (100, 3, 100)]
    assert [ShardStream(index, 1)[p] for p in range(COUNT)] != [stream[p] for p in range(COUNT)]


def test_readers_keep_to_shards_of_their_own(folders):
    """Pieces of neighbouring positions: of a pass over S shards, R readers open at most S + R - 1 in all."""
    index = read_index(folders / "train")
    stream = ShardStream(index, 0)
    ranks = [ShardSampler(COUNT - 1, 4, 0, 2, 7, rank, 2) for rank in (0, 1)]
    read = {reader: {stream[p][0] for p in ranks[reader[0]].piece(reader[1], 0)} for reader in READERS}
    assert sum(map(len, read.values())) <= len(index.shards) + len(READERS) - 1


def test_workers_load_their_own_pieces():
    """Of the batches of a rank, worker w gets numbers w, w + 2, ...: all of them lie in its piece."""
    for sampler in samplers():
        batches = np.reshape(positions(sampler, 2)[1], (4, 3))
        for worker in (0, 1):
            assert sorted(batches[worker::2].ravel()) == list(sampler.piece(worker, 1))


def test_shuffling_stays_within_the_buffer_and_mixes():
    items = list(shuffled(range(500), 50, np.random.default_rng(0)))
    assert sorted(items) == list(range(500))
    assert all(item <= place + 49 for place, item in enumerate(items))
    assert np.mean([abs(item - place) for place, item in enumerate(items)]) > 15
    assert list(shuffled(range(9), 1, np.random.default_rng(0))) == list(range(9))
    firsts = Counter(next(shuffled(range(9), 5, np.random.default_rng(seed))) for seed in range(1000))
    assert sorted(firsts) == list(range(5))
    assert min(firsts.values()) > 200 - 4 * (1000 * 0.2 * 0.8) ** 0.5


def test_order_is_that_of_seed_and_epoch():
    one, again = positions(samplers()[0], 3), positions(samplers()[0], 3)
    assert one == again
    relative = [tuple(np.array(epoch) - 24 * k) for k, epoch in enumerate(one)]
    assert len(set(relative)) == 3
    assert positions(ShardSampler(24, 6, 4, workers=2, world_size=2), 1)[0] != one[0]


@pytest.mark.parametrize("done", range(5))
def test_order_goes_on_from_any_batch(done):
    for rank, whole in enumerate(samplers(epoch=1)):
        rest = ShardSampler(24, 6, 3, workers=2, rank=rank, world_size=2, epoch=1, batches_done=done)
        assert list(rest) == list(whole)[3 * done :]
        rest.set_epoch(2)
        assert len(list(rest)) == 12


# ------------------------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize("candidates", [1, 3])
def test_crops_are_those_of_random_crops(folders, candidates):
    index = read_index(folders / "train")
    augmentation = Augmentation(turns=0.5, permutation=0.5, saturation=0.3, gamma=0.2)
    settings = {"scales": (1.0, 0.7), "probabilities": (0.6, 0.4), "candidates": candidates}
    crops = ShardCrops(ShardStream(index, 5), ShardReader(index, 3), 7, 5, augmentation=augmentation, **settings)
    images = listed(folders / "train")
    starts = np.cumsum([0] + [shard.images for shard in index.shards])
    for place in (0, 1, 17, 52, 53, 200):
        shard, number = crops.stream[place]
        store = MemoryImages({"image": images[starts[shard] + number]})
        assert torch.equal(crops[place], RandomCrops(store, 7, 5, augmentation=augmentation, **settings)[place])


def test_grey(folders):
    index = read_index(folders / "train")
    colour, grey = (ShardReader(index, channels).load(1, 2) for channels in (3, 1))
    assert torch.allclose(grey[0], 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2], atol=1e-6)


# ----------------------------------------------------------------------------------------------- data module


def test_validation_and_test_images_are_the_held_out_ones(folders):
    data = data_of(folders)
    images = listed(folders / "held_out")
    for split, start in (("val", 0), ("test", 1)):
        found = data.evaluation_set(split)
        expected = [image / 255 for image in images[start::2]]
        assert equal([found[k] for k in range(len(found))], expected)
        assert len(set(found.names)) == len(expected)
    assert not set(data.evaluation_set("val").names) & set(data.evaluation_set("test").names)
    assert len(data_of(folders, val_limit=2).evaluation_set("val")) == 2


def picked(folder, names):
    """The images of these names in their order, by tarfile and Pillow alone."""
    by_name = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                array = np.array(Image.open(io.BytesIO(tar.extractfile(member).read())))
                name = member.name.partition("-")[2].removesuffix(".png")
                by_name[name] = torch.from_numpy(array).permute(2, 0, 1) / 255
    return [by_name[name] for name in names]


def test_a_list_chooses_the_held_out_images(folders, tmp_path):
    held_out = folders / "held_out"
    (tmp_path / "test.txt").write_text("n01440764/7.JPEG 0\n\n2.png 65\nval/0 3\n")  # as lists of ImageNet are written
    (tmp_path / "val.txt").write_text("5\n3\n")
    both = data_of(folders, test_list=tmp_path / "test.txt", val_list=tmp_path / "val.txt")
    for split, names in (("test", "720"), ("val", "53")):
        found = both.evaluation_set(split)
        assert equal([found[k] for k in range(len(found))], picked(held_out, names))
    tested = data_of(folders, test_list=tmp_path / "test.txt")
    names = {name.split("-")[1] for name in tested.evaluation_set("val").names}
    plain = {name.split("-")[1] for name in data_of(folders).evaluation_set("val").names}
    assert names == plain - set("720")
    assert len(data_of(folders, test_list=tmp_path / "test.txt", test_limit=2).evaluation_set("test")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("1.png\n1.JPEG\n", "a name comes twice"),
        ("1\nother.png\n", "1 of its 2 names stand for no image or several: other"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(folders, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        data_of(folders, test_list=tmp_path / "list.txt").all_images("test")
    with pytest.raises(FileNotFoundError, match="there is no list of images"):
        data_of(folders, test_list=tmp_path / "nowhere.txt").all_images("test")


@pytest.fixture
def server(folders):
    """The address of a web server with the folders of shards, and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folders))

        def log_message(self, kind, *values):
            asked.append(values[0].split()[1])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def everywhere(data):
    loaded = list(data.train_dataloader())
    held_out = [data.all_images("test")[i] for i in range(len(data.all_images("test").names))]
    return loaded, held_out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_behind_an_address_are_those_of_the_folder(folders, server, tmp_path, num_workers):
    address, asked = server
    places = {"root": f"{address}/train", "held_out": f"{address}/held_out/", "cache": tmp_path / "cache"}
    settings = {"samples_per_epoch": None, "num_workers": num_workers}
    expected, found = everywhere(data_of(folders, **settings)), everywhere(data_of(folders, **settings, **places))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    before = len([path for path in asked if path.endswith(".tar")])
    again = everywhere(data_of(folders, **settings, **places))
    assert all(torch.equal(one, other) for one, other in zip(again[0], expected[0], strict=True))
    assert len([path for path in asked if path.endswith(".tar")]) == before > 0
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_shard_is_fetched_when_it_is_first_used(folders, server, tmp_path):
    address, asked = server
    data = data_of(folders, root=f"{address}/train", samples_per_epoch=4, cache=tmp_path)
    list(data.train_dataloader())
    assert 1 <= len([path for path in asked if path.endswith(".tar")]) <= 2 < len(data.train_index.shards)


def test_a_command_may_bring_the_shards(folders, tmp_path):
    data = data_of(folders, root=f"pipe:cat '{folders}/train/{{}}'", cache=tmp_path)
    expected = list(data_of(folders).train_dataloader())
    assert all(torch.equal(one, other) for one, other in zip(data.train_dataloader(), expected, strict=True))


def test_what_cannot_be_fetched_is_named(folders, server, tmp_path):
    address, _ = server
    with pytest.raises(OSError, match=r"cannot fetch http://127.*/nowhere/index\.json .*check the address"):
        data_of(folders, root=f"{address}/nowhere", cache=tmp_path).train_dataloader()
    with pytest.raises(OSError, match=r"cannot fetch pipe:false index\.json"):
        data_of(folders, root="pipe:false {}", cache=tmp_path).train_dataloader()
    with pytest.raises(OSError, match=r"cannot fetch ftp2://server/index\.json .*no such scheme"):
        data_of(folders, root="ftp2://server", cache=tmp_path).train_dataloader()
    with pytest.raises(ValueError, match="is no index of shards"):
        data_of(folders, root="pipe:echo '<html>' {}", cache=tmp_path).train_dataloader()


def test_a_shard_that_arrives_cut_is_not_kept(folders, copied, tmp_path):
    path = copied / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    data = data_of(folders, root=f"pipe:cat {copied}/{{}}", cache=tmp_path / "cache", samples_per_epoch=None)
    with pytest.raises(ValueError, match=r"shard-000001\.tar is wrong: its SHA-256 is not that of the index, after"):
        list(data.train_dataloader())
    assert not list((tmp_path / "cache").rglob("shard-000001*"))


def test_a_cached_shard_that_changed_is_found_on_request(folders, tmp_path):
    places = {"root": f"pipe:cat {folders}/train/{{}}", "cache": tmp_path, "samples_per_epoch": None}
    list(data_of(folders, **places).train_dataloader())
    (path,) = tmp_path.rglob("shard-000002.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"shard-000002\.tar is wrong: its SHA-256 is not that of the index; delete"):
        data_of(folders, **places, check_hashes=True).train_dataloader()


def test_images_that_are_not_square_are_tiled(folders, tmp_path):
    settings = make_shards.Settings(size=SIZE, crop="none")
    make_shards.make_shards(fill(tmp_path / "images", 4, size=2 * SIZE), tmp_path / "shards", settings, workers=1)
    tiles = data_of(folders, held_out=tmp_path / "shards", tile_size=7).all_images("val")
    assert tiles.pyramid.images.sizes == [(12, 14), (12, 14)]  # 24 x 29, halved to 12 x 14
    assert len(tiles) == 2 * 1 * 2


def test_one_epoch_by_default(folders):
    data = data_of(folders, samples_per_epoch=None)
    assert len(list(data.train_dataloader())) == COUNT // 4


def test_configuration(folders, tmp_path):
    overrides = ["data=webdataset", f"data.root={folders / 'train'}", f"data.held_out={folders / 'held_out'}"]
    with composed(*overrides, "data.crop_size=8", f"run_dir={tmp_path}", folder=tmp_path) as config:
        data = instantiate(config.data, _convert_="all")
    assert isinstance(data, ShardData)
    assert next(iter(data.train_dataloader())).shape == (data.batch_size, 3, 8, 8)


# -------------------------------------------------------------------------------------- under a real trainer


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("interruption", ["within an epoch", "at a validation in the middle", "after an epoch"])
def test_resumed_run_sees_the_batches_of_the_unbroken_one(folders, tmp_path, interruption, num_workers):
    how, settings, done = INTERRUPTIONS[interruption]
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **how)
    whole = fit(tmp_path, data_of(folders, num_workers=num_workers), saver, **settings)
    assert len({batch.numpy().tobytes() for batch in whole}) == 12
    resume = tmp_path / f"step={done}.ckpt"
    assert equal(fit(tmp_path, data_of(folders, num_workers=num_workers), resume=resume, **settings), whole[done:])


@pytest.mark.slow
def test_other_readers_may_go_on_only_after_an_epoch(folders, tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
    fit(tmp_path, data_of(folders), saver)
    with pytest.raises(ValueError, match="1 ranks x 1 workers, now 1 ranks x 2 workers; buffer 1000, now 9"):
        fit(tmp_path, data_of(folders, num_workers=2, buffer=9), resume=tmp_path / "step=6.ckpt")
    saver = ModelCheckpoint(dirpath=tmp_path / "ends", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(tmp_path, data_of(folders, num_workers=1), saver)
    rest = fit(tmp_path, data_of(folders, num_workers=2), resume=tmp_path / "ends" / "step=8.ckpt")
    crops = [Counter(crop.numpy().tobytes() for batch in part for crop in batch) for part in (whole[8:], rest)]
    assert crops[0] == crops[1]  # in another order


def test_other_shards_may_not_go_on(folders, tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(tmp_path, data_of(folders), saver)
    other = data_of(folders, root=folders / "held_out")
    with pytest.raises(ValueError, match=r"made with shards [0-9a-f]{64}, now [0-9a-f]{64}"):
        fit(tmp_path, other, resume=tmp_path / "step=4.ckpt")


@pytest.mark.slow
def test_two_processes_with_two_workers_see_every_sample_once(folders, tmp_path):
    trainer = two_processes(tmp_path)
    trainer.fit(RankRecorder(), data_of(folders, num_workers=2))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    crops = data_of(folders).train_set()
    for epoch in range(3):
        found = Counter(c.numpy().tobytes() for rank in ranks for b in rank[4 * epoch : 4 * epoch + 4] for c in b)
        assert found == Counter(crops[p].numpy().tobytes() for p in range(16 * epoch, 16 * (epoch + 1)))


def test_batches_come_from_worker_k_mod_workers():
    """What ``ShardSampler`` relies on."""

    class Worker(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return torch.utils.data.get_worker_info().id

    loader = DataLoader(Worker(), batch_size=3, sampler=ShardSampler(30, 3, workers=2), num_workers=2)
    assert [batch.tolist() for batch in loader] == [[k % 2] * 3 for k in range(10)]


# -------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def copied(folders, tmp_path):
    """Training shards that a test may damage."""
    target = tmp_path / "train"
    target.mkdir()
    for path in (folders / "train").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_missing_and_cut_shards_are_listed(folders, copied):
    (copied / "shard-000001.tar").unlink()
    (copied / "shard-000002.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing; shard-000002\.tar is wrong.*--verify"):
        data_of(folders, root=copied).train_dataloader()


def test_wrong_hashes_are_found_on_request(folders, copied):
    path = copied / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    data_of(folders, root=copied).train_dataloader()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is wrong: its SHA-256"):
        data_of(folders, root=copied, check_hashes=True).train_dataloader()


def test_damaged_shard_of_the_right_size_is_named(folders, copied):
    path = copied / "shard-000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"shard-000000\.tar holds 0 images, the index says"):
        list(data_of(folders, root=copied, samples_per_epoch=None).train_dataloader())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": []}, "names no images"),
        ({"version": 7}, "version 7, this program reads 1"),
        ({"settings": None, "shards": [{}]}, r"index\.json is damaged"),
    ],
)
def test_unusable_index(folders, copied, change, message):
    path = copied / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        data_of(folders, root=copied).train_dataloader()


def test_impossible_settings(folders, copied):
    count = len(read_index(copied).shards)
    with pytest.raises(ValueError, match=f"{count} shards cannot be split over 1 ranks x 50 workers.*num_workers"):
        data_of(folders, num_workers=50).train_dataloader()
    with pytest.raises(ValueError, match="shorter side of 12 pixels, too small for crops or tiles of 13"):
        data_of(folders, crop_size=13).train_dataloader()
    with pytest.raises(ValueError, match=r"buffer.*got 0"):
        data_of(folders, buffer=0).train_dataloader()
    with pytest.raises(ValueError, match=r"candidates.*got 0"):
        data_of(folders, candidates=0).train_dataloader()
    (copied / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no index\.json.*make_shards\.py"):
        data_of(folders, root=copied).train_dataloader()
    with pytest.raises(FileNotFoundError, match="no such folder of shards"):
        data_of(folders, root=copied / "nowhere").train_dataloader()
