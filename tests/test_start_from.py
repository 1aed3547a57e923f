import pytest
import torch
from tiny import LORA, save_tiny_prior, trained
from tiny_training import distillation, fit

from ud2m.physics import Inpainting, Observation


def without_judge(module):
    """The parameters that an export holds."""
    return {name: p for name, p in trained(module).items() if not name.startswith(("discriminator.", "loss."))}


def test_a_run_starts_from_a_trained_model(prior, tmp_path):
    first = distillation(prior)
    fit(first, tmp_path / "first")
    first.export(tmp_path / "export")
    with first.ema.applied():
        expected = {name: parameter.detach().clone() for name, parameter in without_judge(first).items()}
    module = distillation(prior, start_from=str(tmp_path / "export"), operator=Inpainting(0.2), sigma_y=0.1)
    found = without_judge(module)
    assert expected.keys() == found.keys()
    assert any(not torch.equal(p, found[name]) for name, p in without_judge(distillation(prior)).items())
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name])
    # the average of the new run begins there too
    with module.ema.applied():
        assert all(torch.equal(p, found[name]) for name, p in without_judge(module).items())
    fit(module, tmp_path / "run")
    assert any(not torch.equal(p, expected[name]) for name, p in without_judge(module).items())


@pytest.mark.parametrize("widths", [None, (4, 4, 4, 4), (8, 8, 8, 8)])
def test_a_run_with_a_trained_start_goes_on_from_a_model_with_another(prior, tmp_path, widths):
    def network(start):
        return {"num_blocks": 2, "rule": {"name": "annealed"}, "warm_start": start}

    def learned(widths):
        return network({"name": "network", "channels": 3, "widths": list(widths), "num_blocks": 1})

    theirs = network({"name": "pinv"}) if widths is None else learned(widths)
    first = distillation(prior, network=theirs)
    with torch.no_grad():
        for value in first.network.own_state().values():
            value.add_(0.25)
    first.ema.update()
    first.export(tmp_path / "export")
    with first.ema.applied():
        expected = {name: value.clone() for name, value in first.network.own_state().items()}
    module = distillation(prior, network=learned((4, 4, 4, 4)), start_from=str(tmp_path / "export"))
    found = module.network.own_state()
    starts = [name for name in found if name.startswith("warm_start.")]
    assert 0 < len(starts) < len(found)
    for name, value in found.items():
        if name in starts and widths != (4, 4, 4, 4):
            # its last layer is still 0: the smoothing start
            assert not name.endswith("m_tail.weight") or not value.any()
        else:
            torch.testing.assert_close(value, expected[name])


def test_a_run_says_that_its_prior_has_other_weights_than_the_model_it_starts_from(prior, tmp_path):
    first = distillation(prior)
    with torch.no_grad():
        for value in first.network.own_state().values():
            value.add_(0.25)
    first.ema.update()
    first.export(tmp_path / "export")
    other = save_tiny_prior(tmp_path / "other", seed=5)
    with pytest.warns(UserWarning, match="trained on a prior with other weights"):
        module = distillation(other, start_from=str(tmp_path / "export"))
    with first.ema.applied():
        for name, value in module.network.own_state().items():
            torch.testing.assert_close(value, first.network.own_state()[name])


def test_a_run_with_other_modules_takes_the_adapter_alone_and_says_so(prior, tmp_path):
    first = distillation(prior)
    fit(first, tmp_path / "first")
    first.export(tmp_path / "export")
    network = {"num_blocks": 3, "rule": {"name": "annealed"}, "warm_start": {"name": "pinv"}}
    with pytest.warns(
        UserWarning, match="has another num_blocks and rule than this run: its adapter is taken, and psi begins"
    ):
        module = distillation(prior, network=network, start_from=str(tmp_path / "export"))
    fresh = distillation(prior, network=network)
    for name, value in module.network.own_state().items():
        torch.testing.assert_close(value, fresh.network.own_state()[name])
    with first.ema.applied():
        expected = {name: value.clone() for name, value in without_judge(first).items() if "lora_" in name}
    found = without_judge(module)
    assert any(value.any() for name, value in expected.items() if "lora_B" in name)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("before", [[], ["noise"], ["gain", "noise"]])
