"""Documents and code agree: commands compose, examples run, paths exist, tables and lists are complete."""

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from tiny import SIZE, adapted, save_tiny_prior, tiny_network
from tiny_training import command_line, composed, tiny_overrides, write_images

import ud2m.cli
import ud2m.priors.shipped
from ud2m.cli import pages
from ud2m.cli.commands import TASKS
from ud2m.evaluation.scores import SCORES, Draws, build_score
from ud2m.images import read_image, write_image
from ud2m.losses.generator import GeneratorLoss
from ud2m.losses.terms import Prediction
from ud2m.physics import Denoising, GaussianBlur, Observation
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig
from ud2m.unfolded.network import build_network
from ud2m.unfolded.warm_start import WARM_STARTS

sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "data_prep")]
results = importlib.import_module("results")
ship_model = importlib.import_module("ship_model")

DOCUMENTS = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data_prep/README.md")),
        *(REPOSITORY / "docs").glob("*.md"),
    ]
)
SCRIPT = REPOSITORY / "benchmarks" / "run_results.sh"
OTHER_COMMANDS = ("make", "tensorboard", "pip")
Command = tuple[str, ...]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def words(line: str) -> Command:
    """Return the words of a command line, without comments and environment variables."""
    found = shlex.split(line, comments=True)
    return tuple(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word), found))


def fenced_commands() -> Iterator[tuple[str, Command]]:
    """Yield (document, command) for every line of every bash block."""
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if command := words(line):
                    yield name_of(path), command


def inline_commands() -> Iterator[tuple[str, Command]]:
    """Yield the commands between backticks; an ellipsis stands for some value."""
    for path in DOCUMENTS:
        for line in re.findall(r"`((?:python (?:train|sample)\.py|ud2m [a-z]+) [^`\n]+)`", path.read_text()):
            full = line.replace("experiment=...", "experiment=demo").replace("=...", "=x")
            yield name_of(path), tuple(word for word in words(full) if word != "...")


def scripted_commands(tmp_path: Path) -> list[Command]:
    """Return the commands of all parts of run_results.sh, which runs with a stub in place of Python.

    It runs as a copy, where no results are that it would not make again.
    """
    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\nprintf "python"\nprintf " %q" "$@"\necho\n')
    stub.chmod(0o755)
    parts = re.search(r'^PARTS="([a-z ]+)"', SCRIPT.read_text(), re.MULTILINE)
    assert parts
    copy = tmp_path / "copy" / SCRIPT.relative_to(REPOSITORY)
    copy.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, copy)
    script = ["bash", str(copy), "models", *parts[1].split()]
    done = subprocess.run(script, env=os.environ | {"PYTHON": str(stub)}, capture_output=True, text=True, check=True)
    return [words(line) for line in done.stdout.splitlines()]


PROGRAMS: dict[Command, str] = {("python", "train.py"): "train", ("python", "sample.py"): "sample"}
PROGRAMS |= {(*how, name): name for name in TASKS for how in (("ud2m",), ("python", "-m", "ud2m"))}


def program(command: Command) -> Command | None:
    """Return the words that a command of ours begins with."""
    return next((words for words in PROGRAMS if command[: len(words)] == words), None)


def is_hydra(command: Command) -> bool:
    return program(command) is not None


def overrides_of(command: Command) -> tuple[str, list[list[str]]]:
    """Return the configuration's name, and the overrides of each run (several for a sweep)."""
    begin = program(command)
    assert begin is not None
    rest, name = list(command[len(begin) :]), PROGRAMS[begin]
    if "--config-name" in rest:
        position = rest.index("--config-name")
        name = rest[position + 1]
        del rest[position : position + 2]
    if "--cfg" in rest:
        position = rest.index("--cfg")
        del rest[position : position + 2]
    if "-m" not in rest:
        return name, [rest]
    rest.remove("-m")
    parsed = [OverridesParser.create().parse_override(word) for word in rest]
    choices = [
        [f"{o.get_key_element()}={v}" for v in values_of(o)] if o.is_sweep_override() else [word]
        for o, word in zip(parsed, rest, strict=True)
    ]
    return name, [list(run) for run in itertools.product(*choices)]


