import deepinv
import pytest
import torch
from operators import generator
from tiny import SIZE
from tiny_sampler import CONFIG, SHAPE, build, observation

from ud2m.physics import Denoising, GaussianBlur, Inpainting, Observation, SuperResolution, problem, select_samples
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig
from ud2m.unfolded.network import build_network


@pytest.mark.parametrize("family", [GaussianBlur(), SuperResolution(), Inpainting()])
@pytest.mark.parametrize("eta", [0, 1.0, "fresh"])
def test_samples_are_images_that_differ(sampler, family, eta):
    y, physics = observation(family)
    samples = sampler(y, physics, 0.05, num_samples=4, num_steps=2, eta=eta, generator=generator())
    assert samples.shape == (2, 4, *SHAPE)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert ((samples > 0) & (samples < 1)).float().mean() > 0.4  # of use for comparisons of samples
    assert samples.std(1).mean() > 1e-3
    assert not samples.requires_grad


def test_what_depends_on_the_observation_alone_is_computed_once_for_all_steps(prior_folder, monkeypatch):
    calls = []
    for name in ("mean_gain", "kept_gain", "prepared_prox"):
        function = getattr(problem, name)
        monkeypatch.setattr(problem, name, lambda *a, name=name, function=function: calls.append(name) or function(*a))
    sampler = build(prior_folder)
    network = build_network(sampler.prior, sampler.network.spec | {"conditioning": ["gain", "strength"]})
    y, physics = observation(GaussianBlur())
    PosteriorSampler(network)(y, physics, 0.05, num_samples=2, num_steps=3)
    assert sorted(calls) == ["kept_gain", "mean_gain", "prepared_prox"]


