"""Denoising in tiles: coverage, continuity across the edges, and what it changes."""

from itertools import pairwise, product

import pytest
import torch
from skimage import data

from ud2m.physics import GaussianBlur, observe
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.unfolded.denoisers import tile_places, tiled

SIGMA = torch.full((1,), 0.1)


def cat(height: int, width: int) -> torch.Tensor:
    pixels = torch.from_numpy(data.chelsea()[:height, :width].copy())
    return pixels.permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("length", [16, 17, 20, 32, 33, 100, 451])
@pytest.mark.parametrize("tile", [16, 24, 64])
def test_tiles_cover_evenly_and_overlap(length, tile):
    places = tile_places(length, tile)
    assert places[0].start == 0
    assert places[-1].stop == length
    sides = {place.stop - place.start for place in places}
    assert len(sides) == 1
    assert sides.pop() <= tile
    assert all(a.stop - b.start >= tile // 4 for a, b in pairwise(places))
    steps = {b.start - a.start for a, b in pairwise(places)}
    assert not steps or max(steps) - min(steps) <= 1


def test_large_pictures_cost_little_more_in_tiles():
    """Pixels that the network sees of 1536 x 1024, at most 1024^2 at once, are within 1.05 times those there are."""
    rows, columns = tile_places(1024, 1024), tile_places(1536, 1024)
    seen = [(r.stop - r.start) * (c.stop - c.start) for r, c in product(rows, columns)]
    assert max(seen) <= 1024**2
    assert sum(seen) < 1.05 * 1024 * 1536


def test_a_pointwise_denoiser_does_not_notice():
    x = torch.rand(2, 3, 70, 45, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.3])
    shrink = lambda z, s: z / (1 + s.view(-1, 1, 1, 1))  # noqa: E731
    torch.testing.assert_close(tiled(shrink, 16)(x, sigma), shrink(x, sigma))


def test_the_denoiser_sees_tiles_only_where_the_picture_is_larger():
    seen = []

    def spy(z, sigma):
        seen.append(tuple(z.shape))
        return z

    tiled(spy, 32)(torch.zeros(3, 1, 32, 20), SIGMA)
    tiled(spy, None)(torch.zeros(3, 1, 99, 99), SIGMA)
    assert seen == [(3, 1, 32, 20), (3, 1, 99, 99)]
    seen.clear()
    tiled(spy, 32)(torch.zeros(2, 1, 60, 20), SIGMA)
    assert set(seen) == {(2, 1, 32, 20)}


def test_edges_are_blended():
    """Tiles that disagree by 1 give a picture without a jump: no step larger than that of the ramps."""
    count = iter(range(100))
    made = tiled(lambda z, s: torch.full_like(z, float(next(count) % 2)), 32)(torch.zeros(1, 1, 100, 32), SIGMA)
    column = made[0, 0, :, 5]
    assert column.min() == 0
    assert column.max() == 1
    assert column.diff().abs().max() < 2.5 / 8  # over an overlap of 8 pixels or more


@pytest.mark.parametrize("tile", [0, 15, 20.5])
def test_impossible_tiles_are_refused(tile):
    with pytest.raises(ValueError, match=r"tile .* at least 16, got"):
        tiled(lambda z, s: z, tile)


@pytest.fixture(scope="module")
def samples():
    """Samples of the shipped model for a piece of the cat, whole and in tiles, from the same noise."""
    sampler = PosteriorSampler.from_pretrained("photos_gaussian_blur")
    x0 = cat(160, 144)
    physics = GaussianBlur(1.6).draw(1, (3, 160, 144))
    y = observe(physics, x0, 0.01, torch.Generator().manual_seed(0))
    made = {
        tile: sampler(y, physics, 0.01, num_samples=2, tile=tile, generator=torch.Generator().manual_seed(1))[0]
        for tile in (None, 64)
    }
    return x0[0], made


@pytest.mark.slow
def test_samples_in_tiles_are_as_good_as_whole_ones(samples):
    x0, made = samples
    error = {tile: (sample - x0).square().mean().sqrt().item() for tile, sample in made.items()}
    assert error[64] < 1.03 * error[None]
    assert (made[64] - made[None]).square().mean().sqrt() < 0.3 * error[None]


@pytest.mark.slow
def test_there_is_no_seam(samples):
    """Differences of neighbouring pixels across tile edges are no larger than elsewhere in the error image."""
    x0, made = samples
    error = made[64] - x0
    for axis, length in ((1, 160), (2, 144)):
        jumps = error.diff(dim=axis).abs().mean((0, 1, 3) if axis == 1 else (0, 1, 2))
        places = tile_places(length, 64)
        edges = sorted({p.start - 1 for p in places[1:]} | {p.stop - 1 for p in places[:-1]})
        assert jumps[edges].mean() < 1.2 * jumps.mean()


def test_chunks_hold_fewer_large_pictures(monkeypatch):
    sampler = PosteriorSampler.from_pretrained("photos_gaussian_blur")
    seen = []

    def spy(z, sigma):
        seen.append(tuple(z.shape))
        return z

    monkeypatch.setattr(sampler.network.denoiser, "forward", spy)
    physics = GaussianBlur(1.6).draw(1, (3, 96, 64))
    sampler(torch.zeros(1, 3, 96, 64), physics, 0.01, num_samples=4, num_steps=1, chunk_size=4, tile=32)
    assert {shape[0] * shape[2] * shape[3] for shape in seen} == {32 * 32}
    seen.clear()
    sampler(torch.zeros(1, 3, 96, 64), physics, 0.01, num_samples=5, num_steps=1, chunk_size=4, tile=128)
    assert {shape[0] for shape in seen} == {2, 1}  # two of them fit into a tile, and are fewer than the chunk
