"""Pictures in the log: TensorBoard, wandb (through Lightning's loggers) and PNG files beside the CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torchvision.utils import make_grid

from ud2m.images import write_image


def log_images(loggers: Sequence[Logger], folder: Path, pictures: Mapping[str, Tensor], step: int) -> None:
    """Log each picture [C, H, W] in [0, 1] everywhere a logger can show one, and write it to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_image(picture, folder / f"{name}-{step:06d}.png")
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture.clamp(0, 1).cpu(), step)
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [picture.clamp(0, 1).cpu()], step=step)


def contact_sheet(x0: Tensor, y: Tensor, samples: Tensor) -> Tensor:
    """Return one picture: a row per image with reference, observation, mean, std (times 5) and up to four samples."""
    size = x0.shape[-2:]
    shown = F.interpolate(y, size=size, mode="nearest-exact") if y.shape[-2:] != size else y
    columns = [x0, shown, samples.mean(1), 5 * samples.std(1), *samples[:, :4].unbind(1)]
    rows = [column[i].clamp(0, 1) for i in range(len(x0)) for column in columns]
    return make_grid(rows, nrow=len(columns), padding=1)