def values_of(override: Override) -> Iterable[str]:
    """Return the values of a sweep, of an interval its ends."""
    if override.is_interval_sweep():
        return [str(override.value().start), str(override.value().end)]
    return override.sweep_string_iterator()


def compose_all(command: Command, folder: Path) -> None:
    """Compose and resolve the configuration of every run of a command."""
    name, runs = overrides_of(command)
    for overrides in runs:
        with composed(*overrides, folder=folder, config_name=name) as config:
            OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        if name == "evaluate":
            with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
                for group, entries in (("method", config.methods), ("physics", config.operators)):
                    assert all(pages.part(group, pages.filled(entry, "x")) for entry in entries)
                assert all(pages.part("data", entry) for entry in config.datasets)
            assert all(build_score(metric) for metric in config.metrics if metric in SCORES and "lpips" not in metric)


# --- commands --------------------------------------------------------------------------------------------------------


def informative(commands: Iterable[Command]) -> Iterator[Command]:
    """Yield the commands that hold an override which no earlier one held; where files lie makes no difference."""
    seen: set[tuple[str, str]] = set()
    for command in commands:
        overrides = [w for w in command[1:] if not w.startswith(("run_dir=", "output=", "model=", "prior=", "input="))]
        new = {(command[1], word) for word in overrides} - seen
        seen |= new
        if new:
            yield command


def test_every_command_of_the_documents_composes(tmp_path):
    found = {command: name for name, command in itertools.chain(fenced_commands(), inline_commands())}
    commands = [command for command in found if is_hydra(command)]
    assert len(commands) > 40
    for command in informative(commands):
        try:
            compose_all(command, tmp_path)
        except (HydraException, OmegaConfBaseException) as error:
            pytest.fail(f"{found[command]}: {shlex.join(command)}: {error}")


def test_every_command_of_the_results_composes(tmp_path):
    commands = [command for command in scripted_commands(tmp_path) if is_hydra(command)]
    assert len(commands) > 60
    for command in informative(commands):
        compose_all(command, tmp_path)


def test_a_misspelt_key_is_found(tmp_path):
    for wrong in ("loss.energi=1", "physics=gausian_blur", "lora.ranks=3", "experiment=dmo"):
        with pytest.raises(HydraException):
            compose_all(("python", "train.py", "experiment=demo", wrong), tmp_path)
    with pytest.raises(HydraException):
        compose_all(("python", "sample.py", "model=x", "num_sample=2"), tmp_path)


def test_a_sweep_is_every_combination():
    _, runs = overrides_of(("python", "train.py", "-m", "a=1,2", "b=3", "c=4,5"))
    assert runs == [["a=1", "b=3", "c=4"], ["a=1", "b=3", "c=5"], ["a=2", "b=3", "c=4"], ["a=2", "b=3", "c=5"]]


def test_other_commands_exist(tmp_path):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    parts = set(re.findall(r"^([a-z]+)\(\) \{", SCRIPT.read_text(), re.MULTILINE))
    commands = [command for _, command in fenced_commands()] + scripted_commands(tmp_path)
    for command in commands:
        if is_hydra(command):
            continue
        if command[0] == "python":
            script = REPOSITORY / command[1]
            assert script.is_file(), command
            importlib.import_module(script.stem).parser().parse_args(command[2:])
        elif command[0] == "bash":
            assert REPOSITORY / command[1] == SCRIPT
            assert set(command[2:]) <= parts, command
        else:
            assert command[0] in OTHER_COMMANDS, command
            if command[0] == "make":
                assert set(command[1:]) <= targets, command


def test_make_demo_and_make_test_are_the_first_commands_of_the_readme():
    first = blocks(REPOSITORY / "README.md", "bash")[0]
    assert [words(line) for line in first.splitlines()] == [("make", "demo"), ("make", "test")]


