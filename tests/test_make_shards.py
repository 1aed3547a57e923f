"""Shards of images: ADM's resizing against a dense formula, the same bytes always, and nothing lost on the way."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace

import lmdb
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards_module = importlib.import_module("make_shards")
make_shards, Settings, verify = (getattr(make_shards_module, name) for name in ("make_shards", "Settings", "verify"))

SMALL = Settings(size=16, shard_mb=0.01)  # about 10 images a shard


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def source(tmp_path):
    """50 images in two class folders, with names that a tar reader would trip over."""
    folder = tmp_path / "source"
    for number in range(50):
        path = folder / ("cats" if number % 3 else "big dogs") / f"a.b {number}ü.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(16 + number, 60 - number, number).save(path)
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder):
    """All files in all shards, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


# --------------------------------------------------------------------------------------------------- captions


def test_captions_lie_beside_their_images_in_folders_and_tars_alike(source, tmp_path):
    texts = {}
    for file in source.rglob("*.png"):
        texts[file.stem] = f"a {file.parent.name}\nnumber {file.stem}"
        file.with_suffix(".txt").write_text(f"\n {texts[file.stem]}\n\n", encoding="utf-8")
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        tar.add(source, arcname=".")
    captions = replace(SMALL, captions=True)
    make_shards(source, tmp_path / "out", captions, workers=1)
    found = members(tmp_path / "out")
    keys = [name.removesuffix(".png") for name in found if name.endswith(".png")]
    assert len(keys) == 50
    for key in keys:
        number = next(stem for stem in texts if make_shards_module.key_name(f"{stem}.png") == key.partition("-")[2])
        assert found[f"{key}.txt"].decode() == texts[number]
    make_shards(tmp_path / "source.tar", tmp_path / "of_tar", captions, workers=2)
    assert content(tmp_path / "of_tar") == content(tmp_path / "out")
    # without the word they stay where they are, and make another list of files
    make_shards(source, tmp_path / "without", SMALL, workers=1)
    assert {name: data for name, data in found.items() if not name.endswith(".txt")} == members(tmp_path / "without")
    with pytest.raises(ValueError, match="begun with captions False, now True; another list"):
        make_shards(source, tmp_path / "without", captions, workers=1)


def test_images_without_captions_are_named_before_anything_is_written(source, tmp_path):
    files = sorted(source.rglob("*.png"))
    for file in files[1:]:
        file.with_suffix(".txt").write_text("a cat")
    captions = replace(SMALL, captions=True)
    with pytest.raises(ValueError, match=r"1 of 50 images in .*source have no captions: .*; write them into a \.txt"):
        make_shards(source, tmp_path / "out", captions)
    assert not (tmp_path / "out").exists()
    files[0].with_suffix(".txt").write_bytes(b"\n\xff")
    files[1].with_suffix(".txt").write_bytes(b" \n")
    index = make_shards(source, tmp_path / "out", captions, workers=1)
    assert (index.images, index.source["broken"]) == (48, 2)
    reasons = (tmp_path / "out" / "broken.txt").read_text()
    assert "holds no UTF-8 text" in reasons
    assert "is empty; write captions into it" in reasons


# ----------------------------------------------------------------------------------------------------- pixels


def keys_cubic(x, a=-0.5):
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def box(x):
    return (x > -0.5) & (x <= 0.5)


def matrix(old, new, kernel):
    """Rows that average old pixels by a kernel, which is widened by the reduction."""
    ratio = old / new
    centres = (np.arange(new)[:, None] + 0.5) * ratio
    weights = kernel((np.arange(old) + 0.5 - centres) / max(ratio, 1)).astype(float)
    return weights / weights.sum(1, keepdims=True)


def resized(values, height, width, kernel):
    """Dense products along the rows and then along the columns, rounded to levels after each."""
    for axis, new in ((1, width), (0, height)):
        if values.shape[axis] != new:
            weights = matrix(values.shape[axis], new, kernel)
            values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
            values = np.floor(values.clip(0, 255) + 0.5).clip(0, 255)
    return values


