import inspect
import math

import pytest
import torch
from dense_prox import dense_prox
from operators import CASES, dense, generator
from skimage import data
from tiny import SIZE, SPECS, adapted, perturb, tiny_network, tiny_prior, trained
from torch import nn

from ud2m.evaluation.metrics import psnr
from ud2m.physics import GaussianBlur, Inpainting, Observation, SuperResolution, observe
from ud2m.priors.prior import LoraSpec
from ud2m.random import randn_like
from ud2m.unfolded.network import UnfoldedNetwork, build_network
from ud2m.unfolded.rules import AnnealedRule, PaperRule, rho
from ud2m.unfolded.warm_start import PinvStart, SmoothingStart, Start, smooth

FAMILIES = {"blur": GaussianBlur(), "super-resolution": SuperResolution(), "inpainting": Inpainting()}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
each_rule = pytest.mark.parametrize("rule", ["annealed", "paper"])
each_start = pytest.mark.parametrize("warm_start", ["smoothing", "pinv"])
each_count = pytest.mark.parametrize("num_blocks", [1, 3])
SIGMA = torch.tensor([79.0, 0.9, 0.06])


def problem(family, batch=3, size=SIZE, dtype=torch.float32, sigma=SIGMA, sigma_y=0.05):
    """Return (x_sigma, sigma, observation) of random images."""
    x0 = torch.rand(batch, 3, size, size, generator=generator(0), dtype=dtype)
    physics = family.draw(batch, (3, size, size), generator(1))
    noise = torch.full((batch,), sigma_y, dtype=dtype)
    sigma = sigma[:batch].to(dtype)
    x_sigma = x0 + sigma.view(-1, 1, 1, 1) * randn_like(x0, generator(2))
    return x_sigma, sigma, Observation(observe(physics, x0, noise, generator(3)), physics, noise)


class Squash(nn.Module):
    """A denoiser by hand that depends on the image and on the level of each sample."""

    def forward(self, x_sigma, sigma):
        return torch.sigmoid(3 * x_sigma - 1) / (1 + sigma.view(-1, 1, 1, 1))


# --- the LATINO module against a loop by hand ----------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("case", ["blur", "blur per sample", "sr 2", "inpainting"])
def test_network_is_the_loop_of_the_method(case, rule):
    physics, shape = CASES[case]()
    sigma, sigma_y = torch.tensor([20.0, 0.3]).double(), torch.tensor([0.02, 0.1]).double()
    x0 = torch.rand(2, *shape, generator=generator(0), dtype=torch.float64)
    x_sigma = x0 + sigma.view(-1, 1, 1, 1) * randn_like(x0, generator(4))
    y = observe(physics, x0, sigma_y, generator(5))
    network = tiny_network(Squash(), 3, rule, "pinv").double()
    perturb(network.parameters(), scale=0.5)
    psi = [[p.item() for p in (block.log_delta, block.log_tau, block.log_lam)] for block in network.blocks]
    assert len({value for triple in psi for value in triple}) == 9

    A = dense(physics.A, shape)
    noise = generator(6)
    x = (torch.linalg.pinv(A, rtol=1e-5) @ y.flatten(1).unsqueeze(-1)).view_as(x0)
    both = 1 / torch.sqrt(1 / sigma**2 + 1 / sigma_y**2)
    for k, (log_delta, log_tau, log_lam) in enumerate(torch.tensor(psi, dtype=torch.float64).exp()):
        if rule == "paper":
            tau = both
        else:
            low = 3 * both
            high = torch.maximum(torch.minimum(sigma, torch.tensor(0.4)), low)
            tau = torch.exp((1 - k / 2) * high.log() + k / 2 * low.log())
        delta, tau, lam = tau**2 * log_delta, tau * log_tau, log_lam.expand(2)
        u = dense_prox(A, y, x_sigma, x, sigma, delta, lam, sigma_y)
        z = u + tau.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=noise, dtype=torch.float64)
        x = 1 / (1 + torch.exp(1 - 3 * z)) / (1 + tau.view(-1, 1, 1, 1))
    if rule == "annealed":
        log_delta, log_lam = network.closing.log_delta.exp(), network.closing.log_lam.exp()
        x = dense_prox(A, y, x_sigma, x, sigma, (0.9 * both) ** 2 * log_delta, log_lam.expand(2), sigma_y)

    result = network(x_sigma, sigma, Observation(y, physics, sigma_y), generator(6))
    torch.testing.assert_close(result, x, rtol=0, atol=1e-7)


