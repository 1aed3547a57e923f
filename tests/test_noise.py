import pytest
import torch

from ud2m.random import rand, randn_like


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


DRAWS = {
    "normal": lambda count, generator: randn_like(torch.zeros(count, 2, 3), generator),
    "uniform": lambda count, generator: rand((count, 2, 3), generator),
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@each_draw
def test_a_row_depends_on_its_own_generator_alone(draw):
    together = draw(3, streams(5, 6, 7))
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(together[row : row + 1], draw(1, streams(seed)))
    assert torch.equal(together.flip(0), draw(3, streams(7, 6, 5)))
    assert not torch.equal(together[0], together[1])


@each_draw
def test_generators_move_on(draw):
    generators = streams(5, 6)
    assert not torch.equal(draw(2, generators), draw(2, generators))


@each_draw
def test_one_generator_serves_all_rows(draw):
    first, again = (draw(3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


@each_draw
def test_without_generator_the_global_one_is_used(draw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = draw(2, None)
        torch.manual_seed(3)
        assert torch.equal(first, draw(2, None))


@each_draw
def test_a_generator_leaves_the_global_one_alone(draw):
    before = torch.get_rng_state()
    draw(2, streams(1, 2))
    draw(2, torch.Generator())
    assert torch.equal(before, torch.get_rng_state())


@each_draw
def test_a_wrong_number_of_generators_is_refused(draw):
    with pytest.raises(ValueError, match="got 2 for 3 rows"):
        draw(3, streams(1, 2))


@pytest.mark.parametrize("generator", [torch.Generator().manual_seed(0), streams(*range(4))])
def test_distributions(generator):
    # 5 standard errors of mean and variance of n = 400_000 numbers
    n = 400_000
    normal = randn_like(torch.zeros(4, n // 4), generator)
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    uniform = rand((4, n // 4), generator)
    assert 0 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(uniform.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_has_the_dtype_of_the_image(dtype):
    assert randn_like(torch.zeros(2, 3, dtype=dtype), streams(1, 2)).dtype == dtype
    assert randn_like(torch.zeros(2, 3, dtype=dtype)).dtype == dtype
