import pytest
import torch
from diffusers import DDPMScheduler

from ud2m.priors.schedule import VPSchedule, abar

TABLES = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "short linear": {"beta_schedule": "linear", "num_train_timesteps": 50, "beta_start": 0.002, "beta_end": 0.3},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": torch.linspace(0.01, 0.2, 40).tolist()},
}
each_table = pytest.mark.parametrize("table", TABLES)


def made(table):
    return VPSchedule.from_config(TABLES[table])


@pytest.fixture
def schedule():
    return made("linear")


@each_table
def test_levels_are_those_of_diffusers_table(table):
    theirs = DDPMScheduler(**TABLES[table]).alphas_cumprod.double()
    schedule = made(table)
    assert schedule.num_times == len(theirs)
    sigma = schedule.sigma(torch.arange(schedule.num_times).double())
    torch.testing.assert_close(sigma, ((1 - theirs) / theirs).sqrt() / 2, rtol=2e-3, atol=0)
    torch.testing.assert_close(abar(sigma), theirs, rtol=0, atol=2e-6)
    assert (schedule.sigma_min, schedule.sigma_max) == (sigma[0], sigma[-1])


def test_noisy_images_of_both_conventions_are_the_same(schedule):
    x0 = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    eps = torch.randn_like(x0)
    t = torch.tensor([0, 10, 500, 999])
    # a copy of the betas in float64: 158 = abar^(-1/2) at the end enlarges the rounding of diffusers' float32
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    theirs = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
    sigma = schedule.sigma(t.double()).view(-1, 1, 1, 1)
    x_t = theirs.sqrt() * (2 * x0 - 1) + (1 - theirs).sqrt() * eps
    torch.testing.assert_close(abar(sigma).sqrt() * (2 * (x0 + sigma * eps) - 1), x_t, rtol=0, atol=1e-12)


@each_table
def test_time_inverts_sigma_and_sigma_inverts_time(table):
    schedule = made(table)
    last = schedule.num_times - 1
    t = torch.cat([torch.arange(last + 1).double(), last * torch.rand(200, dtype=torch.float64)])
    torch.testing.assert_close(schedule.time(schedule.sigma(t)), t, rtol=0, atol=1e-8)
    sigma = torch.logspace(-6, 6, 300, base=torch.e, dtype=torch.float64)
    sigma = sigma[(sigma > schedule.sigma_min) & (sigma < schedule.sigma_max)]
    assert len(sigma) > 50
    torch.testing.assert_close(schedule.sigma(schedule.time(sigma)), sigma, rtol=1e-12, atol=0)


def test_round_trip_in_float32(schedule):
    t = torch.linspace(0, 999, 777)
    torch.testing.assert_close(schedule.time(schedule.sigma(t)), t, rtol=0, atol=2e-3)
    assert schedule.time(torch.tensor([0.3])).dtype == torch.float32


def test_conversions_rise_strictly_between_the_table_entries(schedule):
    sigma = schedule.sigma(torch.linspace(0, 999, 5000, dtype=torch.float64))
    assert (sigma[1:] > sigma[:-1]).all()
    assert (schedule.time(sigma)[1:] > schedule.time(sigma)[:-1]).all()


@pytest.mark.parametrize("name", ["sigma", "time"])
def test_gradients_are_those_of_finite_differences(schedule, name):
    convert = getattr(schedule, name)
    inside = [0.3, 17.5, 443.7, 998.6] if name == "sigma" else [0.0061, 0.03, 0.77, 60.0]
    value = torch.tensor(inside, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(convert(value).sum(), value)
    h = 1e-6 * value.detach()
    with torch.no_grad():
        expected = (convert(value + h) - convert(value - h)) / (2 * h)
    assert (expected > 0).all()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_levels_outside_the_table_meet_its_ends(schedule):
    t = schedule.time(torch.tensor([1e-5, 1e5]))
    assert t.tolist() == [0, 999]
    assert schedule.sigma(torch.tensor([-3, 4000])).tolist() == pytest.approx([schedule.sigma_min, schedule.sigma_max])


def test_integer_times_and_any_shape_are_taken(schedule):
    assert schedule.sigma(torch.tensor([[0, 999]])).shape == (1, 2)
    assert schedule.sigma(torch.tensor(444)) == schedule.sigma(torch.tensor(444.0))
    assert schedule.time(torch.ones(2, 1, 3)).shape == (2, 1, 3)


def test_grid_is_the_authors_for_three_steps(schedule):
    times = schedule.time(schedule.grid(3))
    torch.testing.assert_close(times, torch.tensor([999.0, 444.0, 111.0]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("power", [1.0, 5.0])
def test_the_power_of_the_grid_shapes_its_times(schedule, power):
    times = schedule.time(schedule.grid(3, power))
    expected = [999.0, 999 * (2 / 3) ** power, 999 * (1 / 3) ** power]
    torch.testing.assert_close(times, torch.tensor(expected), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_grid_refuses_a_power_that_does_not_fall(schedule, power):
    with pytest.raises(ValueError, match="the power of the grid must be positive"):
        schedule.grid(3, power)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_grid_falls_from_the_largest_level(schedule, num_steps):
    levels = schedule.grid(num_steps)
    assert levels.dtype == torch.float32
    assert len(levels) == num_steps
    assert levels[0] == pytest.approx(schedule.sigma_max)
    assert (levels[1:] < levels[:-1]).all()
    assert levels[-1] > schedule.sigma_min


@pytest.mark.parametrize("num_steps", [0, -1])
def test_grid_refuses_no_steps(schedule, num_steps):
    with pytest.raises(ValueError, match=rf"num_steps \(N\) must be at least 1, got {num_steps}"):
        schedule.grid(num_steps)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_time_refuses_levels_that_are_not_positive(schedule, sigma):
    with pytest.raises(ValueError, match="sigma must be positive"):
        schedule.time(torch.tensor([0.5, sigma]))


@pytest.mark.parametrize(
    "table", [[0.9, 0.9], [0.5, 0.9], [1.0, 0.5], [0.5, 0.0], [0.5], [[0.9, 0.5]], [0.9, float("nan")]]
)
def test_tables_that_are_no_schedule_are_refused(table):
    with pytest.raises(ValueError, match="strictly falling"):
        VPSchedule(table)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown beta_schedule 'sigmoid'; allowed: linear"):
        VPSchedule.from_config({"beta_schedule": "sigmoid"})


def test_the_table_is_no_part_of_checkpoints_and_survives_casts(schedule):
    assert not schedule.state_dict()
    assert torch.nn.Sequential(schedule).double()[0].log_sigmas.dtype == torch.float64
