"""LVTINO against a second implementation, LATINO on videos, and what windows must keep."""

import pytest
import torch
from operators import generator
from video_priors import VP, GaussianPrior, IdentityPrior, OffsetPrior

from ud2m.bars import NetworkEvaluations
from ud2m.physics import Observation, Problem, SuperResolution, VideoOperator
from ud2m.samplers.latent_latino import AnnealedSteps, LatentLatino
from ud2m.samplers.lvtino import Lvtino, fade
from ud2m.unfolded.warm_start import PinvStart

SIDES = (6, 4, 4)
TIMES, IMAGE_TIMES = (700, 400, 100), (300, 80)


def observed(frames: int = 6, sigma_y: float = 0.05, stride: int = 2, count: int = 2, side: int = 4) -> Observation:
    x0 = torch.rand(count, 1, frames, side, side, generator=generator(), dtype=torch.float64) * 0.4 + 0.3
    return Problem(VideoOperator(SuperResolution(2, "box"), stride, stride), sigma_y).observe(x0)


def streams(count: int = 2) -> list[torch.Generator]:
    return [generator(k) for k in range(count)]


def by_the_formula(prior, image_prior, y, sigma_y, eta, width, stream):
    """Return one sample of one clip [96], all written out with vectors and matrices of its pixels."""
    frames, side = SIDES[0], SIDES[1]
    blocks = torch.kron(torch.eye(3), torch.ones(1, 2) / 2).double()
    pooling = torch.kron(torch.eye(2), torch.ones(1, 2) / 2).double()
    A = torch.kron(blocks, torch.kron(pooling, pooling))
    abar = (1 - torch.linspace(VP["beta_start"] ** 0.5, VP["beta_end"] ** 0.5, 1000).double() ** 2).cumprod(0)

    def posterior_mean(model, z, a, b):
        system = a**2 * model.covariance + b**2 * torch.eye(len(z), dtype=torch.float64)
        return model.mean + a * model.covariance @ torch.linalg.solve(system, z - a * model.mean)

    def back_to_data(u, delta):
        left = A.T @ A / sigma_y**2 + torch.eye(len(u)) / delta
        return torch.linalg.solve(left, A.T @ y / sigma_y**2 + u / delta).clamp(0, 1)

    x = (torch.linalg.pinv(A) @ y).clamp(0, 1)
    for k, t in enumerate(TIMES):
        s = t / 1000
        eps = torch.randn(1, *SIDES, generator=stream, dtype=torch.float64).flatten()
        u = 0.5 + posterior_mean(prior, (1 - s) * 4 * (x - 0.5) + s * eps, 1 - s, s) / 4
        x = back_to_data(u.clamp(0, 1), eta * (width * s / 2) ** 2)
        if eta < 1 and k < len(TIMES) - 1:
            a, b = abar[IMAGE_TIMES[k]].sqrt(), (1 - abar[IMAGE_TIMES[k]]).sqrt()
            eps = torch.randn(1, side, side, generator=stream, dtype=torch.float64).flatten()
            u = [
                0.5 + posterior_mean(image_prior, a * 4 * (frame - 0.5) + b * eps, a, b) / 4
                for frame in x.view(frames, -1)
            ]
            x = back_to_data(torch.cat(u).clamp(0, 1), (1 - eta) * (width * b / 2) ** 2)
    return x


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("sigma_y", [0.2, 0.001])
def test_it_is_a_second_implementation(eta, sigma_y):
    prior, image_prior = GaussianPrior(True, *SIDES), GaussianPrior(False, *SIDES[1:], seed=1)
    observation = observed(sigma_y=sigma_y)
    options = {"times": TIMES, "image_times": IMAGE_TIMES, "eta": eta, "steps": AnnealedSteps(1.5)}
    sampler = Lvtino(prior, image_prior, start=PinvStart(), chunk_size=5, **options)
    found = sampler.draw(observation, streams())
    for row, stream in enumerate(streams()):
        y = observation.y[row].flatten()
        expected = by_the_formula(prior, image_prior, y, sigma_y, eta, 1.5, stream)
        torch.testing.assert_close(found[row].flatten(), expected, rtol=0, atol=1e-6)


def test_the_video_prior_alone_is_latino_on_videos():
    prior, observation = GaussianPrior(True, *SIDES), observed()
    ours = Lvtino(prior, times=TIMES, eta=1)
    theirs = LatentLatino(prior, times=TIMES)
    found, expected = ours.draw(observation, streams()), theirs.draw(observation, streams())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert ours.nfe() == theirs.nfe() == 3


def test_total_variation_makes_frames_alike():
    prior, observation = GaussianPrior(True, *SIDES), observed(sigma_y=0.2)
    moved = [
        Lvtino(prior, times=TIMES, eta=1, time=time).draw(observation, streams()).diff(dim=2).abs().mean()
        for time in (0.0, 30.0, 3000.0)
    ]
    assert moved[1] < 0.7 * moved[0]
    assert moved[2] < 0.01


