"""Every shipped model draws the samples that it drew when its digests were stored: bit for bit, for fixed seeds.

Floating-point sums depend on the processor and on the version of torch, so the bits are compared where both are those
of the stored samples, and elsewhere values within rounding. ``python tests/test_shipped_samples.py`` stores them anew.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ud2m import PosteriorSampler
from ud2m.physics import Denoising, GaussianBlur, Inpainting, OperatorFamily, SuperResolution, observe

STORED = Path(__file__).parent / "data" / "shipped_samples.safetensors"
DIGESTS = STORED.with_suffix(".json")
SIDE = 24
ROUNDING = 2e-4
"""Largest difference of a value between processors, in image units; samples pass through 9 networks."""

OPERATORS: dict[str, OperatorFamily] = {
    "photos_gaussian_blur": GaussianBlur(1.6),
    "photos_super_resolution": SuperResolution(4),
    "photos_inpainting": Inpainting(0.7),
    "photos_general": Denoising(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "options": {"num_steps": 2, "eta": "fresh", "step_scale": 1.3, "symmetries": 1},
    "tiled": {"num_steps": 1, "tile": 16, "symmetries": 2, "chunk_size": 1},
}


def picture() -> Tensor:
    """Return a smooth picture with an edge and a texture [1, 3, H, W]."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
    edge = (rows + columns > 1).float()
    return torch.stack([0.2 + 0.5 * rows, 0.8 * edge + 0.1, 0.5 + 0.3 * torch.sin(20 * columns)]).unsqueeze(0)


def draw(model: str, options: dict[str, Any]) -> Tensor:
    x0 = picture()
    physics = OPERATORS[model].draw(1, (3, SIDE, SIDE), torch.Generator().manual_seed(1))
    y = observe(physics, x0, 0.02, torch.Generator().manual_seed(2))
    sampler = PosteriorSampler.from_pretrained(model)
    return sampler(y, physics, 0.02, num_samples=2, generator=torch.Generator().manual_seed(3), **options)


def digest(samples: Tensor) -> str:
    return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()


def processor() -> str:
    """Return what the bits of a sum depend on."""
    kept = ("model name", "model\t", "cpu family")
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith(kept)]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability} {' '.join(sorted(set(names)))} torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", OPERATORS)
def test_a_shipped_model_draws_what_it_drew(model, options):
    stored = json.loads(DIGESTS.read_text())
    samples = draw(model, OPTIONS[options])
    expected = load_file(STORED)[f"{model}.{options}"]
    torch.testing.assert_close(samples, expected, rtol=0, atol=ROUNDING)
    if processor() == stored["processor"]:
        assert digest(samples) == stored["digests"][f"{model}.{options}"]


def store() -> None:
    """Write samples and digests of this version."""
    torch.set_num_threads(1)
    samples = {f"{model}.{name}": draw(model, options) for model in OPERATORS for name, options in OPTIONS.items()}
    save_file({name: value.contiguous() for name, value in samples.items()}, STORED)
    content = {"processor": processor(), "digests": {name: digest(value) for name, value in samples.items()}}
    DIGESTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    store()
