import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from measuring import evaluate
from tiny import trained
from tiny_training import EPOCHS, STEPS, At, TinyData, checkpoint, distillation, everything, fit


def half(scale, growth_interval=2000):
    """Return Lightning's own plugin for ``16-mixed``, which it would replace on a CPU by bfloat16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale, growth_interval=growth_interval))


@pytest.mark.parametrize("clip", [1e-3, 1e6])  # every gradient is clipped, or none is
@pytest.mark.slow
def test_the_scale_of_float16_is_gone_when_gradients_are_clipped(clip, prior, tmp_path):
    def run(name, **options):
        # sgd: a step is proportional to the gradient, where Adam forgives any factor
        module = distillation(prior, optimizer={"clip": clip, "steps": STEPS})
        module.configure_optimizers = lambda: [
            torch.optim.SGD(module.step.generator_parameters(), lr=1e-2),
            torch.optim.SGD(module.discriminator.parameters(), lr=1e-2),
        ]
        fit(module, tmp_path / name, max_epochs=1, **options)
        return trained(module) | {f"d.{k}": p for k, p in module.discriminator.named_parameters()}

    untrained = distillation(prior)
    before = trained(untrained) | {f"d.{k}": p for k, p in untrained.discriminator.named_parameters()}
    expected, found = run("full"), run("half", plugins=half(2.0**8))
    # the scale doubles after the first step: both networks must be freed of that of their own step
    growing = run("growing", plugins=half(2.0**7, growth_interval=1))
    for result in (found, growing):
        moved = torch.cat([(expected[k] - before[k]).flatten() for k in expected])
        error = torch.cat([(result[k] - expected[k]).flatten() for k in expected])
        assert 0 < error.norm() < 0.03 * moved.norm()


@pytest.mark.slow
def test_a_step_that_overflows_in_float16_is_left_out_and_the_scale_falls(prior, tmp_path):
    module = distillation(prior)
    before = {name: p.detach().clone() for name, p in generator(module).items()}
    plugin = half(2.0**60)
    plugin.scaler._backoff_factor = 2.0**-22
    seen = []
    notes = tuple(At(batch, lambda: seen.append(changed(module, before))) for batch in range(STEPS * EPOCHS))
    fit(module, tmp_path, plugins=plugin, callbacks=notes)
    assert seen == [False, False, False, True]
    assert module.steps_done == STEPS * EPOCHS
    assert plugin.scaler.get_scale() == 2.0**16
    assert everything(checkpoint(tmp_path))["/MixedPrecision/scale"] == 2.0**16  # a resumed run goes on with it


def generator(module):
    """Return what is trained through the network in float16; D is evaluated in float32, and does not overflow."""
    return {name: p for name, p in trained(module).items() if not name.startswith("discriminator.")}


def changed(module, before):
    return any(not torch.equal(p, before[name]) for name, p in generator(module).items())


def test_gradients_that_overflow_at_any_scale_stop_the_run(prior, tmp_path):
    module = distillation(prior)
    parameter = module.network.blocks[0].log_tau
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="stopped at step 2: the gradient of 'generator' is nan"):
        fit(module, tmp_path, plugins=half(2.0))
    assert all(p.isfinite().all() for p in trained(module).values())


def test_an_unknown_precision_is_refused(prior, tmp_path):
    module = distillation(prior)
    module._trainer = type("T", (), {"num_training_batches": 2, "max_epochs": 2, "precision": "16-true"})()
    with pytest.raises(ValueError, match="precision must be one of 32-true, bf16-mixed, 16-mixed, 64-true, got 16-tr"):
        module.on_train_start()
    module._trainer = None


def test_bfloat16_trains_around_a_float32_prior(prior, tmp_path):
    module = distillation(prior)
    frozen = {k: p.detach().clone() for k, p in module.prior.named_parameters() if not p.requires_grad}
    fit(module, tmp_path, precision="bf16-mixed")
    # Scores are those of the sampler as it is used, in float32; under autocast they were far off.
    with module.ema.applied():
        expected = evaluate(module.sampler, list(TinyData().val_dataloader()), module.step.problem, num_samples=2)
    assert {k: module.scores[k] for k in ("psnr", "ssim", "r")} == pytest.approx(
        {k: expected[k] for k in ("psnr", "ssim", "r")}, rel=1e-5
    )
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert all(torch.equal(p, dict(module.prior.named_parameters())[k]) for k, p in frozen.items())
    assert all(p.isfinite().all() for p in trained(module).values())