def test_the_commands_of_the_makefile_compose(tmp_path):
    recipes = (REPOSITORY / "Makefile").read_text().replace("$(BIN)/", "").replace("$(RUN)", "runs/x")
    commands = [words(line) for line in recipes.splitlines() if re.match(r"\tpython (train|sample)\.py", line)]
    assert len(commands) >= 2
    for command in commands:
        compose_all(command, tmp_path)


# --- references ------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(page), f"{target} has no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_files_of_the_repository_exist(path):
    for name in re.findall(r"`((?:ud2m|conf|tests|docs|benchmarks|data_prep)/[\w./-]*)`", path.read_text()):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("path", [*DOCUMENTS, SCRIPT], ids=name_of)
def test_no_path_of_a_developer_is_named(path):
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text())


def test_configuration_keys_between_backticks_exist(tmp_path):
    """Such as `training.levels.spread`."""
    kinds = (
        *(["experiment=demo"], ["experiment=photos_prior"], ["data=folder", "data.root=x", "loss/distance=lpips"]),
        ["data=webdataset", "data.root=x", "data.held_out=x"],
        ["trainer=ddp", "logger=wandb"],
    )
    known = {"loss.gradient"}  # the term that docs/extending.md adds
    for overrides in kinds:
        with composed(*overrides, folder=tmp_path) as config:
            known |= set(key_paths(OmegaConf.to_container(config)))
    groups = "|".join({key.partition(".")[0] for key in known if "." in key} - {"physics"})  # physics.A is a method
    keys = [key for path in DOCUMENTS for key in re.findall(rf"`((?:{groups})(?:\.\w+)+)[`=]", path.read_text())]
    assert len(keys) > 20
    assert not set(keys) - known