def test_a_run_whose_psi_has_more_features_begins_as_the_same_function(prior, tmp_path, before):
    def network(conditioning):
        spec = {"num_blocks": 2, "rule": {"name": "annealed"}, "warm_start": {"name": "pinv"}}
        return spec | ({"conditioning": conditioning} if conditioning else {})

    first = distillation(prior, network=network(before))
    with torch.no_grad():
        for k, value in enumerate(first.network.own_state().values()):
            value.add_(0.05 * torch.arange(1.0, value.numel() + 1).view_as(value) - 0.02 * k)
    first.ema.update()
    first.export(tmp_path / "export")
    second = distillation(prior, network=network(["noise", "gain", "hidden"]), start_from=str(tmp_path / "export"))
    x0 = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    physics = Inpainting(0.4).draw(2, (3, 16, 16), torch.Generator().manual_seed(1))
    observation = Observation(physics.A(x0), physics, torch.tensor([0.01, 0.2]))
    with first.ema.applied(), torch.no_grad():
        one, other = (
            module.network(x0, torch.tensor([0.1, 1.0]), observation, torch.Generator().manual_seed(2))
            for module in (first, second)
        )
    torch.testing.assert_close(one, other)
    if before:
        with pytest.warns(UserWarning, match="has another conditioning than this run"):
            distillation(prior, network=network(["level"]), start_from=str(tmp_path / "export"))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_run_of_higher_rank_begins_as_the_same_function_and_trains_the_new_directions(prior, tmp_path, before):
    first = distillation(prior, lora={**LORA, "rank": before})
    with torch.no_grad():
        for k, value in enumerate(p for p in first.network.parameters() if p.requires_grad):
            value.add_(0.05 * torch.arange(1.0, value.numel() + 1).view_as(value) / value.numel() - 0.002 * k)
    first.ema.update()
    first.export(tmp_path / "export")
    second = distillation(prior, lora={**LORA, "rank": 3, "alpha": 1.5}, start_from=str(tmp_path / "export"))
    x0 = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    physics = Inpainting(0.4).draw(2, (3, 16, 16), torch.Generator().manual_seed(1))
    observation = Observation(physics.A(x0), physics, torch.tensor([0.01, 0.2]))
    with first.ema.applied():
        one, other = (
            module.network(x0, torch.tensor([0.1, 1.0]), observation, torch.Generator().manual_seed(2))
            for module in (first, second)
        )
    torch.testing.assert_close(one, other)
    other.square().sum().backward()
    gradients = {name: p.grad for name, p in second.network.named_parameters() if "lora_B" in name}
    assert gradients
    assert all(gradient[:, before:].any() for gradient in gradients.values())


def test_a_run_starts_from_no_other_kind_of_model(prior, tmp_path):
    distillation(prior).export(tmp_path / "export")
    start = {"start_from": str(tmp_path / "export")}
    with pytest.raises(ValueError, match=r"cannot start from the model .*it has another lora: "):
        distillation(prior, lora={**LORA, "rank": 1}, **start)
    with pytest.raises(ValueError, match=r"cannot start from the model .*it has another lora: "):
        distillation(prior, lora={**LORA, "rank": 4, "targets": ("to_q",)}, **start)
    with pytest.raises(ValueError, match=r"cannot start from the model .*does not fit"):
        distillation(save_tiny_prior(tmp_path / "wider", block_out_channels=(16, 32)), **start)
    (tmp_path / "export" / "psi.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot start from the model"):
        distillation(prior, **start)
    with pytest.raises(FileNotFoundError, match="unknown model 'nowhere'"):
        distillation(prior, start_from="nowhere")
