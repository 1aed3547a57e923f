"""Warm starts by networks: RAM and a small one that is trained along, through training, export and sampling."""

import deepinv
import pytest
import torch
from deepinv.models import RAM
from lightning import seed_everything
from tiny import SIZE, SPECS, adapted, save_tiny_prior
from tiny_training import distillation, everything, fit

from ud2m.physics import GaussianBlur, Inpainting, Jpeg, Observation, SuperResolution, observe
from ud2m.priors.prior import Prior
from ud2m.priors.store import weights_fingerprint
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig
from ud2m.unfolded.network import build_network
from ud2m.unfolded.warm_start import NetworkStart, RamStart, SmoothingStart, start_from_y

SMALL = {"name": "network", "widths": [4, 4, 4, 4]}


@pytest.fixture(scope="module")
def ram_file(tmp_path_factory):
    """The real architecture with random weights, saved as its authors save theirs."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ram") / "ram.pth.tar"
    torch.save(RAM(in_channels=(1, 2, 3), pretrained=False).state_dict(), path)
    return path


@pytest.fixture
def prior(tmp_path):
    return adapted(Prior.from_pretrained(save_tiny_prior(tmp_path / "prior", 3)))


def spec(warm_start, num_blocks=1):
    return {"num_blocks": num_blocks, "rule": {"name": "annealed"}, "warm_start": warm_start}


def problem(batch=2):
    x0 = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    physics = GaussianBlur(1.0).draw(batch, (3, SIZE, SIZE))
    return x0, observe(physics, x0, 0.05, torch.Generator().manual_seed(2)), physics


def test_the_small_network_starts_as_the_smoothing_start_and_then_learns():
    _, y, physics = problem()
    start, sigma_y = NetworkStart(widths=(4, 4, 4, 4)), torch.full((2,), 0.05)
    smooth = start_from_y(SmoothingStart(), Observation.of(y, physics, sigma_y))
    torch.testing.assert_close(start_from_y(start, Observation.of(y, physics, sigma_y)), smooth)
    target = 1 - smooth
    optimizer, before = torch.optim.Adam(start.parameters(), 1e-2), (smooth - target).square().mean()
    for _ in range(60):
        loss = (start_from_y(start, Observation.of(y, physics, sigma_y)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * before


@pytest.mark.slow
def test_ram_is_deepinvs_ram_told_the_noise_of_each_sample(ram_file):
    _, y, physics = problem()
    start, sigma_y = RamStart(str(ram_file), trainable=False), torch.tensor([0.05, 0.2])
    kept = y.clone()
    with torch.no_grad():
        own = start_from_y(start, Observation.of(y, physics, sigma_y))
        for k in range(2):
            reference = RAM(in_channels=(1, 2, 3), pretrained=str(ram_file))
            expected = reference(y[k : k + 1], physics, sigma=sigma_y[k].item(), gain=0.0)
            torch.testing.assert_close(own[k : k + 1], expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(y, kept)


@pytest.mark.parametrize("start", [SMALL, pytest.param({"name": "ram", "weights": None}, marks=pytest.mark.slow)])
def test_a_trained_start_is_exported_whole_and_counted(start, prior, tmp_path):
    seed_everything(0)
    network = build_network(prior, spec(start, num_blocks=2))
    with torch.no_grad():
        for parameter in network.warm_start.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    sampler = PosteriorSampler(network, SamplerConfig())
    assert sampler.nfe(3) == (2 + 1) * 3
    sampler.save_pretrained(tmp_path / "export")
    again = PosteriorSampler.from_pretrained(tmp_path / "export")
    _, y, physics = problem()
    one, other = (s(y, physics, 0.05, generator=torch.Generator().manual_seed(3)) for s in (sampler, again))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "start",
    ["network", pytest.param("ram", marks=pytest.mark.slow), pytest.param("frozen ram", marks=pytest.mark.slow)],
)
def test_a_run_trains_the_start_at_its_own_rate_unless_it_is_frozen(start, ram_file, tmp_path):
    options = {
        "network": SMALL,
        "ram": {"name": "ram", "weights": str(ram_file)},
        "frozen ram": {"name": "ram", "weights": str(ram_file), "trainable": False},
    }[start]
    network = {"num_blocks": 1, "rule": SPECS["annealed"], "warm_start": options}
    module = distillation(save_tiny_prior(tmp_path / "prior"), 0.0, network=network, operator=GaussianBlur(1.0))
    before = {k: v.clone() for k, v in module.network.warm_start.state_dict().items()}
    fit(module, tmp_path / "run")
    moved = {k for k, v in module.network.warm_start.state_dict().items() if not torch.equal(v, before[k])}
    groups = module.configure_optimizers()[0].param_groups
    assert [group["lr"] for group in groups] == [1e-2, 1e-2, 1e-3][: 2 if start == "frozen ram" else 3]
    stored = [k for k in everything(tmp_path / "run" / "checkpoints" / "last.ckpt") if "warm_start" in k]
    assert bool(moved) == bool(stored) == (start != "frozen ram")
    with module.ema.applied():
        module.sampler.save_pretrained(tmp_path / "export")
        again = PosteriorSampler.from_pretrained(tmp_path / "export")
        _, y, physics = problem()
        one, other = (s(y, physics, 0.05, generator=torch.Generator().manual_seed(3)) for s in (module.sampler, again))
    torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_frozen_ram_is_exported_by_reference_and_fingerprint(prior, ram_file, tmp_path):
    start = {"name": "ram", "weights": str(ram_file), "trainable": False}
    sampler = PosteriorSampler(build_network(prior, spec(start)), SamplerConfig())
    assert not any(p.requires_grad for p in sampler.network.warm_start.parameters())
    sampler.save_pretrained(tmp_path / "export")
    assert sum(file.stat().st_size for file in (tmp_path / "export").iterdir()) < 1e6
    again = PosteriorSampler.from_pretrained(tmp_path / "export")
    _, y, physics = problem()
    one, other = (s(y, physics, 0.05, generator=torch.Generator().manual_seed(3)) for s in (sampler, again))
    torch.testing.assert_close(one, other)
    changed = torch.load(ram_file, weights_only=True)
    changed["m_tail.conv.weight" if "m_tail.conv.weight" in changed else next(iter(changed))] += 1
    torch.save(changed, ram_file.with_name("changed"))
    config = tmp_path / "export" / "config.json"
    config.write_text(config.read_text().replace(str(ram_file), str(ram_file.with_name("changed"))))
    with pytest.raises(ValueError, match="trained with a RAM of fingerprint"):
        PosteriorSampler.from_pretrained(tmp_path / "export")


@pytest.mark.slow
def test_other_sizes_than_multiples_of_eight_are_taken():
    for start in (NetworkStart(widths=(4, 4, 4, 4)), RamStart()):
        for side in (36, 44):
            x0 = torch.rand(1, 3, side, side + 4)
            physics = SuperResolution(2).draw(1, (3, side, side + 4))
            with torch.no_grad():
                x = start_from_y(start, Observation.of(physics.A(x0), physics, 0.05))
            assert x.shape == x0.shape
            assert x.isfinite().all()


@pytest.mark.slow
def test_what_no_start_can_use_is_refused(tmp_path, ram_file):
    with pytest.raises(ValueError, match="RAM that is not trained needs weights"):
        RamStart(trainable=False)
    with pytest.raises(FileNotFoundError, match=r"no RAM weights at nowhere\.pth"):
        RamStart("nowhere.pth")
    for content in ("no weights", "half a download"):
        (tmp_path / "text.pth").write_text(content)
        with pytest.raises(ValueError, match=r"text\.pth does not hold RAM's weights"):
            RamStart(str(tmp_path / "text.pth"))
    with pytest.raises(ValueError, match=r"does not hold RAM's weights for \[3\] channels"):
        RamStart(str(ram_file), channels=[3])
    with pytest.raises(ValueError, match="four levels"):
        NetworkStart(widths=[8, 8])
    assert (
        weights_fingerprint(RamStart(str(ram_file)).network.state_dict()) == RamStart(str(ram_file), False).fingerprint
    )


@pytest.mark.slow
def test_ram_sees_the_decoded_picture_of_a_jpeg_as_a_noisy_image(ram_file):
    start, sigma_y = RamStart(str(ram_file)), torch.full((1,), 0.05)
    x0 = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    codec = Jpeg().draw(1, (3, 16, 16))
    y = codec.A(x0)
    with torch.no_grad():
        expected = start.network(y.clamp(0, 1), deepinv.physics.Denoising(), sigma=sigma_y, gain=torch.zeros(1))
        found = start_from_y(start, Observation.of(y, codec, sigma_y))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", [Inpainting(), GaussianBlur(), SuperResolution(4), Jpeg()])
def test_ram_takes_images_of_several_scales(ram_file, family):
    """At 64 pixels it asks the operator at its own size for a prox, with a solver, which small images never do."""
    start, shape = RamStart(str(ram_file)), (3, 64, 64)
    physics = family.draw(1, shape, torch.Generator().manual_seed(0))
    y = observe(physics, torch.rand(1, *shape, generator=torch.Generator().manual_seed(1)), 0.01)
    with torch.no_grad():
        found = start_from_y(start, Observation.of(y, physics, 0.01))
        if isinstance(family, Inpainting):
            theirs = deepinv.physics.Inpainting(shape, mask=physics.mask.expand(1, *shape)[0])
            expected = start.network(y, theirs, sigma=torch.full((1,), 0.01), gain=torch.zeros(1))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.shape == (1, *shape)
    assert found.isfinite().all()
