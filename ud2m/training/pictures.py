"""Pictures in the log: TensorBoard, wandb (through Lightning's loggers) and PNG files beside the CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torchvision.utils import make_grid

from ud2m.images import write_image


def log_images(loggers: Sequence[Any], folder: Path, pictures: Mapping[str, Tensor], step: int) -> None:
    """Log each picture [C, H, W] in [0, 1] everywhere a logger can show one, and write it to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        shown = picture.clamp(0, 1).float().cpu()
        write_image(shown, folder / f"{name}-{step:06d}.png")
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, shown, step)
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [shown], step=step)


def contact_sheet(x0: Tensor, y: Tensor, samples: Tensor) -> Tensor:
    """Return one picture: a row per image with reference, observation, mean, std (times 5) and up to four samples.

    Args:
        x0: references [B, C, H, W].
        y: observations; black is shown for those that are no images of C channels.
        samples: [B, S, C, H, W].
    """
    std = 5 * samples.std(1) if samples.shape[1] > 1 else torch.zeros_like(x0)
    columns = [x0, _at_size(y, x0), samples.mean(1), std, *samples[:, :4].unbind(1)]
    rows = [column[i].clamp(0, 1) for i in range(len(x0)) for column in columns]
    return make_grid(rows, nrow=len(columns), padding=1)


def _at_size(y: Tensor, x0: Tensor) -> Tensor:
    if y.ndim != 4 or y.shape[1] != x0.shape[1]:
        return torch.zeros_like(x0)
    return y if y.shape == x0.shape else F.interpolate(y, size=x0.shape[-2:], mode="nearest-exact")
