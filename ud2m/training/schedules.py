"""Learning-rate schedule shared by all trainings."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> LambdaLR:
    """Rise linearly over ``warmup`` steps, then fall as a half cosine to zero at step ``total``."""
    return LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * min(n / total, 1.0))),
    )
