"""The commands of the documents, of the Makefile and of the results' script compose and run."""

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
from conftest import REPOSITORY
from documents import DOCUMENTS, SCRIPT, blocks, name_of
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tiny import SIZE, save_tiny_prior
from tiny_training import command_line, composed, tiny_overrides, write_images

from ud2m.cli import as_override, pages
from ud2m.cli.commands import MODELS, TASKS
from ud2m.evaluation.scores import SCORES, build_score
from ud2m.images import write_image

sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "data_prep")]

OTHER_COMMANDS = ("make", "tensorboard", "pip")
Command = tuple[str, ...]


def words(line: str) -> Command:
    """Return the words of a command line, without comments and environment variables."""
    found = shlex.split(line, comments=True)
    return tuple(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", word), found))


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
    parts = [
        part
        for names in re.findall(r'^(?:PARTS|ON_FOLDERS)="(.+)"', SCRIPT.read_text(), re.M)
        for part in names.split()
    ]
    assert len(parts) > 20
    copy = tmp_path / "copy" / SCRIPT.relative_to(REPOSITORY)
    copy.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, copy)
    script = ["bash", str(copy), "models", *parts]
    given = {"PYTHON": str(stub), "PHOTOGRAPHS": "photographs", "CBSD68": "cbsd68"}
    done = subprocess.run(script, env=os.environ | given, capture_output=True, text=True, check=True)
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
    rest = [as_override(word) for word in rest]
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


def informative(commands: Iterable[Command]) -> Iterator[Command]:
    """Yield the commands that hold an override which no earlier one held; where files lie makes no difference."""
    seen: set[tuple[str, str]] = set()
    for command in commands:
        overrides = [w for w in command[1:] if not w.startswith(("run_dir=", "output=", "model=", "prior=", "input="))]
        new = {(command[1], word) for word in overrides} - seen
        seen |= new
        if new:
            yield command


@pytest.mark.slow
def test_every_command_of_the_documents_composes(tmp_path):
    found = {command: name for name, command in itertools.chain(fenced_commands(), inline_commands())}
    commands = [command for command in found if is_hydra(command)]
    assert len(commands) > 40
    for command in informative(commands):
        try:
            compose_all(command, tmp_path)
        except (HydraException, OmegaConfBaseException) as error:
            pytest.fail(f"{found[command]}: {shlex.join(command)}: {error}")


@pytest.mark.slow
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
    parts = set(re.findall(r"^([a-z0-9_]+)\(\) \{", SCRIPT.read_text(), re.MULTILINE))
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
        elif command[0] == "ud2m":
            assert command[1:] == (MODELS,), command
        else:
            assert command[0] in OTHER_COMMANDS, command
            if command[0] == "make":
                assert set(command[1:]) <= targets, command


def test_make_demo_and_make_test_are_the_first_commands_of_the_readme():
    first = blocks(REPOSITORY / "README.md", "bash")[0]
    assert [words(line) for line in first.splitlines()] == [("make", "demo"), ("make", "test")]


def test_the_commands_of_the_makefile_compose(tmp_path):
    recipes = (REPOSITORY / "Makefile").read_text().replace("$(BIN)/", "").replace("$(RUN)", "runs/x")
    lines = recipes.replace("\\\n", " ").splitlines()
    commands = [words(line) for line in lines if re.match(r"\t(python (train|sample)\.py|ud2m )", line)]
    assert len(commands) >= 3
    for command in commands:
        compose_all(command, tmp_path)


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
