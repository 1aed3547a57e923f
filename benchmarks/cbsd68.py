"""Measure priors as Gaussian denoisers on CBSD68, the field's usual colour test set, beside published figures.

    python benchmarks/cbsd68.py FOLDER [--prior NAME ...] [--averaged NAME ...] [--samples PICTURE]

FOLDER holds the 68 images (481x321 or 321x481) as ``cbsd68_*`` or alone. Writes ``docs/results/cbsd68.json``: the mean
over images of the PSNR in dB at sigma = 15, 25 and 50 of 255, one network evaluation per image at full size. The noise
of an image depends on its name and the level alone; nothing is clipped before, and the result is clipped to [0, 1].
``--averaged`` measures priors also by eight evaluations per image, in the orientations of the square. ``--samples``
draws 16 pictures from the last prior alone by 50 DDIM steps of diffusers, to look at.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from prior_denoising import Denoiser, with_prior
from results import store
from ud2m.evaluation.metrics import psnr
from ud2m.images import list_images, read_image, write_image
from ud2m.priors.prior import Prior

LEVELS = (15, 25, 50)
"""Standard deviations of the noise, of 255."""
COUNT = 68
PUBLISHED = {
    "CBM3D (Dabov et al., 2007)": (33.52, 30.71, 27.38),
    "FFDNet (Zhang et al., 2018)": (33.87, 31.21, 27.96),
    "DnCNN (Zhang et al., 2017), a network per level": (33.90, 31.24, 27.95),
    "DRUNet (Zhang et al., 2021)": (34.30, 31.69, 28.51),
}
"""PSNR in dB at ``LEVELS``, as the last of these papers lists it (DnCNN: as the second one does)."""


def images_of(folder: Path) -> dict[str, Tensor]:
    """Return the images [3, H, W] of the test set by name.

    Raises:
        ValueError: when the folder does not hold 68 images.
    """
    paths = list_images(folder)
    paths = [path for path in paths if path.name.startswith("cbsd68_")] or paths
    if len(paths) != COUNT:
        raise ValueError(f"{folder} holds {len(paths)} images of CBSD68, which has {COUNT}; give the folder of all")
    return {path.stem: read_image(path, 3) for path in paths}


def noise_of(name: str, level: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise that depends on the image's name and the level alone."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {level}".encode()).digest()[:4], "big")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def averaged(denoise: Denoiser) -> Denoiser:
    """Return the mean of T^-1 denoise(T x) over the eight symmetries T of the square (self-ensemble).

    Not by deepinv's ``Rotate``, which cuts what is not square to its shape when it is turned.
    """

    def turned(noisy: Tensor) -> Tensor:
        return torch.stack([denoise(noisy.rot90(k, (-2, -1))).rot90(-k, (-2, -1)) for k in range(4)]).mean(0)

    return lambda noisy: (turned(noisy) + turned(noisy.flip(-1)).flip(-1)) / 2


def measure(prior: Prior, images: dict[str, Tensor], ensemble: bool = False) -> dict[str, float]:
    """Return the mean PSNR in dB by level, of one evaluation or of the mean of eight."""
    found = {}
    for level in LEVELS:
        denoise, values = with_prior(prior, level / 255), []
        if ensemble:
            denoise = averaged(denoise)
        for name, x0 in tqdm(images.items(), desc=f"sigma {level}", unit="image"):
            noisy = x0 + level / 255 * noise_of(name, level, x0.shape)
            values.append(psnr(denoise(noisy[None]).clamp(0, 1), x0[None]))
        found[heading(level)] = torch.cat(values).mean().item()
    return found


def heading(level: int) -> str:
    """Return the key of a level in the rows."""
    return f"psnr@{level}/255"


def draw(prior: Prior, count: int = 16, steps: int = 50) -> Tensor:
    """Return a grid of pictures [3, H, W] drawn from the prior alone, of the size that it was trained with."""
    scheduler = DDIMScheduler(num_train_timesteps=prior.schedule.num_times, clip_sample=True)
    pipeline = DDIMPipeline(prior.unet, scheduler)
    drawn = pipeline(
        batch_size=count, num_inference_steps=steps, output_type="np", generator=torch.Generator().manual_seed(0)
    )
    return make_grid(torch.from_numpy(drawn.images).permute(0, 3, 1, 2), nrow=4)


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the 68 images")
    parser.add_argument("--prior", nargs="+", default=["photos_prior"], help="shipped names, folders or hub ids")
    parser.add_argument("--averaged", nargs="+", default=[], help="measured also as the mean of eight orientations")
    parser.add_argument("--samples", type=Path, help="picture of samples to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store."""
    options = parser().parse_args(arguments)
    if others := set(options.averaged) - set(options.prior):
        raise ValueError(f"--averaged takes priors that --prior names, got {', '.join(sorted(others))}; add to --prior")
    images = images_of(options.folder)
    rows: list[dict[str, Any]] = [
        {"method": name} | dict(zip(map(heading, LEVELS), values, strict=True)) for name, values in PUBLISHED.items()
    ]
    config = {}
    for reference in options.prior:
        prior = Prior.from_pretrained(reference)
        millions = sum(p.numel() for p in prior.parameters()) / 1e6
        rows.append({"method": f"{reference} ({millions:.2f} M parameters)"} | measure(prior, images))
        if reference in options.averaged:
            rows.append({"method": f"{reference}, mean of 8 orientations"} | measure(prior, images, ensemble=True))
        config[reference] = prior.fingerprint
    if options.samples is not None:
        write_image(draw(prior), options.samples)
    command = f"python benchmarks/cbsd68.py FOLDER --prior {' '.join(options.prior)}"
    if options.averaged:
        command += f" --averaged {' '.join(options.averaged)}"
    print(store("cbsd68", command, {"prior": config}, rows, ""))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
