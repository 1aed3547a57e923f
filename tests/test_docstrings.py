"""Docstrings as IDEs and Sphinx read them: each argument and each error begins a line, alone. Runs nothing."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "ud2m").rglob("*.py"))}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.Module) -> Iterator[Definition]:
    return (node for node in ast.walk(tree) if isinstance(node, Definition))


CLASSES = {node.name: node for tree in TREES.values() for node in definitions(tree) if isinstance(node, ast.ClassDef)}


def parameters(node: Definition) -> set[str]:
    """Return the names of a function's parameters; of a class those of ``__init__``, or its fields, also inherited."""
    if not isinstance(node, ast.ClassDef):
        args = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
        return {arg.arg for arg in args if arg} - {"self", "cls"}
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return parameters(part)
    fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
    bases = [CLASSES[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in CLASSES]
    return {field.id for field in fields if isinstance(field, ast.Name)}.union(*map(parameters, bases))


def entries(docstring: str, headings: str) -> list[str]:
    """Return the entries of the sections ``headings``, each with the lines that are indented below it."""
    sections = re.findall(rf"^(?:{headings}):\n((?:(?: {{4}}.*)?\n)*)", docstring + "\n", re.MULTILINE)
    lines = "\n".join(textwrap.dedent(section).strip() for section in sections)
    return re.split(r"\n(?! )", lines) if lines else []


def faults(docstring: str, known: set[str]) -> list[str]:
    """Return what is wrong: entries that do not begin with one name or hold several, and parameters without an entry.

    Without a section for them the parameters need no entries: names and types may say enough.
    """
    arguments, errors = entries(docstring, "Args|Attributes"), entries(docstring, "Raises|Warns")
    named = {entry: entry.partition(":")[0] for entry in [*arguments, *errors]}
    names = [*known, r"[\w.]*[A-Z]\w+(?:Error|Warning|Exit)"]
    found = [entry for entry in arguments if named[entry] not in known]
    found += [entry for entry in errors if not re.fullmatch(names[-1], named[entry])]
    found += [entry for entry in named if re.search(rf"[.;]\s+(?:{'|'.join(names)})(?:, \w+)*: ", entry)]
    return found + (sorted(known.difference(named.values())) if arguments else [])


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_argument_has_a_line_of_its_own(path):
    wrong = {
        f"{node.name}, line {node.lineno}": found
        for node in definitions(TREES[path])
        if (found := faults(ast.get_docstring(node) or "", parameters(node)))
    }
    assert wrong == {}


def test_the_sections_are_found():
    nodes = [node for tree in TREES.values() for node in definitions(tree)]
    documented = [node for node in nodes if entries(ast.get_docstring(node) or "", "Args|Attributes")]
    assert len(documented) > 100
    assert {type(node) for node in documented} == {ast.FunctionDef, ast.ClassDef}
    assert sum(len(entries(ast.get_docstring(node) or "", "Raises")) for node in nodes) > 100


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("Args:\n    a: one,\n        as of two: lines.\n    b: [B].", []),
        ("Args:\n    a: one. b: two.", ["a: one. b: two.", "b"]),
        ("Args:\n    a, b: both.", ["a, b: both.", "a", "b"]),
        ("Args:\n    a: one.\n    b: two.\n    c: three.", ["c: three."]),
        ("Args:\n    a: one.\n\nReturns:\n    b: two.", ["b"]),
        ("Args:\n    a: one.\n    b: two.\n    in words", ["in words"]),
        ("Raises:\n    ValueError: for a.\n    OSError: for b.", []),
        ("Raises:\n    ValueError: for a. OSError: for b.", ["ValueError: for a. OSError: for b."]),
        ("Raises:\n    ValueError, OSError: for both.", ["ValueError, OSError: for both."]),
        ("No section.", []),
    ],
)
def test_what_counts_as_a_fault(section, wrong):
    assert faults(f"Words.\n\n{section}", {"a", "b"}) == wrong


def test_the_parameters_are_those_that_a_caller_gives():
    tree = ast.parse(
        "class A:\n    x: int\n    y: int = 1\n"
        "class B:\n    w: int\n    def __init__(self, u, /, v, *rest, k=1, **more): ...\n"
    )
    assert [parameters(node) for node in tree.body] == [{"x", "y"}, {"u", "v", "rest", "k", "more"}]
    assert {"warmup", "lr"} < parameters(CLASSES["OptimizerSettings"])  # the first is a field of its base
