"""Print what UD2M costs beside its bare network evaluations: python benchmarks/cost.py [--repeats 7] [--threads 1].

Two ratios, medians over interleaved repetitions:

* sampling: one call of the sampler (adapter merged) for 8 samples of one observation / K N calls of the bare network on
  8 images of the same layout and in the same precision, at 3x128x128;
* training: both updates of one step, without a perceptual term / K forward-backward passes of the bare adapted network
  on the same images plus the passes of the discriminator alone.

On CPUs times are those of the processor, which other processes on the machine do not lengthen.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments import training_module
from ud2m.cli.sample import trained_operator
from ud2m.losses.terms import Prediction
from ud2m.physics import Inpainting, Problem
from ud2m.precision import fastest_layout, network_precision
from ud2m.priors.prior import Prior
from ud2m.samplers.base import Sampler
from ud2m.samplers.deepinv import DiffPir, Dps
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.training import DistillationModule
from ud2m.training.distillation_step import DistillationStep

Step = Callable[[], object]
PRECISIONS = ("float32", "bfloat16")
NUM_SAMPLES = 8
BATCHED: dict[str, Callable[..., Sampler]] = {"DPS": Dps, "DiffPIR": DiffPir}


def interleaved(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Time each step in turn, ``repeats`` times after one warm-up, so that a drifting machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            wait()
            start = clock()
            step()
            wait()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def wait() -> None:
    """Return when a GPU has finished what it was given: the program itself runs ahead of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build(physics: str) -> DistillationModule:
    """Return the training module of the operator's experiment, with a discriminator and without a perceptual term."""
    return training_module(f"photos_{physics}", "name=cost", "loss.adversarial=0.01", "loss.perceptual=0")


def sampling_ratio(
    sampler: PosteriorSampler, problem: Problem, x0: Tensor, repeats: int, num_samples: int = 1
) -> tuple[float, float]:
    """Return (median ratio, seconds per call) of the sampler for observations of images x0.

    The adapter is merged, and the bare network evaluated in the sampler's precision.
    """
    prior, observation = sampler.prior.merge_adapter(), problem.observe(x0)
    images = x0.repeat_interleave(num_samples, dim=0).contiguous(memory_format=fastest_layout(x0))
    sigma = images.new_full((len(images),), 0.1)

    @torch.no_grad()
    def bare() -> None:
        with network_precision(sampler.config.precision, x0.device):
            for _ in range(sampler.nfe()):
                prior.unet(images, prior.schedule.time(sigma))

    seconds = interleaved({"sampler": lambda: sampler.sample(observation, num_samples), "bare": bare}, repeats)
    return ratio(seconds["sampler"], seconds["bare"]), statistics.median(seconds["sampler"])


class TrainingCost:
    """One training step on images x0, and the bare passes of its networks, under autocast to ``precision``."""

    def __init__(self, model: DistillationModule, x0: Tensor, precision: str = "float32"):
        self.model, self.x0, self.precision = model, x0, precision
        self.streams = [torch.Generator(x0.device).manual_seed(i) for i in range(len(x0))]
        self.optimizers = model.configure_optimizers()

    def step(self) -> None:
        """Both updates."""
        with network_precision(self.precision, self.x0.device):
            self.model.step(self.x0, self.streams)[0].backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def bare(self) -> None:
        """K forward and backward passes of the adapted network, and those that the losses' networks take."""
        model, images = self.model, self.x0.repeat_interleave(self.model.loss.num_outputs, dim=0)
        with network_precision(self.precision, self.x0.device):
            time = model.prior.schedule.time(images.new_full((len(images),), 0.1))
            for _ in range(model.network.num_blocks):
                model.prior.unet(images, time).sample.square().mean().backward()
            loss_passes(model.step, self.x0, images, self.streams)
        model.zero_grad()

    def ratio(self, repeats: int) -> tuple[float, float]:
        """Return (median ratio, seconds per step)."""
        seconds = interleaved({"step": self.step, "bare": self.bare}, repeats)
        return ratio(seconds["step"], seconds["bare"]), statistics.median(seconds["step"])


