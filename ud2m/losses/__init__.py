"""What training minimises."""

from ud2m.losses.adversarial import Adversarial, Discriminator, DiscriminatorLoss, FeatureDiscriminator, gradient_square
from ud2m.losses.generator import GeneratorLoss, build_generator_loss
from ud2m.losses.terms import (
    L2,
    EnergyScore,
    FeatureDistance,
    FeatureEnergyScore,
    LossTerm,
    MeanL2,
    NonFiniteLossError,
    Perceptual,
    Prediction,
    PriorFeatures,
)

__all__ = [
    "L2",
    "Adversarial",
    "Discriminator",
    "DiscriminatorLoss",
    "EnergyScore",
    "FeatureDiscriminator",
    "FeatureDistance",
    "FeatureEnergyScore",
    "GeneratorLoss",
    "LossTerm",
    "MeanL2",
    "NonFiniteLossError",
    "Perceptual",
    "Prediction",
    "PriorFeatures",
    "build_generator_loss",
    "gradient_square",
]
