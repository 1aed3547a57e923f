"""Operators on videos: the matrix over frames, and what the rest of the package asks of them."""

import pytest
import torch
from operators import dense, generator
from torch import Tensor

from ud2m.physics import (
    Inpainting,
    Observation,
    Problem,
    SpaceTime,
    SuperResolution,
    VideoOperator,
    estimate_sigma_y,
    residual,
)
from ud2m.physics.video import exposures

OF_BLOCKS = VideoOperator(SuperResolution(2, "box"), 4, 4)


def means(x: Tensor, exposure: int, stride: int) -> Tensor:
    """Return the means of frames [T], written as a loop: each around the middle of its block, ends repeated."""
    rows = []
    for start in range(0, len(x), stride):
        low = start - max(0, exposure - stride) // 2
        rows.append(sum(x[min(max(t, 0), len(x) - 1)] for t in range(low, low + exposure)) / exposure)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("frames", "exposure", "stride"), [(8, 4, 4), (10, 4, 4), (9, 8, 8), (25, 7, 1), (3, 7, 1), (7, 1, 3), (12, 6, 4)]
)
def test_the_matrix_over_frames_is_a_mean_of_a_clip_whose_ends_are_repeated(frames, exposure, stride):
    x = torch.rand(frames, generator=generator(), dtype=torch.float64)
    matrix = exposures(frames, exposure, stride)
    torch.testing.assert_close(matrix @ x, means(x, exposure, stride), rtol=0, atol=1e-14)


def test_a_clip_is_seen_frame_by_frame():
    """The tail of 10 frames is its last frame, repeated: with 12 frames the same is seen."""
    x = torch.rand(2, 3, 10, 4, 6, generator=generator())
    longer = torch.cat([x, x[:, :, -1:].expand(-1, -1, 2, -1, -1)], 2)
    y, y_longer = (OF_BLOCKS.draw(2, clip.shape[1:]).A(clip) for clip in (x, longer))
    torch.testing.assert_close(y, y_longer)
    frame = SuperResolution(2, "box").draw(2, (3, 4, 6)).A(longer[:, :, 8:12].mean(2))
    torch.testing.assert_close(y[:, :, 2], frame)


def test_noise_is_drawn_for_each_clip_alone_with_its_own_mask_and_level():
    problem = Problem(VideoOperator(Inpainting(0.5), 2, 2), 0.05, seed=3)
    x0 = torch.rand(3, 2, 4, 8, 8, generator=generator())
    together = problem.observe(x0)
    alone = problem.observe(x0[1:2], first=1)
    assert torch.equal(together.y[1:2], alone.y)
    seen = together.y != 0
    assert torch.equal(seen, seen[:, :1, :1].expand_as(seen))  # one mask for all frames of a clip
    assert not torch.equal(seen[0], seen[1])
    levels = torch.tensor([0.01, 0.1, 1.0])
    streams = [generator(k) for k in range(3)]
    observation = problem.draw(x0, levels, streams)
    misfit = residual(observation.physics, x0, observation.y, levels)
    torch.testing.assert_close(misfit, torch.ones(3), rtol=0, atol=0.2)


def test_the_prox_of_a_long_clip_is_the_dense_solution():
    """Problem A at 10 frames, in float64: a tail that is repeated gives another singular value."""
    shape, gamma = (1, 10, 4, 4), torch.tensor([0.5, 1e6], dtype=torch.float64)
    physics = OF_BLOCKS.draw(2, shape)
    y = torch.rand(2, 1, 3, 2, 2, generator=generator(1), dtype=torch.float64)
    z = torch.rand(2, *shape, generator=generator(2), dtype=torch.float64)
    A, weight = dense(physics.A, shape), gamma.view(-1, 1, 1)
    right = weight * A.mT @ y.flatten(1).unsqueeze(-1) + z.flatten(1).unsqueeze(-1)
    expected = torch.linalg.solve(weight * A.mT @ A + torch.eye(160), right).view_as(z)
    torch.testing.assert_close(physics.prox_l2(z, y, gamma), expected, rtol=0, atol=1e-10)


def test_an_observation_says_how_large_its_clip_is():
    x0 = torch.rand(2, 3, 8, 8, 8, generator=generator())
    observation = Problem(OF_BLOCKS, 0.01).observe(x0)
    assert observation.image_shape == (3, 8, 8, 8)
    assert OF_BLOCKS.image_shape(tuple(observation.y.shape[1:])) == (3, 8, 8, 8)
    again = Observation.of(observation.y, observation.physics, 0.01).rows(torch.tensor([1, 1, 0]))
    assert torch.equal(again.physics.A(x0[[1, 1, 0]]), observation.physics.A(x0)[[1, 1, 0]])
    with pytest.raises(ValueError, match=r"this operator makes values from 0 to 1 of images"):
        Observation.of(255 * observation.y, observation.physics, 0.01)


def test_the_noise_level_of_a_clip_is_estimated():
    x0 = torch.full((2, 3, 4, 192, 192), 0.5)
    problem = Problem(VideoOperator(SuperResolution(2), 2, 2), 0.03)
    observation = problem.observe(x0)
    estimated = estimate_sigma_y(observation.physics, observation.y)
    torch.testing.assert_close(estimated, torch.full((2,), 0.03), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VideoOperator(SuperResolution(2), 0, 1), "exposure must be an integer of at least 1, got 0"),
        (lambda: OF_BLOCKS.check((3, 8, 8)), r"is for videos \(C, T, H, W\), got \(3, 8, 8\)"),
        (lambda: OF_BLOCKS.check((3, 3, 8, 8)), "the clip has 3 frames and the operator makes one of 4"),
        (lambda: OF_BLOCKS.check((3, 8, 9, 8)), "factor 2 does not divide the image size 9x8"),
        (lambda: SpaceTime(torch.zeros(2, 8), None, (1, 8, 4, 4)), "must be finite, not 0"),
        (lambda: SpaceTime(torch.ones(2, 7), None, (1, 8, 4, 4)), r"\[T', 8\]; got \[2, 7\]"),
        (lambda: OF_BLOCKS.draw(1, (1, 8, 4, 4)).A(torch.ones(1, 1, 7, 4, 4)), r"takes \[B, C, 8, h, w\] here"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
