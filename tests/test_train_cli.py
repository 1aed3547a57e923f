import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from measuring import evaluate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import save_tiny_prior
from tiny_training import (
    EPOCHS,
    STEPS,
    At,
    Break,
    assert_equal,
    command_line,
    everything,
    largest_difference,
    tiny_overrides,
    write_images,
)

from ud2m.cli.errors import message
from ud2m.data import FolderData
from ud2m.images import read_image
from ud2m.physics import GaussianBlur
from ud2m.physics.problem import Problem
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.training.checkpoints import PREEMPTED, read_checkpoint
from ud2m.training.progress import StepProgress
from ud2m.training.validation import Validation


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a prior and images."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_prior(folder / "prior")
    write_images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def tiny(place):
    return tiny_overrides(str(place / "prior"), place / "images")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a whole run with discriminator."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert command_line(*tiny, "loss.adversarial=0.01", f"run_dir={folder}") == 0
    return folder


def rows(folder):
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def only_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not line.startswith("training:")]
    assert len(lines) == 1, lines
    return lines[0]


# --- a run folder ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_was_promised(finished):
    promised = {"checkpoints", "config.yaml", "export", "images", "logs", "metrics.json"}
    assert promised <= {p.name for p in finished.iterdir()}
    assert not list(finished.rglob("*incomplete*"))
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    (row,) = json.loads((finished / "metrics.json").read_text())
    assert row["method"] == "UD2M (K=1, N=1)"
    assert row["nfe"] == 1
    assert row["score"] == -row["energy"]
    assert {"psnr_mean", "ssim", "residual", "r", "seconds_per_image", "step"} <= row.keys()
    config = OmegaConf.load(finished / "config.yaml")
    assert config.steps == STEPS * EPOCHS
    assert "${" not in (finished / "config.yaml").read_text()  # resolved: it says what was run


def test_the_scores_are_those_of_the_export(finished, place):
    (row,) = json.loads((finished / "metrics.json").read_text())
    data = FolderData(place / "images", channels=3, crop_size=16, batch_size=4, samples_per_epoch=4, val_limit=2)
    sampler = PosteriorSampler.from_pretrained(finished / "export")
    scores = evaluate(sampler, data.val_dataloader(), Problem(GaussianBlur(1.6), 0.01, seed=0), num_samples=2)
    for name in ("psnr", "psnr_mean", "ssim", "r"):
        assert scores[name] == pytest.approx(row[name], rel=1e-3), name


@pytest.mark.slow
def test_any_checkpoint_is_exported_by_command(finished, capsys):
    for name in ("best", "last"):
        assert command_line(f"run_dir={finished}", f"export={name}.ckpt") == 0
        assert str(finished / f"export-{name}") in capsys.readouterr().out
        state = read_checkpoint(finished / "checkpoints" / f"{name}.ckpt")["state_dict"]
        averages = {v.item() for k, v in state.items() if k.startswith("ema.average_") and v.ndim == 0}
        psi = load_file(finished / f"export-{name}" / "psi.safetensors")
        assert {v.item() for v in psi.values()} <= averages
        PosteriorSampler.from_pretrained(finished / f"export-{name}")
    one, other = (load_file(finished / f / "adapter_model.safetensors") for f in ("export", "export-best"))
    assert_equal(one, other)
    assert command_line(f"run_dir={finished}", "export=first.ckpt") == 1
    assert "export=... names one of best.ckpt, last.ckpt in run_dir" in only_line(capsys)


def test_curves_pictures_and_rates_reach_the_logs(finished):
    curves = rows(finished)
    columns = set(curves[0])
    wanted = {"val/psnr", "val/psnr_mean", "val/r", "val/score", "psi/tau_1", "psi/delta_1", "psi/lam_1"}
    wanted |= {
        f"loss/{t}" for t in ("total", "perceptual", "energy", "adversarial", "discriminator", "gradient_penalty")
    }
    wanted |= {"accuracy/real", "accuracy/generated", "images_per_second"}
    wanted |= {f"{kind}/{player}" for kind in ("lr", "grad_norm") for player in ("generator", "discriminator")}
    assert wanted <= columns
    assert [int(r["step"]) for r in curves if r["loss/total"]] == list(range(STEPS * EPOCHS))
    assert [int(r["step"]) for r in curves if r["val/score"]] == [STEPS * (k + 1) for k in range(EPOCHS)]
    events = EventAccumulator(str(finished / "logs")).Reload()
    assert wanted <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Images("validation")] == [STEPS, 2 * STEPS]
    assert [e.step for e in events.Scalars("val/psnr")] == [STEPS, 2 * STEPS]
    pictures = sorted((finished / "images").iterdir())
    assert [p.name for p in pictures] == ["validation-000002.png", "validation-000004.png"]
    # two images in rows, and columns x0, y, mean, std and two samples, of 16 pixels with a seam of one
    assert read_image(pictures[0]).shape == (3, 2 * 17 + 1, 6 * 17 + 1)