def key_paths(tree: dict, above: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of nested dictionaries."""
    for key, value in tree.items():
        yield above + key
        if isinstance(value, dict):
            yield from key_paths(value, f"{above}{key}.")


# --- differences from the paper --------------------------------------------------------------------------------------


def differences() -> set[tuple[str, str]]:
    """Return (file, class or function) of every "Differs from" in the package, in docstrings and comments."""
    found = set()
    for path in sorted((REPOSITORY / "ud2m").rglob("*.py")):
        text = path.read_text()
        for number, line in enumerate(text.splitlines(), start=1):
            if "Differs from" in line:
                found.add((name_of(path), enclosing(ast.parse(text), number)))
    return found


def enclosing(tree: ast.AST, line: int) -> str:
    """Return the dotted name of the innermost class or function around a line."""
    names: list[str] = []
    node: ast.AST | None = tree
    while node is not None:
        inside = (n for n in ast.iter_child_nodes(node) if isinstance(n, ast.ClassDef | ast.FunctionDef))
        node = next((n for n in inside if n.lineno <= line <= (n.end_lineno or 0)), None)
        if node is not None:
            names.append(node.name)
    return ".".join(names)


def test_every_difference_from_the_paper_has_its_row():
    text = (REPOSITORY / "docs" / "method.md").read_text()
    rows = set(re.findall(r"^\| `(ud2m/[\w/]+\.py)` `([\w.]+)` \|", text, re.MULTILINE))
    assert differences()
    assert rows == differences()


# --- examples in Python ----------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Ship a micro prior and a micro model under the names of the documents; return the folder."""
    folder = tmp_path / "pretrained"
    monkeypatch.setattr(ud2m.priors.shipped, "SHIPPED", folder)
    save_tiny_prior(tmp_path / "prior")
    ship_model.ship(tmp_path / "prior", "photos_prior", "photos_prior")
    model = adapted(Prior.from_pretrained(tmp_path / "prior"))
    info = {"physics": {"operator": {"class": "ud2m.physics.GaussianBlur", "width": 1.6}, "sigma_y": 0.01}}
    config = SamplerConfig(num_steps=2, info=info)
    PosteriorSampler(tiny_network(model, 2), config).save_pretrained(tmp_path / "export")
    ship_model.ship(tmp_path / "export", "photos_gaussian_blur", "photos_prior")
    return folder


@pytest.mark.parametrize("name", ["README.md", "docs/sampling.md"])
def test_the_python_example_runs(name, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(torch.rand(3, 24, 32), Path("blurred.png"))
    (block,) = blocks(REPOSITORY / name, "python")
    scope: dict = {}
    exec(compile(block, name, "exec"), scope)
    assert scope["samples"].shape == (1, 8, 3, 24, 32)
    if name != "README.md":
        assert read_image("mean.png").shape == read_image("std.png").shape == (3, 24, 32)


@pytest.fixture(scope="module")
def extensions():
    """The classes of docs/extending.md."""
    scope: dict = {}
    for block in blocks(REPOSITORY / "docs" / "extending.md", "python"):
        exec(compile(block, "docs/extending.md", "exec"), scope)
    yield scope
    WARM_STARTS.pop("grey")
    SCORES.pop("mae")


def test_the_operator_of_the_guide(extensions, generator):
    physics = extensions["DiscBlur"](radius=1.0).draw(2, (3, 8, 8))  # a pixel and its four neighbours
    x = torch.rand(2, 3, 8, 8, generator=generator)
    expected = (x + sum(x.roll(shift, axis) for shift in (-1, 1) for axis in (2, 3))) / 5
    torch.testing.assert_close(physics.A(x), expected)
    assert extensions["DiscBlur"](radius=2.0, boundary="valid").image_shape((3, 8, 8)) == (3, 12, 12)
    with pytest.raises(ValueError, match="larger than the image"):
        extensions["DiscBlur"](radius=4.0).check((3, 8, 8))


def test_the_loss_of_the_guide(extensions):
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 10
    prediction = Prediction(torch.zeros(1, 3, 8, 8), ramp.unsqueeze(1), torch.ones(1), torch.zeros(1, 3, 8, 8))
    total, _ = GeneratorLoss({"gradient": (2.0, extensions["GradientL1"]())})(prediction)
    assert total.item() == pytest.approx(0.2)


def test_the_warm_start_of_the_guide(extensions):
    block = next(b for b in blocks(REPOSITORY / "docs" / "extending.md", "yaml") if "grey" in b)
    network = build_network(torch.nn.Identity(), yaml.safe_load(block))
    x = torch.zeros(1, 3, 8, 8)
    observation = Observation.of(x, GaussianBlur(0.5).draw(1, (3, 8, 8)), 1.0)
    start = network.warm_start(x, torch.ones(1), observation)
    assert torch.equal(start, torch.full_like(x, 0.5))


def test_the_metric_of_the_guide(extensions, generator):
    x0, errors = torch.full((4, 3, 8, 8), 0.5), torch.tensor([0.1, -0.1, 0.3, 0.5])
    samples = (x0 + errors.view(4, 1, 1, 1)).unsqueeze(1).repeat(1, 2, 1, 1, 1)
    score = build_score("mae")
    score.add(Draws(x0, Observation.of(x0, Denoising().draw(4, (3, 8, 8)), 1.0), 1.0, samples))
    found = score.numbers()
    assert found["mae"] == pytest.approx(0.25)
    assert 0.1 <= found["mae_low"] < 0.25 < found["mae_high"] <= 0.5


def test_the_data_set_of_the_guide(extensions):
    data = extensions["Discs"](channels=1, crop_size=32, batch_size=8, samples_per_epoch=16, val_limit=4)
    batches = list(data.train_dataloader())
    assert [tuple(batch.shape) for batch in batches] == [(8, 1, 32, 32)] * 2
    assert len(data.evaluation_set("val")) == 4
    assert 0.02 < batches[0].mean() < 0.25  # a quarter disc in a corner ... a whole one, pi / 16


def test_the_yaml_of_the_guide_is_valid():
    for block in blocks(REPOSITORY / "docs" / "extending.md", "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


# --- results ---------------------------------------------------------------------------------------------------------

ROWS = [
    {"method": "A | b", "data": "photos", "size": "32x32", "nfe": 0, "psnr": 20.004, "r": None, "setting": "x"},
    {"method": "ours", "data": "photos", "size": "32x32", "nfe": 9, "psnr": 30.0, "r": 0.5, "setting": None},
]


def output_folder(path: Path, rows: list[dict], **config: object) -> Path:
    """Write what sample.py leaves behind."""
    trained = {
        "sigma_y": 0.01,
        "info": {"physics": {"operator": {"class": "ud2m.physics.GaussianBlur"}, "sigma_y": 0.01}},
    }
    settings = {
        "data": {"_target_": "ud2m.data.PhotoData", "crop_size": 32, "tile_size": None},
        "physics": None,
        "sigma_y": None,
        "output": str(path),
        "trained": trained,
    }
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(rows))
    (path / "config.json").write_text(json.dumps(settings | config))
    return path


def test_documents_show_the_stored_results():
    assert results.DOCUMENT.read_text() == results.render_document(), "run: python benchmarks/results.py render"
    readme = results.README.read_text()
    assert readme == results.render_readme(readme), "run: python benchmarks/results.py render"


def test_every_stored_result_is_whole_and_shown():
    names = {section.name for section in results.SECTIONS}
    for path in results.RESULTS.glob("*.json"):
        assert path.stem in names
        content = results.load(path.stem)
        assert content["command"]
        assert content["machine"]
        assert not re.search(r'[" =]/\w', path.read_text()), "an absolute path"


def test_the_readme_shows_sections_that_exist():
    names = {section.name for section in results.SECTIONS}
    shown = [
        name for match in results.MARKED.finditer(results.README.read_text()) for name in match["names"].split(",")
    ]
    assert len(shown) > 8
    assert set(shown) <= names


def test_a_table_has_the_formats_of_the_report():
    assert results.table(ROWS, ["method", "nfe", "psnr", "r"]).splitlines() == [
        "| Method | NFE | PSNR [dB] | r |",
        "| --- | ---: | ---: | ---: |",
        "| A \\| b | 0 | 20.00 | – |",
        "| ours | 9 | **30.00** | 0.50 |",
    ]


def test_levels_of_denoising_get_headings_and_winners():
    rows = [{"method": "a", "psnr@0.05": 30.123}, {"method": "b", "psnr@0.05": 31.0}]
    assert results.table(rows).splitlines() == [
        "| Method | σ = 0.05 |",
        "| --- | ---: |",
        "| a | 30.12 |",
        "| b | **31.00** |",
    ]


def test_missing_results_are_named(tmp_path):
    text = "a\n<!-- results:prior,losses method psnr -->\nold\n<!-- /results -->\nz\n"
    expected = (
        "a\n<!-- results:prior,losses method psnr -->\nNot measured yet: `prior`, `losses`.\n<!-- /results -->\nz\n"
    )
    assert results.render_readme(text, tmp_path) == expected
    assert results.render_document(tmp_path).count(results.NOT_MEASURED) == len(results.SECTIONS)
    results.store("prior", "python x.py", {}, ROWS, folder=tmp_path)
    once = results.render_readme(text, tmp_path)
    assert "| ours | **30.00** |" in once
    assert "\n\nNot measured yet: `losses`.\n" in once
    assert "old" not in once
    assert results.render_readme(once, tmp_path) == once
    assert "```bash\npython x.py\n```" in results.render_document(tmp_path)


def test_collecting_takes_all_rows_or_the_last_one_under_a_label(tmp_path):
    whole = output_folder(tmp_path / "a", [{"method": "LATINO", "psnr": 1.0}, {"method": "UD2M", "psnr": 2.0}])
    labelled = output_folder(
        tmp_path / "b",
        [{"method": "LATINO", "psnr": 3.0}, {"method": "UD2M", "psnr": 4.0}],
        sigma_y=0.05,
        physics={"operator": {"_target_": "ud2m.physics.SuperResolution"}, "sigma_y": 0.02},
        data={"_target_": "ud2m.data.MnistData", "crop_size": 32, "tile_size": 64},
    )
    rows, configs = results.collect([str(whole), f"UD2M, sigma_y = 0.05={labelled}"])
    assert [(row["method"], row["psnr"]) for row in rows] == [
        ("LATINO", 1.0),
        ("UD2M", 2.0),
        ("UD2M, sigma_y = 0.05", 4.0),
    ]
    settings = [tuple(row[key] for key in results.SETTING) for row in rows]
    assert settings[0] == settings[1] == ("photos", "32x32", "Gaussian blur", 0.01)
    assert settings[2] == ("mnist", "64x64", "Super resolution", 0.05)
    assert set(configs) == {"a", "b"}
    assert "output" not in configs["a"]
    with pytest.raises(FileNotFoundError, match="output folder of sample"):
        results.collect([str(tmp_path / "c")])


def test_an_evaluation_is_collected_and_shown_with_its_intervals(tmp_path):
    common = {"data": "photos", "size": "32x32", "sigma_y": 0.01, "images": 5, "samples": 2, "seed": 0, "nfe": 9}
    common |= {"lpips": 0.1, "lpips_backend": "alex 1", "peak_memory": 77.0}
    rows = [
        {"method": name, "operator": operator, "psnr": psnr, "psnr_low": psnr - 1, "psnr_high": psnr + 1} | common
        for operator in ("blur", "jpeg")
        for name, psnr in (("a", 30.0), ("b", 31.0))
    ]
    folder = tmp_path / "evaluated"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(rows))
    (folder / "settings.json").write_text(json.dumps({"config": {"name": "evaluated"}, "cells": []}))
    found, configs = results.collect([str(folder)])
    assert found == rows
    assert configs == {"evaluated": {"name": "evaluated"}}
    content = {"rows": found, "note": "", "command": "python x.py", "machine": "m"}
    text = results.render_section(results.SECTIONS[0], content)
    assert "| blur | b | 9 | **31.00 [30.00, 32.00]** | 0.100 |" in text.replace("**0.100**", "0.100")
    assert (
        "lpips: network alex 1; data photos, size 32x32, sigma_y 0.01, images 5, samples 2, seed 0; in brackets" in text
    )
    assert "77" not in text


def test_what_must_not_be_stored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="paths of this machine"):
        results.store("prior", "python x.py --prior /somewhere/else", {}, ROWS, folder=tmp_path)
    with pytest.raises(ValueError, match="no section"):
        results.store("priors", "python x.py", {}, ROWS, folder=tmp_path)
    path = results.store("prior", f"python {REPOSITORY}/x.py", {}, ROWS, folder=tmp_path)
    assert json.loads(path.read_text())["command"] == "python x.py"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="measure it again"):
        results.load("prior", tmp_path)


