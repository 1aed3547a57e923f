"""Put a trained prior or model into the package, so that it loads by name right after installation.

    python data_prep/ship_model.py runs/photos_prior/export photos_prior
    python data_prep/ship_model.py runs/photos_gaussian_blur/export photos_gaussian_blur --prior photos_prior
    python data_prep/ship_model.py runs/sharp/export-last photographs_gaussian_blur --prior photographs_prior \
        --options num_steps=5 grid_power=2.0 eta=0.0

A prior (a diffusers folder) is copied as it is. Of a model (an export) the adapter is stored in half precision, and its
reference to the prior becomes the name of the shipped one, whose fingerprint must be the one that the model was trained
on. What is copied is loaded before it gets its place. Only safetensors and JSON are copied.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

import ud2m.priors.adm
import ud2m.priors.shipped
from ud2m.files import move_into_place, parse_json, plain_name, write_json
from ud2m.priors.prior import Prior
from ud2m.priors.shipped import PSI_FILE, SCHEDULER_FILE, shipped_folder
from ud2m.priors.store import UNET_FILE
from ud2m.samplers.config import SamplerConfig
from ud2m.samplers.export import CONFIG_FILE
from ud2m.samplers.ud2m import PosteriorSampler

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PRIOR_LIMIT, MODEL_LIMIT = 4_000_000, 2_000_000
"""Largest size of a folder in bytes: the package must stay small."""


def ship(source: Path, name: str, prior: str, replace: bool = False, options: Mapping[str, Any] | None = None) -> Path:
    """Copy a prior or export folder to ``ud2m/pretrained/NAME`` and return that folder.

    Args:
        source: a diffusers folder or an export. name: what users will call it.
        prior: name of the shipped prior of an export. replace: an older one of this name gives way.
        options: of ``SamplerConfig``, that take the place of the export's.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when it is too large, is there already, or was trained on another prior than ``prior``.
    """
    target = ud2m.priors.shipped.SHIPPED / plain_name(name, "a shipped model")
    if target.exists() and not replace:
        raise ValueError(f"{target} is there already; --replace lets it give way")
    work = target.with_name(f".{name}.incomplete")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        is_prior = "_class_name" in read_json(source / UNET_FILE)
        if is_prior and options:
            raise ValueError(f"{source} is a prior, which does not sample; leave out {', '.join(options)}")
        if is_prior:
            copy_prior(source, work)
        else:
            copy_model(source, work, prior, options or {})
        check(work, PRIOR_LIMIT if is_prior else MODEL_LIMIT)
        move_into_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def copy_prior(source: Path, work: Path) -> None:
    """Copy a diffusers folder and load the copy."""
    for file in (UNET_FILE, SCHEDULER_FILE, WEIGHTS_FILE):
        copy(source / file, work / file)
    if Prior.from_pretrained(work).fingerprint != Prior.from_pretrained(source).fingerprint:
        raise ValueError(f"the copy of {source} differs from it; copy again")


def copy_model(source: Path, work: Path, prior: str, options: Mapping[str, Any]) -> None:
    """Copy an export that refers to the shipped prior, and load the copy, which checks fingerprint and options."""
    if shipped_folder(prior) is None:
        raise ValueError(f"no shipped prior is called {prior!r}; ship it first")
    config = read_json(source / CONFIG_FILE)
    config["prior"]["reference"] = prior
    config["sampler"] = SamplerConfig(**config["sampler"]).with_options(**options).stored()
    write_json(work / CONFIG_FILE, config)
    copy(source / PSI_FILE, work / PSI_FILE)
    if config["lora"]["rank"] > 0:
        copy_adapter(source, work, prior)
    PosteriorSampler.from_pretrained(work)


def copy_adapter(source: Path, work: Path, prior: str) -> None:
    """Store the adapter in half precision; it is loaded as float32."""
    half = {name: value.half() for name, value in load_file(source / ADAPTER_FILE).items()}
    overflow = [name for name, value in half.items() if not value.isfinite().all()]
    if overflow:
        raise ValueError(f"half precision cannot hold the adapter: {overflow[0]} is not finite")
    save_file(half, work / ADAPTER_FILE, metadata={"format": "pt"})
    (work / ADAPTER_FILE).chmod(0o644)  # safetensors writes files that only their owner can read
    adapter = read_json(source / ADAPTER_CONFIG_FILE)
    adapter["base_model_name_or_path"] = prior
    write_json(work / ADAPTER_CONFIG_FILE, adapter)


def check(folder: Path, limit: int) -> None:
    """Raise ValueError when the files of a folder are larger than ``limit`` bytes together, or name absolute paths."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > limit:
        raise ValueError(f"{size} bytes are too many to ship, at most {limit} are allowed; take a smaller network")
    for path in folder.glob("*.json"):
        if '"/' in path.read_text():
            raise ValueError(f"{path.name} of {folder.name} names an absolute path of this machine; remove it")


def copy(source: Path, target: Path) -> None:
    """Copy one file, readable for all."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; name the export folder of a run")
    shutil.copyfile(source, target)


def read_json(path: Path) -> dict:
    """Return the content of a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name the export folder of a run")
    return parse_json(path.read_text())


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="export folder of a run")
    parser.add_argument("name", help="what users will call it, e.g. photos_gaussian_blur")
    parser.add_argument("--prior", default="photos_prior", help="shipped prior of a model")
    parser.add_argument("--replace", action="store_true", help="replace a shipped one of this name")
    parser.add_argument(
        "--options", nargs="*", default=[], type=option, metavar="KEY=VALUE", help="how the model samples by default"
    )
    return parser


def option(text: str) -> tuple[str, Any]:
    """Return key and value of an option of sampling."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} sets nothing; write a key and a value, as num_steps=5")
    return key, yaml.safe_load(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ship one folder."""
    options = parser().parse_args(arguments)
    folder = ship(options.source, options.name, options.prior, options.replace, dict(options.options))
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>9d}  {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
