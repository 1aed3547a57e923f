"""The house: which folder may import which, drawn from one list, and constructs that are kept out. Runs nothing."""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ud2m"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOORS = {"__init__", "__main__"}
"""What users enter by: they lie on no floor."""

FLOORS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["house"]["floors"]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_ROOMS, MOST_ARROWS = 20, 70

FRAMEWORKS = {
    "lightning": {"training", "data", "cli"},
    "pytorch_lightning": set(),
    "diffusers": {"priors", "samplers"},
    "peft": {"priors", "samplers"},
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "wandb": {"cli"},
    "jinja2": {"reports"},
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def room(path: Path) -> str:
    """Return the folder or module of the package that a file belongs to: ``samplers``, ``images``, or ``__init__``."""
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
            # ``from ud2m import prior`` imports ud2m.priors.adm
            yield from (f"{module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "a computed name"


def name_of(function: ast.expr) -> str:
    """Return the last name of what is called: ``load`` of ``torch.load``."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def edges() -> dict[str, set[str]]:
    """Return which other rooms each room imports."""
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        own = {name.split(".")[1] for name in imported(path) if name.startswith("ud2m.")}
        graph.setdefault(room(path), set()).update(own - {room(path)})
    return graph


def calls(path: Path) -> Iterator[tuple[str, ast.Call, dict[str, ast.expr]]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield name_of(node.func), node, {str(keyword.arg): keyword.value for keyword in node.keywords}


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"


def drawing() -> str:
    """Return the house as a mermaid chart: floors of rooms, and an arrow from each room to those that it imports."""
    lines = ["flowchart BT"]
    for number, rooms in enumerate(FLOORS):
        lines.append(f'    subgraph F{number} ["{number + 1}"]')
        lines.append(f"        {'; '.join(rooms)}")
        lines.append("    end")
    graph = edges()
    for user in FLOOR:
        lines += [f"    {user} --> {used}" for used in sorted(graph[user], key=lambda name: (FLOOR[name], name))]
    return "\n".join(lines)


def test_every_room_has_a_floor():
    assert {room(path) for path in SOURCES} - DOORS == set(FLOOR)


def test_imports_point_down():
    upward = [
        f"{user} (floor {FLOOR[user] + 1}) imports {used} (floor {FLOOR[used] + 1})"
        for user, others in edges().items()
        for used in others
        if user not in DOORS and FLOOR[used] > FLOOR[user]
    ]
    assert not upward


def test_the_house_stays_small():
    graph = {user: used for user, used in edges().items() if user not in DOORS}
    assert len(graph) <= MOST_ROOMS
    assert sum(len(used) for used in graph.values()) <= MOST_ARROWS


def test_the_drawing_is_that_of_the_house():
    """Run this file as a program to draw it anew."""
    assert f"```mermaid\n{drawing()}\n```" in ARCHITECTURE.read_text()


def test_no_module_name_stands_for_two_modules():
    names = Counter(path.stem for path in SOURCES if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_name_has_two_meanings():
    """Of public classes and functions at the top of a module; ``main`` is what a command calls."""
    where: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in tree(path).body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef)
                and not node.name.startswith("_")
                and node.name != "main"
            ):
                where.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def modules() -> dict[str, set[str]]:
    """Return which modules each module imports, by their full names."""
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        used = set()
        for name in imported(path):
            used |= {end for end in (name, name.rpartition(".")[0]) if end in named and end != own}
        graph[own] = used
    return graph


@pytest.mark.parametrize("graph", [edges, modules], ids=["rooms", "modules"])
def test_nothing_imports_itself_through_others(graph):
    graph = graph()

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
    assert {"priors", "unfolded", "physics", "files"} <= graph["samplers"]
    assert "random" in graph["physics"]
    assert "samplers" in graph["__init__"]  # inside a function


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_stay_where_they_belong(framework):
    users = {room(path) for path in SOURCES for name in imported(path) if name.split(".")[0] == framework}
    assert users <= FRAMEWORKS[framework]


def test_scripts_hand_over_to_the_package():
    for path in SCRIPTS:
        packages = {name.split(".")[0] for name in imported(path)}
        assert packages <= {"hydra", "omegaconf", "ud2m"}
        assert all(name.startswith("ud2m.cli") for name in imported(path) if name.startswith("ud2m"))


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_constructs_that_are_kept_out(path):
    """Bare handlers, silent ones, and loading that could run code from a file."""
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
                            loose.append((room(path), function.name))
                            # the check: names are compared, and a difference raises, before anything is loaded
                            body = ast.unparse(function)
                            assert ".keys() ^" in body.split("super().load_state_dict")[0], where(path, node)
                            assert "raise ValueError" in body.split("super().load_state_dict")[0], where(path, node)
    assert loose == [("training", "load_state_dict")]


if __name__ == "__main__":
    text = re.sub(
        r"```mermaid\n.*?\n```", lambda _: f"```mermaid\n{drawing()}\n```", ARCHITECTURE.read_text(), flags=re.S
    )
    ARCHITECTURE.write_text(text)