# --- the prior beside classical methods ------------------------------------------------------------------------------


def test_the_best_setting_is_the_one_of_highest_psnr():
    denoising = importlib.import_module("prior_denoising")
    x0 = torch.full((4, 3, 32, 32), 0.5)
    noisy = denoising.add_noise(x0, 0.1)
    assert (noisy - x0).std().item() == pytest.approx(0.1, rel=0.05)
    settings = [denoising.Setting(f"{w:g}", lambda y, w=w: 0.5 + w * (y - 0.5)) for w in (1.0, 0.2, 0.6)]
    assert denoising.best_setting(settings, noisy, x0).words == "0.2"
    # white noise of standard deviation w sigma
    assert denoising.mean_psnr(settings[2].denoise, noisy, x0) == pytest.approx(24.437, abs=0.1)


def test_the_prior_is_measured_beside_classical_methods(shipped):
    denoising = importlib.import_module("prior_denoising")
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    rows = denoising.measure(Prior.from_pretrained("photos_prior"), {32: ramp}, levels=(0.1,))
    scores = {row["method"]: row["psnr@0.1"] for row in rows}
    assert scores["noisy image"] == pytest.approx(20.5, abs=0.5)
    assert min(scores["non-local means"], scores["total variation (Chambolle)"]) > 25
    assert "σ = 0.1: weight" in rows[1]["setting"]
    assert rows[-1]["method"] == "prior"


