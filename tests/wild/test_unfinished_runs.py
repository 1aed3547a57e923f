"""A run that did not reach its steps never looks finished, whatever stopped it."""

import pytest
from tiny import save_tiny_prior
from tiny_training import EPOCHS, STEPS, Break, command_line, everything, tiny_overrides, write_images

ALL = STEPS * EPOCHS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    return tiny_overrides(save_tiny_prior(place / "prior"), write_images(place / "images"))


def only_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    return lines[0]


def looks_unfinished(folder):
    return not any((folder / name).exists() for name in ("export", "metrics.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    ["+trainer.max_steps=1", "trainer.max_epochs=1", "+trainer.max_time=00:00:00:00", "+trainer.limit_train_batches=1"],
)
def test_a_run_that_goes_on_and_is_stopped_early(limit, tiny, tmp_path, monkeypatch, capsys):
    run = f"run_dir={tmp_path}"
    monkeypatch.setattr("ud2m.cli.train.StepProgress", lambda: Break(1, 0, OSError("power cut")))
    assert command_line(*tiny, run) == 1
    assert "power cut" in only_line(capsys)
    monkeypatch.undo()
    assert command_line("resume=true", run, limit) == 1
    only_line(capsys)
    assert looks_unfinished(tmp_path)
    assert command_line("resume=true", run) == 0
    assert not looks_unfinished(tmp_path)
    steps = {key: value for key, value in everything(tmp_path / "checkpoints" / "last.ckpt").items() if "num_up" in key}
    assert {int(value) for value in steps.values()} == {ALL}


@pytest.mark.parametrize(
    "limit",
    ["+trainer.max_steps=1", "trainer.max_epochs=1", "+trainer.max_time=00:00:00:00", "+trainer.fast_dev_run=true"],
)
@pytest.mark.parametrize("kind", ["distillation", "prior"])
@pytest.mark.slow
def test_a_new_run_that_is_stopped_early(limit, kind, tiny, tmp_path, capsys):
    small = ["training=prior", "training.unet.block_out_channels=[8,8,8,8]", "training.unet.norm_num_groups=4"]
    small += ["training.unet.attention_head_dim=8"]
    words = [w for w in tiny if not w.startswith(("loss.", "network.", "training."))] if kind == "prior" else tiny
    assert command_line(*words, *(small if kind == "prior" else []), f"run_dir={tmp_path}", limit) == 1
    line = only_line(capsys)
    assert "is not finished" in line or "the optimizer plans" in line
    assert looks_unfinished(tmp_path)
