import copy
import math
import random
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from measuring import evaluate
from processes import start
from safetensors.torch import load_file
from tiny import LORA, SIZE, perturb, save_tiny_prior, tiny_prior, trained
from tiny_training import (
    EPOCHS,
    STEPS,
    At,
    Break,
    TinyData,
    assert_equal,
    distillation,
    everything,
    fit,
    largest_difference,
    prior_module,
    warmup_cosine_oracle,
)
from torch import nn

from ud2m.losses.generator import build_generator_loss
from ud2m.losses.terms import L2
from ud2m.physics import GaussianBlur, Inpainting, observe
from ud2m.priors.prior import Prior
from ud2m.training import Levels
from ud2m.training.checkpoints import PREEMPTED, read_checkpoint
from ud2m.training.ema import Ema
from ud2m.training.pictures import contact_sheet
from ud2m.training.random_streams import row_streams, stream
from ud2m.training.schedules import warmup_cosine


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return save_tiny_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def unbroken(prior, tmp_path_factory):
    """The folder and the trainer of a whole run."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, fit(distillation(prior), folder)


def checkpoint(folder, name="last"):
    return folder / "checkpoints" / f"{name}.ckpt"


def streams(module, count):
    return row_streams("cpu", list(range(count)), module.seed, module.stream_name)


def images(count):
    data = TinyData().train_set()
    return torch.stack([data[i] for i in range(count)])


# --- accumulation ----------------------------------------------------------------------------------------------------


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


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "batch", "error"),
    [(1, 0, RuntimeError("power cut")), (1, 1, RuntimeError("power cut")), (1, 1, KeyboardInterrupt())],
)
def test_resuming_equals_the_unbroken_run_bit_for_bit(epoch, batch, error, prior, unbroken, tmp_path):
    with pytest.raises((RuntimeError, SystemExit)):
        fit(distillation(prior), tmp_path, callbacks=(Break(epoch, batch, error),))
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
    assert torch.load(checkpoint(tmp_path), weights_only=True)["scores"]["step"] == STEPS
    torch.manual_seed(77)  # the state of global random numbers must not matter
    fit(distillation(prior), tmp_path, resume=True)
    assert_equal(everything(checkpoint(unbroken[0])), everything(checkpoint(tmp_path)))
    assert_equal(everything(checkpoint(unbroken[0], "best")), everything(checkpoint(tmp_path, "best")))


def long_run(prior, folder, resume=False, **options):
    """Two epochs of three steps, of two batches each."""
    data = TinyData()
    data.samples_per_epoch = 3 * 2 * 4
    module = distillation(prior, optimizer={"steps": 6, "accumulate": 2})
    fit(module, folder, data, resume, **options)


@pytest.fixture(scope="module")
def long_unbroken(prior, tmp_path_factory):
    """The folder of a whole long run."""
    folder = tmp_path_factory.mktemp("long")
    long_run(prior, folder)
    return folder


# Within step 2 of the first epoch; and within its last one, where the validation comes first.
@pytest.mark.parametrize(("number", "batch", "step"), [(signal.SIGTERM, 2, 2), (signal.SIGUSR1, 5, 3)])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_bit_for_bit(
    number, batch, step, prior, long_unbroken, tmp_path
):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as error:
        long_run(prior, tmp_path, callbacks=(At(batch, lambda: signal.raise_signal(number)),))
    assert error.value.code == PREEMPTED
    assert signal.getsignal(number) == before
    assert int(read_checkpoint(checkpoint(tmp_path))["state_dict"]["ema.num_updates"]) == step
    long_run(prior, tmp_path, True)
    for name in ("last", "best"):
        assert_equal(everything(checkpoint(long_unbroken, name)), everything(checkpoint(tmp_path, name)))


def test_checkpoints_between_validations(prior, long_unbroken, tmp_path):
    with pytest.raises(RuntimeError):
        long_run(prior, tmp_path, every=5, callbacks=(Break(1, 5),))
    assert int(read_checkpoint(checkpoint(tmp_path))["state_dict"]["ema.num_updates"]) == 5
    long_run(prior, tmp_path, True)
    assert_equal(everything(checkpoint(long_unbroken)), everything(checkpoint(tmp_path)))
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1 step, or null, got 0"):
        long_run(prior, tmp_path, every=0)


def wait_for_writes(process, path, writes):
    """Return when ``path`` was written so often, or the process has ended."""
    seen = path.stat().st_mtime_ns if path.exists() else None
    while writes and process.is_alive():
        now = path.stat().st_mtime_ns if path.exists() else None
        writes, seen = writes - (now != seen), now
        process.join(0.002)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_the_unbroken_one(prior, tmp_path):
    steps = 40

    def run(folder):
        data = TinyData()
        data.samples_per_epoch = 4 * 10
        module = distillation(prior, optimizer={"steps": steps})
        fit(module, folder, data, checkpoint(folder).exists(), every=1, max_epochs=4)

    run(tmp_path / "unbroken")
    rng, killed, resumed = random.Random(0), tmp_path / "killed", set()
    for _ in range(20):
        process = start(run, killed)
        wait_for_writes(process, checkpoint(killed), rng.randint(1, 2))
        process.join(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        resumed.add(int(read_checkpoint(checkpoint(killed))["state_dict"]["ema.num_updates"]))
    assert len(resumed) > 3  # it was killed at different places
    run(killed)
    for name in ("last", "best"):
        assert_equal(everything(checkpoint(tmp_path / "unbroken", name)), everything(checkpoint(killed, name)))


def test_float64_is_resumed_without_rounding(prior, tmp_path):
    with pytest.raises(RuntimeError):
        fit(distillation(prior), tmp_path / "broken", callbacks=(Break(1, 0),), precision="64-true")
    fit(distillation(prior), tmp_path / "broken", resume=True, precision="64-true")
    fit(distillation(prior), tmp_path / "unbroken", precision="64-true")
    assert_equal(everything(checkpoint(tmp_path / "unbroken")), everything(checkpoint(tmp_path / "broken")))


def test_a_moved_run_resumes_with_its_best_score(prior, unbroken, tmp_path):
    with pytest.raises(RuntimeError):
        fit(distillation(prior), tmp_path / "here", callbacks=(Break(1, 0),))
    (tmp_path / "here").rename(tmp_path / "there")
    fit(distillation(prior), tmp_path / "there", resume=True)
    assert_equal(everything(checkpoint(unbroken[0])), everything(checkpoint(tmp_path / "there")))


def test_a_resumed_run_knows_the_score_to_beat(prior, tmp_path, monkeypatch):
    scores = iter([30.0, 20.0])
    monkeypatch.setattr("ud2m.training.validation.Validation.result", lambda self: ({}, next(scores)))
    with pytest.raises(RuntimeError):
        fit(distillation(prior), tmp_path, callbacks=(Break(1, 0),))
    fit(distillation(prior), tmp_path, resume=True)
    assert read_checkpoint(checkpoint(tmp_path, "best"))["scores"]["step"] == STEPS
    assert read_checkpoint(checkpoint(tmp_path))["scores"]["step"] == 2 * STEPS


def test_resuming_a_finished_run_changes_nothing(prior, unbroken):
    before = checkpoint(unbroken[0]).read_bytes()
    module = distillation(prior)
    fit(module, unbroken[0], resume=True)
    assert checkpoint(unbroken[0]).read_bytes() == before
    assert module.steps_done == STEPS * EPOCHS


def test_resuming_with_accumulation(prior, tmp_path):
    def run(folder, **options):
        module = distillation(prior, optimizer={"accumulate": 2})
        fit(module, folder, TinyData(accumulate=2), **options)

    run(tmp_path / "unbroken")
    with pytest.raises(RuntimeError):
        run(tmp_path / "broken", callbacks=(Break(1, 1),))  # between both halves of a step
    run(tmp_path / "broken", resume=True)
    assert_equal(everything(checkpoint(tmp_path / "unbroken")), everything(checkpoint(tmp_path / "broken")))


def test_resuming_a_prior(tmp_path):
    fit(prior_module(), tmp_path / "unbroken")
    with pytest.raises(RuntimeError):
        fit(prior_module(), tmp_path / "broken", callbacks=(Break(1, 1),))
    fit(prior_module(), tmp_path / "broken", resume=True)
    assert_equal(everything(checkpoint(tmp_path / "unbroken")), everything(checkpoint(tmp_path / "broken")))


def test_other_data_settings_are_refused(prior, unbroken):
    with pytest.raises(ValueError, match="batch_size 4, now 8"):
        fit(distillation(prior), unbroken[0], TinyData(8), resume=True, max_epochs=EPOCHS + 1)


def test_random_streams_depend_on_the_key_alone():
    def draw(generator):
        return torch.rand(3, generator=generator)

    assert torch.equal(draw(stream("cpu", 1, "a", 2)), draw(stream("cpu", 1, "a", 2)))
    values = torch.stack(
        [draw(g) for g in row_streams("cpu", [0, 1, 2, 12], 1, "a")] + [draw(stream("cpu", 11, "a", 2))]
    )
    assert len(values.unique(dim=0)) == 5


@pytest.mark.parametrize("world", [1, 2, 4])
def test_streams_follow_the_dealing_of_rows_to_ranks(world, prior):
    # The data module deals position q of the stream to rank q mod world; rank 0's first row of batch 1 comes after
    # a whole batch of all ranks.
    from ud2m.data.sampler import StreamSampler

    module = distillation(prior, optimizer={"accumulate": 2})
    module.ema.num_updates += 3  # batches 6 and 7 are next
    local = 8 // world
    for rank in range(world):
        module._trainer = type("T", (), {"world_size": world, "global_rank": rank})()
        sampler = StreamSampler(8 * 10, 8, rank=rank, world_size=world)
        dealt = list(sampler)[7 * local : 8 * local]
        expected = [g.initial_seed() for g in row_streams("cpu", dealt, module.seed, "distillation")]
        assert [g.initial_seed() for g in module.streams(local, batch_idx=5)] == expected
    module._trainer = None


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_hold_what_is_trained_and_nothing_frozen(prior, unbroken):
    module = distillation(prior)
    content = torch.load(checkpoint(unbroken[0]), weights_only=True)
    generator = sum(p.numel() for p in module.network.parameters() if p.requires_grad)
    discriminator = sum(p.numel() for p in module.discriminator.parameters())
    held = sum(v.numel() for v in content["state_dict"].values())
    assert held == 2 * generator + discriminator + 1  # parameters, averages, the count of updates
    moments = sum(v.numel() for s in content["optimizer_states"] for p in s["state"].values() for v in p.values())
    assert 2 * (generator + discriminator) <= moments < 2 * (generator + discriminator) + 200
    frozen = sum(p.numel() for p in module.prior.parameters() if not p.requires_grad)
    assert frozen > generator + discriminator  # else the size below would say nothing
    total = 4 * (4 * generator + 3 * discriminator)
    assert checkpoint(unbroken[0]).stat().st_size < total + 100_000


def test_a_checkpoint_of_another_prior_is_refused(unbroken, tmp_path):
    other = save_tiny_prior(tmp_path, seed=5)
    with pytest.raises(ValueError, match=r"trained on a prior with fingerprint .* resume with the same prior"):
        fit(distillation(other), unbroken[0], resume=True)
    with pytest.raises(ValueError, match="fingerprint"):
        distillation(other).restore(checkpoint(unbroken[0]))


@pytest.mark.parametrize(
    "change", [{"adversarial": 0.0}, {"lora": {"rank": 3, "alpha": 1.0, "targets": ["to_q"]}}], ids=["loss", "rank"]
)
def test_a_checkpoint_of_another_model_is_refused(change, prior, unbroken):
    with pytest.raises(ValueError, match="of another model, unmatched: "):
        distillation(prior, **change).restore(checkpoint(unbroken[0]))


@pytest.mark.parametrize("size", [0, 100, 5000, -20])
def test_a_truncated_checkpoint_gives_one_message(size, unbroken, tmp_path):
    content = checkpoint(unbroken[0]).read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[:size])
    with pytest.raises(
        ValueError, match=r"last.ckpt is truncated, damaged or no checkpoint \(.*\); copy best.ckpt"
    ) as e:
        read_checkpoint(tmp_path / "last.ckpt")
    assert "\n" not in str(e.value)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"state_dict": {}, "more": Malice()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="truncated, damaged or no checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "written").exists()


def test_the_best_checkpoint_is_the_one_of_the_highest_score(prior, tmp_path, monkeypatch):
    scores = iter([20.0, 22.0, 21.0])
    monkeypatch.setattr("ud2m.training.validation.Validation.result", lambda self: ({"r": None}, next(scores)))
    fit(distillation(prior, optimizer={"steps": 3 * STEPS}), tmp_path, max_epochs=3)
    best, last = (read_checkpoint(checkpoint(tmp_path, name)) for name in ("best", "last"))
    assert (best["scores"]["score"], best["scores"]["step"]) == (22.0, 2 * STEPS)
    assert (last["scores"]["score"], last["scores"]["step"]) == (21.0, 3 * STEPS)


def test_a_failing_write_leaves_the_old_checkpoint(prior, unbroken, tmp_path, monkeypatch):
    fit(distillation(prior), tmp_path)
    before = checkpoint(tmp_path).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(distillation(prior, optimizer={"steps": 6}), tmp_path, resume=True, max_epochs=3)
    assert checkpoint(tmp_path).read_bytes() == before


# --- average ---------------------------------------------------------------------------------------------------------


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


# --- failing well ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["energy", "discriminator"])
def test_a_loss_that_is_not_finite_stops_with_step_and_term(term, prior, tmp_path):
    module = distillation(prior)
    owner = module.step.discriminator_loss if term == "discriminator" else module.loss.terms[term]
    forward, calls = owner.forward, []

    def nan_from_step_three(*args):
        calls.append(None)
        if len(calls) <= 3:
            return forward(*args)
        if term == "discriminator":
            return forward(lambda *images: args[0](*images) * float("nan"), *args[1:])
        return forward(*args) * float("nan")

    owner.forward = nan_from_step_three
    with pytest.raises(FloatingPointError, match=f"stopped at step 3: the loss term '{term}' is nan"):
        fit(module, tmp_path)
    kept = read_checkpoint(checkpoint(tmp_path))
    assert kept["scores"]["step"] == STEPS
    assert all(v.isfinite().all() for v in kept["state_dict"].values())
    distillation(prior).restore(checkpoint(tmp_path))


def test_a_network_that_gives_nan_to_the_solver_stops_with_the_step(prior, tmp_path):
    module = distillation(prior, operator=GaussianBlur(0.5, boundary="valid"))
    start = module.network.warm_start
    forward = start.forward
    start.forward = lambda *args: forward(*args) * (float("nan") if module.steps_done == 1 else 1)
    with pytest.raises(FloatingPointError, match=r"stopped at step 1: .* BoundedBlur got NaN or infinity in z"):
        fit(module, tmp_path)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_parameters(prior, tmp_path):
    # The loss is finite: without a check of the gradient the checkpoint of the next validation would hold nan.
    module = distillation(prior)
    parameter = module.network.blocks[0].log_tau
    parameter.register_hook(lambda gradient: gradient * float("nan") if module.steps_done == 1 else gradient)
    with pytest.raises(FloatingPointError, match="stopped at step 1: the gradient of 'generator' is nan"):
        fit(module, tmp_path)
    assert all(p.isfinite().all() for p in trained(module).values())
    assert not checkpoint(tmp_path).exists()


def test_a_validation_score_that_is_not_a_number_stops_before_a_checkpoint(prior, tmp_path, monkeypatch):
    scores = iter([20.0, float("nan")])
    monkeypatch.setattr("ud2m.training.validation.Validation.result", lambda self: ({}, next(scores)))
    with pytest.raises(FloatingPointError, match="stopped at step 4: the validation score is nan"):
        fit(distillation(prior), tmp_path)
    assert read_checkpoint(checkpoint(tmp_path))["scores"]["score"] == 20.0


def test_a_prior_that_diverges_says_so(tmp_path):
    module = prior_module()
    with torch.no_grad():
        module.unet.conv_out.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="step 0: the loss term 'noise prediction' is nan"):
        fit(module, tmp_path)


def test_noise_levels_of_a_range_are_log_uniform_and_reach_the_observations(prior, monkeypatch):
    seen = []

    def spy(physics, x0, sigma_y, streams):
        seen.append(sigma_y)
        return observe(physics, x0, sigma_y, streams)

    monkeypatch.setattr("ud2m.physics.problem.observe", spy)
    module = distillation(prior, sigma_y_range=[0.01, 0.16])
    streams = [torch.Generator().manual_seed(i) for i in range(400)]
    position = (module.step.draw_sigma_y(400, streams) / 0.01).log() / math.log(16)
    assert 0 <= position.min() < 0.02
    assert 0.98 < position.max() <= 1
    assert position.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 400) ** 0.5)
    module.step.predict(torch.rand(4, 3, SIZE, SIZE), streams[:4])
    assert len(seen[0].unique()) == 4
    assert module.step.problem.sigma_y == module.sampler.config.sigma_y == 0.05


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sigma_y": 0.0}, "sigma_y must be a positive noise level in image units, got 0"),
        ({"sigma_y": -0.1}, "sigma_y must be a positive"),
        ({"sigma_y_range": [0.0, 0.1]}, "sigma_y_range must hold two positive noise levels that rise"),
        ({"sigma_y_range": [0.2, 0.1]}, "sigma_y_range must hold"),
        ({"network": {"num_blocks": 0, "rule": {"name": "paper"}, "warm_start": {"name": "pinv"}}}, "num_blocks"),
        ({"sampling": {"num_steps": 2, "eta": 1.5}}, "eta must be"),
        ({"validation": {"num_samples": 0, "lpips": None, "metric": "psnr"}}, "num_samples must be an integer"),
        (
            {"validation": {"num_samples": 1, "lpips": None, "metric": "residual"}},
            "is no number to choose by; take one of psnr_mean",
        ),
        ({"validation": {"num_samples": 1, "lpips": None, "metric": "-psnr"}}, "is no number to choose by"),
        ({"optimizer": {"accumulate": 0}}, "accumulate must be at least 1"),
        ({"optimizer": {"clip": 0.0}}, "clip, the largest gradient norm, must be positive"),
        ({"optimizer": {"lr": 0.0}}, "learning rates must be positive"),
        ({"optimizer": {"learning_rate": 0.1}}, "the optimizer is described by .*lr_psi.*learning_rate"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(overrides, message, prior):
    with pytest.raises(ValueError, match=message):
        distillation(prior, **overrides)


@pytest.mark.parametrize("net", [None, "alex"])
def test_selection_by_lpips_needs_its_weights(net, prior, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"validation\.metric=lpips: the metric lpips cannot be computed: .*alex"):
        distillation(prior, validation={"num_samples": 1, "lpips": net, "metric": "lpips"})


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"focus": 1.5}, {"focus_max": 1e-4}, {"levels": []}])
def test_numbers_of_a_prior_are_checked(change):
    with pytest.raises(ValueError, match="must"):
        prior_module(**change)


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


def test_a_run_starts_from_no_other_kind_of_model(prior, tmp_path):
    distillation(prior).export(tmp_path / "export")
    start = {"start_from": str(tmp_path / "export")}
    with pytest.raises(ValueError, match=r"cannot start from the model .*it has another lora: "):
        distillation(prior, lora={**LORA, "rank": 1}, **start)
    network = {"num_blocks": 3, "rule": {"name": "annealed"}, "warm_start": {"name": "pinv"}}
    with pytest.raises(ValueError, match="it has another num_blocks"):
        distillation(prior, network=network, **start)
    with pytest.raises(ValueError, match="it has another prior"):
        distillation(save_tiny_prior(tmp_path / "other", seed=5), **start)
    (tmp_path / "export" / "psi.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot start from the model"):
        distillation(prior, **start)
    with pytest.raises(FileNotFoundError, match="no model at 'nowhere'"):
        distillation(prior, start_from="nowhere")


def half(scale, growth_interval=2000):
    """Return Lightning's own plugin for ``16-mixed``, which it would replace on a CPU by bfloat16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale, growth_interval=growth_interval))


