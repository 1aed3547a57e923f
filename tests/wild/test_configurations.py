"""Configurations that came with a file: they name classes of a short list, and run no command."""

import importlib
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image
from tiny import SIZE, save_tiny_prior
from tiny_training import command_line, composed, tiny_overrides

from ud2m.cli.methods import build_sampler, shares_prior
from ud2m.cli.objects import ALLOW, build, commands_given
from ud2m.cli.sample import trained_operator
from ud2m.physics import GaussianBlur
from ud2m.training.checkpoints import RESUMED

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")

STRANGERS = [
    {"_target_": "os.system", "command": "touch {mark}"},
    {"_target_": "joblib.load", "filename": "{mark}"},
    {"_target_": "numpy.load", "file": "{mark}", "allow_pickle": True},
    {"_target_": "shutil.copyfile", "src": "/etc/hostname", "dst": "{mark}"},
    {"_target_": "subprocess.Popen", "args": ["touch", "{mark}"]},
    {"_target_": "builtins.open", "file": "{mark}", "mode": "w"},
    {"_target_": "torch.save", "obj": 1, "f": "{mark}"},
    {"_target_": "pathlib.Path.touch", "self": "{mark}"},
    # what this package has, but is no class of it
    {"_target_": "ud2m.data.remote.fetch", "address": "pipe:touch {mark}; echo ", "name": "x"},
    {"_target_": "ud2m.files.write_bytes", "path": "{mark}", "data": "x"},
    {"_target_": "ud2m.files.shutil.copyfile", "src": "/etc/hostname", "dst": "{mark}"},
    {"_target_": "ud2m.data.remote.subprocess.Popen", "args": ["touch", "{mark}"]},
    {"_target_": "ud2m.physics.GaussianBlur.__init__.__globals__", "x": 1},
    {"_target_": "lightning.Trainer.fit", "self": 1},
    {"_target_": ["os.system"], "command": "touch {mark}"},
    {"_target_": {"a": "os.system"}},
    {"_target_": None},
    {"_target_": "ud2m.physics.Nothing"},
    {"_target_": ""},
]


