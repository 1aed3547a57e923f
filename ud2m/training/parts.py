"""Builds a distillation from the plain values of conf/training/distillation.yaml."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from ud2m.losses.adversarial import DiscriminatorLoss
from ud2m.losses.generator import GeneratorLoss
from ud2m.names import check_names, check_types, made
from ud2m.physics import OperatorFamily, Problem
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.samplers import export
from ud2m.samplers.config import SamplerConfig
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.training.distillation import DistillationModule, OptimizerSettings
from ud2m.training.distillation_step import DistillationStep
from ud2m.training.levels import Levels
from ud2m.training.validation import Validation
from ud2m.unfolded.network import UnfoldedNetwork, build_network

CHECKPOINTING = ("none", "modules", "all")
"""What is evaluated again in the backward pass: nothing, LATINO modules (but the last), also residual blocks."""


def build_distillation(
    *,
    operator: OperatorFamily,
    sigma_y: float,
    levels: Levels,
    loss: Callable[..., GeneratorLoss],
    discriminator: Callable[..., nn.Module],
    discriminator_loss: DiscriminatorLoss,
    optimizer: Mapping[str, Any],
    sampling: Mapping[str, Any],
    validation: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    sigma_y_range: Sequence[float] | None = None,
    noise: float | None = None,
    seed: int = 0,
    **network: Any,
) -> DistillationModule:
    """Return the training module of a configuration.

    Args:
        operator: family that the physics are drawn from.
        sigma_y: noise level of the observations, image units.
        levels: draws sigma per sample.
        loss: builds the generator's loss from ``features`` and ``discriminator`` (``build_generator_loss``).
        discriminator: builds D from ``channels``, and ``features`` if it has an argument of that name; called only when
            the adversarial term has a weight.
        discriminator_loss: the loss of D.
        optimizer: of ``OptimizerSettings``.
        sampling: of ``SamplerConfig``: the sampler that validates and is exported.
        validation: of ``Validation``: what is measured, and what selects the best checkpoint.
        info: plain values that the export keeps, such as the configuration of the operator.
        sigma_y_range: lowest and highest noise level of training, log-uniform per sample; ``sigma_y`` is then that of
            validation and the sampler's default. None: always ``sigma_y``.
        noise: noise level that the observations have where the network is told another one, as 0 in noise-free
            protocols. None: what it is told.
        seed: of all randomness.
        network: of ``build_trained_network``.

    Raises:
        ValueError: for numbers out of range; errors of the parts.
    """
    settings = made(OptimizerSettings, optimizer, "optimizer")
    bounds = None if sigma_y_range is None else (float(sigma_y_range[0]), float(sigma_y_range[1]))
    problem = Problem(operator, sigma_y, seed, noise, bounds)
    config = made(SamplerConfig, {**sampling, "sigma_y": float(sigma_y), "info": dict(info or {})}, "sampling")
    check_names(Validation, validation, "validation")
    check_types(Validation, validation, "validation")
    unfolded = build_trained_network(**network)
    prior = cast(Prior, unfolded.denoiser)
    terms = loss(features=prior.features, discriminator=partial(discriminator, channels=prior.channels))
    step = DistillationStep(unfolded, problem, levels, terms, discriminator_loss)
    sampler = PosteriorSampler(unfolded, config)
    return DistillationModule(step, sampler, Validation(sampler, problem, **validation), settings)


def build_trained_network(
    *,
    prior: str,
    lora: Mapping[str, Any],
    network: Mapping[str, Any],
    start_from: str | None = None,
    checkpointing: str = "none",
    kept_modules: int = 1,
    frozen_bfloat16: bool = False,
    channels_last: bool = False,
    compile: str | None = None,
) -> UnfoldedNetwork:
    """Return the network that is trained; its denoiser is the prior with its adapter.

    Args:
        prior: reference of the frozen prior.
        lora: of ``LoraSpec``, what of it is adapted.
        network: plain description for ``build_network``.
        start_from: model whose trained parameters the run begins with (``samplers.export.start_from``). None: the
            prior's.
        checkpointing: one of ``CHECKPOINTING``: less memory for more time, with the same gradients.
        kept_modules: the last LATINO modules, which checkpointing leaves out; at least one, whose turn in the backward
            pass comes at once.
        frozen_bfloat16: keep the frozen weights in bfloat16 (``Prior.store_frozen_in_bfloat16``), in which the network
            is then validated too.
        channels_last: ``Prior.use_channels_last``.
        compile: backend or mode of torch.compile for the network (``Prior.compile_network``), None to do without.
            The discriminator is not compiled: its penalty is differentiated twice.

    Raises:
        ValueError: for numbers out of range; errors of the parts.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing must be one of {', '.join(CHECKPOINTING)}, got {checkpointing!r}")
    adapted = Prior.from_pretrained(prior).add_lora(made(LoraSpec, lora, "lora"))
    unfolded = build_network(adapted, network, None if checkpointing == "none" else kept_modules)
    if start_from is not None:
        export.start_from(unfolded, start_from)
    if checkpointing == "all":
        adapted.checkpoint_layers()
    if frozen_bfloat16:
        adapted.store_frozen_in_bfloat16()
    if channels_last:
        adapted.use_channels_last()
    if compile is not None:
        adapted.compile_network(compile)
    return unfolded
