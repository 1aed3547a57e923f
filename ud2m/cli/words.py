"""The words of a command line: made readable for Hydra where names have signs of its grammar, and explained if not."""

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from ud2m.cli import PLACES
from ud2m.cli.settings import COMMANDS
from ud2m.names import allowed, flattened, unknown

TEXTS = ("cache", "held_out", "kernel", "mask", "masks", "model", "path", "root", "start_from", "test_list", "val_list")
"""Last parts of the keys of pages that hold names or paths."""
OPEN = {"physics": ("operator", "sigma_y", "noise", "sigma_y_range"), "loss": ("terms",)}
"""Pages that are no arguments of a class, and what may be added to them: nothing would read anything else."""
_PARSER = OverridesParser.create()
_NO_KEY = re.compile(r"Could not override '(.+?)'\.|Key '(.+?)' is not in struct")
_PREFIX = "+~"


def conf_folder() -> Path:
    """Return the folder of the configuration pages: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def readable(command: str, words: Sequence[str], conf: Path) -> list[str]:
    """Return the words of a command as Hydra reads them.

    Names and paths get quotes where Hydra would read numbers or signs of its grammar (``input=2024_01_05``,
    ``input=a(1).png``). In ``sample`` without ``physics=...`` settings of the operator are those of the model's own;
    ``resume=true`` takes the places of the data that its run had, which the page composed here may lack.

    Args:
        command: train, sample or evaluate.
        words: of the command line.
        conf: the folder of pages.

    Raises:
        ValueError: for what is no name of a page.
    """
    keys = {word.partition("=")[0].lstrip(_PREFIX) for word in words}
    sweeps = bool({"-m", "--multirun"} & set(words))
    goes_on = any(word.lower() == "resume=true" for word in words)
    own_operator = command == "sample" and "physics" not in keys
    found = []
    for word in words:
        key = word.partition("=")[0]
        if not word.startswith("-") and "=" in word:
            check_page(word, conf)
            if (goes_on and key in PLACES) or (own_operator and key.startswith("physics.")):
                word = f"++{word}"
            if is_text(key.lstrip(_PREFIX), command):
                word = quoted(word, sweeps)
        found.append(word)
    return found


def is_text(key: str, command: str = "") -> bool:
    """Return whether a key holds a name or a path."""
    field = COMMANDS[command].model_fields.get(key) if command else None
    return key.rpartition(".")[2] in TEXTS if field is None else allowed(field).startswith("a text")


def quoted(word: str, sweeps: bool = False) -> str:
    """Return ``KEY=VALUE`` with quotes around a text that Hydra would read as something else."""
    key, _, value = word.partition("=")
    try:
        override = _PARSER.parse_override(word)
        read = override.value()
        if (sweeps and override.is_sweep_override()) or read is None or isinstance(read, str | QuotedString):
            return word
    except HydraException:
        pass
    # in quotes a backslash counts as one except in front of a quote
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"{key}='{escaped}'"


def check_page(word: str, conf: Path) -> None:
    """Raise ValueError for a word that gives a group of pages something else than names."""
    key, _, value = word.partition("=")
    if "." in key or not (conf / key).is_dir():
        return
    try:
        override = _PARSER.parse_override(word)
    except HydraException:
        return  # Hydra says so
    value_read: Any = override.value()
    names = value_read if isinstance(value_read, list) else [value_read]
    if not override.is_sweep_override() and not all(isinstance(name, str | QuotedString) for name in names):
        raise ValueError(f"{key} must be the name of a page, got {value!r}; there are {', '.join(pages(conf / key))}")


def pages(folder: Path) -> list[str]:
    """Return the names of the pages in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def check_added(words: Sequence[str]) -> None:
    """Raise ValueError for a word ``+KEY=...`` that adds what nothing would read."""
    for key in (word.partition("=")[0] for word in words if word.startswith("+")):
        page, _, rest = key.lstrip("+").partition(".")
        if page in OPEN and rest and "." not in rest and rest not in OPEN[page]:
            raise ValueError(unknown(f"addition to {page}", rest, OPEN[page]))


def explained(error: Exception, command: str, words: Sequence[str], conf: Path) -> str:
    """Return in one line what Hydra says of words that it cannot compose."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown(group.lstrip("/") or "page", name, error.options)
    if isinstance(error, OverrideParseException):
        key, given, _ = error.override.partition("=")
        if not given:
            return f"{error.override!r} is no setting: these are KEY=VALUE (--help explains the keys)"
        return f"{error.override!r} cannot be read; a value with other signs than letters has quotes: \"{key}='...'\""
    text = str(error)
    missing = _NO_KEY.search(text)
    if missing:
        return no_key(missing[1] or missing[2], settings_of(command, words, conf))
    if text.startswith("Could not append"):
        key = text.split("'")[1]
        return f"{key} is there already: change it without a plus sign, {key}=..."
    if "Ambiguous value" in text:
        key = text.split("'")[1].partition("=")[0]
        return f"{key} has several values: a list is {key}=[a,b], a text with commas \"{key}='a,b'\", and -m takes each"
    cause = f": {str(error.__cause__).splitlines()[0]}" if error.__cause__ is not None else ""
    return f"{text.strip().splitlines()[0]}{cause}"


def entry_words(entry: str) -> list[str]:
    """Return the words of ``NAME [key=value ...]``; blanks inside of quotes part none.

    Raises:
        ValueError: for a quote that does not end.
    """
    try:
        return shlex.split(entry)
    except ValueError as error:
        raise ValueError(f"{entry!r}: {error}") from error


def settings_of(command: str, words: Sequence[str], conf: Path) -> dict[str, Any]:
    """Return the settings of a command with the pages that words choose, their references unresolved."""
    chosen = [word for word in words if "." not in word.partition("=")[0] and (conf / word.partition("=")[0]).is_dir()]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        composed = compose(command, chosen)
    return {str(key): value for key, value in OmegaConf.to_container(composed).items()}  # type: ignore[union-attr]


def no_key(key: str, settings: Mapping[str, Any]) -> str:
    """Return the message about a key that is not there: the nearest ones, and those beside it."""
    every, path = list(flattened(settings)), key.split(".")[:-1]
    node: Any = settings
    for depth, part in enumerate(path):
        if not isinstance(node, Mapping) or not isinstance(node.get(part), Mapping):
            path = path[:depth]
            break
        node = node[part]
    beside = ".".join(path)
    same = [other for other in every if other.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = same[:1] or get_close_matches(key, [*every, *settings], n=1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"unknown key {key!r}{hint}; known{f' in {beside}' if beside else ''}: {', '.join(map(str, node))}"
