"""Image metrics, one number per image; images [B, C, H, W] or videos [B, C, T, H, W], in [0, 1]."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SSIM_WINDOW = 11


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Return -10 log10(mean square error) in dB per image [B], for a data range of 1; inf for equal images.

    Of videos over all frames.

    Raises:
        ValueError: when the shapes differ.
    """
    check_shapes(x, reference, (4, 5))
    return -10 * (x - reference).square().flatten(1).mean(1).log10()


def ssim(x: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity per image [B] (Wang et al., 2004), for a data range of 1.

    Gaussian window of 11 pixels and standard deviation 1.5, averaged over channels and the whole image with
    mirrored borders (torchmetrics' way; scikit-image leaves a border of 5 pixels out).

    Raises:
        ValueError: when the shapes differ or the image is smaller than the window.
    """
    check_shapes(x, reference)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {tuple(x.shape[2:])}")
    values = structural_similarity_index_measure(x, reference, data_range=1.0, reduction="none")
    return torch.as_tensor(values).reshape(len(x))


def spread_and_error(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean V and mean ((m - reference)^2 - V / S) per image [B]: unbiased, the same for every S.

    m and V are the mean and the unbiased variance of the S samples per pixel, averaged over pixels and channels. m has
    an error of its own because S is finite, V / S; without it the second number is the square error of the mean of
    infinitely many samples, E - reference.

    Args:
        samples: [B, S, C, H, W] or [B, S, C, T, H, W], S >= 2.
        reference: [B, C, H, W] or [B, C, T, H, W].

    Raises:
        ValueError: when the shapes do not fit or S < 2.
    """
    if samples.ndim not in (5, 6) or samples.shape[1] < 2:
        raise ValueError(f"calibration needs samples [B, S, C, H, W] with S >= 2, got shape {tuple(samples.shape)}")
    mean = samples.mean(1)
    check_shapes(mean, reference, (4, 5))
    variance = samples.var(1).flatten(1).mean(1)
    return variance, (mean - reference).square().flatten(1).mean(1) - variance / samples.shape[1]


def calibration_ratio(variance: Tensor, error: Tensor) -> float:
    """Return r = sqrt(mean variance / mean error) over images [B], 1 for a calibrated sampler; < 1: too little spread.

    Of ``spread_and_error``: if reference and samples are independent draws of the posterior, E(reference - E)^2 = Var.
    """
    return (variance.mean() / error.mean()).sqrt().item()


def psnr_limit(samples: Tensor, reference: Tensor) -> Tensor:
    """Return the PSNR in dB per image [B] that the mean of infinitely many samples would have, for a data range of 1.

    -10 log10 of the second number of ``spread_and_error``. The mean of S samples has a square error that is larger by
    Var / S: 1 dB for four calibrated samples. Where the estimate is below 1e-10 it counts as that, 100 dB.

    Args:
        samples: [B, S, C, H, W], S >= 2.
        reference: [B, C, H, W].

    Raises:
        ValueError: as ``spread_and_error``.
    """
    return -10 * spread_and_error(samples, reference)[1].clamp(min=1e-10).log10()


def over_frames(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a distance (images, references) -> [B] that takes videos too: there it is the mean over frames."""

    def of(x: Tensor, reference: Tensor) -> Tensor:
        if x.ndim == 4:
            return distance(x, reference)
        check_shapes(x, reference, (5,))
        return distance(frames_of(x), frames_of(reference)).unflatten(0, (len(x), -1)).mean(1)

    return of


def frames_of(videos: Tensor) -> Tensor:
    """Return the frames [B T, C, H, W] of videos [B, C, T, H, W], one video after the other."""
    return videos.transpose(1, 2).flatten(0, 1)


def check_shapes(x: Tensor, reference: Tensor, dimensions: tuple[int, ...] = (4,)) -> None:
    """Raise ValueError unless both are batches of one shape: of images, or of videos where these have 5 dimensions."""
    if x.ndim not in dimensions or x.shape != reference.shape:
        raise ValueError(
            f"image and reference must both be [B, C, H, W], got {list(x.shape)} and {list(reference.shape)}"
        )
