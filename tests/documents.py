"""The documents, and the code blocks in them."""

import re
from pathlib import Path

from conftest import REPOSITORY

DOCUMENTS = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data_prep/README.md")),
        *(REPOSITORY / "docs").glob("*.md"),
    ]
)
SCRIPT = REPOSITORY / "benchmarks" / "run_results.sh"


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
