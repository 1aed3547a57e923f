"""Lightning modules that train an unfolded network by distillation, a small prior, or a bridge to compare with."""

from ud2m.training.bridge_training import BridgeModule
from ud2m.training.consistency import ConsistencyModule
from ud2m.training.distillation import DistillationModule
from ud2m.training.latent_training import AutoencoderModule, LatentModule
from ud2m.training.levels import Levels
from ud2m.training.parts import build_distillation
from ud2m.training.prior_training import PriorModule

__all__ = [
    "AutoencoderModule",
    "BridgeModule",
    "ConsistencyModule",
    "DistillationModule",
    "LatentModule",
    "Levels",
    "PriorModule",
    "build_distillation",
]
