"""Measurement operators A of y = A x0 + sigma_y w: families to draw them from, and what to ask them."""

from ud2m.physics.adopted import Adopted, adopt, joined
from ud2m.physics.blur import GaussianBlur, KernelFile, MotionBlur, RandomGaussianBlur, UniformBlur
from ud2m.physics.boundary import BoundedBlur, bounded_blur
from ud2m.physics.checks import NoiseLevelWarning, told_level
from ud2m.physics.circular import CircularBlur, CircularDownsampling
from ud2m.physics.data_term import DataTerm, prepared_prox
from ud2m.physics.ddrm import DdrmBlur, DdrmJpeg, DdrmSuperResolution
from ud2m.physics.family import OperatorFamily
from ud2m.physics.general import Colorization, DeepinvOperator, Denoising
from ud2m.physics.inpainting import Inpainting, MaskCollection, MaskFile, MissingBoxes, MissingStrokes, PixelMask
from ud2m.physics.jpeg import Jpeg, JpegCodec
from ud2m.physics.measurement import (
    estimate_sigma_y,
    image_shape,
    kept_gain,
    largest_gain,
    mean_gain,
    measured,
    misfit,
    observe,
    residual,
)
from ud2m.physics.mixture import BlurMixture, Mixture
from ud2m.physics.problem import Observation, Problem
from ud2m.physics.rows import at_least_float32, per_sample, select_samples
from ud2m.physics.separable import Separable
from ud2m.physics.super_resolution import SuperResolution
from ud2m.physics.video import SpaceTime, VideoOperator

__all__ = [
    "Adopted",
    "BlurMixture",
    "BoundedBlur",
    "CircularBlur",
    "CircularDownsampling",
    "Colorization",
    "DataTerm",
    "DdrmBlur",
    "DdrmJpeg",
    "DdrmSuperResolution",
    "DeepinvOperator",
    "Denoising",
    "GaussianBlur",
    "Inpainting",
    "Jpeg",
    "JpegCodec",
    "KernelFile",
    "MaskCollection",
    "MaskFile",
    "MissingBoxes",
    "MissingStrokes",
    "Mixture",
    "MotionBlur",
    "NoiseLevelWarning",
    "Observation",
    "OperatorFamily",
    "PixelMask",
    "Problem",
    "RandomGaussianBlur",
    "Separable",
    "SpaceTime",
    "SuperResolution",
    "UniformBlur",
    "VideoOperator",
    "adopt",
    "at_least_float32",
    "bounded_blur",
    "estimate_sigma_y",
    "image_shape",
    "joined",
    "kept_gain",
    "largest_gain",
    "mean_gain",
    "measured",
    "misfit",
    "observe",
    "per_sample",
    "prepared_prox",
    "residual",
    "select_samples",
    "told_level",
]
