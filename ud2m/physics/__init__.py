"""Measurement operators A of y = A x0 + sigma_y w: families to draw them from, and what to ask them."""

from ud2m.physics.blur import GaussianBlur, KernelFile, MotionBlur, RandomGaussianBlur, UniformBlur
from ud2m.physics.boundary import BoundedBlur
from ud2m.physics.circular import CircularBlur, CircularDownsampling
from ud2m.physics.family import OperatorFamily
from ud2m.physics.general import Colorization, DeepinvOperator, Denoising
from ud2m.physics.inpainting import Inpainting, MaskFile, MissingBoxes, MissingStrokes, PixelMask
from ud2m.physics.measurement import estimate_sigma_y, measured, observe, residual
from ud2m.physics.mixture import BlurMixture, Mixture
from ud2m.physics.samples import at_least_float32, per_sample, select_samples
from ud2m.physics.super_resolution import SuperResolution

__all__ = [
    "BlurMixture",
    "BoundedBlur",
    "CircularBlur",
    "CircularDownsampling",
    "Colorization",
    "DeepinvOperator",
    "Denoising",
    "GaussianBlur",
    "Inpainting",
    "KernelFile",
    "MaskFile",
    "MissingBoxes",
    "MissingStrokes",
    "Mixture",
    "MotionBlur",
    "OperatorFamily",
    "PixelMask",
    "RandomGaussianBlur",
    "SuperResolution",
    "UniformBlur",
    "at_least_float32",
    "estimate_sigma_y",
    "measured",
    "observe",
    "per_sample",
    "residual",
    "select_samples",
]
