"""Linear operators of deepinv, as users give them to a sampler: right, or refused before anything is drawn."""

import deepinv.physics as dp
import numpy as np
import pytest
import torch
from deepinv.utils import TensorList
from dense_prox import DELTA, LAM, SIGMA, SIGMA_Y, dense_prox, joint_prox
from operators import BATCH, dense, generator

from ud2m.physics import Adopted, DeepinvOperator, Observation, adopt, joined, residual, select_samples
from ud2m.priors.gaussian_mixture import GaussianMixture
from ud2m.samplers.latino import Latino, LatinoSetting


def uniform(*shape, seed=5):
    return torch.rand(*shape, generator=generator(seed))


def psf(count=1, dtype=torch.float32):
    values = uniform(count, 1, 3, 3).to(dtype)
    values[:, :, 1, 1] += 3
    return values / values.sum((-2, -1), keepdim=True)


def maps(coils=3, size=8):
    return torch.complex(uniform(1, coils, size, size), uniform(1, coils, size, size, seed=6))


def mask(count=1, channels=1, size=8):
    return (uniform(count, channels, size, size) > 0.4).float()


SIX = [0.0, 30.0, 60.0, 90.0, 120.0, 150.0]
OPERATORS = {
    **{f"blur {p}": (lambda p=p: dp.Blur(psf(), p)) for p in ("valid", "circular", "reflect", "replicate", "constant")},
    "blur by fft": lambda: dp.Blur(psf(), "circular", use_fft=True),
    "float64 psf": lambda: dp.Blur(psf(dtype=torch.float64), "valid"),
    "blur per sample": lambda: dp.Blur(psf(BATCH), "valid"),
    "BlurFFT": lambda: dp.BlurFFT((3, 8, 8), psf()),
    "BlurFFT per sample": lambda: dp.BlurFFT((3, 8, 8), psf(BATCH)),
    "Downsampling": lambda: dp.Downsampling((3, 8, 8), "gaussian", factor=2, padding="circular"),
    "Downsampling valid": lambda: dp.Downsampling((3, 8, 8), psf(), factor=2, padding="valid"),
    "Inpainting": lambda: dp.Inpainting((3, 8, 8), mask()),
    "Inpainting per sample": lambda: dp.Inpainting((3, 8, 8), mask(BATCH, 3)),
    "Decolorize": lambda: dp.Decolorize(),
    "Demosaicing": lambda: dp.Demosaicing((3, 8, 8)),
    "MRI": lambda: dp.MRI(mask(), (8, 8)),
    "MRI per sample": lambda: dp.MRI(mask(BATCH), (8, 8)),
    "MultiCoilMRI": lambda: dp.MultiCoilMRI(mask(), maps(), (8, 8)),
    "Tomography": lambda: dp.Tomography(6, 8),
    "Tomography normalised": lambda: dp.Tomography(6, 8, normalize=True),
    "Tomography of a disc": lambda: dp.Tomography(SIX, 8, circle=True, normalize=True),
    "Tomography, one after the other": lambda: dp.Tomography(6, 8, parallel_computation=False, normalize=True),
    "Tomography, fan beam": lambda: dp.Tomography(6, 8, fan_beam=True, normalize=True),
    "CompressedSensing": lambda: dp.CompressedSensing(40, (1, 8, 8), rng=generator(2)),
    "SinglePixelCamera": lambda: dp.SinglePixelCamera(20, (1, 8, 8), rng=generator(2)),
    "HyperSpectralUnmixing": lambda: dp.HyperSpectralUnmixing(uniform(3, 5), 3, 5),
    "StackedLinearPhysics": lambda: dp.StackedLinearPhysics(
        [dp.Blur(psf(), "valid"), dp.Inpainting((3, 8, 8), mask())]
    ),
    "Pansharpen": lambda: dp.Pansharpen((3, 8, 8), factor=2),
    "composed": lambda: dp.ComposedLinearPhysics(dp.Blur(psf(), "valid"), dp.Decolorize()),
}


def shape_of(name):
    channels = 2 if "MRI" in name else 1 if name.startswith(("Tomo", "Comp", "Single")) else 3
    return (channels, 8, 8)


def white(shape):
    """The prior whose pixels are independent around 0.5, with its exact denoiser."""
    size = torch.Size(shape).numel()
    return GaussianMixture(torch.ones(1), torch.full((1, *shape), 0.5), 0.02 * torch.eye(size)[None])


