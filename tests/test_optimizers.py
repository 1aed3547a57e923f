import copy

import pytest
import torch
from tiny import SIZE, perturb, trained
from tiny_training import (
    EPOCHS,
    STEPS,
    At,
    TinyData,
    distillation,
    fit,
    images,
    largest_difference,
    prior_module,
    streams,
    warmup_cosine_oracle,
)

from ud2m.losses.generator import build_generator_loss
from ud2m.losses.terms import L2
from ud2m.training.schedules import warmup_cosine

# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [distillation, prior_module])
def test_accumulation_equals_the_big_batch(make, prior, tmp_path):
    # float64, so that only another meaning can tell them apart; 3 steps, generator, discriminator and averages
    def run(batch_size, accumulate):
        folder = tmp_path / str(batch_size)
        options = {"steps": 3, "accumulate": accumulate}
        module = make(prior, optimizer=options) if make is distillation else make(accumulate=accumulate)
        start = copy.deepcopy(module.state_dict())
        data = TinyData(batch_size)
        data.samples_per_epoch = 3 * 8
        fit(module, folder, data, max_epochs=1, precision="64-true")
        return start, module.state_dict()

    start, big = run(8, 1)
    _, small = run(4, 2)
    assert big.keys() == small.keys()
    assert any(k.startswith("discriminator.") for k in big) == (make is distillation)
    assert largest_difference(big, small) < 1e-9
    assert all(not torch.equal(start[k].double(), big[k].double()) for k in big)  # everything moved


@pytest.mark.slow
def test_accumulation_in_float32_and_it_is_no_coincidence(prior, tmp_path):
    def run(name, batch_size, accumulate, samples):
        module = distillation(prior, optimizer={"steps": 3, "accumulate": accumulate})
        data = TinyData(batch_size)
        data.samples_per_epoch = samples
        fit(module, tmp_path / name, data, max_epochs=1)
        return module.state_dict()

    big = run("big", 8, 1, 24)
    assert largest_difference(big, run("small", 4, 2, 24)) < 1e-4  # AdamW divides by the root of small squares
    assert largest_difference(big, run("half", 4, 1, 12)) > 1e-3


def test_epochs_must_hold_whole_steps(prior, tmp_path):
    data = TinyData()
    data.samples_per_epoch = 3 * 4
    with pytest.raises(ValueError, match="an epoch of 3 batches is no multiple of accumulate=2"):
        fit(distillation(prior, optimizer={"accumulate": 2}), tmp_path, data)
    with pytest.raises(ValueError, match="the optimizer plans 4 steps, the trainer 6"):
        fit(distillation(prior), tmp_path, data)


# --- optimisers and gradients ----------------------------------------------------------------------------------------


def test_every_trained_parameter_is_in_one_optimizer_once_and_no_frozen_one(prior):
    module = distillation(prior)
    optimizers = module.configure_optimizers()
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in trained(module).values()}
    assert all(p.requires_grad for p in held)
    held_by = [{id(p) for g in o.param_groups for p in g["params"]} for o in optimizers]
    assert held_by[0] == {id(p) for p in trained(module.network).values()}
    assert held_by[1] == {id(p) for p in module.discriminator.parameters()}
    psi, adapter = optimizers[0].param_groups
    assert {id(p) for p in adapter["params"]} == {id(p) for p in trained(module.prior).values()}
    assert (psi["weight_decay"], adapter["weight_decay"]) == (0.0, 0.01)


def test_without_adapter_psi_alone_is_trained(prior, tmp_path):
    module = distillation(prior, adversarial=0.0, lora={"rank": 0})
    (optimizer,) = module.configure_optimizers()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for part in (module.network.blocks, module.network.closing) for p in part.parameters()
    }
    fit(module, tmp_path)
    modules = [f"network.blocks.{k}.log_{name}" for k in range(2) for name in ("delta", "tau", "lam")]
    closing = ["network.closing.log_delta", "network.closing.log_lam"]
    assert sorted(k for k in module.state_dict() if not k.startswith("ema.")) == sorted(modules + closing)