def adm(array, size):
    """ADM's reduction of uint8 [H, W, C] by dense matrices."""
    values = array.astype(float)
    while min(values.shape[:2]) >= 2 * size:
        values = resized(values, values.shape[0] // 2, values.shape[1] // 2, box)
    height, width = values.shape[:2]
    scale = size / min(height, width)
    return resized(values, round(height * scale), round(width * scale), keys_cubic)


# odd sides such that no pixel lies on an edge of a box, where rounding errors decide: 191 -> 95 -> 47 -> 23
@pytest.mark.parametrize("shape", [(16, 16), (64, 96), (48, 160), (208, 191), (20, 16), (9, 14), (35, 59)], ids=str)
def test_resizing_is_adms(shape):
    height, width = shape
    image = picture(width, height, 0)
    found = np.asarray(make_shards_module.resize(image, 16), dtype=float)
    expected = adm(np.asarray(image), 16)
    assert found.shape == expected.shape
    assert min(found.shape[:2]) == 16
    assert np.abs(found - expected).max() <= 1  # Pillow computes in fixed point
    assert np.mean(found != expected) < 0.02


def test_halving_is_the_mean_of_four_pixels():
    image = picture(32, 32, 2)
    blocks = np.asarray(image, dtype=float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    excess = np.asarray(make_shards_module.resize(image, 16)) - blocks
    assert excess.min() >= 0  # halves are rounded up, after the rows and again after the columns
    assert excess.max() <= 1


def test_bicubic_alone_would_be_noticed():
    image = picture(64, 64, 1)
    plain = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(plain - adm(np.asarray(image), 16)).max() > 5


def test_crops():
    image = Image.fromarray(np.arange(27 * 16, dtype=np.uint16).reshape(16, 27).astype(np.uint8)).convert("RGB")
    array = np.asarray(image)
    centre = np.asarray(make_shards_module.crop(image, Settings(size=16), 0))
    assert np.array_equal(centre, array[:, 5:21])  # (27 - 16) // 2
    assert make_shards_module.crop(image, Settings(size=16, crop="none"), 0) is image
    places = set()
    for number in range(200):
        piece = np.asarray(make_shards_module.crop(image, Settings(size=16, crop="random"), number))
        places |= {left for left in range(12) if np.array_equal(piece, array[:, left : left + 16])}
    assert places == set(range(12))  # every place, the last one too


def test_shards_hold_every_image_once_with_its_class(source, tmp_path):
    index = make_shards(source, tmp_path / "out", SMALL, workers=1)
    files = members(tmp_path / "out")
    images = {name: data for name, data in files.items() if name.endswith(".png")}
    assert index.images == len(images) == 50
    assert len(files) == 100
    assert all(name.isascii() and name.count(".") == 1 and " " not in name for name in files)
    found = set()
    for name, data in images.items():
        array = np.asarray(Image.open(io.BytesIO(data)))
        assert array.shape == (16, 16, 3)
        found.add((array.tobytes(), int(files[name[:-4] + ".cls"])))
    expected = set()
    for path in source.rglob("*.png"):
        resized = make_shards_module.resize(Image.open(path), 16)
        left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
        array = np.asarray(resized)[top : top + 16, left : left + 16]
        expected.add((array.tobytes(), ["big dogs", "cats"].index(path.parent.name)))
    assert found == expected
    first = [files[name[:-4] + ".cls"] for name in list(images)[:10]]
    assert len(set(first)) == 2  # classes are mixed
    assert index.classes == ("big dogs", "cats")


def test_webdataset_reads_them(source, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    make_shards(source, tmp_path / "out", SMALL, workers=1)
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert len(samples) == 50
    assert {label for _, label in samples} == {0, 1}
    own = [np.asarray(Image.open(io.BytesIO(d))) for n, d in members(tmp_path / "out").items() if n.endswith(".png")]
    assert all(np.array_equal(image, mine) for (image, _), mine in zip(samples, own, strict=True))


def test_index_says_what_is_there(source, tmp_path):
    make_shards(source, tmp_path / "out", SMALL, workers=1)
    text = (tmp_path / "out" / "index.json").read_text()
    index = json.loads(text)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) > 3
    assert [shard["name"] for shard in index["shards"]] == [path.name for path in shards]
    for shard, path in zip(index["shards"], shards, strict=True):
        sha256 = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert shard["sha256"] == sha256
        assert shard["bytes"] == path.stat().st_size <= 0.01 * 2**20 + tarfile.RECORDSIZE
        with tarfile.open(path) as tar:
            assert shard["images"] == sum(name.endswith(".png") for name in tar.getnames())
    assert index["images"] == 50
    assert index["settings"]["size"] == 16
    assert str(tmp_path) not in text


# ----------------------------------------------------------------------------------------------- the same bytes


def test_same_bytes_whatever_the_workers_and_the_place(source, tmp_path):
    make_shards(source, tmp_path / "one", SMALL, workers=1)
    source.rename(tmp_path / "moved")
    make_shards(tmp_path / "moved", tmp_path / "two", SMALL, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    make_shards(tmp_path / "moved", tmp_path / "seed", Settings(size=16, shard_mb=0.01, seed=1), workers=1)
    assert content(tmp_path / "seed") != content(tmp_path / "one")


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, count):
    """Let the resizing of image number ``count`` of this run raise."""
    whole, seen = make_shards_module.encode, []

    def encode(*arguments):
        seen.append(1)
        if len(seen) > count:
            raise StoppedError
        return whole(*arguments)

    monkeypatch.setattr(make_shards_module, "encode", encode)
    return seen


def test_interrupted_runs_go_on_and_end_with_the_same_bytes(source, tmp_path, monkeypatch):
    for number in (3, 20, 41):
        (source / "cats" / f"broken {number}.png").write_bytes(b"no image")
    make_shards(source, tmp_path / "whole", SMALL, workers=1)
    out, resized = tmp_path / "out", 0
    for count in (0, 4, 13, 25, 12):
        with monkeypatch.context() as patch:
            seen = stop_after(patch, count)
            with pytest.raises(StoppedError):
                make_shards(source, out, SMALL, workers=1)
            resized += len(seen)
        assert not (out / "index.json").exists()
        assert not list(out.glob(".*"))
    with monkeypatch.context() as patch:
        seen = stop_after(patch, 1000)
        make_shards(source, out, SMALL, workers=1)
    assert 0 < len(seen) < 25  # what was finished is not made again
    assert content(out) == content(tmp_path / "whole")
    assert (out / "broken.txt").read_text().count("\n") == 3


def test_finished_shards_that_were_damaged_are_made_again(source, tmp_path, monkeypatch, capsys):
    for number in range(10):
        (source / "cats" / f"broken {number}.png").write_bytes(b"no image")
    make_shards(source, tmp_path / "whole", SMALL, workers=1)
    out = tmp_path / "out"
    stop_after(monkeypatch, 45)
    with pytest.raises(StoppedError):
        make_shards(source, out, SMALL, workers=1)
    monkeypatch.undo()
    shard = out / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    make_shards(source, out, SMALL, workers=1)
    assert "shard-000001.tar" in capsys.readouterr().out
    assert content(out) == content(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import make_shards
whole, seen = make_shards.encode, []
def encode(*arguments):
    seen.append(1)
    if len(seen) > 23:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)
make_shards.encode = encode
make_shards.main([sys.argv[2], sys.argv[3], "--size", "16", "--shard-mb", "0.01", "--workers", "1"])
"""


@pytest.mark.slow
def test_killed_program_goes_on(source, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(REPOSITORY / "data_prep"), str(source), str(out)]
    assert subprocess.run(command).returncode == -9
    assert list(out.glob(".*.incomplete"))  # killed within a shard
    assert list(out.glob("*.tar"))
    make_shards(source, out, SMALL, workers=1)
    make_shards(source, tmp_path / "whole", SMALL, workers=1)
    assert content(out) == content(tmp_path / "whole")


def test_finished_folder_is_left_as_it_is(source, tmp_path, monkeypatch):
    make_shards(source, tmp_path / "out", SMALL, workers=1)
    before = content(tmp_path / "out")
    stop_after(monkeypatch, 0)
    assert make_shards(source, tmp_path / "out", SMALL, workers=1).images == 50
    assert content(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------------- tars


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_nested_tar_gives_the_images_of_its_folder(source, tmp_path):
    """As ImageNet: a tar of one tar per class."""
    outer = tmp_path / "train.tar"
    with tarfile.open(outer, "w") as tar:
        for folder in sorted(source.iterdir(), reverse=True):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in folder.iterdir():
                    add(inner, f"./{path.name}", path.read_bytes())
                add(inner, ".hidden.png", b"no image")
            add(tar, f"{folder.name}.tar", buffer.getvalue())
    make_shards(source, tmp_path / "folder", SMALL, workers=1)
    make_shards(outer, tmp_path / "tar", SMALL, workers=1)
    assert content(tmp_path / "folder") == content(tmp_path / "tar")


def test_order_of_the_members_of_a_tar_does_not_matter(source, tmp_path):
    paths = sorted(source.rglob("*.png"))
    for name, order in (("one", paths), ("two", paths[::-1])):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for path in order:
                add(tar, path.relative_to(source).as_posix(), path.read_bytes())
        make_shards(tmp_path / f"{name}.tar", tmp_path / name, SMALL, workers=1)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_damaged_and_compressed_tars_are_refused(source, tmp_path):
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(source)
    with pytest.raises(ValueError, match=r"packed\.tar is no whole uncompressed tar.*decompress"):
        make_shards(tmp_path / "packed.tar", tmp_path / "out", SMALL)
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        tar.add(source, arcname=".")
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.tar is no whole uncompressed tar"):
        make_shards(tmp_path / "cut.tar", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- broken and verify


def test_broken_images_are_listed_up_to_the_limit(source, tmp_path):
    whole = next(source.rglob("*.png")).read_bytes()
    (source / "cats" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "cats" / "text.jpg").write_text("hello")
    Image.new("RGBA", (20, 20), (1, 2, 3, 0)).save(source / "cats" / "clear.png")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"3 images cannot be read, at most 2.*--max-broken"):
        make_shards(source, out, SMALL, workers=1, max_broken=2)
    assert not (out / "index.json").exists()
    index = make_shards(source, out, SMALL, workers=1, max_broken=3)
    assert index.images == 50
    assert index.source["broken"] == 3
    lines = dict(line.split("\t") for line in (out / "broken.txt").read_text().splitlines())
    assert set(lines) == {"cats/cut.png", "cats/text.jpg", "cats/clear.png"}
    assert "transparent" in lines["cats/clear.png"]
    assert lines["cats/text.jpg"] == "not an image of PNG, JPEG, WEBP, BMP"


def test_nothing_but_broken_images_is_an_error(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_text("hello")
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        make_shards(tmp_path / "source", tmp_path / "out", SMALL, workers=1)
    assert not (tmp_path / "out" / "index.json").exists()


def test_verify_names_what_is_missing_wrong_or_foreign(source, tmp_path, capsys):
    out = tmp_path / "out"
    make_shards(source, out, SMALL, workers=1)
    assert verify(out) == []
    make_shards_module.main(["--verify", str(out)])
    (out / "shard-000000.tar").unlink()
    wrong = out / "shard-000001.tar"
    data = bytearray(wrong.read_bytes())
    data[700] ^= 1
    wrong.write_bytes(data)
    (out / "shard-000002.tar").write_bytes(b"short")
    (out / "shard-000077.tar").write_bytes(b"")
    lines = verify(out)
    assert [line.split()[0] for line in lines] == [f"shard-0000{n}.tar" for n in ("00", "01", "02", "77")]
    for line, words in zip(lines, ("missing", "SHA-256", "5 bytes", "not in the index"), strict=True):
        assert words in line
    with pytest.raises(SystemExit) as error:
        make_shards_module.main(["--verify", str(out)])
    assert str(error.value) == "\n".join(lines)  # a text as exit status is printed, and means 1


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_an_error_that_says_what_to_do():
    with pytest.raises(OSError, match=r"a worker process was killed.*--workers.*start again"):
        list(make_shards_module.in_order(die, range(3), 2))


def test_results_come_in_order_from_few_at_a_time():
    taken = []
    items = (taken.append(number) or number for number in range(100))
    results = make_shards_module.in_order(abs, items, 2)
    assert next(results) == 0
    assert len(taken) == 2 * make_shards_module.READ_AHEAD
    assert list(results) == list(range(1, 100))


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"size": 0}, "--size.*got 0"),
        ({"crop": "centre"}, "--crop must be one of center, random, none, got centre"),
        ({"format": "gif"}, "--format.*png, jpg, got gif"),
        ({"quality": 101}, "--quality.*got 101"),
        ({"shard_mb": 0}, "--shard-mb.*got 0"),
        ({"seed": -1}, "--seed.*got -1"),
    ],
)
def test_bad_settings(option, message):
    with pytest.raises(ValueError, match=message):
        Settings(**option)


def test_bad_sources_and_outputs(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or tar of images"):
        make_shards(tmp_path / "nowhere", tmp_path / "out", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in"):
        make_shards(tmp_path / "empty", tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match=r"neither a folder nor a \.tar"):
        make_shards(next(source.rglob("*.png")), tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="inside the source"):
        make_shards(source, source / "out", SMALL)
    with pytest.raises(ValueError, match="already holds other files"):
        make_shards(source, tmp_path, SMALL)
    with pytest.raises(FileNotFoundError, match=r"holds no index\.json"):
        verify(source)


def test_other_settings_or_images_are_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 30)
    with pytest.raises(StoppedError):
        make_shards(source, out, SMALL, workers=1)
    monkeypatch.undo()
    for _ in ("unfinished", "finished"):
        with pytest.raises(ValueError, match=r"begun with size 16, now 8; use the same"):
            make_shards(source, out, Settings(size=8, shard_mb=0.01))
        picture(20, 20, 99).save(source / "new.png")
        with pytest.raises(ValueError, match="another list of source images"):
            make_shards(source, out, SMALL)
        (source / "new.png").unlink()
        make_shards(source, out, SMALL, workers=1)


@pytest.mark.slow
def test_command_line(source, tmp_path, capsys):
    options = ["--size", "16", "--format", "jpg", "--quality", "80", "--crop", "none", "--workers", "1"]
    make_shards_module.main([str(source), str(tmp_path / "out"), *options])
    assert "50 images in 1 shards" in capsys.readouterr().out
    images = [Image.open(io.BytesIO(d)) for n, d in members(tmp_path / "out").items() if n.endswith(".jpg")]
    assert len(images) == 50
    assert {min(image.size) for image in images} == {16}
    assert len({image.size for image in images}) > 5
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "data_prep" / "make_shards.py"), "nowhere", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: no such folder or tar")
    assert result.stderr.count("\n") == 1


def write_lmdb(folder, images):
    """Write encoded images under their keys, as LSUN's LMDB holds them."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, data in images.items():
            transaction.put(key.encode(), data)


def webp(seed):
    buffer = io.BytesIO()
    picture(40, 30, seed).save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_lmdb_gives_the_images_of_its_folder(tmp_path, workers):
    images = {f"{seed:040x}": webp(seed) for seed in range(7)}
    write_lmdb(tmp_path / "bedroom_train_lmdb", images)
    plain = tmp_path / "plain"
    plain.mkdir()
    for key, data in images.items():
        (plain / f"{key}.webp").write_bytes(data)
    settings = Settings(size=16, shard_mb=0.005)
    made = [
        make_shards(source, tmp_path / f"out-{source.name}", settings, workers)
        for source in (tmp_path / "bedroom_train_lmdb", plain)
    ]
    assert [index.images for index in made] == [7, 7]
    assert made[0].digest == made[1].digest  # the same shards to the last byte
    assert len(made[0].shards) > 1
    assert not made[0].classes
    assert not verify(tmp_path / "out-bedroom_train_lmdb")


def test_lmdbs_inside_a_folder_are_classes(tmp_path):
    for number, name in enumerate(("bedroom", "church")):
        write_lmdb(tmp_path / "lsun" / name, {f"{number}{k}": webp(2 * number + k) for k in range(2)})
    index = make_shards(tmp_path / "lsun", tmp_path / "out", Settings(size=16), 1)
    assert index.classes == ("bedroom", "church")
    assert index.images == 4


def test_a_damaged_lmdb_is_refused(tmp_path):
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"nothing" * 1000)
    with pytest.raises(ValueError, match=r"is no whole LMDB: .*; fetch it again"):
        make_shards(tmp_path / "lmdb", tmp_path / "out", Settings(), 1)


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match="pip install lmdb"):
        make_shards(tmp_path / "lmdb", tmp_path / "out", Settings(), 1)