def test_network_evaluations_are_the_blocks():
    prior = tiny_prior()
    calls = []
    prior.unet.register_forward_hook(lambda *_: calls.append(1))
    network = tiny_network(prior, 4)
    network(*problem(GaussianBlur()), generator())
    assert len(calls) == network.num_blocks == 4


def test_blocks_share_one_denoiser():
    network = tiny_network(tiny_prior(), 3)
    own = [name for name, _ in network.named_parameters() if not name.startswith("denoiser.")]
    modules = [f"blocks.{k}.log_{n}" for k in range(3) for n in ("delta", "tau", "lam")]
    assert sorted(own) == sorted([*modules, "closing.log_delta", "closing.log_lam"])
    assert len(list(network.parameters())) == len(list(tiny_prior().parameters())) + 11


def test_samples_of_a_batch_do_not_meet():
    network = tiny_network(tiny_prior())
    x_sigma, sigma, observation = problem(GaussianBlur(), sigma_y=0.05)

    def run(rows):
        streams = [generator(row) for row in rows]
        return network(x_sigma[rows], sigma[rows], observation.rows(torch.tensor(rows)), streams)

    together = run([0, 1, 2])
    alone = torch.cat([run([0]), run([1]), run([2])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# --- gradients -----------------------------------------------------------------------------------------------


@each_family
@each_rule
@each_start
@each_count
def test_every_trained_parameter_receives_a_gradient(family, rule, warm_start, num_blocks):
    """Neither tau (through integer times) nor delta (a constant for some operators) is left out."""
    network = tiny_network(adapted(tiny_prior()), num_blocks, rule, warm_start)
    perturb(p for name, p in network.named_parameters() if ".log_" in name)
    output = network(*problem(family), generator(7))
    output.square().mean().backward()
    parameters = trained(network)
    assert sum(".log_" in name for name in parameters) == 3 * num_blocks + (2 if rule == "annealed" else 0)
    assert sum("lora_" in name for name in parameters) > 8
    assert sum("conv_out" in name for name in parameters) == 2
    silent = [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert not silent
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def test_at_the_start_psi_and_the_second_factors_receive_a_gradient():
    """With B = 0 the gradient of the first factor A, B^T (...), is zero: B moves first."""
    network = tiny_network(tiny_prior().add_lora(LoraSpec(rank=2)), 3, "paper", "pinv")
    network(*problem(GaussianBlur()), generator(7)).square().mean().backward()
    for name, parameter in trained(network).items():
        assert (parameter.grad.abs().max() > 0) == ("lora_A" not in name), name


class SmoothDenoiser(nn.Module):
    """Depends on the level as an eps-network does; float64 throughout, which the times of diffusers are not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x_sigma, sigma):
        level = sigma.view(-1, 1, 1, 1)
        return x_sigma - level * torch.tanh(self.weight * x_sigma + level.log())


@each_family
@each_rule
@each_start
def test_gradients_of_psi_are_those_of_finite_differences(family, rule, warm_start):
    network = tiny_network(SmoothDenoiser(), 3, rule, warm_start).double()
    perturb(network.parameters())
    inputs = problem(family, dtype=torch.float64)

    def value():
        # bounded: deblurring by the pseudo-inverse gives numbers whose differences drown in rounding
        return network(*inputs, generator(7)).tanh().square().sum()

    value().backward()
    h = 1e-6
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            parameter += h
            upper = value()
            parameter -= 2 * h
            lower = value()
            parameter += h
        expected = ((upper - lower) / (2 * h)).item()
        assert parameter.grad.item() == pytest.approx(expected, rel=1e-4, abs=1e-6), name


# --- rules ---------------------------------------------------------------------------------------------------

LEVELS = torch.tensor([79.0, 0.9, 0.2, 0.03])


def test_rho_joins_the_precisions():
    sigma, sigma_y = torch.tensor([3.0, 0.01]), torch.tensor([4.0, 1e3])
    torch.testing.assert_close(rho(sigma, sigma_y), torch.tensor([2.4, 0.01]))


@each_count
def test_paper_rule_is_rho_for_every_module(num_blocks):
    sigma_y = torch.full_like(LEVELS, 0.05)
    for k in range(num_blocks):
        delta, tau = PaperRule()(k, num_blocks, LEVELS, sigma_y)
        torch.testing.assert_close(1 / delta, 1 / sigma_y**2 + 1 / LEVELS**2)
        torch.testing.assert_close(tau, delta.sqrt())


def test_annealed_rule_falls_geometrically_between_its_ends():
    rule, sigma_y = AnnealedRule(tau_max=0.4, floor=2.0), torch.full_like(LEVELS, 0.02)
    steps = [rule(k, 4, LEVELS, sigma_y) for k in range(4)]
    tau = torch.stack([tau for _, tau in steps])
    last = 2 / (1 / 0.02**2 + 1 / LEVELS**2).sqrt()
    torch.testing.assert_close(tau[0], torch.tensor([0.4, 0.4, 0.2, last[3]]))  # 0.03 < 2 rho: nothing to anneal
    torch.testing.assert_close(tau[3], last)
    torch.testing.assert_close(tau[1:] / tau[:-1], (tau[1] / tau[0]).expand(3, 4))
    assert (tau[1:, :3] < tau[:-1, :3]).all()
    for delta, level in steps:
        torch.testing.assert_close(delta, level**2)


def test_the_annealed_rule_closes_below_its_lowest_level_and_the_papers_rule_not_at_all():
    rule, sigma_y = AnnealedRule(floor=2.0, closing=0.5), torch.full_like(LEVELS, 0.02)
    torch.testing.assert_close(rule.closing(LEVELS, sigma_y), rho(LEVELS, sigma_y) ** 2)
    assert rule.closes
    assert not PaperRule().closes
    assert tiny_network(Squash(), 2, "paper").closing is None


def test_annealed_rule_of_one_module_is_the_geometric_mean_of_the_ends():
    rule, sigma_y = AnnealedRule(), torch.full_like(LEVELS, 0.01)
    (_, first), (_, last), (_, only) = (rule(k, n, LEVELS, sigma_y) for k, n in ((0, 2), (1, 2), (0, 1)))
    torch.testing.assert_close(only, (first * last).sqrt())


@each_rule
def test_psi_starts_at_the_rule(rule):
    assert set(tiny_network(Squash(), 3, rule).psi().values()) == {1.0}
    names = [f"{n}_{k}" for k in (1, 2) for n in ("delta", "lam", "tau")]
    closing = ["delta_closing", "lam_closing"] if rule == "annealed" else []
    assert list(tiny_network(Squash(), 2, rule).psi()) == names + closing


# --- warm starts ---------------------------------------------------------------------------------------------


def photo(size=64):
    """A piece of the cat [1, 3, size, size]."""
    pixels = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None] / 255
    return pixels[..., 90 : 90 + size, 130 : 130 + size]


def observed_photo(family, sigma_y=0.01):
    x0 = photo()
    physics = family.draw(1, tuple(x0.shape[1:]), generator(1))
    level = torch.tensor([sigma_y])
    return x0, observe(physics, x0, level, generator(2)), physics, level


@each_family
def test_pinv_start_is_the_pseudo_inverse(family):
    x_sigma, sigma, observation = problem(family)
    assert torch.equal(PinvStart()(x_sigma, sigma, observation), observation.physics.A_dagger(observation.y))


@pytest.mark.parametrize(
    ("family", "sigma_y", "least"),
    [
        (GaussianBlur(), 0.01, 30),
        (GaussianBlur(), 0.05, 27),
        (SuperResolution(), 0.01, 28),
        (Inpainting(), 0.01, 26),
        (Inpainting(), 0.05, 22.5),
    ],
)
def test_smoothing_start_beats_the_pseudo_inverse_on_a_photograph(family, sigma_y, least):
    x0, y, physics, level = observed_photo(family, sigma_y)
    sigma = torch.tensor([79.0])
    x_sigma = x0 + sigma * randn_like(x0, generator(3))
    start = SmoothingStart()(x_sigma, sigma, Observation(y, physics, level))
    assert psnr(start, x0) > least
    assert psnr(start, x0) > 1 + psnr(physics.A_dagger(y).clamp(0, 1), x0)


def test_smoothing_start_leaves_no_black_holes():
    x0 = 0.3 + 0.7 * photo()
    _, _, physics, level = observed_photo(Inpainting(0.7))
    y = observe(physics, x0, level, generator(2))
    start = SmoothingStart()(torch.full_like(x0, 0.5), torch.tensor([1e3]), Observation(y, physics, level))
    missing = (physics.mask == 0).expand_as(x0)
    assert start[missing].min() > 0.29
    assert (start - x0)[missing].square().mean().sqrt() < 0.06
    assert (start - x0)[~missing].abs().max() < 0.06
    assert physics.A_dagger(y)[missing].max() == 0


def test_smoothing_start_uses_the_noisy_image_where_it_is_clean():
    x0, y, physics, level = observed_photo(Inpainting(0.7))
    sigma = torch.tensor([0.005])
    x_sigma = x0 + sigma * randn_like(x0, generator(3))
    start = SmoothingStart()(x_sigma, sigma, Observation(y, physics, level))
    assert psnr(start, x0) > 44


@each_family
def test_smoothing_start_serves_any_size(family):
    for height, width in ((20, 36), (52, 16), (24, 24)):
        x0 = torch.rand(1, 3, height, width, generator=generator())
        physics = family.draw(1, (3, height, width), generator())
        level = torch.tensor([0.05])
        observation = Observation(observe(physics, x0, level, generator()), physics, level)
        start = SmoothingStart()(x0, torch.tensor([1e3]), observation)
        assert start.shape == x0.shape
        assert start.isfinite().all()


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (3, 5)])
@pytest.mark.parametrize("scale", [1, 2, 4, 32])
def test_smoothing_keeps_constants_and_lowers_variation(size, scale):
    grey = torch.full((1, 2, *size), 0.3)
    torch.testing.assert_close(smooth(grey, scale), grey)
    x = torch.rand(1, 2, *size, generator=generator())
    assert smooth(x, scale).shape == x.shape
    if scale == 1:
        torch.testing.assert_close(smooth(x, 1), x)
    else:
        assert smooth(x, scale).var() < 0.6 * x.var()


@each_start
def test_training_and_sampling_start_alike(warm_start):
    """The start of training is that of sampling: one forward pass serves both, and nothing in it asks for the mode."""
    network = tiny_network(adapted(tiny_prior()), 2, "annealed", warm_start)
    inputs = problem(Inpainting())
    starts = []
    network.warm_start.register_forward_hook(lambda _, __, output: starts.append(output.detach()))
    outputs = [network.train(mode)(*inputs, generator(7)).detach() for mode in (True, False)]
    assert torch.equal(*starts)
    assert torch.equal(*outputs)
    assert torch.equal(starts[0], type(network.warm_start)(**options(warm_start))(*inputs))


def options(name):
    return {key: value for key, value in SPECS[name].items() if key != "name"}


# --- descriptions and states ---------------------------------------------------------------------------------


def described(**change):
    return {"num_blocks": 2, "rule": SPECS["annealed"], "warm_start": SPECS["smoothing"]} | change


def test_a_network_is_built_from_its_description():
    network = build_network(Squash(), described(num_blocks=4))
    assert network.num_blocks == 4
    assert (network.rule.tau_max, network.rule.floor) == (0.4, 3.0)
    assert (network.warm_start.scales, network.warm_start.deviation) == ((8, 4, 2), 0.1)
    assert network.spec == described(num_blocks=4)
    assert isinstance(build_network(Squash(), described(warm_start={"name": "pinv"})).warm_start, PinvStart)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, r"num_blocks \(K\) must be at least 1, got 0"),
        ({"num_blocks": "3"}, r"num_blocks \(K\) must be an integer, got '3'"),
        ({"num_blocks": None}, r"num_blocks \(K\) must be an integer"),
        ({"rule": {"name": "guess"}}, "unknown rule .*'guess'.*names paper, annealed"),
        ({"rule": {}}, "unknown rule {}"),
        ({"rule": "paper"}, "unknown rule 'paper'; give {name: ...}"),
        ({"rule": ["paper"]}, "unknown rule"),
        ({"rule": {"name": ["paper"]}}, "unknown rule"),
        ({"rule": {"name": "paper", "tau_max": 1}}, r"rule 'paper' does not take these options: .*tau_max"),
        ({"rule": {"name": "annealed", "tau_max": "x"}}, "rule 'annealed' does not take these options"),
        ({"rule": {"name": "annealed", "tau_max": 0.0}}, "tau_max, floor, width and closing must be positive"),
        ({"rule": {"name": "annealed", "floor": -1}}, "tau_max, floor, width and closing must be positive"),
        ({"warm_start": {"name": "rma"}}, "unknown warm_start .*'rma'.*names pinv, smoothing"),
        ({"warm_start": {"name": "smoothing", "scales": []}}, "scales must be >= 1"),
        ({"warm_start": {"name": "smoothing", "scales": [2, 0]}}, "scales must be >= 1"),
        ({"warm_start": {"name": "smoothing", "deviation": 0}}, "deviation > 0"),
        ({"blocks": 3}, "described by num_blocks, rule and warm_start, got .*blocks"),
    ],
)
def test_descriptions_that_fit_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_network(Squash(), described(**change))


@pytest.mark.parametrize("spec", [{}, [], None, "paper"])
def test_no_description_is_refused(spec):
    with pytest.raises(ValueError, match="a network is described by num_blocks, rule and warm_start"):
        build_network(Squash(), spec)


def test_options_of_the_defaults_are_those_of_the_classes():
    assert set(inspect.signature(AnnealedRule).parameters) == set(options("annealed"))
    assert set(inspect.signature(SmoothingStart).parameters) == set(options("smoothing"))


class LearnedStart(Start):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x_sigma, sigma, observation):
        return self.weight.view(1, 3, 1, 1) * observation.physics.A_dagger(observation.y)


def test_own_state_is_psi_and_a_learned_start():
    network = UnfoldedNetwork(tiny_prior(), 2, PaperRule(), LearnedStart())
    perturb(p for name, p in network.named_parameters() if not name.startswith("denoiser."))
    state = {name: value.clone() for name, value in network.own_state().items()}
    assert len(state) == 3 * 2 + 1
    other = UnfoldedNetwork(tiny_prior(), 2, PaperRule(), LearnedStart())
    parameters = dict(other.named_parameters())
    other.load_own_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.own_state().items())
    assert all(parameters[name] is p for name, p in other.named_parameters())
    assert other.psi() == network.psi()
    assert all(value != 1 for value in other.psi().values())


@pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
def test_a_state_that_does_not_fit_is_refused(how):
    network = tiny_network(Squash(), 2)
    state = {name: value + 1 for name, value in network.own_state().items()}
    value = state.pop("blocks.1.log_lam")
    state |= {
        "missing": {},
        "unknown": {"blocks.1.log_lam": value, "blocks.2.log_lam": value},
        "shape": {"blocks.1.log_lam": value.expand(2)},
    }[how]
    with pytest.raises(ValueError, match="do not fit this network"):
        network.load_own_state(state)
    assert set(network.psi().values()) == {1.0}


def test_the_step_scale_is_a_factor_on_the_modules_delta_alone():
    network, arguments = tiny_network(Squash()), problem(FAMILIES["blur"])
    scaled = network(*arguments, generator(6), step_scale=2.5)
    plain = network(*arguments, generator(6))
    with torch.no_grad():
        for block in network.blocks:
            block.log_delta += math.log(2.5)
    torch.testing.assert_close(network(*arguments, generator(6)), scaled)
    assert not torch.allclose(plain, scaled, atol=1e-3)