def test_samples_do_not_depend_on_what_is_drawn_beside_them():
    prior, image_prior, observation = IdentityPrior(True), IdentityPrior(False), observed(side=8)
    sampler = Lvtino(prior, image_prior, times=TIMES, image_times=IMAGE_TIMES, chunk_size=12)
    physics, y = observation.physics, observation.y
    together = sampler(y, physics, 0.05, 3, generator(4))
    assert together.shape == (2, 3, 1, 6, 8, 8)
    alone = Lvtino(prior, image_prior, times=TIMES, image_times=IMAGE_TIMES, chunk_size=1)
    torch.testing.assert_close(alone(y, physics, 0.05, 3, generator(4)), together)
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(physics.A(together[:, 1]), y, rtol=0, atol=0.1)


def test_evaluations_are_counted_by_windows_and_frames():
    prior, image_prior, observation = IdentityPrior(True, 4), IdentityPrior(False), observed(13, stride=1)
    sampler = Lvtino(prior, image_prior, times=TIMES, image_times=IMAGE_TIMES, window=9, overlap=4)
    with NetworkEvaluations(sampler.networks) as counter:
        sampler.sample(observation)
    assert sampler.nfe() == 5
    assert counter.count == 2 * sampler.evaluations_of(observation) == 2 * (3 * 2 + 2 * 13)


# --- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("frames", [5, 9, 10, 26, 57])
@pytest.mark.parametrize(("window", "overlap"), [(9, 4), (9, 0), (17, 7)])
def test_windows_cover_a_clip_and_overlap(stride, frames, window, overlap):
    sampler = Lvtino(IdentityPrior(True, stride), eta=1, window=window, overlap=overlap)
    starts, whole = sampler.starts(frames), sampler.whole(frames)
    assert frames <= whole < frames + stride
    assert (whole - 1) % stride == 0
    length = min(window, whole)
    assert starts[0] == 0
    assert starts[-1] + length == whole
    steps = torch.tensor(starts).diff()
    assert (steps > 0).all()
    assert (steps <= length - overlap).all()
    assert all(start % stride == 0 for start in starts)


def test_a_prior_of_single_frames_gives_the_same_in_windows():
    """Frames that two windows see have one noise, and both estimates are the same."""
    observation = observed(26)
    whole, parts = (
        Lvtino(IdentityPrior(True), eta=1, window=window).draw(observation, streams()) for window in (None, 9)
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert whole.std() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0, 4, 8])
def test_borders_of_windows_do_not_flicker(overlap):
    """Windows that are brighter and darker by turns: from frame to frame no more than a step of the fade is seen."""
    sampler = Lvtino(OffsetPrior(4), eta=1, window=17, overlap=overlap)
    u = sampler.of_videos(torch.full((1, 1, 57, 4, 4), 0.5), 1, streams(1))
    first, second, *others = sampler.starts(57)
    shared = first + 17 - second
    assert shared > overlap
    assert others
    largest = u.diff(dim=2).abs().max()
    assert abs(largest - 2 * OffsetPrior.OFFSET / (shared + 1)) < 0.005  # the noise of t = 1
    assert torch.equal(fade(9, 4)[-4:] + fade(9, 4)[:4], torch.full((4,), 5.0))


@pytest.mark.parametrize("frames", [9, 25, 57, 121])
def test_networks_see_a_window_whatever_the_length(frames):
    prior, image_prior = IdentityPrior(True, 4), IdentityPrior(False)
    sampler = Lvtino(prior, image_prior, times=TIMES, image_times=IMAGE_TIMES, window=9, chunk_size=4)
    sample = sampler.draw(observed(frames, count=1), streams(1))
    assert sample.shape == (1, 1, frames, 4, 4)
    assert max(prior.seen) == 9
    assert max(image_prior.seen) == 4


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0}, r"eta must be a share in \(0, 1\], got 0"),
        ({"eta": 0.5}, "eta=0.5 needs a pipeline of images too"),
        ({"eta": 0.5, "image_prior": IdentityPrior(True)}, "eta=0.5 needs a pipeline of images too"),
        ({"prior": IdentityPrior(False)}, "stub is a pipeline of images; LVTINO needs one of videos"),
        ({"time": -1.0}, "time must be a weight of at least 0, got -1.0"),
        ({"window": 8}, r"window must be 1 \+ 4 n frames, as the video prior takes them, got 8"),
        ({"window": 9, "overlap": 6}, "overlap must be a number of frames from 0 to window - 4, got 6 at window=9"),
        ({"times": (100, 200)}, "times must be whole numbers that fall"),
        (
            {"eta": 0.5, "image_prior": IdentityPrior(False), "image_times": (300, 200), "times": (300,)},
            "image_times has 2 times and times 1",
        ),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        Lvtino(**({"prior": IdentityPrior(True, 4), "eta": 1} | options))


def test_operators_on_images_are_refused():
    physics = SuperResolution(2).draw(1, (1, 8, 8))
    with pytest.raises(ValueError, match="LVTINO restores videos; take an operator on videos, as physics=video_a"):
        Lvtino(IdentityPrior(True), eta=1)(torch.rand(1, 1, 4, 4), physics, 0.05)