def test_the_picture_has_a_row_per_operator(shipped, tmp_path, monkeypatch):
    overview = importlib.import_module("overview_picture")
    monkeypatch.setattr(overview, "SIDE", 32)
    path = tmp_path / "new" / "overview.png"
    overview.main(["--models", *["photos_gaussian_blur"] * 3, "--output", str(path)])
    _, height, width = read_image(path).shape
    assert width / height == pytest.approx(7 / 3, rel=0.15)


# --- shipping --------------------------------------------------------------------------------------------------------


def test_a_shipped_model_equals_the_export(shipped, tmp_path):
    files = {path.name for path in (shipped / "photos_gaussian_blur").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "config.json", "psi.safetensors"}
    adapter = load_file(shipped / "photos_gaussian_blur" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float16}
    ours = PosteriorSampler.from_pretrained("photos_gaussian_blur")
    export = PosteriorSampler.from_pretrained(tmp_path / "export")
    assert ours.prior.reference == "photos_prior"
    assert ours.config == export.config
    theirs = export.network.state_dict()
    for name, value in ours.network.state_dict().items():
        assert value.dtype == theirs[name].dtype
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-3)


def test_a_model_of_rank_zero_ships_without_adapter(shipped, tmp_path):
    prior = Prior.from_pretrained(tmp_path / "prior")
    PosteriorSampler(tiny_network(prior, 1)).save_pretrained(tmp_path / "psi_only")
    folder = ship_model.ship(tmp_path / "psi_only", "psi_only", "photos_prior")
    assert {path.name for path in folder.iterdir()} == {"config.json", "psi.safetensors"}


