"""Values that are no numbers of an observation, an operator or a model, and numbers in other clothes."""

import shutil
import warnings

import deepinv.physics as dp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZE, save_tiny_prior
from tiny_sampler import build

from ud2m import PosteriorSampler
from ud2m.physics import (
    CircularBlur,
    Denoising,
    GaussianBlur,
    Inpainting,
    MissingBoxes,
    MotionBlur,
    NoiseLevelWarning,
    Observation,
    PixelMask,
    Problem,
    SuperResolution,
    UniformBlur,
    told_level,
)
from ud2m.priors.prior import Prior
from ud2m.samplers.config import SamplerConfig
from ud2m.samplers.latino import Latino

SHAPE = (3, SIZE, SIZE)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    save_tiny_prior(folder / "prior")
    build(folder / "prior", 2).save_pretrained(folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def sampler(export):
    return PosteriorSampler.from_pretrained(export)


def images(count=2, seed=0):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def draw(sampler, y, physics, **options):
    return sampler(y, physics, generator=torch.Generator().manual_seed(0), **options)


class Untouched(torch.nn.Module):
    def forward(self, *arguments):
        raise AssertionError("sampling has begun")


# --- y ----------------------------------------------------------------------------------------------------------------

WITH_NAN = images()
WITH_NAN[1, 0, 3, 4] = torch.nan
REFUSED = {
    "NaN": (WITH_NAN, r"NaN or infinity \(observation 1 of 2\)"),
    "infinity": (images() / 0, r"NaN or infinity \(observation 0, 1 of 2\)"),
    "uint8": ((255 * images()).byte(), "got torch.uint8: divide 8-bit values by 255"),
    "bool": (images() > 0.5, "got torch.bool"),
    "complex": (images().to(torch.complex64), "got torch.complex64"),
    "8-bit values": (255 * images(), "divide 8-bit values by 255"),
    "from -1 to 1": (2 * images() - 1, r"map \[-1, 1\] to \[0, 1\]"),
}
OPERATORS = {
    "denoising": lambda: Denoising().draw(2, SHAPE),
    "blur": lambda: CircularBlur(torch.full((1, 1, 1, 1), 1.0), SHAPE),
    "deepinv": lambda: dp.Denoising(),
    "mask": lambda: PixelMask(torch.ones(2, 1, SIZE, SIZE), SHAPE),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", REFUSED)
def test_y_that_is_none_is_refused_before_sampling(case, operator):
    y, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Latino(Untouched())(y, OPERATORS[operator](), 0.01)


def test_noise_and_other_operators_are_no_reason_to_refuse():
    generator = torch.Generator().manual_seed(0)
    dark = 0.02 * images()
    Observation.of(dark + 0.5 * torch.randn(dark.shape, generator=generator), OPERATORS["denoising"](), 0.5)
    for physics, shape in (
        (dp.MRI(torch.ones(8, 8), (8, 8)), (2, 8, 8)),
        (dp.CompressedSensing(30, (1, 8, 8), rng=generator), (1, 8, 8)),
        (dp.Tomography(9, 8, normalize=False), (1, 8, 8)),
        (SuperResolution(2).draw(1, (1, 8, 8)), (1, 8, 8)),
    ):
        for x in (torch.ones(1, *shape), torch.zeros(1, *shape), torch.rand(1, *shape, generator=generator).round()):
            y = physics.A(x)
            Observation.of(y + 0.05 * torch.randn(y.shape, generator=generator), physics, 0.05)


def test_other_precisions_give_the_same_samples(sampler):
    physics = GaussianBlur(1.0).draw(2, SHAPE)
    y = physics.A(images()).half()
    expected = draw(sampler, y.float(), physics)
    assert torch.equal(draw(sampler, y, physics), expected)  # casting up is exact
    assert torch.equal(draw(sampler, y.double(), physics), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_operators_in_other_precisions(dtype):
    psf = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = images()
    expected = dp.Blur(psf.double(), "circular").A(x.double())
    observation = Observation.of(expected.float() / expected.max().item(), dp.Blur(psf, "circular"), 0.01)
    torch.testing.assert_close(observation.physics.A(x).double(), expected, rtol=0, atol=1e-5)


# --- operators --------------------------------------------------------------------------------------------------------


def test_parameters_with_nan_are_named():
    for physics, name in (
        (dp.Blur(torch.full((1, 1, 3, 3), torch.nan), "circular"), "filter of the operator Blur"),
        (dp.Inpainting(SHAPE, mask=torch.full((1, 1, SIZE, SIZE), torch.inf)), "mask of the operator Inpainting"),
    ):
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
            Latino(Untouched())(images(), physics, 0.01)


def test_the_noise_model_of_the_operator_counts_where_sigma_y_is_left_out(sampler):
    physics = dp.Denoising(dp.GaussianNoise(0.3))
    y = images()
    assert torch.equal(draw(sampler, y, physics), draw(sampler, y, physics, sigma_y=0.3))
    assert not torch.allclose(draw(sampler, y, physics), draw(sampler, y, dp.Denoising(dp.ZeroNoise())), atol=1e-2)
    assert told_level(dp.Denoising(dp.ZeroNoise())) is None
    assert told_level(GaussianBlur().draw(1, SHAPE)) is None


def test_another_noise_level_than_the_operators_warns(sampler):
    physics = dp.Denoising(dp.GaussianNoise(torch.tensor([0.1, 0.3])))
    with pytest.warns(NoiseLevelWarning, match=r"noise_model.sigma of the operator is 0.1, 0.3, but sigma_y=0.05"):
        draw(sampler, images(), physics, sigma_y=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(sampler, images(), physics, sigma_y=torch.tensor([0.1, 0.3]))
        draw(sampler, images(), physics)


# --- scalars of numpy -------------------------------------------------------------------------------------------------


def test_scalars_of_numpy_are_numbers(sampler, tmp_path):
    physics, y = Denoising().draw(2, SHAPE), images()
    expected = draw(sampler, y, physics, sigma_y=0.5, num_samples=2, num_steps=2, eta=0.5, step_scale=2.0)
    options = {"num_steps": np.int64(2), "eta": np.float32(0.5), "step_scale": np.float64(2)}
    found = draw(sampler, y, physics, sigma_y=np.float32(0.5), num_samples=np.int64(2), **options)
    assert torch.equal(found, expected)
    PosteriorSampler(sampler.network, SamplerConfig(**options)).save_pretrained(tmp_path / "export")  # as JSON
    assert Problem(Denoising(), np.float32(0.5)).sigma_y == 0.5
    blurs = [
        GaussianBlur(np.float32(1)),
        UniformBlur(np.int32(3)),
        MotionBlur(np.int64(5)),
        SuperResolution(np.int64(2)),
    ]
    for family in [*blurs, Inpainting(np.float32(0.5)), MissingBoxes(count=np.int8(2))]:
        assert family.draw(1, SHAPE).A(images(1)).isfinite().all()


def test_truth_values_are_no_numbers():
    for options in ({"num_steps": True}, {"chunk_size": np.bool_(True)}, {"step_scale": True}, {"eta": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SamplerConfig(**options)


# --- weights ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "NaN": (lambda t: torch.full_like(t, torch.nan), "holds NaN or infinity"),
    "infinity": (lambda t: t / 0, "holds NaN or infinity"),
    "integers": (lambda t: t.round().long(), "holds torch.int64; weights are floats"),
    "complex": (lambda t: t.to(torch.complex64), "holds torch.complex64; weights are floats"),
    "bool": (lambda t: t > 0, "holds torch.bool; weights are floats"),
}


@pytest.mark.parametrize("file", ["psi.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("case", CHANGES)
def test_weights_of_an_export_are_finite_floats(case, file, export, tmp_path):
    shutil.copytree(export, tmp_path / "export")
    change, message = CHANGES[case]
    state = load_file(export / file)
    name = next(iter(state))
    save_file(state | {name: change(state[name])}, tmp_path / "export" / file)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        PosteriorSampler.from_pretrained(tmp_path / "export")


def test_weights_of_a_prior_are_finite(export, tmp_path):
    shutil.copytree(export.parent / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"][0] = torch.nan
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in.bias in .* holds NaN or infinity"):
        Prior.from_pretrained(tmp_path / "prior")
