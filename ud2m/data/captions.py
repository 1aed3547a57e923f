"""Captions of images: a text for each, captions one a line, in a file of the image's name."""

from pathlib import Path

CAPTION_SUFFIX = ".txt"


def read_captions(image: Path) -> str:
    """Return the captions of an image file, one a line, from the text file of the same name beside it.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is empty or no text.
    """
    file = image.with_suffix(CAPTION_SUFFIX)
    if not file.is_file():
        raise FileNotFoundError(f"{image} has no captions: write them into {file.name} beside it, one a line")
    return parse_captions(file.read_bytes(), str(file))


def parse_captions(content: bytes, name: str) -> str:
    """Return the captions in a text file, one a line, without blank lines.

    Args:
        content: of the file.
        name: of the file, for errors.

    Raises:
        ValueError: when it is empty or no text.
    """
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} holds no UTF-8 text: {error}; save it as plain text") from error
    if not any(lines):
        raise ValueError(f"{name} is empty; write captions into it, one a line")
    return "\n".join(line for line in lines if line)
