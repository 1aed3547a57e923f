"""Print what UD2M costs beside its bare network evaluations: python benchmarks/cost.py [--repeats 7] [--threads 1].

Two ratios, medians over interleaved repetitions:

* sampling: one call of the sampler (adapter merged) / K N calls of the bare network, at 3x128x128;
* training: both updates of one step, without a perceptual term / K forward-backward passes of the bare adapted network
  on the same images plus the passes of the discriminator alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from experiments import training_module
from ud2m.losses.terms import Prediction
from ud2m.training import DistillationModule
from ud2m.training.distillation_step import DistillationStep

Step = Callable[[], object]


def interleaved(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Time each step in turn, ``repeats`` times after one warm-up, so that a drifting machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def build(physics: str) -> DistillationModule:
    """Return the training module of the operator's experiment, with a discriminator and without a perceptual term."""
    return training_module(f"photos_{physics}", "name=cost", "loss.adversarial=0.01", "loss.perceptual=0")


def sampling_ratio(model: DistillationModule, size: int, repeats: int) -> tuple[float, float]:
    """Return (median ratio, seconds per call) of the sampler at 3 x size x size."""
    shape = (model.prior.channels, size, size)
    observation = model.step.problem.observe(torch.rand(1, *shape))
    x, sigma = torch.rand(1, *shape), torch.tensor([0.1])
    model.prior.merge_adapter()

    @torch.no_grad()
    def bare() -> None:
        for _ in range(model.sampler.nfe()):
            model.prior.unet(x, model.prior.schedule.time(sigma))

    seconds = interleaved({"sampler": lambda: model.sampler.sample(observation), "bare": bare}, repeats)
    return ratio(seconds["sampler"], seconds["bare"]), statistics.median(seconds["sampler"])


def training_ratio(model: DistillationModule, batch: int, size: int, repeats: int) -> tuple[float, float]:
    """Return (median ratio, seconds per step) of one training step on ``batch`` images."""
    x0 = torch.rand(batch, model.prior.channels, size, size)
    streams = [torch.Generator().manual_seed(i) for i in range(batch)]
    outputs = model.loss.num_outputs
    optimizers = model.configure_optimizers()
    images = x0.repeat_interleave(outputs, dim=0)
    sigma = torch.full((len(images),), 0.1)

    def step() -> None:
        model.step(x0, streams)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def bare() -> None:
        for _ in range(model.network.num_blocks):
            model.prior.unet(images, model.prior.schedule.time(sigma)).sample.square().mean().backward()
        discriminator_passes(model.step, x0, images, streams)
        model.zero_grad()

    seconds = interleaved({"step": step, "bare": bare}, repeats)
    return ratio(seconds["step"], seconds["bare"]), statistics.median(seconds["step"])


def discriminator_passes(step: DistillationStep, x0: Tensor, images: Tensor, streams: list[torch.Generator]) -> None:
    """Run the discriminator as one training step does: its own loss, and the generator's term through it."""
    images = images.clone().requires_grad_()
    prediction = Prediction(x0, images.unflatten(0, (len(x0), -1)), torch.ones(len(x0)), x0)
    assert step.discriminator is not None
    loss_d, _ = step.discriminator_loss(step.discriminator, prediction, streams)
    (loss_d + step.loss.terms["adversarial"](prediction)).backward()


def ratio(first: list[float], second: list[float]) -> float:
    """Return the median of the ratios of paired times."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def main() -> None:
    """Print one line per operator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for physics in ("gaussian_blur", "super_resolution", "inpainting", "general"):
        training, step = training_ratio(build(physics), batch=8, size=32, repeats=options.repeats)
        sampling, call = sampling_ratio(build(physics), size=128, repeats=options.repeats)
        print(
            f"{physics:18s} sampling 3x128x128: {sampling:.3f} x bare ({call:.2f} s)   "
            f"training 8 images of 32x32: {training:.3f} x bare ({step:.2f} s)"
        )


if __name__ == "__main__":
    main()
