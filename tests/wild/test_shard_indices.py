"""Indices of shards from strangers: names in them are plain, and reach neither other folders nor a shell."""

import hashlib
import importlib
import json
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from ud2m.data import ShardData
from ud2m.data.remote import fetch, fetch_index, shard_path
from ud2m.data.shard_index import Shard, ShardIndex, read_index

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")

NAMES = [
    "../outside.tar",
    "/abs/x.tar",
    "../../x.tar",
    "a/../../x.tar",
    "sub/x.tar",
    "..",
    ".",
    "",
    ".hidden.tar",
    "x.tar; touch mark",
    "$(touch mark).tar",
    "`touch mark`.tar",
    "x.tar\ntouch mark",
    "x.tar|touch mark.tar",
    "'; touch mark; '.tar",
    "-rf.tar",
    "x.tar\0.tar",
    "index.json",
    "C:\\x.tar",
    7,
    None,
    ["x.tar"],
]


@pytest.fixture
def shards(tmp_path):
    """A folder of shards, and a function that rewrites its index."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for n in range(4):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{n}.png")
    folder = tmp_path / "shards"
    make_shards.make_shards(tmp_path / "images", folder, make_shards.Settings(12), workers=1)
    content = json.loads((folder / "index.json").read_text())

    def rewrite(change):
        change(content)
        (folder / "index.json").write_text(json.dumps(content))
        return folder

    return rewrite


def named(name):
    return lambda content: content["shards"][0].update(name=name)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_in_an_index_are_plain(shards, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shards(named(name))
    with pytest.raises(ValueError, match=r"index\.json is damaged \(a shard") as error:
        read_index(folder)
    assert "\n" not in str(error.value)
    for place in (str(folder), f"pipe:cat {folder}/{{}}", f"pipe:cat '{folder}/{{}}'"):
        data = ShardData(place, place, channels=3, crop_size=8, batch_size=2, cache=tmp_path / "cache")
        with pytest.raises(ValueError, match="a shard"):
            data.train_dataloader()
    assert not (tmp_path / "mark").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"images", "shards", "cache"}


def test_a_whole_name_is_taken(shards):
    (shard,) = read_index(shards(lambda content: None)).shards
    assert shard.name == "shard-000000.tar"


@pytest.mark.parametrize("name", ["../x.tar", "/tmp/ud2m-stranger.tar", "x.tar; touch mark"])
def test_names_are_looked_at_again_where_they_are_used(name, tmp_path, monkeypatch):
    """Of an index that was made in another way than by reading."""
    monkeypatch.chdir(tmp_path)
    shard = Shard("x.tar", 1, 1, hashlib.sha256(b"x\n").hexdigest())
    object.__setattr__(shard, "name", name)
    (tmp_path / "cache").mkdir()
    index = ShardIndex(tmp_path / "cache", {}, {}, (), (shard,), "pipe:echo x; : {}")
    for use in (lambda: shard_path(index, shard), lambda: index.place(shard), lambda: fetch(index.address, name)):
        with pytest.raises(ValueError, match="has a plain name"):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["shards"][0].update(images="4"),
        lambda c: c["shards"][0].update(images=-1),
        lambda c: c["shards"][0].update(images=True),
        lambda c: c["shards"][0].update(bytes=None),
        lambda c: c["shards"][0].update(more=1),
        lambda c: c.update(shards={"a": 1}),
        lambda c: c.update(settings=[]),
        lambda c: c["settings"].update(format="../x"),
        lambda c: c["settings"].update(format=[]),
        lambda c: c["settings"].update(size="256"),
        lambda c: c["settings"].update(size=0),
        lambda c: c["settings"].pop("crop"),
        lambda c: c.update(classes=3),
    ],
)
def test_an_index_of_other_values_is_one_line(shards, change):
    folder = shards(change)
    with pytest.raises(ValueError, match=r"index\.json is damaged") as error:
        read_index(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["PIPE:touch mark", "PIPE:touch mark #://", "pi\tpe:touch mark #://", "file:///etc"]
)
def test_only_listed_schemes_are_opened(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no such scheme; allowed are http, https"):
        fetch_index(address, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_late_is_told(tmp_path):
    with pytest.raises(OSError, match=r"cannot fetch pipe:.*the command ended with 3"):
        fetch("pipe:echo {}; exit 3", "index.json")
