"""The shipped pipeline ``digits``: small, loaded by diffusers alone, and its words mean digits."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from digit_classes import fit_classes
from torchvision.transforms.functional import pil_to_tensor

from ud2m.data.mnist import NUMBERS, Digits, MnistData, read_mnist
from ud2m.data.moving_digits import MovingDigitsData
from ud2m.physics import Problem, SuperResolution
from ud2m.priors.latent import LatentPrior
from ud2m.priors.latent_parts import most_frequent, read_pipeline_captions
from ud2m.priors.shipped import SHIPPED
from ud2m.samplers.latent_latino import LatentLatino

FOLDER = SHIPPED / "digits"
MOST_BYTES = 3_000_000
DATA = {"digits": MnistData, "moving_digits": MovingDigitsData}


@pytest.fixture(scope="module")
def prior():
    return LatentPrior.from_pretrained("digits")


@pytest.fixture(scope="module")
def digits(request):
    """Training digits with their classes, and a function that tells classes by regression on the pixels."""
    root = request.getfixturevalue("shared") / "data" / "mnist"
    mnist = read_mnist(root, train=True)
    data = Digits(mnist.data, 32, "train")
    x = torch.stack([data[k] for k in range(8000)])
    labels = mnist.targets[:8000]
    return x, labels, fit_classes(x, labels)


def test_it_is_small_and_diffusers_alone_draws_with_it():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= MOST_BYTES
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a photo of the digit one", num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0]
    assert image.size == (32, 32)
    assert 0.02 < pil_to_tensor(image.convert("L")).float().mean() / 255 < 0.5  # ink on black


@pytest.mark.parametrize("name", DATA)
def test_its_captions_are_those_of_its_training_data(name):
    data = DATA[name](root="nowhere", captions=True, channels=1, crop_size=32, batch_size=1)
    lines = [line for text in data.all_captions() for line in text.split("\n")]
    assert read_pipeline_captions(SHIPPED / name) == most_frequent(lines)


@torch.no_grad()
def test_its_words_mean_digits(prior, digits):
    _, _, classes = digits
    texts = [f"a photo of the digit {name}" for name in NUMBERS for _ in range(8)]
    sampler = LatentLatino(prior, texts[0])
    streams = [torch.Generator().manual_seed(k) for k in range(len(texts))]
    drawn = sampler.from_prior(prior.encode_prompt(texts), (32, 32), streams)
    right = classes(drawn) == torch.arange(10).repeat_interleave(8)
    assert right.float().mean() > 0.6  # of real digits this regression knows five in six


@torch.no_grad()
@pytest.mark.slow
def test_the_right_prompt_helps_and_a_wrong_one_misleads(prior, digits):
    x, labels, classes = digits
    x0, truth = x[:40], labels[:40]
    problem = Problem(SuperResolution(8), 0.02)
    observation = problem.observe(x0)

    def share(shift):
        texts = [f"a photo of the digit {NUMBERS[(label + shift) % 10]}" for label in truth.tolist()]
        sampler = LatentLatino(prior, prior.encode_prompt(texts))
        samples = sampler.draw(observation, [torch.Generator().manual_seed(k) for k in range(40)])
        return (classes(samples) == truth).float().mean()

    assert share(0) > 0.6
    assert share(1) < share(0) - 0.3
