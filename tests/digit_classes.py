"""A regression on the pixels of digits that tells their classes: independent of everything that the package trains."""

from collections.abc import Callable

import torch
from torch import Tensor


def fit_classes(x: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return images [N, C, H, W] -> classes [N], by ridge regression on images x with their labels."""

    def rows_of(images: Tensor) -> Tensor:
        return torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1).double()

    rows, targets = rows_of(x), torch.nn.functional.one_hot(labels, 10).double()
    weights = torch.linalg.solve(rows.T @ rows + 30 * torch.eye(rows.shape[1]), rows.T @ targets)
    return lambda images: (rows_of(images) @ weights).argmax(1)