@pytest.mark.parametrize("clip", [1e-3, 1e6])  # every gradient is clipped, or none is
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


def test_a_step_that_overflows_in_float16_is_left_out_and_the_scale_falls(prior, tmp_path):
    module = distillation(prior)
    before = {name: p.detach().clone() for name, p in trained(module).items()}
    plugin = half(2.0**60)
    plugin.scaler._backoff_factor = 2.0**-22
    seen = []
    notes = tuple(At(batch, lambda: seen.append(changed(module, before))) for batch in range(STEPS * EPOCHS))
    fit(module, tmp_path, plugins=plugin, callbacks=notes)
    assert seen == [False, False, False, True]
    assert module.steps_done == STEPS * EPOCHS
    assert plugin.scaler.get_scale() == 2.0**16
    assert everything(checkpoint(tmp_path))["/MixedPrecision/scale"] == 2.0**16  # a resumed run goes on with it


def changed(module, before):
    return any(not torch.equal(p, before[name]) for name, p in trained(module).items())


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


# --- levels ----------------------------------------------------------------------------------------------------------


def test_levels_have_the_stated_values_and_shares(generator):
    schedule = tiny_prior().schedule
    count, spread = 200_000, 0.25
    sigma = Levels(3, spread, 0.02, 80.0)(torch.rand(count, 2, generator=generator), schedule)
    grid = schedule.grid(3)
    shares = torch.stack([(sigma == level).double().mean() for level in grid])
    deviation = (0.25 * 0.75 / count) ** 0.5  # binomial
    assert (shares - (1 - spread) / 3).abs().max() < 5 * deviation
    others = sigma[torch.stack([sigma != level for level in grid]).all(0)].double()
    assert len(others) / count == pytest.approx(spread, abs=5 * deviation)
    assert 0.02 <= others.min() < 0.0201
    assert 79.5 < others.max() <= 80.0
    logs = others.log()  # uniform: mean and variance of the log
    width = math.log(80.0 / 0.02)
    assert logs.mean().item() == pytest.approx(math.log(0.02) + width / 2, abs=5 * width / math.sqrt(12 * len(others)))
    assert logs.std().item() == pytest.approx(width / math.sqrt(12), rel=0.02)


