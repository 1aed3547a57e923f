import math

import numpy as np
import pytest
import torch
from measuring import evaluate
from safetensors.torch import load_file
from tiny import trained
from tiny_training import TinyData, distillation, fit, largest_difference
from torch import nn

from ud2m.training.ema import Ema


def test_the_average_equals_its_closed_form(generator):
    # a_n = prod_i d_i p_0 + sum_i (1 - d_i) prod_{j > i} d_j p_i, d_i = min(decay, (1 + i) / (10 + i))
    decay, updates = 0.4, 12
    parameter = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    history = [parameter.detach().numpy().copy()]
    ema = Ema([parameter], decay)
    for _ in range(updates):
        with torch.no_grad():
            parameter.copy_(torch.randn(5, generator=generator, dtype=torch.float64))
        history.append(parameter.detach().numpy().copy())
        ema.update()
    d = [min(decay, (1 + i) / (10 + i)) for i in range(updates + 1)]
    expected = math.prod(d[1:]) * history[0]
    for i in range(1, updates + 1):
        expected = expected + (1 - d[i]) * math.prod(d[i + 1 :]) * history[i]
    np.testing.assert_allclose(ema.averages[0].numpy(), expected, rtol=1e-12)
    assert d[1] < decay == d[-1]  # both branches were used


def test_the_average_is_applied_inside_the_context_only(generator):
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema([parameter], 0.9)
    with torch.no_grad():
        parameter += 1
    seen = []

    def fail():
        with ema.applied():
            seen.append(parameter.detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(seen[0], torch.zeros(3))
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert torch.equal(ema.averages[0], torch.zeros(3))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        Ema([nn.Parameter(torch.zeros(1))], decay)


def test_the_average_holds_trained_parameters_only_and_validation_and_export_use_it(prior, tmp_path):
    module = distillation(prior)
    assert {id(p) for p in module.ema.source} == {id(p) for p in trained(module.network).values()}
    fit(module, tmp_path)
    raw = {k: v.detach().clone() for k, v in trained(module.network).items()}
    averaged = dict(zip(raw, module.ema.averages, strict=True))
    assert all(not torch.equal(raw[k], averaged[k]) for k in raw)
    module.export(tmp_path / "export")
    assert largest_difference(raw, trained(module.network)) == 0  # training would go on with the raw ones
    psi = load_file(tmp_path / "export" / "psi.safetensors")
    assert all(torch.equal(psi[k], averaged[k]) for k in psi)
    # The score of the last validation is the averages': the raw ones score otherwise.
    batches = list(TinyData().val_dataloader())
    with module.ema.applied():
        as_validated = evaluate(module.sampler, batches, module.step.problem, num_samples=2)
    raw_score = evaluate(module.sampler, batches, module.step.problem, num_samples=2)
    assert module.scores["psnr"] == pytest.approx(as_validated["psnr"], rel=1e-6)
    assert module.scores["psnr"] != pytest.approx(raw_score["psnr"], rel=1e-6)