def filled(node, mark):
    if isinstance(node, dict):
        return {key: filled(value, mark) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(value, mark) for value in node]
    return node.replace("{mark}", str(mark)) if isinstance(node, str) else node


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda node: str(node["_target_"]))
@pytest.mark.parametrize(
    "around",
    [
        lambda bomb: bomb,
        lambda bomb: bomb | {"_partial_": True},
        lambda bomb: {"_target_": "ud2m.physics.GaussianBlur", "width": bomb},
        lambda bomb: {"a": [{"b": bomb}]},
    ],
    ids=["alone", "partial", "argument", "list"],
)
def test_nothing_but_the_listed_is_built(stranger, around, tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises(
        ValueError, match=r"(is not built: allowed are classes of ud2m, .*UD2M_ALLOW|is not there|is a com)"
    ) as e:
        build(OmegaConf.create(around(filled(stranger, mark))), "training")
    assert "\n" not in str(e.value)
    assert not mark.exists()


def test_all_targets_are_looked_at_before_the_first_is_called(tmp_path):
    """A class that is allowed may write files; here it fails, later than the refusal."""
    wrong = {"_target_": "ud2m.physics.GaussianBlur", "width": -1.0}
    with pytest.raises(ValueError, match=r"os\.system"):
        build({"first": wrong, "second": {"_target_": "os.system", "command": "true"}})


def test_texts_of_a_stored_configuration_are_not_read_twice():
    """An escaped reference is a text once resolved, and stays one."""
    node = OmegaConf.create({"_target_": "ud2m.physics.KernelFile", "path": r"\${oc.env:HOME}"})
    with pytest.raises((FileNotFoundError, ValueError), match=r"\$\{oc\.env:HOME\}"):
        build(node)


def test_what_classes_cannot_take_is_one_line():
    with pytest.raises(ValueError, match=r"unknown argument of GaussianBlur 'colour'"):
        build({"_target_": "ud2m.physics.GaussianBlur", "colour": 1})
    with pytest.raises(ValueError, match=r"WandbLogger is not built with settings; allowed are .*project"):
        build({"_target_": "lightning.pytorch.loggers.WandbLogger", "settings": {"base_url": "http://stranger"}})


def test_pages_of_methods_are_built_by_the_same_rule():
    for use in (shares_prior, lambda target: build_sampler(target, torch.nn.Identity(), "cpu")):
        with pytest.raises(ValueError, match=r"os\.system' is not built"):
            use({"_target_": "os.system", "command": "true"})


@pytest.mark.parametrize(
    "description",
    [
        {"class": "os.system", "command": "true"},
        {"class": "ud2m.data.MnistData", "root": "x"},
        {"class": "ud2m.physics.GaussianBlur", "colour": 1},
        {"class": "ud2m.physics.Mixture", "families": [{"_target_": "os.system", "command": "true"}]},
        {"class": 3},
        {},
        [],
        "ud2m.physics.GaussianBlur",
    ],
)
def test_the_operator_of_an_export_is_one_of_ours(description):
    with pytest.raises(ValueError, match="the operator that the model names cannot be made"):
        trained_operator(description)
    assert isinstance(trained_operator({"class": "ud2m.physics.GaussianBlur", "width": 2.0}), GaussianBlur)


# --- a run folder of a stranger -----------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A run folder that could go on, and a function that plants values in its configuration."""
    folder = tmp_path / "run"
    with composed("scale=tiny", f"run_dir={folder}", f"hydra.run.dir={folder}", folder=folder) as config:
        from ud2m.cli.train import prepare

        folder.mkdir()
        stored = prepare(config, folder)
    (folder / "checkpoints").mkdir()
    parts: dict = {"state_dict": {}} | {part: {"a": 1} for part in RESUMED}
    torch.save(parts, folder / "checkpoints" / "last.ckpt")

    def plant(key, value):
        OmegaConf.update(stored, key, value, merge=False, force_add=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(stored))
        return folder

    return plant


def only_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("stranger", STRANGERS[:5], ids=lambda node: str(node["_target_"]))
@pytest.mark.parametrize("key", ["training", "training.operator", "training.loss.terms.extra"])
def test_an_export_calls_nothing_that_its_run_folder_names(run_folder, key, stranger, tmp_path, capsys):
    folder = run_folder(key, filled(stranger, tmp_path / "mark"))
    assert command_line(f"run_dir={folder}", "export=last.ckpt") == 1
    assert f"error: _target_ {stranger['_target_']!r} is not built" in only_line(capsys)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("stranger", STRANGERS[:5], ids=lambda node: str(node["_target_"]))
@pytest.mark.parametrize("key", ["data", "data.augment", "training", "trainer", "trainer.strategy", "logger.csv"])
def test_a_resumed_run_calls_nothing_that_its_folder_names(run_folder, key, stranger, tmp_path, capsys):
    folder = run_folder(key, filled(stranger, tmp_path / "mark"))
    assert command_line(f"run_dir={folder}", "resume=true") == 1
    assert f"error: _target_ {stranger['_target_']!r} is not built" in only_line(capsys)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "text", ["- 1\n", "3\n", "a: !!python/object/apply:os.system ['true']\n", "version: 0.2.0\nx: ${oc.env:HOME}\n"]
)
def test_a_stored_configuration_holds_values_alone(run_folder, text, capsys):
    folder = run_folder("seed", 0)
    (folder / "config.yaml").write_text(text)
    assert command_line(f"run_dir={folder}", "resume=true") == 1
    assert str(folder / "config.yaml") in only_line(capsys)


@pytest.mark.parametrize("value", [3, "text", [1], {"a": 1}, None, {"_target_": "ud2m.physics.Denoising"}], ids=repr)
@pytest.mark.parametrize("key", ["data", "training", "trainer", "logger", "logger.csv"])
def test_parts_of_other_kinds_are_one_line(run_folder, key, value, capsys):
    folder = run_folder(key, value)
    assert command_line(f"run_dir={folder}", "resume=true") == 1
    line = only_line(capsys)
    assert key in line or "Denoising" in line
    assert any(words in line for words in ("describes no", "holds loggers by their names", "cannot be made"))


@pytest.mark.slow
def test_few_words_do_not_stand_for_many(run_folder, capsys):
    """Each line holds the one before it ten times."""
    folder = run_folder("seed", 0)
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]
    (folder / "config.yaml").write_text("\n".join([*lines, "version: 0.2.0"]))
    assert command_line(f"run_dir={folder}", "resume=true") == 1
    assert f"{folder / 'config.yaml'} is not valid YAML: it has aliases" in only_line(capsys)
    (folder / "config.yaml").write_text("a: " + "[" * 5000 + "]" * 5000)
    assert command_line(f"run_dir={folder}", "resume=true") == 1
    assert f"{folder / 'config.yaml'} is not valid YAML" in only_line(capsys)


