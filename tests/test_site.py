"""The documents as a site, with the API: what `make docs` builds."""

import os
import re
import shlex
import subprocess
import sys
from html import unescape

import pytest
import yaml
from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def pages(nav) -> list[str]:
    """The files of a navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages(part)]


def test_every_document_is_a_page_of_the_site():
    text = (REPOSITORY / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("nav:") : text.index("validation:")])["nav"]
    assert sorted(pages(nav)) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    made = re.search(r"^docs: install\n\t(.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert made
    words = shlex.split(made[1].replace("$(BIN)/python", shlex.quote(sys.executable)))
    command = ["env", *(word for word in words if word != "--quiet"), "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "warning" not in shown.lower()
    api = unescape(re.sub(r"<[^>]+>", "", (tmp_path / "site" / "api.html").read_text()))
    # the class, an argument of its call, and a method
    for words in ("Draw posterior samples p(x | y) in K N network", "samples per observation.", "push_to_hub"):
        assert words in api
    assert "_check_image" not in api
    assert r"\(x_0\)" in (tmp_path / "site" / "method.html").read_text()
    assert 'class="mermaid"' in (tmp_path / "site" / "architecture.html").read_text()
    assert (tmp_path / "site" / "quickstart.ipynb").is_file()
