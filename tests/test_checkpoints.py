import random
import signal

import pytest
import torch
from processes import start
from tiny import save_tiny_prior
from tiny_training import (
    EPOCHS,
    STEPS,
    At,
    Break,
    TinyData,
    assert_equal,
    checkpoint,
    distillation,
    everything,
    fit,
    prior_module,
)

from ud2m.training.checkpoints import PREEMPTED, read_checkpoint


@pytest.fixture(scope="module")
def unbroken(prior, tmp_path_factory):
    """The folder and the trainer of a whole run."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, fit(distillation(prior), folder)


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
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_float64_is_resumed_without_rounding(prior, tmp_path):
    with pytest.raises(RuntimeError):
        fit(distillation(prior), tmp_path / "broken", callbacks=(Break(1, 0),), precision="64-true")
    fit(distillation(prior), tmp_path / "broken", resume=True, precision="64-true")
    fit(distillation(prior), tmp_path / "unbroken", precision="64-true")
    assert_equal(everything(checkpoint(tmp_path / "unbroken")), everything(checkpoint(tmp_path / "broken")))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match=r"cannot write .*/best.ckpt: no space is left on the device; free some"):
        fit(distillation(prior, optimizer={"steps": 6}), tmp_path, resume=True, max_epochs=3)
    assert checkpoint(tmp_path).read_bytes() == before
