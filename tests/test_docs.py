"""Documents and code agree: links lead somewhere, paths and keys exist, lists are complete, examples run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from documents import DOCUMENTS, SCRIPT, blocks, name_of
from omegaconf import OmegaConf
from tiny_training import composed

from ud2m.evaluation.scores import SCORES, Draws, build_score
from ud2m.losses.generator import GeneratorLoss
from ud2m.losses.terms import Prediction
from ud2m.physics import Denoising, GaussianBlur, Observation
from ud2m.unfolded.network import build_network
from ud2m.unfolded.warm_start import WARM_STARTS

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
        *(
            ["experiment=demo"],
            ["experiment=photos_prior"],
            ["data=folder", "data.root=x", "loss/distance=lpips", "loss/features=lpips"],
        ),
        ["data=webdataset", "data.root=x", "data.held_out=x"],
        ["experiment=moving_digits_latent", "data.root=x", "training.vae=x"],
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
