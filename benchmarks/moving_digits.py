"""The pipeline of moving digits: its autoencoder, and what it draws for its words, judged by an independent classifier.

    python benchmarks/moving_digits.py [--pipeline moving_digits] [--videos 200] [--strip strip.png]

The classifier is that of ``latent_digits.py``, trained on still digits; of a video it sees every frame, moved so that
the centre of mass lies in the middle, and its logits are averaged. Rows: test videos, the same through the autoencoder
(PSNR in dB), and samples with the prompts of all classes in turn in 1, 4 and 8 evaluations. ``bend`` is the mean length
of the second differences of the centre of mass, in pixels: 0 for a constant velocity, more where it bounces.
``--strip`` writes a picture of samples, a row per digit and a column per frame.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from latent_digits import BATCH, Classifier, mean_text, trained_classifier
from results import store
from ud2m.data.mnist import NUMBERS, read_mnist
from ud2m.data.moving_digits import MovingDigits
from ud2m.evaluation.metrics import psnr
from ud2m.images import write_image
from ud2m.priors.latent import LatentPrior
from ud2m.random import randn_like

FRAMES, SIDE, SPEED = 9, 32, 2
STEPS = (1, 4, 8)


def centres(videos: Tensor) -> Tensor:
    """Return row and column [B, T, 2] of the centres of mass of videos [B, 1, T, H, W], in pixels."""
    mass = videos[:, 0].clamp_min(0) + 1e-8
    axes = (mass.sum(3), mass.sum(2))
    return torch.stack([(m * torch.arange(m.shape[2])).sum(2) / m.sum(2) for m in axes], 2)


def bend(videos: Tensor) -> Tensor:
    """Return the mean length [B] of the second differences of the centres of mass."""
    return centres(videos).diff(n=2, dim=1).norm(dim=2).mean(1)


def classes(classifier: Classifier, videos: Tensor) -> Tensor:
    """Return the class [B] of videos [B, 1, T, H, W]."""
    middle = (SIDE - 1) / 2
    moves = (middle - centres(videos)).round().long()
    padded = torch.nn.functional.pad(videos, (SIDE,) * 4)
    frames = [
        padded[b, :, t, SIDE - row : 2 * SIDE - row, SIDE - column : 2 * SIDE - column]
        for b, places in enumerate(moves.tolist())
        for t, (row, column) in enumerate(places)
    ]
    return classifier(torch.stack(frames)).view(len(videos), videos.shape[2], -1).mean(1).argmax(1)


def drawn(prior: LatentPrior, labels: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Return videos of these digits, by multistep consistency sampling at evenly spaced times."""
    noise = [torch.Generator().manual_seed(seed * len(labels) + k) for k in range(len(labels))]
    prompt = prior.encode_prompt([f"a video of the digit {NUMBERS[label]}" for label in labels.tolist()])
    z0 = torch.zeros(len(labels), *prior.latent_shape((FRAMES, SIDE, SIDE)))
    for t in prior.table.shifted_times(steps, 1.0):
        z0 = prior.estimate(prior.noised(z0, t, randn_like(z0, noise)), t, prompt)
    return prior.decode(z0).clamp(0, 1)


@torch.no_grad()
def measured(prior: LatentPrior, classifier: Classifier, root: Path, count: int) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    mnist = read_mnist(root, train=False)
    picked = [k * len(mnist.data) // count for k in range(count)]
    data = MovingDigits(mnist.data, SIDE, "test", FRAMES, SPEED)
    x0, labels = torch.stack([data[k] for k in picked]), mnist.targets[picked]
    decoded = torch.cat([prior.decode(prior.encode(x)).clamp(0, 1) for x in x0.split(BATCH)])
    rows = [
        row("test videos", x0, labels, classifier),
        row("autoencoded", decoded, labels, classifier) | {"PSNR": mean_text(psnr(decoded, x0), ".2f")},
    ]
    labels = torch.arange(count) % len(NUMBERS)
    for steps in STEPS:
        parts = [drawn(prior, part, steps, seed) for seed, part in enumerate(labels.split(BATCH))]
        rows.append(row(f"samples, {steps} evaluations", torch.cat(parts), labels, classifier))
    return rows


def row(name: str, videos: Tensor, labels: Tensor, classifier: Classifier) -> dict[str, Any]:
    """Return the numbers that all videos have."""
    right = (classes(classifier, videos) == labels).float()
    return {"videos": name, "class": mean_text(right, ".3f"), "bend": mean_text(bend(videos), ".2f"), "PSNR": None}


def strip(prior: LatentPrior, steps: int = 4) -> Tensor:
    """Return a picture with a video of each digit, a row each."""
    videos = drawn(prior, torch.arange(len(NUMBERS)), steps)
    return make_grid(videos.transpose(1, 2).flatten(0, 1), nrow=FRAMES, padding=1, pad_value=0.3)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and store the table."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--pipeline", default="moving_digits", help="name or folder")
    found.add_argument("--videos", type=int, default=200, help="test videos, evenly spaced over all; and samples")
    found.add_argument("--root", type=Path, default=Path("data/mnist"), help="holds MNIST/raw")
    found.add_argument("--folder", type=Path, default=Path("results/latent_digits"), help="holds the classifier")
    found.add_argument("--strip", type=Path, default=None, help="picture of samples to be written")
    found.add_argument("--no-store", action="store_true", help="print the table, and store nothing")
    options = found.parse_args(arguments)
    prior = LatentPrior.from_pretrained(options.pipeline)
    if options.strip is not None:
        write_image(strip(prior), options.strip)
    rows = measured(
        prior, trained_classifier(options.root, options.folder / "classifier.pt"), options.root, options.videos
    )
    for line in rows:
        print(line)
    if not options.no_store:
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        print(store("moving_digits", shlex.join(["python", *sys.argv]), config, rows))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