def test_the_export_is_that_of_the_best_checkpoint(tiny, tmp_path, monkeypatch):
    scores = iter([30.0, 20.0])
    monkeypatch.setattr(Validation, "result", lambda self: ({}, next(scores)))
    assert command_line(*tiny, f"run_dir={tmp_path}") == 0
    best, last = (read_checkpoint(tmp_path / "checkpoints" / f"{n}.ckpt")["state_dict"] for n in ("best", "last"))
    psi = load_file(tmp_path / "export" / "psi.safetensors")
    exported = torch.stack(list(psi.values()))
    averages = [
        torch.stack(
            [
                state[f"ema.average_{i}"]
                for i in range(len(state))
                if f"ema.average_{i}" in state and state[f"ema.average_{i}"].ndim == 0
            ]
        )
        for state in (best, last)
    ]
    assert torch.equal(exported.sort().values, averages[0].sort().values)
    assert not torch.equal(exported.sort().values, averages[1].sort().values)
    (row,) = json.loads((tmp_path / "metrics.json").read_text())
    assert (row["score"], row["step"]) == (30.0, STEPS)


def test_val_lpips_is_logged_with_its_backend_where_weights_are(tiny, tmp_path, shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "torch_home"))
    size = ["data.crop_size=32", "training.validation.lpips=alex", "training.validation.metric=lpips"]
    assert command_line(*tiny, *size, f"steps={STEPS}", f"run_dir={tmp_path}") == 0
    (row,) = json.loads((tmp_path / "metrics.json").read_text())
    assert row["lpips"] > 0
    assert row["score"] == -row["lpips"]
    assert row["lpips_backend"].startswith("alex, lpips")
    assert any(r["val/lpips"] for r in rows(tmp_path))


@pytest.mark.slow
def test_the_bar_shows_losses_and_validation_over_the_whole_run(tiny, tmp_path, capfd):
    assert command_line(*tiny, f"run_dir={tmp_path}") == 0
    shown = capfd.readouterr().err
    total = STEPS * EPOCHS
    assert f"validating 1/1:  50%|█████     | {total // 2}/{total} [" in shown
    assert "loss=" in shown
    assert "val score=" in shown
    assert "<" in shown.split("validating")[1]  # elapsed<remaining


def test_the_bar_counts_validation_batches_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(StepProgress, "__init__", lambda self: setattr(self, "terminal", True))
    progress = StepProgress()
    trainer = type(
        "T",
        (),
        {
            "is_global_zero": True,
            "num_training_batches": 10,
            "max_epochs": 2,
            "num_val_batches": [3],
            "progress_bar_metrics": {"loss": 0.25},
        },
    )()
    trainer.fit_loop = type("F", (), {"epoch_loop": type("E", (), {"total_batch_idx": 9})})
    progress.on_train_start(trainer, None)
    assert (progress.bar.total, progress.bar.initial) == (20, 10)  # resumed in the middle
    progress.on_train_batch_end(trainer, None, None, None, 0)
    for k in range(3):
        progress.on_validation_batch_start(trainer, None, None, k)
    progress.on_validation_end(trainer, None)
    progress.on_exception(trainer, None, KeyboardInterrupt())
    shown = capsys.readouterr().err
    assert all(f"validating {k}/3:  55%" in shown for k in (1, 2, 3))
    assert progress.bar is None