@pytest.mark.parametrize(("key", "value"), [("name", "../../away"), ("version", "/tmp/away"), ("name", "/tmp/away")])
def test_curves_stay_in_the_run_folder(run_folder, key, value, capsys):
    folder = run_folder(f"logger.csv.{key}", value)
    assert command_line(f"run_dir={folder}", "resume=true") == 1
    assert "outside of the run folder" in only_line(capsys)


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["root", "held_out"])
def test_a_command_counts_on_the_command_line_alone(run_folder, key, tmp_path, capsys):
    mark = tmp_path / "mark"
    stranger = {"_target_": "ud2m.data.ShardData", "root": "x", "held_out": "x", "channels": 3, "crop_size": 8}
    folder = run_folder("data", stranger | {"batch_size": 2, key: f"pipe:touch {mark}; cat {{}}"})
    assert command_line(f"run_dir={folder}", "resume=true") == 1
    assert f"repeat it there, data.{key}=..." in only_line(capsys)
    # another one there does not allow it
    other = {"root": "held_out", "held_out": "root"}[key]
    assert command_line(f"run_dir={folder}", "resume=true", f'data.{other}="pipe:touch {mark} {{}}"') == 1
    assert f"repeat it there, data.{key}=..." in only_line(capsys)
    assert not mark.exists()
    nested = {"_target_": "ud2m.data.shard_index.ShardIndex", "address": f"pipe:touch {mark}"}
    with pytest.raises(ValueError, match="is a command"):
        build({"_target_": "ud2m.data.shards.ShardReader", "index": nested})


def test_the_command_line_is_read_as_hydra_reads_it(tmp_path):
    entries = ["+data.root=\"pipe:cat 'a b' {}\"", "+data.held_out=x", '+list=["webdataset root=pipe:y","z"]']
    with composed("data=webdataset", *(e.replace("+data", "data") for e in entries), folder=tmp_path):
        assert {"pipe:cat 'a b' {}", "x", "pipe:y", "z"} <= commands_given()
    assert not HydraConfig.initialized()
    assert commands_given() == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::lightning")
def test_a_run_goes_on_when_its_command_is_repeated(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part in ("train", "held_out"):
        (tmp_path / f"{part}_images").mkdir()
        for n in range(4):
            pixels = rng.integers(0, 256, (2 * SIZE, 2 * SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{part}_images" / f"{n}.png")
        make_shards.make_shards(tmp_path / f"{part}_images", tmp_path / part, make_shards.Settings(2 * SIZE), workers=1)
    tiny = tiny_overrides(save_tiny_prior(tmp_path / "prior"), tmp_path)
    tiny = [word for word in tiny if not word.startswith(("data=", "data.root="))]
    root = f"data.root=\"pipe:cat '{tmp_path}/train/{{}}'\""
    places = [root, f"data.held_out={tmp_path / 'held_out'}", f"data.cache={tmp_path / 'cache'}"]
    run = f"run_dir={tmp_path / 'run'}"
    assert command_line("data=webdataset", *tiny, *places, run) == 0
    capsys.readouterr()
    assert command_line("resume=true", run) == 1
    assert "repeat it there, data.root=..." in only_line(capsys)
    assert command_line("resume=true", run, root) == 0
    # the same images elsewhere
    (tmp_path / "train").rename(tmp_path / "moved")
    assert command_line("resume=true", run, f"data.root={tmp_path / 'moved'}") == 0


# --- one's own classes --------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of the user's own."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import os\nfrom ud2m.physics import GaussianBlur\n\n\nclass MyBlur(GaussianBlur):\n    pass\n\n\n"
        "def my_blur(width):\n    return MyBlur(width)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_classes_of_ones_own_are_allowed_by_name(own, monkeypatch):
    node = {"_target_": f"{own}.MyBlur", "width": 2.0}
    with pytest.raises(ValueError, match=rf"{own}.MyBlur' is not built: .*UD2M_ALLOW=my_package"):
        build(node)
    assert own not in sys.modules  # not even imported
    monkeypatch.setenv(ALLOW, f"other, {own}")
    assert type(build(node)).__name__ == "MyBlur"
    assert type(build(node | {"_target_": f"{own}.my_blur"})).__name__ == "MyBlur"
    with pytest.raises(ValueError, match="is not built"):
        build({"_target_": f"{own}.os.system", "command": "true"})
    with pytest.raises(ValueError, match="is not built"):
        build({"_target_": f"{own}x.MyBlur"})
