"""Bad inputs for the commands and the Python API, made from what they say of themselves: is each one a clear line?

    python benchmarks/bad_input.py [--store]

Every setting of the commands (``ud2m.cli.settings``) is given each of ``WORDS``, and its name is misspelt; the options
of sampling, the arguments of operators, losses and samplers with a latent prior, and what networks are compiled by are
given each of ``OBJECTS``. All run in this process: commands up to where they would begin to load a model or data,
samplers with the shipped pipelines. Counted are

* clear: refused in one line that names the key or the value;
* unclear: refused in another way;
* traceback: anything else that was raised;
* accepted, with a reason: the value is right for this setting;
* silent: accepted without one.
"""

import argparse
import io
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from results import store
from ud2m.cli import app, commands, evaluate, sample, train
from ud2m.cli.objects import build
from ud2m.cli.settings import COMMANDS
from ud2m.names import allowed
from ud2m.priors.latent import LatentPrior
from ud2m.priors.prior import Prior
from ud2m.samplers.config import SamplerConfig

WORDS = ("abc", "null", "true", "-1", "0", "1.5", "1e30", "nan", "[1,2]", "{a:1}", "''")
OBJECTS = ("abc", None, True, -1.0, math.nan, math.inf, [1, "a"], {"a": 1})
MODULES = {"train": train, "sample": sample, "evaluate": evaluate, "app": app}
PARTS = {
    "operator": ({"_target_": "ud2m.physics.GaussianBlur", "width": 1.6, "boundary": "circular"}, ["widht"]),
    "mask": ({"_target_": "ud2m.physics.Inpainting", "missing": 0.3}, ["mising"]),
    "loss": ({"_target_": "ud2m.losses.EnergyScore", "patch_size": 8, "spread": 1.0, "num_outputs": 2}, ["size"]),
    "levels": ({"_target_": "ud2m.training.Levels", "num_steps": 3, "grid_power": 5.0, "spread": 0.25}, ["power"]),
}
"""Pages of parts with their arguments, and names that they do not have."""
SAMPLERS = ("latino", "latino_pro", "latino_scores", "lvtino", "vision_xl")
"""Pages of ``conf/sampler``."""
LOADING = ("reference", "image_reference", "guidance", "dtype", "vae_dtype")
"""Their arguments that belong to the prior."""

Case = tuple[str, str, Any, Callable[[], object]]


class Begun(BaseException):
    """The settings were accepted: the command would begin its work."""


def cases() -> Iterator[Case]:
    """Yield place, key, value and call of every bad input."""
    for command, settings in COMMANDS.items():
        for key in settings.model_fields:
            for value in WORDS:
                yield command, key, value, lambda c=command, w=f"{key}={value}": run(c, w)
            for word in (f"{key}x=1", f"+{key}x=1"):
                yield command, f"{key}x", "1", lambda c=command, w=word: run(c, w)
    for name in SamplerConfig.__dataclass_fields__:
        for value in OBJECTS:
            yield "Python, sampling", name, value, lambda n=name, v=value: SamplerConfig(**{n: v})
    for place, (page, misspelt) in PARTS.items():
        for name in [*list(page)[1:], *misspelt]:
            for value in OBJECTS:
                yield f"Python, {place}", name, value, lambda p=page, n=name, v=value: build(p | {n: v}, n)
    for sampler in SAMPLERS:
        page = sampler_page(sampler)
        for name in [*list(page)[1:], "promt"]:
            for value in OBJECTS:
                made = made_once if name in LOADING else made_with_kept_priors
                yield f"sampler={sampler}", name, value, lambda m=made, p=page, n=name, v=value: m(p | {n: v})
        for part in ("steps", "optimizer"):
            for name in list(page.get(part, ()))[1:]:
                for value in OBJECTS:
                    changed = page | {part: page[part] | {name: value}}
                    yield f"sampler={sampler}", f"{part}.{name}", value, lambda p=changed: made_with_kept_priors(p)
    for value in (*WORDS[:1], *OBJECTS[1:]):
        yield "compile", "compile", value, lambda v=value: Prior.from_pretrained("micro_prior").compile_network(v)