@pytest.mark.slow
def test_wandb_works_offline(tiny, tmp_path, monkeypatch):
    import wandb

    logged = []
    kind = wandb.sdk.wandb_run.Run
    log = kind.log_artifact
    monkeypatch.setattr(kind, "log_artifact", lambda run, artefact: logged.append(artefact) or log(run, artefact))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command_line(*tiny, "logger=wandb", f"run_dir={tmp_path}") == 0
    assert wandb.run is None  # ended, for the next run of a sweep
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    media = list(folder.rglob("*.png"))
    assert len(media) == EPOCHS
    # The exported model is an artefact: every file of the export waits to be uploaded.
    (artefact,) = logged
    names = {path.relative_to(tmp_path / "export").as_posix() for path in (tmp_path / "export").rglob("*")}
    assert artefact.type == "model"
    assert set(artefact.manifest.entries) == {name for name in names if (tmp_path / "export" / name).is_file()}
    # A resumed run goes on with the same run of wandb.
    assert command_line("resume=true", f"run_dir={tmp_path}") == 0
    identities = {path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert identities == {OmegaConf.load(tmp_path / "config.yaml").logger.wandb.id}
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_broken_run_is_resumed_from_its_folder_alone(tiny, finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr("ud2m.cli.train.StepProgress", lambda: Break(1, 1, OSError("power cut")))
    assert command_line(*tiny, "loss.adversarial=0.01", f"run_dir={run}") == 1
    assert only_line(capsys) == "error: power cut"
    assert not (run / "metrics.json").exists()
    assert not (run / "export").exists()
    before = rows(run)
    monkeypatch.undo()
    assert command_line("resume=true", f"run_dir={run}") == 0
    for name in ("last.ckpt", "best.ckpt"):
        assert_equal(everything(run / "checkpoints" / name), everything(finished / "checkpoints" / name))
    with open(run / "logs" / "metrics-1.csv", newline="") as file:
        assert list(csv.DictReader(file)) == before
    assert [int(r["step"]) for r in rows(run) if r["loss/total"]] == [STEPS, STEPS + 1]
    ours, theirs = (json.loads((f / "metrics.json").read_text())[0] for f in (run, finished))
    assert ours | {"seconds_per_image": 0} == theirs | {"seconds_per_image": 0}


def test_an_interrupted_run_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ud2m.cli.train.StepProgress", lambda: Break(1, 0, KeyboardInterrupt()))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    assert command_line(*tiny, f"run_dir={tmp_path}") == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Lightning leaves it ignored
    assert only_line(capsys) == (
        f"interrupted; go on from the last checkpoint with: python train.py resume=true run_dir={tmp_path}"
    )


def test_an_interruption_before_training_is_one_line_too(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ud2m.cli.train.build_trainer", interrupt)
    assert command_line(*tiny, f"run_dir={tmp_path}") == 130
    assert only_line(capsys) == "interrupted"


@pytest.mark.slow
def test_resume_auto_starts_goes_on_and_refuses_another_run(tiny, finished, tmp_path, monkeypatch, capsys):
    run = [*tiny, "loss.adversarial=0.01", f"run_dir={tmp_path}", "resume=auto"]
    monkeypatch.setattr("ud2m.cli.train.StepProgress", lambda: At(3, lambda: signal.raise_signal(signal.SIGTERM)))
    assert command_line(*run, "checkpoint_every=1") == PREEMPTED
    assert only_line(capsys).startswith("interrupted; go on from the last checkpoint with: python train.py resume=true")
    monkeypatch.undo()
    assert command_line(*run, "loss.l2=0.5") == 1
    assert "holds a run with another configuration (other loss.l2, loss." in only_line(capsys)
    assert command_line(*run, "trainer.log_every_n_steps=2") == 0
    for name in ("last.ckpt", "best.ckpt"):
        assert_equal(everything(tmp_path / "checkpoints" / name), everything(finished / "checkpoints" / name))
    assert command_line(*tiny, f"run_dir={tmp_path / 'other'}", "resume=perhaps") == 1
    assert "resume must be true or false or auto, got 'perhaps'" in only_line(capsys)


def test_a_finished_run_can_be_exported_again(finished, capsys):
    before = load_file(finished / "export" / "psi.safetensors")
    assert command_line("resume=true", f"run_dir={finished}") == 0
    assert largest_difference(before, load_file(finished / "export" / "psi.safetensors")) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "holds a run already; add resume=true to go on with it, or choose another run_dir"),
        (["resume=true", "steps=8"], "a resumed run keeps its configuration, .*config.yaml; leave out steps"),
        (["resume=true", "physics=inpainting"], "leave out physics"),
        (["resume=true", "experiment=photos_prior"], "leave out experiment"),
    ],
)
def test_what_would_be_another_run_is_refused(arguments, expected, finished, capsys):
    assert command_line(*arguments, f"run_dir={finished}") == 1
    assert __import__("re").search(expected, only_line(capsys))


def test_a_resumed_run_may_move_to_another_machine(finished, tmp_path, capsys):
    assert command_line("resume=true", f"run_dir={finished}", "data.num_workers=0", "trainer.log_every_n_steps=5") == 0


