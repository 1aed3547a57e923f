"""The renderer of every page: one HTML file that loads nothing, from the templates, style and script in templates/."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ud2m.files import write_bytes


def render_page(template: str, **content: Any) -> str:
    """Return a page as HTML; all texts are escaped.

    Args:
        template: name of a file ``NAME.html.j2`` in templates/.
        content: values that the template shows: plain ones, and the dataclasses of this folder.

    Raises:
        jinja2.UndefinedError: where the template needs a value that is not given.
    """
    return _TEMPLATES.get_template(f"{template}.html.j2").render(content)


def write_page(path: str | Path, page: str) -> None:
    """Write a page atomically.

    Raises:
        OSError: when the place cannot be written or the disk is full.
    """
    write_bytes(path, page.encode(errors="replace"))  # file names may hold bytes that are no text


_TEMPLATES = Environment(
    loader=PackageLoader("ud2m.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["indented_json"] = partial(json.dumps, indent=2, ensure_ascii=False, default=str)
_TEMPLATES.globals["zip"] = zip
