"""What a training run would cost, from shapes alone: ``python train.py experiment=... estimate=true``.

The training module is built on the meta device of PyTorch, where tensors have shapes and no values, and takes one step
forward and backward there. So no weights are needed, no memory and hardly any time, whatever the size of the network.
"""

import torch
from omegaconf import DictConfig, OmegaConf

from ud2m.cli.objects import build
from ud2m.samplers.base import check_count
from ud2m.training.cost import Estimate, cost_of
from ud2m.training.distillation_step import DistillationStep


def estimate(config: DictConfig) -> Estimate:
    """Return the cost of the run that a composed configuration describes.

    Raises:
        ValueError: for a run that trains no adapter, and for numbers that cannot be.
    """
    if "prior" not in config.training:
        raise ValueError("estimate=true knows the cost of experiments that distil a prior, not of training=prior")
    if not config.device_tflops > 0:
        raise ValueError(f"device_tflops, TFLOP/s that a device reaches, must be positive, got {config.device_tflops}")
    for name, value in {"data.batch_size": config.data.batch_size, "accumulate": config.accumulate}.items():
        check_count(name, value)
    step, precision = on_meta(config), str(config.trainer.precision)
    shape = (config.data.channels, config.data.crop_size, config.data.crop_size)
    # what does not grow with the batch, such as a copy of a weight, belongs to no image; one image is a special case
    two, four = (cost_of(step, (images, *shape), precision) for images in (2, 4))
    discriminator = [] if step.discriminator is None else list(step.discriminator.parameters())
    return Estimate(
        frozen=sum(p.numel() for p in step.prior.parameters() if not p.requires_grad),
        trained=sum(p.numel() for p in step.generator_parameters()),
        discriminator=sum(p.numel() for p in discriminator),
        weights=sum(tensor.nbytes for tensor in [*step.modules.parameters(), *step.modules.buffers()]),
        flops=(four.flops - two.flops) / 2,
        activations=(four.peak - two.peak) / 2,
        shared=2 * two.peak - four.peak,
        precision=precision,
        checkpointing=config.training.checkpointing,
        batch=config.data.batch_size * config.accumulate,
        accumulate=config.accumulate,
        devices=config.trainer.devices if isinstance(config.trainer.devices, int) else 1,
        tflops=config.device_tflops,
    )


def on_meta(config: DictConfig) -> DistillationStep:
    """Return the step of the training module without values.

    The operator is replaced by the identity: the operators of this package compute element by element or by FFTs, which
    are not counted, and keep little. Weights of other networks are not read.
    """
    chosen = config.copy()
    OmegaConf.set_struct(chosen, False)
    chosen.prior = config.architecture or config.prior
    chosen.physics.operator = {"_target_": "ud2m.physics.Denoising"}
    if "weights" in chosen.network.warm_start:
        chosen.network.warm_start.update({"weights": None, "trainable": True})
    chosen.training.validation.lpips = None
    chosen.training.validation.metric = "psnr"
    with torch.device("meta"):
        return build(chosen.training, "training").to("meta").step