def test_levels_at_the_ends_of_the_uniform_numbers():
    schedule = tiny_prior().schedule
    ends = torch.tensor([[0.0, 0.9], [1.0, 0.9], [0.0, 0.0], [1.0, 0.0]])
    grid = schedule.grid(3)
    expected = torch.tensor([grid[0], grid[-1], 0.02, 80.0])
    torch.testing.assert_close(Levels(3, 0.25)(ends, schedule), expected)


def test_levels_follow_the_power_of_the_grid():
    schedule = tiny_prior().schedule
    sigma = Levels(3, 0.0, grid_power=5.0)(torch.rand(64, 2), schedule)
    torch.testing.assert_close(sigma.unique(), schedule.grid(3, 5.0).flip(0))


def test_levels_are_drawn_per_sample(prior):
    module = distillation(prior, levels=Levels(2, spread=1.0))
    prediction = module.step.predict(images(6), streams(module, 6))
    assert len(prediction.sigma.unique()) == 6


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"spread": 1.5}, {"sigma_low": 0.0}, {"sigma_high": 0.01}])
def test_impossible_levels_are_refused(options):
    with pytest.raises(ValueError, match=r"must be at least 1|levels need"):
        Levels(**options)


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_every_kind_of_observation(generator):
    x0 = torch.rand(2, 3, 8, 8, generator=generator)
    samples = torch.rand(2, 5, 3, 8, 8, generator=generator)
    sheet = contact_sheet(x0, torch.rand(2, 3, 2, 2), samples)
    assert sheet.shape == (3, 2 * 9 + 1, 8 * 9 + 1)
    assert torch.equal(sheet[:, 1:9, 1:9], x0[0])
    torch.testing.assert_close(sheet[:, 10:18, 19:27], samples[1].mean(0))
    torch.testing.assert_close(sheet[:, 10:18, 28:36], (5 * samples[1].std(0)).clamp(0, 1))
    assert contact_sheet(x0, torch.rand(2, 7), samples[:, :1]).isfinite().all()
    assert contact_sheet(x0, x0[:, :1], samples[:, :1]).shape == (3, 19, 46)


