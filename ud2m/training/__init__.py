"""Lightning modules: distillation of an unfolded network, and training of a small prior."""

from ud2m.training.distillation import DistillationModule
from ud2m.training.levels import Levels
from ud2m.training.prior import PriorModule

__all__ = ["DistillationModule", "Levels", "PriorModule"]
