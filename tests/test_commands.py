"""``ud2m train``, ``ud2m sample``, ``ud2m evaluate``: what they say at once, and what is installed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir

from ud2m.cli import commands
from ud2m.cli.models import scores_file
from ud2m.priors.shipped import SHIPPED

COMMANDS = ("train", "sample", "evaluate")
HEAVY = ("torch", "lightning", "diffusers", "peft", "deepinv", "numpy", "wandb", "webdataset")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            print("imported", name, file=sys.stderr)
            sys.exit(99)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def without_heavy_modules(tmp_path_factory):
    """Return a function that runs a program in a folder, where importing a heavy module ends it."""
    folder = tmp_path_factory.mktemp("blocker")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}

    def run(*arguments, place):
        done = subprocess.run([sys.executable, *arguments], env=environment, cwd=place, capture_output=True, text=True)
        assert done.returncode != 99, done.stderr
        return done

    return run


def programs():
    module = [("-m", "ud2m", name) for name in COMMANDS]
    return [*module, *((str(REPOSITORY / f"{name}.py"),) for name in ("train", "sample"))]


def test_the_blocker_blocks(without_heavy_modules, tmp_path):
    with pytest.raises(AssertionError, match="imported torch"):
        without_heavy_modules("-c", "import torch", place=tmp_path)
    with pytest.raises(AssertionError, match="imported"):
        without_heavy_modules("-m", "ud2m", "evaluate", place=tmp_path)


@pytest.mark.parametrize("program", programs(), ids=lambda program: Path(program[-1]).name)
def test_help_and_misspelt_keys_are_answered_before_heavy_imports(program, without_heavy_modules, tmp_path):
    told = without_heavy_modules(*program, "--help", place=tmp_path)
    assert told.returncode == 0
    assert 20 < len(told.stdout.splitlines()) <= 50
    assert "seed=0 " in told.stdout
    wrong = without_heavy_modules(*program, "sead=3", place=tmp_path)
    assert wrong.returncode == 1
    assert "unknown key 'sead' (did you mean seed?)" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert "Traceback" not in wrong.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_misspelt_names_are_answered_before_heavy_imports(without_heavy_modules, tmp_path):
    page = without_heavy_modules("-m", "ud2m", "train", "experiment=phtos", place=tmp_path)
    assert page.returncode == 1
    assert "unknown experiment 'phtos'" in page.stderr
    for arguments, answer in {
        ("sample", "model=photos_gausian_blur"): "did you mean photos_gaussian_blur?",
        ("sample", "prior=photo_prior"): "unknown prior 'photo_prior' (did you mean photos_prior?)",
        ("train", "prior=photo_prior"): "(did you mean photos_prior?); known: micro_prior, ",
        ("train", "training.start_from=photos"): "(did you mean photos_general?); known: photographs_gauss",
        ("evaluate", "methods=[latinoo]"): "unknown method 'latinoo' (did you mean latino?)",
        ("evaluate", "operators=[inpaiting]"): "unknown physics 'inpaiting' (did you mean inpainting?)",
        ("evaluate", "datasets=[photo]"): "unknown data 'photo' (did you mean photos?)",
        ("evaluate", 'methods=["ud2m target.model=photos_blur"]'): "unknown model 'photos_blur'",
        (
            "evaluate",
            'operators=["gaussian_blur operator.widht=2"]',
        ): "setting of physics gaussian_blur 'operator.widht' (did you",
    }.items():
        told = without_heavy_modules("-m", "ud2m", *arguments, place=tmp_path)
        assert told.returncode == 1
        assert answer in told.stderr
        assert len(told.stderr.splitlines()) == 1
        assert not any(path.is_file() for path in tmp_path.rglob("*"))
    command = without_heavy_modules("-m", "ud2m", "trian", place=tmp_path)
    assert command.returncode == 1
    assert command.stderr == "error: no command 'trian'; there are train, sample, evaluate, app, models (ud2m --help)\n"
    for words in ([], ["--help"]):
        assert "ud2m evaluate" in without_heavy_modules("-m", "ud2m", *words, place=tmp_path).stdout
    assert without_heavy_modules("-m", "ud2m", "--version", place=tmp_path).stdout.startswith("ud2m 0.")


def test_help_has_the_words_of_the_page(tmp_path, monkeypatch):
    pages = tmp_path / "conf"
    for group, names in {"colour": ("red", "blue"), "size": ("small",), "other": ("x",)}.items():
        (pages / group).mkdir(parents=True)
        for name in names:
            (pages / group / f"{name}.yaml").touch()
    (pages / "paint.yaml").write_text(
        "# ud2m paint\n#\n# Paint a wall; sizes are in conf/size.\n"
        "defaults:\n  - colour: red   # of the wall\n  - _self_\n\n"
        "coats: 2   # more: thicker\nhidden: 1\nnested:\n  key: 3  # not told\nhydra:\n  key: 4  # not told\n"
    )
    monkeypatch.setattr(commands, "conf_folder", lambda: pages)
    told = commands.help_of("paint").splitlines()
    assert told[:3] == ["ud2m paint", "", "Paint a wall; sizes are in conf/size."]
    assert [line.split(maxsplit=1) for line in told[5:7]] == [
        ["colour=red", "of the wall"],
        ["coats=2", "more: thicker"],
    ]
    assert told[9:11] == ["  colour: blue, red", "  size: small"]
    assert "told" not in "".join(told)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_key_is_explained(name):
    """But those of nested parts, which have pages of their own."""
    lines = (commands.conf_folder() / f"{name}.yaml").read_text().partition("\nhydra:")[0].splitlines()
    keys = {line.split(":")[0] for line in lines if line[:1].isalpha() and not line.rstrip().endswith(":")}
    told = {line.split("=")[0].strip() for line in commands.help_of(name).splitlines() if "=" in line}
    assert len(keys) > 10
    assert keys <= told


def test_the_pages_of_a_clone_are_those_of_its_top_folder():
    assert commands.conf_folder() == REPOSITORY / "conf"


def test_every_folder_of_the_package_is_installed():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "ud2m").rglob("__init__.py")}
    assert set(settings["packages"]) == {".".join(folder.parts) for folder in folders} | {"ud2m.conf", "ud2m.results"}
    assert settings["package-dir"] == {"ud2m.conf": "conf", "ud2m.results": "docs/results"}
    assert settings["package-data"]["ud2m.results"] == [scores_file().name]
    pages = {page for pattern in settings["package-data"]["ud2m.conf"] for page in (REPOSITORY / "conf").glob(pattern)}
    assert pages == {path for path in (REPOSITORY / "conf").rglob("*") if path.is_file()}


def test_models_are_listed_with_their_scores_and_words_that_choose_them(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ud2m", "models"])
    commands.start()
    lines = capsys.readouterr().out.splitlines()
    table = lines[1 : lines.index("")]
    assert max(map(len, lines)) <= 125
    shipped = {path.parent.name for path in SHIPPED.glob("*/psi.safetensors")}
    assert {line.split()[0] for line in table} == {f"model={name}" for name in shipped}
    stored = json.loads(scores_file().read_text())["rows"]
    rows = {row["method"]: row for row in stored if row["operator"] == "inpainting"}
    for name in shipped:
        settings = json.loads((SHIPPED / name / "config.json").read_text())
        own = [line for line in table if line.startswith(f"model={name} ")]
        assert len(own) == (5 if name.endswith("_general") else 1)
        assert all(f" {settings['network']['num_blocks'] * settings['sampler']['num_steps']} " in line for line in own)
        trained = settings["sampler"]["info"]["physics"]["operator"]["class"].rpartition(".")[2].lower()
        assert len(own) > 1 or own[0].split()[1].replace("_", "") == trained
        assert not any(" -" in line for line in own)  # all are measured
    for name in ("photographs_inpainting", "photos_inpainting"):
        (line,) = [line for line in table if line.startswith(f"model={name} ")]
        row = rows[f"UD2M (model={name})"]
        assert line.split()[-4:] == [f"{row['psnr_mean']:.2f}", "dB", f"{row['lpips']:.3f}", f"{row['r']:.2f}"]
    (line,) = [line for line in table if line.startswith("model=photos_general physics=inpainting ")]
    assert f" {rows['UD2M (model=photos_general)']['lpips']:.3f} " in line
    levels = {line.split()[-9]: line.split()[-8] for line in table}
    assert levels == {row["operator"]: f"{row['sigma_y']:g}" for row in stored}
    assert "of CBSD68" in lines[-4]
    with initialize_config_dir(str(commands.conf_folder()), version_base="1.3"):
        assert f"it is {compose('sample').model}." in lines[-1]