def test_what_must_not_be_shipped_is_refused(shipped, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in shipped.rglob("*") if path.is_file()}
    save_tiny_prior(tmp_path / "other", seed=1)
    ship_model.ship(tmp_path / "other", "other_prior", "")
    with pytest.raises(ValueError, match="fingerprint"):
        ship_model.ship(tmp_path / "export", "model", "other_prior")
    with pytest.raises(ValueError, match="ship it first"):
        ship_model.ship(tmp_path / "export", "model", "no_prior")
    with pytest.raises(ValueError, match="--replace"):
        ship_model.ship(tmp_path / "export", "photos_gaussian_blur", "photos_prior")
    with pytest.raises(ValueError, match="plain name"):
        ship_model.ship(tmp_path / "export", "../model", "photos_prior")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ship_model.ship(tmp_path / "nowhere", "model", "photos_prior")
    monkeypatch.setattr(ship_model, "MODEL_LIMIT", 1000)
    with pytest.raises(ValueError, match="too many"):
        ship_model.ship(tmp_path / "export", "photos_gaussian_blur", "photos_prior", replace=True)
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in shipped.iterdir()} == {"photos_prior", "photos_gaussian_blur", "other_prior"}


def test_replacing_a_shipped_prior(shipped, tmp_path):
    save_tiny_prior(tmp_path / "other", seed=1)
    ship_model.ship(tmp_path / "other", "photos_prior", "", replace=True)
    assert Prior.from_pretrained("photos_prior").fingerprint == Prior.from_pretrained(tmp_path / "other").fingerprint
    assert not list(shipped.glob(".*"))


# --- for real --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    """The README's training on one's own images and its sampling of one's own file, in miniature."""
    train, sample = (
        next(command for name, command in fenced_commands() if name == "README.md" and set(part) <= set(command))
        for part in (["prior=runs/my_prior/export", "run_dir=runs/my_run"], ["model=runs/my_run/export"])
    )
    save_tiny_prior(tmp_path / "prior")
    images = write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    write_image(torch.rand(3, SIZE, SIZE), "photo.png")
    assert command_line(*train[2:], *tiny_overrides(str(tmp_path / "prior"), images)) == 0
    assert {path.name for path in Path("runs/my_run/export").iterdir()} > {"config.json", "psi.safetensors"}
    script = [sys.executable, str(REPOSITORY / "sample.py"), *sample[2:], "output=out", "num_samples=2"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert {"report.html", "metrics.json", "mean.png", "std.png", "samples"} <= {p.name for p in Path("out").iterdir()}
    (row,) = json.loads(Path("out/metrics.json").read_text())
    assert row["psnr"] > 0