def observed(physics, x0, sigma_y):
    """Return y, in the parts that the operator gives."""
    noiseless = physics.A(x0)
    noise = generator(9)
    parts = list(noiseless) if isinstance(noiseless, TensorList) else [noiseless]
    noisy = [
        p + sigma_y.view(-1, *(1,) * (p.ndim - 1)).to(p) * torch.randn(p.shape, generator=noise).to(p) for p in parts
    ]
    return TensorList(noisy) if isinstance(noiseless, TensorList) else noisy[0]


QUICK = ("blur per sample", "float64 psf", "Inpainting per sample", "Decolorize", "MRI", "Pansharpen")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPERATORS])
def test_prox_and_samples(name):
    physics, shape = OPERATORS[name](), shape_of(name)
    x0 = uniform(BATCH, *shape, seed=1).to(float_of(name))
    y = observed(physics, x0, SIGMA_Y)
    observation = Observation.of(y, physics, SIGMA_Y.float())
    adopted = observation.physics
    assert observation.image_shape == shape
    matrix = dense(lambda e: joined(physics.A(e.to(x0))).double(), shape)
    x_sigma, x = uniform(BATCH, *shape, seed=2).double(), uniform(BATCH, *shape, seed=3).double()
    expected = dense_prox(matrix, observation.y.double(), x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    arguments = (observation.y, x_sigma.float(), x.float(), SIGMA.float(), DELTA.float(), LAM.float(), SIGMA_Y.float())
    torch.testing.assert_close(joint_prox(adopted, *arguments).double(), expected, rtol=0, atol=2e-4)
    # and with rows of their own
    index = torch.tensor([1, 0, 1])
    rows = observation.rows(index)
    picked = (rows.y, *(value[index] for value in arguments[1:]))
    torch.testing.assert_close(joint_prox(rows.physics, *picked).double(), expected[index], rtol=0, atol=2e-4)

    # a prior that is not theirs, and few levels: the last step still leaves the samples near the observation
    sampler = Latino(white(shape), LatinoSetting(num_levels=2, tau_last=0.05))
    samples = sampler(y, physics, SIGMA_Y.float(), 1, generator(4))[:, 0].to(observation.y)
    assert (residual(adopted, samples, observation.y, observation.sigma_y) < 1.6).all()
    assert residual(adopted, x0, observation.y, observation.sigma_y).tolist() == pytest.approx([1, 1], abs=0.2)


@pytest.mark.slow
def test_closed_forms_are_kept_where_they_are_right():
    kept = {name for name in OPERATORS if is_exact(name)}
    closed = ("BlurFFT", "Inpainting", "Demosaicing", "MRI", "SinglePixelCamera", "Decolorize")
    assert kept == {name for name in OPERATORS if name.startswith(closed)}

    class Doubled(dp.LinearPhysics):
        """With a prox that its user wrote, right for one value of ``error``."""

        error = 0.0

        def A(self, x, **kwargs):
            return 2 * x

        A_adjoint = A

        def prox_l2(self, z, y, gamma, **kwargs):
            return (2 * gamma * y + z) / (4 * gamma + 1 + self.error)

    physics = Doubled()
    assert adopt(physics, uniform(1, 3, 8, 8)).exact
    physics.error = 30.0
    assert not adopt(physics, uniform(1, 3, 8, 8)).exact


def is_exact(name):
    physics = OPERATORS[name]()
    return adopt(physics, physics.A(uniform(BATCH, *shape_of(name)).to(float_of(name)))).exact


def float_of(name):
    return torch.float64 if "float64" in name else torch.float32


def test_decolorize_was_far_off():
    """deepinv's prox leaves out what its luminance does not see."""
    physics, x = dp.Decolorize(), uniform(1, 3, 8, 8)
    y = physics.A(x)
    wrong, right = physics.prox_l2(x, y, 100.0), adopt(physics, y).prox_l2(x, y, 100.0)
    torch.testing.assert_close(right, x, rtol=0, atol=1e-5)  # x explains y
    assert (wrong - x).norm() > 0.3 * x.norm()


# --- what is refused --------------------------------------------------------------------------------------------------


class Hidden(dp.LinearPhysics):
    """Gains of two samples where nobody can find them, or other ones in every call."""

    def __init__(self, gains):
        super().__init__()
        self.gains = gains

    def A(self, x, **kwargs):
        return self.gains() * x

    def A_adjoint(self, y, **kwargs):
        return self.gains() * y


GAINS = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
COLOUR = (BATCH, 3, 8, 8)
REFUSED = {
    "filtered back-projection": (lambda: dp.Tomography(6, 8, adjoint_via_backprop=False), (BATCH, 1, 12, 6), "adjoint"),
    "parameters of other samples": (lambda: dp.Blur(psf(3), "circular"), COLOUR, "does not fit"),
    "a y of another size": (lambda: dp.Inpainting((3, 8, 8), mask()), (BATCH, 3, 9, 8), "does not fit"),
    "hidden parameters": (lambda: Hidden(lambda: GAINS), COLOUR, "cannot be found out"),
    "another operator in every call": (lambda: Hidden(lambda: torch.rand(1)), COLOUR, "in every call"),
    "not linear": (lambda: dp.LinearPhysics(A=lambda x: x + 1, A_adjoint=lambda y: y), COLOUR, "is not linear"),
    "a volume": (lambda: dp.DynamicMRI(mask(1, 4), (8, 8)), (BATCH, 2, 4, 8, 8), "not on .B, C, H, W."),
    "a wrong scale": (lambda: dp.LinearPhysics(A=lambda x: 2 * x, A_adjoint=lambda y: y), COLOUR, "not the adjoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_before_sampling(name):
    make, shape, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Latino(Untouched())(uniform(*shape), make(), 0.05)


class Untouched(torch.nn.Module):
    def forward(self, *arguments):
        raise AssertionError("sampling has begun")


def test_per_sample_is_not_guessed():
    physics = dp.Inpainting((3, 8, 8), mask(BATCH))
    with pytest.raises(ValueError, match="not known which parameters of Inpainting belong to one sample"):
        select_samples(physics, torch.tensor([1, 0]))
    # a buffer as long as the batch, of another meaning
    stacked = dp.LinearPhysics(A=lambda x: x.sum(1, keepdim=True), A_adjoint=lambda y: y.expand(-1, BATCH, -1, -1))
    stacked.register_buffer("weights", torch.rand(BATCH, 1, 8, 8))
    adopted = adopt(stacked, uniform(BATCH, 1, 8, 8))
    assert select_samples(adopted, torch.tensor([1, 1, 1])).inner.weights is stacked.weights


def test_a_shared_operator_serves_any_number_of_samples_and_is_not_copied():
    physics = dp.Tomography(6, 8)
    adopted = adopt(physics, physics.A(uniform(1, 1, 8, 8)))
    assert select_samples(adopted, torch.zeros(5, dtype=torch.int64)) is adopted
    assert adopted.A(uniform(5, 1, 8, 8)).shape[0] == 5
    assert isinstance(adopted, Adopted)


# --- by name ----------------------------------------------------------------------------------------------------------


def test_complex_coil_maps_come_from_a_file(tmp_path):
    np.save(tmp_path / "maps.npy", maps()[0].numpy())
    np.save(tmp_path / "mask.npy", mask()[0, 0].numpy())
    files = {"coil_maps": str(tmp_path / "maps.npy"), "mask": str(tmp_path / "mask.npy")}
    x = uniform(BATCH, 2, 8, 8)
    found = DeepinvOperator("MultiCoilMRI", files).draw(BATCH, (2, 8, 8)).A(x)
    torch.testing.assert_close(found, dp.MultiCoilMRI(mask()[0, 0], maps()[0], (8, 8)).A(x))
    assert found[:, 1].abs().max() > 0.1  # an imaginary part


def test_random_operators_by_name_are_the_same_in_every_run():
    make = lambda: DeepinvOperator("CompressedSensing", {"m": 20}).draw(1, (1, 8, 8))  # noqa: E731
    x = uniform(1, 1, 8, 8)
    before = torch.get_rng_state()
    assert torch.equal(make().A(x), make().A(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_deepinv_itself_cannot_make_is_one_line():
    with pytest.raises(ValueError, match="Tomography with angles, dtype, normalize does not take images"):
        DeepinvOperator("Tomography", {"angles": 6, "dtype": torch.float64, "normalize": True}).draw(1, (1, 8, 8))
