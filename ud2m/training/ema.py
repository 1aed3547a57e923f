"""Exponential moving average of trained parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema(nn.Module):
    """Average the given parameters: a <- d a + (1 - d) p, with d = min(decay, (1 + n) / (10 + n)) at update n.

    The early, smaller decay lets the average forget the start. ``torch.optim.swa_utils.AveragedModel`` would copy the
    whole model, frozen prior included; this holds the trained parameters alone.
    """

    num_updates: Tensor

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the average must be in [0, 1), got {decay}")
        self.decay = decay
        self.source = list(parameters)
        for i, parameter in enumerate(self.source):
            self.register_buffer(f"average_{i}", parameter.detach().clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    @property
    def averages(self) -> list[Tensor]:
        """The averaged tensors, in the order of the parameters."""
        return [self.get_buffer(f"average_{i}") for i in range(len(self.source))]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current parameters."""
        self.num_updates += 1
        n = self.num_updates.item()
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.source], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as parameters inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.source, self.averages, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