def test_neither_player_leaves_a_gradient_with_the_other_and_one_backward_gives_both(prior):
    module = distillation(prior)
    perturb(trained(module).values())
    x0 = images(3)
    ours, theirs = trained(module.network), dict(module.discriminator.named_parameters())

    def gradients(pick):
        module.zero_grad(set_to_none=True)
        s = streams(module, 3)
        prediction = module.step.predict(x0, s)
        generator_loss, _ = module.loss(prediction)
        discriminator_loss, _ = module.step.discriminator_loss(module.discriminator, prediction, s)
        {"generator": generator_loss, "discriminator": discriminator_loss}[pick].backward()
        return [{k: p.grad for k, p in group.items()} for group in (ours, theirs)]

    of_generator, none = gradients("generator")
    assert all(g is None for g in none.values())
    assert all(g is not None and g.abs().sum() > 0 for g in of_generator.values())
    none, of_discriminator = gradients("discriminator")
    assert all(g is None for g in none.values())
    assert all(g is not None and g.abs().sum() > 0 for g in of_discriminator.values())
    module.zero_grad(set_to_none=True)
    total, values = module.losses(x0, streams(module, 3))
    total.backward()
    assert all(torch.allclose(p.grad, of_generator[k], atol=1e-7) for k, p in ours.items())
    assert all(torch.allclose(p.grad, of_discriminator[k], atol=1e-7) for k, p in theirs.items())
    losses = {"total", "l2", "energy", "adversarial", "discriminator", "gradient_penalty"}
    assert set(values) == losses | {"accuracy/real", "accuracy/generated"}
    _, logged = module.losses(x0, streams(module, 3), logged=True)
    assert set(logged) - set(values) == {"gradient/l2", "gradient/energy", "gradient/adversarial"}
    frozen = [p for p in module.prior.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_one_unfolded_pass_serves_both_updates(prior, tmp_path):
    module = distillation(prior)
    calls = []
    module.prior.register_forward_hook(lambda m, args, out: calls.append(len(args[0])) if m.training else None)
    fit(module, tmp_path, limit_val_batches=0, callbacks=(), max_epochs=EPOCHS)
    # K = 2 modules per batch, each with M = 2 outputs for 4 images
    assert calls == [8] * 2 * STEPS * EPOCHS


def test_draws_of_one_sample_share_its_warm_start(prior):
    # the energy score asks for two outputs of each of the three samples
    module, calls = distillation(prior, adversarial=0.0), []
    module.network.warm_start.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    prediction = module.step.predict(torch.rand(3, 3, SIZE, SIZE), [torch.Generator().manual_seed(k) for k in range(3)])
    assert prediction.outputs.shape[:2] == (3, 2)
    assert calls == [3]


def test_a_term_of_weight_zero_costs_nothing(prior, tmp_path):
    terms = {"l2": {"weight": 1.0, "term": L2}}
    module = distillation(prior, loss=lambda **parts: build_generator_loss(terms=terms, **parts))
    assert module.discriminator is None
    assert len(module.configure_optimizers()) == 1
    rows = []
    module.prior.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    module.losses(images(4), streams(module, 4))
    assert rows == [4, 4]  # one output per image


def test_gradients_are_clipped_to_a_joint_norm(prior, tmp_path):
    # AdamW does not show the size of a gradient; plain gradient descent does: |step| = rate * min(norm, clip).
    def moved(clip):
        module = distillation(prior, adversarial=0.0, optimizer={"clip": clip, "steps": 1, "warmup": 0})
        parameters = list(trained(module.network).values())
        module.configure_optimizers = lambda: torch.optim.SGD(parameters, lr=1.0)
        before = [p.detach().clone() for p in parameters]
        data = TinyData()
        data.samples_per_epoch = 4
        fit(module, tmp_path / str(clip), data, max_epochs=1)
        return torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])

    free, clipped = moved(1e9), moved(1e-3)
    assert free.norm() > 1e-2
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(free, clipped, dim=0) > 0.9999


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10)])
def test_learning_rate_equals_its_formula(warmup, total):
    for n in range(total + 1):
        assert warmup_cosine(n, warmup, total) == pytest.approx(warmup_cosine_oracle(n, warmup, total), abs=1e-12)
    assert warmup_cosine(total, warmup, total) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_learning_rates_move_once_per_optimizer_step(accumulate, prior, tmp_path):
    rates = []
    module = distillation(
        prior, optimizer={"accumulate": accumulate, "lr": 0.1, "lr_psi": 0.2, "lr_discriminator": 0.3}
    )
    update = module.update

    def recorded():
        update()
        rates.append([g["lr"] for o in module.optimizers() for g in o.param_groups])

    module.update = recorded
    fit(module, tmp_path, TinyData(accumulate=accumulate))
    factors = [warmup_cosine_oracle(n, 2, STEPS * EPOCHS) for n in range(STEPS * EPOCHS)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([[0.2 * f, 0.1 * f, 0.3 * f] for f in factors]))


@pytest.mark.slow
def test_the_generator_feels_the_discriminator_after_its_warmup(prior, tmp_path):
    """Until then the run is the one without the term, but for D."""

    def run(name, steps, **options):
        module = distillation(prior, optimizer={"steps": 8, "discriminator_warmup": 4}, **options)
        at = At(steps, lambda: kept.append([p.detach().clone() for p in module.step.generator_parameters()]))
        kept = []
        data = TinyData()
        data.samples_per_epoch = 4 * 8
        fit(module, tmp_path / name, data, max_epochs=1, callbacks=(at,))
        return kept[0]

    for steps, felt in ((4, False), (5, True)):
        one, other = run(f"with-{steps}", steps), run(f"without-{steps}", steps, adversarial=0.0)
        assert felt != all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="discriminator_warmup must be at least 0 and below the 8 steps"):
        distillation(prior, optimizer={"steps": 8, "discriminator_warmup": 8})