def test_auto_is_float32_for_a_model_that_needs_it_and_what_is_asked_for_stays(sampler, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    y, physics = observation()

    def draw(**options):
        return sampler.with_options(**options)(y, physics, num_samples=2, generator=generator(0))

    full, rounded = draw(precision="float32"), draw(precision="bfloat16")
    assert not torch.equal(full, rounded)
    assert torch.equal(draw(), rounded)
    assert torch.equal(draw(needs_float32=True), full)
    assert torch.equal(draw(needs_float32=True, precision="bfloat16"), rounded)
    with pytest.raises(ValueError, match="needs_float32 must be true or false, got 1"):
        SamplerConfig(needs_float32=1)


def test_the_generator_decides(sampler):
    y, physics = observation()
    first, again, other = (sampler(y, physics, num_samples=2, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        free = sampler(y, physics)
        assert not torch.equal(sampler(y, physics), free)
        torch.manual_seed(5)
        assert torch.equal(sampler(y, physics), free)


def test_observations_of_equal_content_get_different_samples(sampler):
    y, physics = observation(GaussianBlur(), 1)
    samples = sampler(y.expand(2, -1, -1, -1), physics, num_samples=1, generator=generator())
    assert not torch.allclose(samples[0], samples[1], atol=1e-2)


@pytest.mark.parametrize("family", [GaussianBlur(), Inpainting()])
def test_chunks_change_nothing(sampler, family):
    y, physics = observation(family, 3)
    noise = torch.tensor([0.02, 0.05, 0.2])
    whole, *parts = (
        sampler(y, physics, noise, num_samples=3, generator=generator(), chunk_size=size) for size in (64, 9, 4, 1)
    )
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [2, 3, 64])
def test_every_sample_meets_its_own_observation(sampler, chunk_size):
    y, physics = observation(Inpainting(), 3)
    assert len(physics.mask) == 3
    noise, rows = torch.tensor([0.02, 0.05, 0.2]), []

    def keep(_, inputs):
        x_sigma, sigma, seen, streams = inputs
        assert len(x_sigma) == len(sigma) == len(seen) == len(seen.physics.mask) == len(streams) <= chunk_size
        rows.extend(zip(seen.y, seen.physics.mask, seen.sigma_y, strict=True))

    hook = sampler.network.register_forward_pre_hook(keep)
    sampler(y, physics, noise, num_samples=2, num_steps=1, chunk_size=chunk_size)
    hook.remove()
    assert len(rows) == 6
    for k, (y_row, mask, sigma_y) in enumerate(rows):
        assert torch.equal(y_row, y[k // 2])
        assert torch.equal(mask, physics.mask[k // 2])
        assert sigma_y == noise[k // 2]


def test_a_sample_is_explained_by_its_own_mask(sampler):
    """Through the whole call: the same seeds with one observation at a time give the same samples."""
    y, physics = observation(Inpainting(), 2)
    together = sampler(y, physics, num_samples=2, generator=generator(3))
    rows = torch.arange(2)
    stream = generator(3)
    alone = [
        sampler(y[i : i + 1], select_samples(physics, rows[i : i + 1]), num_samples=2, generator=stream) for i in rows
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_call_leaves_no_state(sampler):
    y, physics = observation()
    before = {name: value.clone() for name, value in sampler.network.state_dict().items()}
    states = [module.training for module in sampler.network.modules()]
    first = sampler(y, physics, num_samples=2, generator=generator(), chunk_size=1)
    assert torch.equal(sampler(y, physics, num_samples=2, generator=generator(), chunk_size=1), first)
    assert all(torch.equal(value, before[name]) for name, value in sampler.network.state_dict().items())
    assert [module.training for module in sampler.network.modules()] == states
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("num_steps", "num_blocks"), [(1, 1), (3, 1), (2, 3), (None, 2)])
@pytest.mark.parametrize("chunk_size", [64, 2])
def test_network_evaluations_are_those_claimed(prior_folder, num_steps, num_blocks, chunk_size):
    sampler = build(prior_folder, num_blocks=num_blocks)
    batches = []
    unet = sampler.prior.unet.get_base_model()
    unet.register_forward_hook(lambda module, inputs, _: batches.append(len(inputs[0])))
    y, physics = observation()
    sampler(y, physics, num_samples=3, num_steps=num_steps, chunk_size=chunk_size)
    assert sum(batches) == 2 * 3 * sampler.nfe(num_steps)
    assert sampler.nfe(num_steps) == num_blocks * (num_steps or 2)
    assert len(batches) == -(-6 // chunk_size) * sampler.nfe(num_steps)


def test_defaults_are_those_of_the_config(sampler):
    y, physics = observation()
    default = sampler(y, physics, generator=generator())
    explicit = sampler(y, physics, 0.05, 1, generator(), num_steps=2, eta=0.5)
    assert torch.equal(default, explicit)
    for change in ({"num_steps": 3}, {"eta": 1}, {"sigma_y": 0.1}, {"step_scale": 2.0}):
        assert not torch.allclose(sampler(y, physics, generator=generator(), **change), default, atol=1e-3)


def test_levels_visited_are_those_of_the_grid(sampler):
    sampler = PosteriorSampler(sampler.network, SamplerConfig(num_steps=3, grid_power=4.0))
    visited = []
    handle = sampler.network.register_forward_pre_hook(lambda _, inputs: visited.append(inputs[1][0].item()))
    sampler(*observation(), generator=generator())
    handle.remove()
    times = sampler.prior.schedule.time(torch.tensor(visited))
    torch.testing.assert_close(times, 999 * torch.tensor([1, 2 / 3, 1 / 3]) ** 4, rtol=1e-3, atol=1e-2)


def test_operators_of_deepinv_are_served(sampler):
    y, ours = observation(Inpainting())
    theirs = deepinv.physics.Inpainting(SHAPE, mask=ours.mask)
    expected = sampler(y, ours, num_samples=2, generator=generator())
    torch.testing.assert_close(sampler(y, theirs, num_samples=2, generator=generator()), expected, rtol=0, atol=1e-5)


def test_images_larger_than_those_of_training_are_sampled(sampler):
    y, physics = observation(GaussianBlur(), 1, (3, 2 * SIZE, 3 * SIZE))
    assert sampler(y, physics).shape == (1, 1, 3, 2 * SIZE, 3 * SIZE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_observations_of_another_precision_are_served(sampler, dtype):
    y, physics = observation()
    y = y.to(dtype)
    expected = sampler(y.float(), physics, 0.05, generator=generator())
    assert torch.equal(sampler(y, physics, 0.05, generator=generator()), expected)


@pytest.mark.parametrize("name", ["num_samples", "num_steps", "chunk_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_counts_below_one_are_refused(sampler, name, value):
    with pytest.raises(ValueError, match=rf"{name}.* must be an integer of at least 1, got {value}"):
        sampler(*observation(), **{name: value})


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), [0.1, 0.0], [0.1, 0.1, 0.1]])
def test_noise_levels_that_are_none_are_refused(sampler, value):
    with pytest.raises(ValueError, match=r"sigma_y must be a positive noise level .* \(2\)"):
        sampler(*observation(), sigma_y=torch.tensor(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("eta", [-1, 2.0, "old"])
def test_other_values_of_eta_are_refused(sampler, eta):
    with pytest.raises(ValueError, match="eta must be"):
        sampler(*observation(), eta=eta)


def test_noise_levels_are_one_per_observation():
    y, physics = torch.zeros(3, 1, 4, 4), Denoising().draw(3, (1, 4, 4))
    assert Observation.of(y, physics, 0.5).sigma_y.tolist() == [0.5] * 3
    assert Observation.of(y, physics, torch.tensor([0.5])).sigma_y.tolist() == [0.5] * 3
    assert Observation.of(y, physics, torch.tensor([1.0, 2.0, 3.0])).sigma_y.tolist() == [1, 2, 3]


def test_a_grey_image_does_not_fit_a_colour_prior(sampler):
    with pytest.raises(ValueError, match=r"draws images with 3 channels, this operator acts on \(1, 16, 16\)"):
        sampler(*observation(shape=(1, SIZE, SIZE)))


def test_a_size_that_the_network_cannot_take_is_refused(sampler):
    with pytest.raises(ValueError, match="at least 2 pixels a side, got 1x16"):
        sampler(*observation(shape=(3, 1, 16)))


def test_a_picture_of_any_size_is_sampled(sampler):
    y, physics = observation(shape=(3, 19, 23))
    assert sampler(y, physics, num_samples=2).shape == (len(y), 2, 3, 19, 23)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, r"num_steps \(N\)"),
        ({"num_steps": "3"}, r"num_steps \(N\)"),
        ({"grid_power": 0}, "grid_power"),
        ({"grid_power": "steep"}, "grid_power"),
        ({"step_scale": 0.0}, "step_scale"),
        ({"grid_power": 0.0}, "grid_power"),
        ({"step_scale": float("inf")}, "step_scale"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"tile": 8}, r"tile .* at least 16"),
        ({"eta": "old"}, "eta must be"),
        ({"eta": None}, "eta must be"),
        ({"sigma_y": 0.0}, "sigma_y"),
        ({"sigma_y": "x"}, "sigma_y"),
        ({"sigma_y": float("nan")}, "sigma_y"),
        ({"info": []}, "info"),
    ],
)
def test_impossible_defaults_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**(CONFIG | change))
