"""Measure how well a prior denoises the test photographs, beside total variation and non-local means.

    python benchmarks/prior_denoising.py [--prior photos_prior]

Writes ``docs/results/prior.json``: PSNR in dB, mean over all tiles of 32x32 and of 128x128 pixels, at four noise
levels. The classical methods are scikit-image's. Their strength is the best one of a grid on (some of) the test tiles
themselves, per level and size: better than a user could choose it, so the comparison favours them. Images are not
clipped before denoising and clipped to [0, 1] after it, for every method.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torch import Tensor
from tqdm import tqdm

from results import store
from ud2m.data import PhotoData
from ud2m.evaluation.metrics import psnr
from ud2m.priors.prior import Prior

LEVELS = (0.05, 0.1, 0.25, 0.5)
SIZES = (32, 128)
SEARCH_PIXELS = 32 * 32 * 96  # on which the settings of the classical methods are searched
Denoiser = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """One way to denoise at a known level, in words and as a function of noisy images [B, C, H, W]."""

    words: str
    denoise: Denoiser


def per_image(function: Callable[..., np.ndarray], **options: Any) -> Denoiser:
    """Return a denoiser of batches that calls a function of scikit-image on each image [H, W, C]."""

    def denoise(noisy: Tensor) -> Tensor:
        images = (function(image.permute(1, 2, 0).numpy(), channel_axis=-1, **options) for image in noisy)
        return torch.stack([torch.from_numpy(image).permute(2, 0, 1).float() for image in images])

    return denoise


def total_variation(sigma: float) -> Iterator[Setting]:
    """Yield strengths of TV denoising (Chambolle, 2004); ``weight`` is the fidelity's, relative to sigma."""
    for factor in (0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 2.8, 3.6, 4.6):
        options = {"weight": factor * sigma, "max_num_iter": 200}
        yield Setting(f"weight {factor:g} σ", per_image(denoise_tv_chambolle, **options))


def non_local_means(sigma: float) -> Iterator[Setting]:
    """Yield patch sizes and strengths of non-local means (Buades et al., 2005), fast mode with the known sigma."""
    for patch in (3, 5, 7):
        for factor in (0.4, 0.5, 0.6, 0.7, 0.85):
            options = {"h": factor * sigma, "sigma": sigma, "patch_size": patch, "patch_distance": 7}
            words = f"patch {patch}, h {factor:g} σ"
            yield Setting(words, per_image(denoise_nl_means, fast_mode=True, **options))


def add_noise(x0: Tensor, sigma: float) -> Tensor:
    """Return x0 + sigma eps; the noise depends on the level and the shape alone."""
    generator = torch.Generator().manual_seed(round(1e4 * sigma))
    return x0 + sigma * torch.randn(x0.shape, generator=generator)


def mean_psnr(denoise: Denoiser, noisy: Tensor, x0: Tensor, chunk: int = 64) -> float:
    """Return the mean over images of the PSNR in dB."""
    pairs = zip(noisy.split(chunk), x0.split(chunk), strict=True)
    return torch.cat([psnr(denoise(y).clamp(0, 1), x) for y, x in pairs]).mean().item()


def best_setting(settings: Sequence[Setting], noisy: Tensor, x0: Tensor) -> Setting:
    """Return the setting of the highest PSNR on evenly spaced images, at least two of them."""
    count = min(len(x0), max(2, SEARCH_PIXELS // (x0.shape[-1] * x0.shape[-2])))
    picked = torch.arange(count) * len(x0) // count
    scores = [mean_psnr(setting.denoise, noisy[picked], x0[picked]) for setting in settings]
    return settings[int(np.argmax(scores))]


def with_prior(prior: Prior, sigma: float) -> Denoiser:
    """Return one step of the prior at this level."""

    @torch.no_grad()
    def denoise(noisy: Tensor) -> Tensor:
        return prior(noisy, torch.full((len(noisy),), sigma))

    return denoise


def measure(prior: Prior, images: dict[int, Tensor], levels: Sequence[float] = LEVELS) -> list[dict[str, Any]]:
    """Return one row per method and size of ``images`` (side -> [B, C, side, side])."""
    classical = {"total variation (Chambolle)": total_variation, "non-local means": non_local_means}
    rows = []
    for side, x0 in images.items():
        size = {"size": f"{side}x{side}"}
        noise: dict[str, Any] = {"method": "noisy image"} | size
        ours: dict[str, Any] = {"method": "prior"} | size
        others: dict[str, dict[str, Any]] = {name: {"method": name} | size for name in classical}
        for sigma in tqdm(levels, desc=f"{side}x{side}", unit="level"):
            key, noisy = f"psnr@{sigma:g}", add_noise(x0, sigma)
            noise[key] = mean_psnr(lambda y: y, noisy, x0)
            ours[key] = mean_psnr(with_prior(prior, sigma), noisy, x0)
            for name, grid in classical.items():
                best = best_setting(list(grid(sigma)), noisy, x0)
                others[name][key] = mean_psnr(best.denoise, noisy, x0)
                words = f"σ = {sigma:g}: {best.words}"
                others[name]["setting"] = "; ".join(filter(None, [others[name].get("setting"), words]))
        rows += [noise, *others.values(), ours]
    return rows


def test_tiles(side: int) -> Tensor:
    """Return all test tiles of the photographs [B, 3, side, side]."""
    tiles = PhotoData(channels=3, crop_size=side, batch_size=1).evaluation_set("test")
    return torch.stack([tiles[i] for i in range(len(tiles))])


def parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="photos_prior", help="shipped name, folder or hub id of a colour prior")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store."""
    options = parser().parse_args(arguments)
    prior = Prior.from_pretrained(options.prior)
    rows = measure(prior, {side: test_tiles(side) for side in SIZES})
    parameters = sum(p.numel() for p in prior.parameters())
    config = {"prior": options.prior, "fingerprint": prior.fingerprint, "parameters": parameters}
    note = f"The prior `{options.prior}` has {parameters / 1e6:.2f} million parameters."
    print(store("prior", f"python benchmarks/prior_denoising.py --prior {options.prior}", config, rows, note))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
