"""The renderer of every page: one HTML file that loads nothing, from the templates, style and script in templates/."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ud2m.files import write_bytes
from ud2m.images import data_url, moving_url

PAGE_BYTES = 5_000_000
QUALITIES = (None, 90, 60, 30, 15)
"""Of the pictures of a page: lossless, or WebP of such a quality."""


def render_page(template: str, **content: Any) -> str:
    """Return a page as HTML; all texts are escaped.

    Its pictures are the first of ``QUALITIES`` with which it has at most ``PAGE_BYTES``, one for all of them: they are
    there to be compared.

    Args:
        template: name of a file ``NAME.html.j2`` in templates/.
        content: values that the template shows: plain ones, and the dataclasses of this folder.

    Raises:
        jinja2.UndefinedError: where the template needs a value that is not given.
    """
    source = _TEMPLATES.get_template(f"{template}.html.j2")
    for quality in QUALITIES[:-1]:
        page = _small(source.generate(content | {"quality": quality}))
        if page is not None:
            return page
    return source.render(content | {"quality": QUALITIES[-1]})


def _small(parts: Iterable[str]) -> str | None:
    """Return a page of at most ``PAGE_BYTES``; None of a larger one, as soon as that is known."""
    page, size = [], 0
    for part in parts:
        page.append(part)
        size += len(part.encode(errors="replace"))
        if size > PAGE_BYTES:
            return None
    return "".join(page)


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
_TEMPLATES.filters["data_url"] = data_url
_TEMPLATES.filters["moving_url"] = moving_url
_TEMPLATES.globals["zip"] = zip