def test_nothing_to_resume(tmp_path, capsys):
    assert command_line("resume=true", f"run_dir={tmp_path}") == 1
    assert "nothing to resume in" in only_line(capsys)


@pytest.mark.parametrize("resume", ["true", "auto"])
@pytest.mark.parametrize(("wrote", "named"), [(None, "before 0.2"), ("0.0.7", "0.0.7"), ("1.0.0", "1.0.0")])
def test_a_run_of_another_version_is_refused(wrote, named, resume, tiny, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = OmegaConf.load(run / "config.yaml")
    assert config.pop("version") == version("ud2m")
    OmegaConf.save(config if wrote is None else OmegaConf.merge(config, {"version": wrote}), run / "config.yaml")
    arguments = [] if resume == "true" else [*tiny, "loss.adversarial=0.01"]
    assert command_line(*arguments, f"resume={resume}", f"run_dir={run}") == 1
    line = only_line(capsys)
    assert f"config.yaml was written by ud2m {named}, and this is ud2m {version('ud2m')}" in line


@pytest.mark.slow
def test_a_run_of_the_same_series_goes_on(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = OmegaConf.load(run / "config.yaml")
    config.version = ".".join([*version("ud2m").split(".")[:2], "99"])
    OmegaConf.save(config, run / "config.yaml")
    assert command_line("resume=true", f"run_dir={run}") == 0


def test_a_damaged_checkpoint_gives_one_line_and_is_left_alone(finished, tmp_path, capsys):
    run = tmp_path / "run"
    __import__("shutil").copytree(finished, run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:3000])
    assert command_line("resume=true", f"run_dir={run}") == 1
    assert "last.ckpt is truncated, damaged or no checkpoint" in only_line(capsys)
    assert last.stat().st_size == 3000
    shutil.copy(run / "checkpoints" / "best.ckpt", last)  # what the message says
    assert command_line("resume=true", f"run_dir={run}") == 0


@pytest.mark.slow
def test_a_run_interrupted_at_the_command_line_goes_on(tiny, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    steps = ["steps=200", "validate_every=10"]  # too many to be done before a busy machine delivers the signal
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "train.py", *tiny, *steps, f"run_dir={run}"]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=file, stdout=file, env=environment)
        while not (run / "checkpoints" / "last.ckpt").is_file():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    shown = log.read_text()
    assert "Traceback" not in shown
    assert f"interrupted; go on from the last checkpoint with: python train.py resume=true run_dir={run}" in shown
    assert not (run / "metrics.json").exists()
    done = read_checkpoint(run / "checkpoints" / "last.ckpt")["scores"]["step"]
    assert 0 < done < 200
    assert command_line("resume=true", f"run_dir={run}") == 0
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["scores"]["step"] == 200
    assert (run / "metrics.json").is_file()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("physics.sigma_y=0", "sigma_y must be a positive noise level in image units, got 0"),
        ("network.num_blocks=0", "num_blocks (K) must be at least 1, got 0"),
        ("training.sampling.num_steps=0", "num_steps (N) must be at least 1, got 0"),
        ("accumulate=0", "accumulate must be a whole number of at least 1, got 0"),
        ("steps=5", "steps must be a multiple of validate_every (each run ends in a validation), got 5 and 2"),
        ("steps=many", "steps must be a whole number of at least 1, got 'many'"),
        ("validate_every=0", "validate_every must be a whole number of at least 1, got 0"),
        ("loss.l2=-1", "the loss weight 'l2' must be a finite number >= 0"),
        ("prior=nowhere/at/all", "no prior at 'nowhere/at/all'"),
        ("data.root=/nowhere", "no such folder of images: /nowhere"),
        ("data.channels=1", "the images have 1 channels, the prior 3"),
        ("network.rule.name=steep", "unknown rule"),
        ("training.optimizer.lr=-1", "learning rates must be positive"),
        ("data.batch_size=0", "batch"),
        ("trainer.precision=8-bit", "trainer.precision must be "),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_one(override, expected, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert command_line(*tiny, override, f"run_dir={run}") == 1
    line = only_line(capsys)
    assert line.startswith("error: ")
    assert expected in line
    assert not (run / "metrics.json").exists()
    assert not (run / "export").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny, tmp_path, capsys):
    assert command_line(*tiny, "trainer.accelerator=gpu", f"run_dir={tmp_path}") == 1
    line = only_line(capsys)
    assert line.startswith("error: no trainer with accelerator=gpu, devices=1: ")
    assert line.endswith("see trainer.accelerator, trainer.devices and trainer.strategy")