def sampler_page(name: str) -> dict[str, Any]:
    """Return a page of ``conf/sampler`` as ``ud2m sample`` has it, with a prompt and two candidates."""
    with initialize_config_dir(str(commands.conf_folder()), version_base="1.3"):
        config = compose("sample", [f"sampler={name}", "prompt=a photo of a digit", "precision=float32"])
    page = OmegaConf.to_container(config, resolve=False)["sampler"]
    page = {key: OmegaConf.select(config.sampler, key) for key in page}
    page = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in page.items()}
    return page | ({"candidates": ["a zero", "a one"]} if name == "latino_scores" else {})


def made_once(page: dict[str, Any]) -> object:
    """Return the sampler of a page."""
    return build(page, "sampler")


def made_with_kept_priors(page: dict[str, Any]) -> object:
    """Return the sampler of a page, with priors that are loaded once."""
    with patch.object(LatentPrior, "from_pretrained", kept_prior):
        return build(page, "sampler")


LOAD = LatentPrior.from_pretrained


@cache
def kept_prior(reference: str, *_: Any, **options: Any) -> LatentPrior:
    """Return a pipeline that ships with the package."""
    return LOAD(reference, **options)


def run(command: str, word: str) -> None:
    """Run a command with one word up to where it would begin.

    Raises:
        ValueError: with its one line.
        RuntimeError: when it said more or less than a line.
    """

    def begun(*_: object) -> None:
        raise Begun

    errors = io.StringIO()
    HydraConfig.instance().cfg = None
    with patch.object(sys, "argv", ["ud2m", command, word]), patch.object(MODULES[command], "main", begun):
        try:
            with redirect_stderr(errors), redirect_stdout(io.StringIO()):
                commands.start()
        except SystemExit as stopped:
            lines = errors.getvalue().splitlines()
            if stopped.code == 1 and len(lines) == 1 and lines[0].startswith("error: "):
                raise ValueError(lines[0].removeprefix("error: ")) from stopped
            raise RuntimeError(f"exit {stopped.code} with {len(lines)} lines: {lines[-1:]}") from stopped


def outcome(place: str, key: str, value: Any, call: Callable[[], object]) -> tuple[str, str]:
    """Return what came of an input, and what was said; for an accepted one, why that is right."""
    try:
        call()
    except Begun:
        pass
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        names = (key.rpartition(".")[2], key.replace("reference", "pipeline"), str(value).strip("'\""))
        named = any(name in said for name in names)
        return ("clear" if named and "\n" not in said else "unclear"), said
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    reason = why_right(place, key, value)
    return ("accepted" if reason else "silent"), reason


def why_right(place: str, key: str, value: Any) -> str:
    """Return why it is right to accept a value, or nothing."""
    if place not in COMMANDS:
        if key == "info" and isinstance(value, dict):
            return "a mapping of anything is kept beside a model"
        if value is None:
            return "null is a value of this option"
        if key.endswith("prompt") and value == "abc":
            return "a prompt is any text"
        return "true is a value of this option" if key == "optimizer.checkpoint" and value is True else ""
    fields = COMMANDS[place].model_fields
    words = allowed(fields[key]) if key in fields else ""
    if value == "null" and "null" in words:
        return "null is a value of this setting"
    if value == "true" and "true or false" in words:
        return "true is a value of this setting"
    if value in ("0", "1.5", "1e30") and ("number" in words or "noise level" in words):
        return "the number is in the range of this setting"
    if words.startswith("a text") and value != "''":
        return "a name or path of one's own, which may be any text"
    return ""


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write docs/results/bad_input.json")
    return parser


def main() -> None:
    """Run all cases, print the counts and what is not clear, and store the counts."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for place, key, value, call in cases():
            found, said = outcome(place, key, value, call)
            counts.setdefault(place, Counter())[found] += 1
            if found == "accepted":
                reasons[said] += 1
            elif found != "clear":
                print(f"{found}: {place} {key}={value} {said[:200]}", flush=True)
    kinds = ("clear", "unclear", "traceback", "silent", "accepted")
    rows: list[dict[str, Any]] = [
        {"method": place, "inputs": sum(count.values())} | {kind: count[kind] for kind in kinds}
        for place, count in counts.items()
    ]
    for row in rows:
        print(row)
    note = "Accepted, since " + "; ".join(f"{why} ({number})" for why, number in reasons.most_common()) + "."
    print(note)
    if options.store:
        print(store("bad_input", "python benchmarks/bad_input.py --store", {}, rows, note))


if __name__ == "__main__":
    main()