def loss_passes(step: DistillationStep, x0: Tensor, images: Tensor, streams: list[torch.Generator]) -> None:
    """Run the networks of the losses as one training step does: D's own loss, D and LPIPS in the generator's."""
    images = images.clone().requires_grad_()
    prediction = Prediction(x0, images.unflatten(0, (len(x0), -1)), x0.new_ones(len(x0)), x0)
    assert step.discriminator is not None
    total, _ = step.discriminator_loss(step.discriminator, prediction, streams)
    for name in {"adversarial", "perceptual"} & set(step.loss.terms):
        total = total + step.loss.terms[name](prediction)
    total.backward()


def ratios(physics: str, repeats: int) -> dict[str, float]:
    """Return training's and sampling's median ratios and seconds for an operator, as the head of this file says."""
    trained, sampled = build(physics), build(physics)
    training, step = TrainingCost(trained, torch.rand(8, trained.prior.channels, 32, 32)).ratio(repeats)
    x0 = torch.rand(1, sampled.prior.channels, 128, 128)
    row: dict[str, float] = {}
    for precision in PRECISIONS:
        sampler = PosteriorSampler(sampled.network, sampled.sampler.config.with_options(precision=precision))
        found, call = sampling_ratio(sampler, sampled.step.problem, x0, repeats, NUM_SAMPLES)
        row |= {f"sampling / bare, {precision}": found, f"seconds per call, {precision}": call}
    return row | {"training / bare": training, "seconds per step": step}


def batching_ratio(make: Callable[..., Sampler], observations: int, repeats: int) -> tuple[float, float]:
    """Return (median ratio, largest difference of a pixel) of one sample each of observations, one by one / together.

    Images of 3x32x32, of which each has its own missing pixels; the sampler takes 20 steps.
    """
    problem = Problem(Inpainting(), 0.01)
    observation = problem.observe(torch.rand(observations, 3, 32, 32))
    sampler = make(Prior.from_pretrained("photos_prior"), num_steps=20, precision="float32")
    each = [observation.rows(torch.tensor([row])) for row in range(observations)]

    def streams(rows: range) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    @torch.no_grad()
    def one_by_one() -> Tensor:
        return torch.cat([sampler.draw(one, streams(range(row, row + 1))) for row, one in enumerate(each)])

    @torch.no_grad()
    def together() -> Tensor:
        return sampler.draw(observation, streams(range(observations)))

    seconds = interleaved({"alone": one_by_one, "together": together}, repeats)
    difference = (one_by_one() - together()).abs().max().item()
    return ratio(seconds["alone"], seconds["together"]), difference


def compiled_row(model: str, how: str, precision: str, images: Tensor, repeats: int) -> dict[str, Any]:
    """Return one row: a shipped model's samples by its compiled network beside those by its network as it is.

    Args:
        model: its name.
        how: backend or mode of torch.compile.
        precision: of the networks.
        images: [B, C, H, W], one sample each.
        repeats: pairs of calls.
    """
    plain, compiled = (
        PosteriorSampler.from_pretrained(model, device=images.device, precision=precision) for _ in range(2)
    )
    problem = Problem(trained_operator(plain.config.info["physics"]["operator"]), plain.config.sigma_y, seed=0)
    observation = problem.observe(images)
    compiled.compile(how)

    def drawn(sampler: PosteriorSampler) -> Tensor:
        return sampler.sample(observation, generator=torch.Generator().manual_seed(0))

    begun = time.perf_counter()
    difference = (drawn(compiled) - drawn(plain)).abs().max().item()
    first = time.perf_counter() - begun
    seconds = interleaved({"compiled": lambda: drawn(compiled), "plain": lambda: drawn(plain)}, repeats)
    return {
        "method": f"{how}, {precision}",
        "operator": model,
        "compiled / plain": ratio(seconds["compiled"], seconds["plain"]),
        "first call [s]": first,
        "largest difference of a pixel": difference,
    }


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
    for name, make in BATCHED.items():
        gain, _ = batching_ratio(make, 16, options.repeats)
        print(f"{name:18s} 16 observations of 32x32 one by one: {gain:.2f} x the time of one batch")
    for physics in ("gaussian_blur", "super_resolution", "inpainting", "general"):
        for name, value in ratios(physics, options.repeats).items():
            print(f"{physics:18s} {name:30s} {value:.3f}")


if __name__ == "__main__":
    main()
