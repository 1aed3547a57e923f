"""Warnings of runs that go wrong, and their absence in runs that do not."""

import torch
from tiny_training import TinyData, distillation, fit

from ud2m.training import health
from ud2m.training.health import Health


def warnings_of(module, folder, capsys, monkeypatch, window=3):
    """The warnings of eight steps, where judgements take ``window`` steps."""
    monkeypatch.setattr(health, "WINDOW", window)
    data = TinyData()
    data.samples_per_epoch = 4 * 8
    fit(module, folder, data, max_epochs=1, callbacks=(Health(),), log_every_n_steps=1)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_a_healthy_run_is_silent(prior, tmp_path, capsys, monkeypatch):
    module = distillation(prior, optimizer={"steps": 8, "discriminator_warmup": 7})  # it takes longer to learn
    assert warnings_of(module, tmp_path, capsys, monkeypatch) == []


def test_a_discriminator_that_has_won_is_reported_once(prior, tmp_path, capsys, monkeypatch):
    module = distillation(prior, optimizer={"steps": 8})
    reference = TinyData().train_set()

    def knows_it_all(x, condition):  # real images are those of the data
        real = torch.stack([reference[i] for i in range(32)])
        distance = (x.unsqueeze(1) - real).abs().flatten(2).amax(2).amin(1)
        logits = torch.where(distance < 1e-6, 5.0, -5.0) + 0 * x.mean((1, 2, 3))
        return logits + 0 * sum(p.sum() for p in module.discriminator.parameters())

    module.discriminator.forward = knows_it_all
    module.step.discriminator_loss.gradient_penalty = 0.0
    (line,) = warnings_of(module, tmp_path, capsys, monkeypatch)
    assert "the discriminator has won: over the last 3 steps 100.0 % of its decisions were right" in line


def test_a_discriminator_that_has_learned_nothing_is_reported_once(prior, tmp_path, capsys, monkeypatch):
    module = distillation(prior, optimizer={"steps": 8, "discriminator_warmup": 2})

    def undecided(x, condition):
        return 0.01 * x.mean((1, 2, 3)) + 0 * sum(p.sum() for p in module.discriminator.parameters())

    module.discriminator.forward = undecided
    module.step.discriminator_loss.gradient_penalty = 0.0
    lines = warnings_of(module, tmp_path, capsys, monkeypatch)
    assert ["the discriminator is undecided" in line for line in lines] == [True]
    assert "its loss was 1.386, and 1.386 is that of one that says the same" in lines[0]


def test_a_term_that_is_hardly_felt_is_reported_once(prior, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(health, "MEASURED", 2)
    module = distillation(prior, adversarial=1e-9, optimizer={"steps": 8})
    (line,) = warnings_of(module, tmp_path, capsys, monkeypatch, window=100)
    assert "the loss term adversarial is hardly felt: at most" in line
    assert "Raise loss.adversarial; gradient/adversarial is in the log" in line


def test_an_adapter_that_does_not_move_is_reported_once(prior, tmp_path, capsys, monkeypatch):
    module = distillation(prior, adversarial=0.0, optimizer={"steps": 8, "lr": 1e-9, "weight_decay": 0.0})
    (line,) = warnings_of(module, tmp_path, capsys, monkeypatch)
    assert "the adapter (LoRA) does not move: in 3 steps it changed by" in line


def test_a_run_without_adapter_has_none_to_move(prior, tmp_path, capsys, monkeypatch):
    module = distillation(prior, adversarial=0.0, lora={"rank": 0}, optimizer={"steps": 8})
    assert warnings_of(module, tmp_path, capsys, monkeypatch) == []


def test_images_per_second_counts_images_of_training_alone(monkeypatch):
    # a clock that stands still but where the test moves it: 4 images in 2 s, validation of 100 s, 4 images in 2 s
    now, logged = [1.0], {}
    monkeypatch.setattr(health.time, "perf_counter", lambda: now[0])
    loop = type("L", (), {"total_batch_idx": 0})
    trainer = type("T", (), {"world_size": 2, "log_every_n_steps": 2, "callback_metrics": {}})()
    trainer.fit_loop = type("F", (), {"epoch_loop": loop})
    settings = type("S", (), {"accumulate": 4})
    module = type("M", (), {"settings": settings, "log": lambda self, name, value: logged.update({name: value})})()
    speed = Health()
    for number in range(2):
        loop.total_batch_idx = number
        speed.on_train_batch_start(trainer, module, None, number)
        now[0] += 2.0
        speed.on_train_batch_end(trainer, module, None, torch.zeros(4, 1), number)
        speed.on_validation_start(trainer, module)
        now[0] += 100.0
    assert logged == {"images_per_second": 2 * 8 / 4.0}
