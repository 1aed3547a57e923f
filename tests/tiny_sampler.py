"""A micro posterior sampler, and observations for it."""

import torch
from operators import generator
from tiny import LORA, SIZE, adapted, perturb, save_tiny_prior, tiny_network

from ud2m.physics import Inpainting, observe
from ud2m.priors.prior import LoraSpec, Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

SHAPE = (3, SIZE, SIZE)
CONFIG = {
    "num_steps": 2,
    "eta": 0.5,
    "step_scale": 1.5,
    "sigma_y": 0.05,
    "info": {"physics": {"operator": {"width": 1.6}}, "steps": 7},
}


def build(prior_folder, rank=LORA["rank"], num_blocks=3):
    """Return a sampler in the state in which training leaves it."""
    prior = Prior.from_pretrained(prior_folder)
    prior = adapted(prior, rank=rank) if rank else prior.add_lora(LoraSpec(rank=0))
    network = tiny_network(prior, num_blocks)
    perturb((p for name, p in network.named_parameters() if name.startswith("blocks.")), scale=0.3)
    return PosteriorSampler(network, SamplerConfig(**CONFIG))


def export(folder):
    """Return an export folder for random masks, on a micro prior."""
    prior = adapted(Prior.from_pretrained(save_tiny_prior(folder / "prior")))
    info = {"physics": {"operator": {"class": "ud2m.physics.Inpainting", "missing": 0.5}, "sigma_y": 0.05}}
    sampler = PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=2, sigma_y=0.05, info=info))
    sampler.save_pretrained(folder / "export")
    return str(folder / "export")


def observation(family=None, batch=2, shape=SHAPE, sigma_y=0.05):
    x0 = torch.rand(batch, *shape, generator=generator(0))
    physics = (family or Inpainting()).draw(batch, shape, generator(1))
    return observe(physics, x0, sigma_y, generator(2)), physics