def test_a_batch_that_does_not_divide_is_refused_before_processes_are_started(tiny, tmp_path, capsys):
    assert command_line(*tiny, "trainer=ddp", "trainer.devices=3", f"run_dir={tmp_path}") == 1
    assert "error: data.batch_size counts the images of all 3 processes together and must be a multiple" in only_line(
        capsys
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["experiment=phtos"], "unknown experiment 'phtos'"),
        (["loss.l3=1"], "unknown key 'loss.l3' (did you mean loss.l2?)"),
        (["physics=unblur"], "unknown physics 'unblur'"),
    ],
)
def test_hydra_names_unknown_experiments_and_keys(arguments, expected, tmp_path, capsys):
    assert command_line(*arguments, f"run_dir={tmp_path / 'run'}") == 1
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command_line(f"run_dir={tmp_path / 'file' / 'run'}") == 1
    assert f"cannot write to the folder {tmp_path / 'file' / 'run'}: Not a directory; choose another" in only_line(
        capsys
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert command_line(f"run_dir={tmp_path / 'run'}") == 1
    assert "Permission denied" in only_line(capsys)


def test_an_error_in_a_loader_process_is_one_line(tiny, place, tmp_path, capsys):
    # The header is that of an image, what follows is cut off: it shows when a worker reads it.
    images = tmp_path / "images"
    for name in ("train", "val", "test"):
        write_images(images / name, 1)
    content = (images / "train" / "0.png").read_bytes()
    (images / "train" / "0.png").write_bytes(content[: len(content) // 2])
    changed = [o for o in tiny if not o.startswith(("data.root", "data.num_workers"))]
    assert command_line(*changed, f"data.root={images}", "data.num_workers=1", f"run_dir={tmp_path / 'run'}") == 1
    line = only_line(capsys)
    assert line.startswith(f"error: {images}/train/0.png is a truncated or damaged PNG file")


def test_message_of_an_error_in_a_loader_process():
    text = (
        "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n    raise ValueError("inner: no")\nValueError: inner\n\n'
        "The above exception was the direct cause of the following exception:\n\nTraceback (most recent call last):\n"
        '  File "b.py", line 2, in g\n{1}: cannot read x.png: it is cut off\nand more\n'
    )
    assert message(ValueError(text.format("ValueError", "ValueError"))) == "cannot read x.png: it is cut off\nand more"
    named = text.format("OddError", "package.module.OddError")
    assert message(ValueError(named)) == "cannot read x.png: it is cut off\nand more"
    assert message(ValueError("Caught a cold")) == "Caught a cold"


def test_messages_of_other_errors():
    from hydra.errors import InstantiationException

    wrapped = InstantiationException("Error in call to target 'a.B'")
    wrapped.__cause__ = ValueError("width must be positive")
    assert message(wrapped) == "width must be positive"
    wrapped.__cause__ = TypeError("B() got an unexpected keyword argument 'c'")
    assert message(wrapped) == "TypeError: B() got an unexpected keyword argument 'c'"
    assert message(OSError(28, "No space left on device", "/x")) == "No space left on device: /x"
    assert message(FileNotFoundError("no prior at 'x'")) == "no prior at 'x'"
    assert message(ValueError()) == "ValueError"


def test_the_traceback_can_be_asked_for(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UD2M_TRACEBACK", "1")
    command_line(*tiny, "network.num_blocks=0", f"run_dir={tmp_path}")
    assert "Traceback" in capsys.readouterr().err


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one(tiny, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    common = [*tiny, "steps=3", "validate_every=3", "accumulate=2", "loss.adversarial=0.01", "trainer.devices"]
    single = ["trainer.devices=1", f"run_dir={tmp_path / 'one'}"]
    double = ["trainer=ddp", "trainer.devices=2", f"run_dir={tmp_path / 'two'}"]
    for options in (single, double):
        command = [sys.executable, "train.py", *common[:-1], *options]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert Counter(done.stdout.splitlines())[f"run folder: {options[-1].split('=')[1]}"] == 1
    one, two = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    assert largest_difference(one["state_dict"], two["state_dict"]) < 1e-5
    assert one["scores"]["psnr"] == pytest.approx(two["scores"]["psnr"], rel=1e-5)
    assert Path(tmp_path / "two" / "metrics.json").is_file()