# --- prior -----------------------------------------------------------------------------------------------------------


def test_training_a_prior_lowers_the_loss_and_raises_the_psnr(tmp_path):
    module = prior_module(lr=1e-2, levels=[0.1, 0.5])
    data = TinyData(16)
    data.samples_per_epoch = 16 * 60
    first = module.losses(images(64), streams(module, 64))[0].item()
    before = module.evaluate(data)[0]
    fit(module, tmp_path, data, max_epochs=1)
    after = module.evaluate(data)[0]
    assert module.losses(images(64), streams(module, 64))[0].item() < 0.5 * first
    assert after["score"] > before["score"] + 3
    assert after["psnr@0.5"] > 10 * math.log10(1 / 0.5**2) + 3  # 3 dB less noise than there was
    assert (after["method"], after["nfe"], after["step"]) == ("prior", 1, 60)
    assert after["score"] == pytest.approx((after["psnr@0.1"] + after["psnr@0.5"]) / 2)


def test_an_exported_prior_is_the_averaged_network(tmp_path):
    module = prior_module()
    fit(module, tmp_path)
    module.export(tmp_path / "export")
    loaded = Prior.from_pretrained(tmp_path / "export")
    x, sigma = images(2), torch.tensor([0.1, 1.0])
    raw = Prior(copy.deepcopy(module.unet), module.schedule)(x, sigma)
    with module.ema.applied():
        averaged = Prior(copy.deepcopy(module.unet), module.schedule)(x, sigma)
    exported = loaded(x, sigma)
    assert (exported - averaged).abs().max() < 5e-3  # fp16 on disk
    assert (exported - averaged).abs().max() < 0.1 * (exported - raw).abs().max()


def test_levels_of_prior_training(generator):
    module = prior_module(focus=0.75, focus_max=1.0)
    sigma = module.draw_sigma(torch.rand(100_000, 2, generator=generator))
    low, high = module.schedule.sigma_min, module.schedule.sigma_max
    assert low <= sigma.min() < 1.01 * low
    assert 0.99 * high < sigma.max() <= 1.001 * high
    uniform_time = (module.schedule.sigma(torch.linspace(0, 999, 10_001)) > 1.0).double().mean().item()
    assert (sigma > 1.0).double().mean().item() == pytest.approx(0.25 * uniform_time, abs=0.01)


def test_validation_of_a_prior_weighs_images_not_batches(tmp_path):
    module = prior_module(levels=[0.3])
    fit(module, tmp_path)  # five images in batches of four and one
    with module.ema.applied():
        scores = [module.denoising_psnr(x0, i)["psnr@0.3"] for i, x0 in enumerate(TinyData().val_dataloader())]
    assert module.scores["score"] == pytest.approx(torch.cat(scores).mean().item(), rel=1e-6)
    assert [len(s) for s in scores] == [4, 1]
