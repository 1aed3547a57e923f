"""The page around every report."""

import html
from collections.abc import Mapping
from typing import Any


def text_of(value: Any) -> str:
    return html.escape(str(value))


def _tag(name: str, content: str, **attributes: str) -> str:
    """Return an element; ``content`` is HTML already, attribute values are plain text (``class_``: class)."""
    return f"<{name}{_attributes(attributes)}>{content}</{name}>"


def _attributes(attributes: Mapping[str, str]) -> str:
    return "".join(f' {key.rstrip("_")}="{text_of(value)}"' for key, value in attributes.items())


def _paragraphs(text: str) -> str:
    return "".join(_tag("p", text_of(part)) for part in text.split("\n\n") if part.strip())


def html_page(title: str, style: str, body: str, script: str = "") -> str:
    """Return a page that loads nothing, and runs nothing but ``script``; ``body`` is HTML, ``title`` text."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        policy, script = f"{policy}; script-src 'unsafe-inline'", f"<script>{script}</script>\n"
    return _PAGE.format(policy=policy, title=text_of(title), style=style, body=body, script=script)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>{body}</main>
{script}</body>
</html>
"""
