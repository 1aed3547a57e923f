"""Reading HTML pages as a browser would."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Collects what a page holds; fails on unbalanced tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "table" in self.open and "b" in self.open:
            self.bold.append(data)

    def images(self) -> list[tuple[dict, Image.Image]]:
        found = [attributes for tag, attributes in self.tags if tag == "img"]
        return [(a, Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1])))) for a in found]

    def picture(self, alt: str) -> tuple[dict, np.ndarray]:
        (found,) = [(a, np.array(image)) for a, image in self.images() if alt in a["alt"]]
        return found
