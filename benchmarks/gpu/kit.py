"""The parts of run.sh, each within its share of the time."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from xml.etree import ElementTree

from deadline import run_for
from ud2m.files import write_json

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SHARES = {"check": 0.25, "bench": 0.5, "train": 1.0}
"""What a part may take of the time that is left when it begins."""
SCALES = ("real", "tiny")
SPARE = 30.0
"""Seconds that a part keeps to write its results."""


@dataclass(frozen=True)
class Settings:
    """What run.sh is told.

    Attributes:
        minutes: for all parts together.
        scale: ``real``, or ``tiny``: the same parts on a CPU in seconds.
        prior: that the training goes on with, a name or a folder; by default the largest shipped one.
        photographs: folder to train on; where it is not there, the dozen that ship inside installed packages.
        models: experiments, separated by commas, that are trained on the new prior.
    """

    minutes: float = 12.0
    scale: str = "real"
    prior: str = ""
    photographs: str = "benchmarks/gpu/photographs"
    models: str = "photos_general"

    @classmethod
    def of(cls, words: Sequence[str]) -> "Settings":
        """Read ``key=value`` words.

        Raises:
            ValueError: for an unknown key, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        given = dict(word.partition("=")[::2] for word in words)
        unknown = [word for word in words if "=" not in word] + sorted(given.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; there are {', '.join(f'{name}=' for name in known)}")
        try:
            minutes = float(given.pop("minutes", cls.minutes))
        except ValueError as error:
            raise ValueError(f"minutes must be a number, got {words}") from error
        settings = cls(minutes=minutes, **given)
        if not 0 < settings.minutes < 1e4 or settings.scale not in SCALES:
            raise ValueError(
                f"minutes must be positive and scale one of {', '.join(SCALES)}, got {settings.minutes:g} and "
                f"{settings.scale!r}"
            )
        return settings


def check(settings: Settings, out: Path, seconds: float) -> bool:
    """Run the tests marked ``gpu`` and write ``check.json``: outcome, seconds and message of each."""
    report = out / "check.xml"
    report.unlink(missing_ok=True)
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=-q", f"--junitxml={report}"]
    status = run_for([sys.executable, "-m", "pytest", *options, str(REPOSITORY / "tests" / "test_gpu.py")], seconds)
    tests = cases(report) if report.is_file() else {}
    report.unlink(missing_ok=True)
    write_json(out / "check.json", {"exit status": status, "tests": tests})
    return status == 0


def cases(report: Path) -> dict[str, dict[str, object]]:
    """Return what became of each test of a JUnit file."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        worst = next(iter(case), None)
        outcome = "passed" if worst is None or worst.tag.startswith("system") else worst.tag
        message = "" if worst is None else worst.get("message", "")
        found[case.get("name", "")] = {"outcome": outcome, "seconds": float(case.get("time", 0)), "message": message}
    return found


def bench(settings: Settings, out: Path, seconds: float) -> bool:
    """Run bench.py, which writes ``bench.json``."""
    minutes = max(seconds - SPARE, 1) / 60
    options = ["--scale", settings.scale, "--minutes", f"{minutes:.2f}"]
    return run_for([sys.executable, str(HERE / "bench.py"), str(out), *options], seconds) == 0


def train(settings: Settings, out: Path, seconds: float) -> bool:
    """Run go_on.py, which writes ``train.json`` and the weights."""
    options = ["--scale", settings.scale, "--prior", settings.prior, "--photographs", settings.photographs]
    options += ["--models", settings.models, "--seconds", f"{seconds - SPARE:.0f}"]
    return run_for([sys.executable, str(HERE / "go_on.py"), str(out), *options], seconds) == 0


PARTS = {"check": check, "bench": bench, "train": train}


def main(arguments: Sequence[str]) -> int:
    """Run one part or all, and return the exit status: 0 when all went well."""
    began = time.monotonic()
    part, *words = arguments or [""]
    if part not in (*PARTS, "all"):
        raise ValueError(f"the part must be one of {', '.join(PARTS)} and all, got {part!r}")
    settings = Settings.of(words)
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    chosen = list(PARTS) if part == "all" else [part]
    went = {}
    for name in chosen:
        left = 60 * settings.minutes - (time.monotonic() - began)
        share = SHARES[name] if part == "all" else 1.0
        print(f"== {name}: at most {share * left:.0f} s", flush=True)
        started = time.monotonic()
        went[name] = {"went well": PARTS[name](settings, out, share * left), "seconds": time.monotonic() - started}
    write_json(out / "run.json", {"settings": vars(settings), "parts": went})
    print(json.dumps(went, indent=1))
    return 0 if all(part["went well"] for part in went.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
