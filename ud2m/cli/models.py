"""The models that ship with the package: what ``ud2m models`` prints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ud2m.files import parse_json
from ud2m.priors.shipped import PSI_FILE, SHIPPED
from ud2m.samplers.ud2m import PosteriorSampler

RESULTS = Path(__file__).parents[2] / "docs" / "results"
"""Stored results, in a clone; what is installed has none."""
HEADINGS = ("name", "operator", "sigma_y", "NFE", "size", "PSNR of mean", "LPIPS", "r", "try it")
MEASURED = {"psnr_mean": "{:.2f} dB", "lpips": "{:.3f}", "r": "{:.2f}"}
SIDE = "128x128"
"""Size of the pictures that scores are of."""


def models() -> str:
    """Return a table of the shipped models, with their scores on test photographs where a clone has them stored."""
    lines = [list(HEADINGS), *(line(name) for name in shipped_models())]
    shown = [k for k in range(len(HEADINGS)) if any(cells[k] not in ("", "-") for cells in lines[1:])]
    widths = {k: max(len(cells[k]) for cells in lines) for k in shown}
    table = ["  ".join(cells[k].ljust(widths[k]) for k in shown).rstrip() for cells in lines]
    note = f"Scores: {SIDE} test photographs, docs/results.md." if "LPIPS" in table[0] else "Scores: docs/results.md."
    return "\n".join([*table, "", f"{note} sigma_y is that of training, for images in [0, 1]; others may be given."])


def shipped_models() -> list[str]:
    """Return the names of the shipped models."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{PSI_FILE}"))


def line(name: str) -> list[str]:
    """Return the cells of a model."""
    sampler = PosteriorSampler.from_pretrained(name)
    physics, sigma_y = sampler.config.info.get("physics", {}), sampler.config.sigma_y
    size = sum(path.stat().st_size for path in (SHIPPED / name).iterdir())
    scores = stored_scores(name, sigma_y)
    numbers = [words.format(scores[key]) if key in scores else "-" for key, words in MEASURED.items()]
    operator = ", ".join(dict.fromkeys(classes(physics.get("operator", {})))) or "-"
    return [
        *(name, operator, f"{sigma_y:g}", str(sampler.nfe()), f"{size / 1e6:.1f} MB", *numbers),
        f"ud2m sample model={name}",
    ]


def classes(operator: Any) -> Iterator[str]:
    """Yield the names of the families that a stored operator is, or is a mixture of."""
    if isinstance(operator, Mapping):
        inside = [name for value in operator.values() for name in classes(value)]
        yield from inside or [str(operator.get("class", "")).rpartition(".")[2]]
    elif isinstance(operator, Sequence) and not isinstance(operator, str):
        for part in operator:
            yield from (name for name in classes(part) if name)


def stored_scores(name: str, sigma_y: float) -> Mapping[str, Any]:
    """Return the stored row of a model as it ships, at its noise level; nothing where there is none."""
    for path in sorted(RESULTS.glob("*.json")):
        stored = parse_json(path.read_text())
        if f"model={name} " in stored["command"]:
            for row in stored["rows"]:
                ours = row["method"].startswith("UD2M (K=") and row.get("size") == SIDE
                if ours and row.get("sigma_y") == sigma_y:
                    return row
    return {}
