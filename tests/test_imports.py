"""The direction of imports, and constructs that are kept out. Reads the source; runs nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ud2m"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]

# A part may import the parts of lower floors, and of its own as long as there is no circle.
FLOORS = [
    {"noise", "output", "precision", "shard_index", "tensor_file", "usage"},
    {"schedule", "physics", "discriminator", "losses", "metrics", "calibration", "card"},
    {"prior", "prox", "tiling", "symmetry", "exact", "frechet"},
    {"warm_start", "conditioning"},
    {"unfolded"},
    {"sampler"},
    {"pipeline", "baselines", "rivals", "bridge", "methods"},
    {"images", "evaluation", "data", "report", "scores"},
    {"comparison", "training", "cells", "differences", "leaderboard"},
    {"cli"},
    {"evaluate"},
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
GROUND = FLOORS[0] | FLOORS[1]

FRAMEWORKS = {
    "lightning": {"training", "data", "cli"},
    "pytorch_lightning": set(),
    "diffusers": {"prior", "pipeline", "bridge"},
    "peft": {"prior", "pipeline"},
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "wandb": {"cli"},
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def part(path: Path) -> str:
    """Return the part of the package that a file belongs to: ``sampler``, ``physics``, ..., or ``__init__``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Yield the full names of all modules that a file imports, inside functions too."""
    package = ["ud2m", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            # ``from ud2m import prior`` imports ud2m.prior
            yield from (f"{module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "a computed name"


def name_of(function: ast.expr) -> str:
    """Return the last name of what is called: ``load`` of ``torch.load``."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def edges() -> dict[str, set[str]]:
    """Return which other parts of the package each part imports."""
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        own = {name.split(".")[1] for name in imported(path) if name.startswith("ud2m.")}
        graph.setdefault(part(path), set()).update(own - {part(path)})
    return graph


def calls(path: Path) -> Iterator[tuple[str, ast.Call, dict[str, ast.expr]]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield name_of(node.func), node, {str(keyword.arg): keyword.value for keyword in node.keywords}


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"


def test_every_part_has_a_floor():
    assert {part(path) for path in SOURCES} - {"__init__"} == set(FLOOR)


def test_imports_point_down():
    upward = [
        f"{user} (floor {FLOOR[user]}) imports {used} (floor {FLOOR[used]})"
        for user, others in edges().items()
        for used in others
        if user != "__init__" and FLOOR[used] > FLOOR[user]
    ]
    assert not upward


def test_the_ground_floor_knows_nothing_of_the_package():
    graph = edges()
    assert {user: graph[user] - FLOORS[0] for user in GROUND if graph[user] - FLOORS[0]} == {}
    assert all(not graph[user] for user in FLOORS[0])


def test_no_part_imports_itself_through_others():
    graph = edges()

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [*graph[start]]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(graph.get(node, ()))
        return seen

    assert [node for node in graph if node in reached(node)] == []


def test_the_walk_sees_the_imports_that_are_there():
    graph = edges()
    assert {"prior", "unfolded", "sampler", "physics", "output"} <= graph["pipeline"]
    assert "noise" in graph["physics"]
    assert graph["__init__"] == {"pipeline"}  # inside a function


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_stay_where_they_belong(framework):
    users = {part(path) for path in SOURCES for name in imported(path) if name.split(".")[0] == framework}
    assert users <= FRAMEWORKS[framework]


def test_scripts_hand_over_to_the_package():
    for path in SCRIPTS:
        packages = {name.split(".")[0] for name in imported(path)}
        assert packages <= {"hydra", "omegaconf", "ud2m"}
        assert all(name.startswith("ud2m.cli") for name in imported(path) if name.startswith("ud2m"))


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_constructs_that_are_kept_out(path):
    """Pitfall 15, and loading that could run a stranger's code."""
    handlers = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)]
    assert [where(path, node) for node in handlers if node.type is None] == []
    silent = [node for node in handlers if all(isinstance(line, ast.Pass) for line in node.body)]
    broad = [node for node in silent if node.type is None or name_of(node.type) in ("Exception", "BaseException")]
    assert [where(path, node) for node in broad] == []
    assert [name for name in imported(path) if name.split(".")[0] in ("pickle", "dill", "joblib", "marshal")] in (
        [],
        ["pickle.UnpicklingError"],
    )
    for name, node, keywords in calls(path):
        plain = isinstance(node.func, ast.Name)
        assert not (plain and name in ("eval", "exec", "compile")), where(path, node)
        assert "weights_only" not in keywords or not is_false(keywords["weights_only"]), where(path, node)
        if name == "load" and isinstance(node.func, ast.Attribute) and name_of(node.func.value) == "torch":
            assert "weights_only" in keywords, where(path, node)


def test_state_is_loaded_loosely_only_behind_a_check():
    loose = []
    for path in SOURCES:
        for function in ast.walk(tree(path)):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and name_of(node.func) == "load_state_dict":
                        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                        positional = node.args[1] if len(node.args) > 1 else None
                        if is_false(keywords.get("strict", positional)):
                            loose.append((part(path), function.name))
                            # the check: names are compared, and a difference raises, before anything is loaded
                            body = ast.unparse(function)
                            assert ".keys() ^" in body.split("super().load_state_dict")[0], where(path, node)
                            assert "raise ValueError" in body.split("super().load_state_dict")[0], where(path, node)
    assert loose == [("training", "load_state_dict")]
