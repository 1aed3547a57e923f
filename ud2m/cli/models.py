"""The models that ship with the package: what ``ud2m models`` prints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ud2m.cli.words import conf_folder
from ud2m.files import parse_json
from ud2m.priors.shipped import PSI_FILE, SHIPPED
from ud2m.samplers.ud2m import PosteriorSampler

SCORES = "models.json"
"""Of docs/results: rows of ``ud2m evaluate`` with every shipped model, measured by benchmarks/run_results.sh."""
DATA = "CBSD68"
"""Of which these scores are."""
HEADINGS = ("ud2m sample ...", "operator", "sigma_y", "NFE", "size", "PSNR of mean", "LPIPS", "r")
MEASURED = {"psnr_mean": "{:.2f} dB", "lpips": "{:.3f}", "r": "{:.2f}"}

Rows = Sequence[Mapping[str, Any]]


def models() -> str:
    """Return a table of the shipped models: the words that choose each, what it was trained for, and its scores."""
    rows: Rows = parse_json(scores_file().read_text())["rows"]
    lines = [HEADINGS, *(line for name in shipped_models() for line in lines_of(name, rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    pieces = f"{rows[0]['images']} pieces of {rows[0]['size']} of {DATA}, {rows[0]['samples']} samples each"
    chosen = OmegaConf.load(conf_folder() / "sample.yaml").model
    return "\n".join(
        [
            *table,
            "",
            f"Scores: {pieces} (docs/results.md).",
            "LPIPS: of single samples. r: their spread over the error of their mean, 1 where calibrated.",
            "sigma_y is that of the scores, and by default of samples, for images in [0, 1]; others may be given.",
            f"Without model=... it is {chosen}. What has several lines was trained on many operators.",
        ]
    )


def shipped_models() -> list[str]:
    """Return the names of the shipped models."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{PSI_FILE}"))


def scores_file() -> Path:
    """Return the file of stored scores: inside the installed package, or in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "results" / SCORES
    return inside if inside.is_file() else package.parent / "docs" / "results" / SCORES


def lines_of(name: str, rows: Rows) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a model, once for each operator that it was measured on."""
    sampler = PosteriorSampler.from_pretrained(name)
    size = sum(path.stat().st_size for path in (SHIPPED / name).iterdir())
    measured = [row for row in rows if row["method"] == f"UD2M (model={name})"]
    for row in measured or [{"operator": "-"}]:
        words = f"model={name}" + (f" physics={row['operator']}" if len(measured) > 1 else "")
        scores = [form.format(row[key]) if key in row else "-" for key, form in MEASURED.items()]
        sigma_y = row.get("sigma_y", sampler.config.sigma_y)
        numbers = (f"{sigma_y:g}", str(sampler.nfe()), f"{size / 1e6:.1f} MB")
        yield words, str(row["operator"]), *numbers, *scores
