"""The shipped pipeline ``moving_digits``: small, loaded by diffusers alone, and what it draws are digits that move."""

import pytest
import torch
from diffusers import WanPipeline
from digit_classes import fit_classes

from ud2m.data.mnist import NUMBERS, Digits, read_mnist
from ud2m.data.moving_digits import MovingDigits
from ud2m.evaluation.metrics import psnr
from ud2m.priors.latent import LatentPrior
from ud2m.priors.shipped import SHIPPED
from ud2m.random import randn_like

FOLDER = SHIPPED / "moving_digits"
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def prior():
    return LatentPrior.from_pretrained("moving_digits")


def test_it_is_small_and_diffusers_alone_draws_with_it():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= MOST_BYTES
    pipe = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    text = "a video of the digit one"
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=12)
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    frames = pipe(prompt_embeds=embeds, **size, generator=generator, output_type="pt").frames
    assert frames.shape == (1, 9, 1, 32, 32)
    assert 0.02 < frames.mean() < 0.5  # ink on black


@pytest.fixture(scope="module")
def known(request):
    """Test videos with their classes, and a regression on centred frames that tells classes."""
    root = request.getfixturevalue("shared") / "data" / "mnist"
    mnist = read_mnist(root, train=True)
    still = Digits(mnist.data, 32, "train")
    x = torch.stack([still[k] for k in range(8000)])
    of_still = fit_classes(x, mnist.targets[:8000])

    def classes(videos):
        frames = videos[:, 0, 4]
        centred = []
        for frame in frames:
            moves = [15.5 - float((frame.sum(1 - axis) * torch.arange(32)).sum() / frame.sum()) for axis in (0, 1)]
            centred.append(torch.roll(frame, [round(move) for move in moves], (0, 1)))
        return of_still(torch.stack(centred))

    moving = MovingDigits(mnist.data, 32, "train", 9, 2)
    return torch.stack([moving[k] for k in range(8000, 8040)]), mnist.targets[8000:8040], classes


@torch.no_grad()
def test_its_autoencoder_keeps_videos_and_classes(prior, known):
    x, labels, classes = known
    again = prior.decode(prior.encode(x)).clamp(0, 1)
    assert psnr(again, x).mean() > 18
    assert (classes(again) == labels).float().mean() > (classes(x) == labels).float().mean() - 0.15


@torch.no_grad()
def test_what_it_draws_moves_and_its_words_say_a_little(prior, known):
    """A small model, trained for a short time: of the classes a fourth is right, where chance has a tenth."""
    _, _, classes = known
    texts = [f"a video of the digit {name}" for name in NUMBERS for _ in range(6)]
    noise = [torch.Generator().manual_seed(k) for k in range(len(texts))]
    z0, prompt = torch.zeros(len(texts), *prior.latent_shape((9, 32, 32))), prior.encode_prompt(texts)
    for t in prior.table.shifted_times(4, 1.0):
        z0 = prior.estimate(prior.noised(z0, t, randn_like(z0, noise)), t, prompt)
    drawn = prior.decode(z0).clamp(0, 1)
    assert (classes(drawn) == torch.arange(10).repeat_interleave(6)).float().mean() > 0.15
    # they move, though not within a frame
    assert (drawn[:, :, 8] - drawn[:, :, 0]).abs().flatten(1).mean(1).mean() > 0.04
