"""What the scheduler of a diffusers folder says of its network: the noise table, and what the network predicts."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers

from ud2m.priors.schedule import VPSchedule

PREDICTIONS = ("epsilon", "sample", "v_prediction")
DEFAULT = "DDPMScheduler"
"""Class of a file that names none."""
VARIANCE_PRESERVING = (
    DEFAULT,
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "RePaintScheduler",
)
"""Classes whose networks see x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps and an integer t of a table.

They differ in how they sample, which is not ours. Others mean another noisy image by the same words: ``ScoreSdeVe`` and
``EDM`` one without decay, ``FlowMatch`` a straight line; the networks of ``LCM``, ``TCD`` and ``CMStochasticIterative``
were distilled and are no denoisers.
"""
DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Classes of the same noise, whose networks were distilled for few steps: of latent priors, and no denoisers."""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
"""Classes whose networks see x_t = (1 - t/T) x_0 + (t/T) eps and predict eps - x_0."""
NEEDED = {"timestep_type": "discrete", "use_flow_sigmas": False}
"""Options of these classes that change what the network is given, and the value with which it is as above."""


def read_scheduler(
    options: Mapping[str, Any], where: str, allowed: Sequence[str] = VARIANCE_PRESERVING
) -> tuple[VPSchedule, str]:
    """Return the noise table of a ``scheduler_config.json`` and what the network predicts, one of ``PREDICTIONS``.

    What the file leaves out is as the class that it names has it by default. Options that say how to sample (steps,
    clipping, variances) are left to samplers. With ``rescale_betas_zero_snr`` the last time is pure noise, which is no
    level, and is left out of the table.

    Args:
        options: content of the file.
        where: its prior, for messages.
        allowed: classes that it may name.

    Raises:
        ValueError: for a class or an option that describes no variance-preserving noise of discrete times.
    """
    name = options.get("_class_name", DEFAULT)
    if name not in allowed:
        raise ValueError(
            f"the prior {where} has the scheduler {name!r}; allowed are those of variance-preserving noise: "
            f"{', '.join(allowed)}"
        )
    scheduler = make_scheduler(name, options, where)
    config = dict(scheduler.config)
    odd = [f"{key}={config[key]!r}" for key, value in NEEDED.items() if config.get(key, value) != value]
    prediction = config.get("prediction_type", PREDICTIONS[0])
    if prediction not in PREDICTIONS:
        odd.append(f"prediction_type={prediction!r} (allowed: {', '.join(PREDICTIONS)})")
    if scheduler.betas.numel() != config["num_train_timesteps"]:
        odd.append(
            f"{scheduler.betas.numel()} trained_betas beside num_train_timesteps={config['num_train_timesteps']}"
        )
    if odd:
        raise ValueError(f"the prior {where} has a scheduler with {', '.join(odd)}: no network of the kind needed here")
    # theirs are rounded to float32, and rescaled already; but they know more tables
    if config["trained_betas"] is None and config["beta_schedule"] not in VPSchedule.NAMED:
        config |= {"trained_betas": scheduler.betas.tolist(), "rescale_betas_zero_snr": False}
    try:
        return VPSchedule.from_config(config), prediction
    except ValueError as error:
        raise ValueError(f"the prior {where} has no noise table: {error}") from error


def make_scheduler(name: str, options: Mapping[str, Any], where: str) -> Any:
    """Return the scheduler of a class of diffusers, from those options that it knows.

    Raises:
        ValueError: for values that it cannot take.
    """
    made = getattr(diffusers, name)
    known = inspect.signature(made.__init__).parameters
    try:
        return made(**{key: value for key, value in options.items() if key in known})
    except Exception as error:  # of any class: what damaged values lead to in foreign code
        raise ValueError(f"the scheduler {name} of the prior {where} cannot be made: {error}") from error
