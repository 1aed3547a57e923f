"""Two processes on the CPU (gloo) in place of several GPUs, and runs that are stopped from outside."""

import os
import signal

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from processes import ranks
from tiny import trained
from tiny_training import (
    TinyData,
    composed,
    distillation,
    fit,
    largest_difference,
    trainer,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from ud2m.cli import train
from ud2m.cli.errors import user_facing
from ud2m.physics import observe
from ud2m.training.checkpoints import PREEMPTED, Checkpoints, read_checkpoint

ACCUMULATE, BATCHES = 2, 5
"""Batches per step, and steps."""


def data_of(steps=BATCHES, accumulate=ACCUMULATE):
    data = TinyData(4)
    data.samples_per_epoch = 4 * accumulate * steps
    return data


def module_of(prior, accumulate=ACCUMULATE, steps=BATCHES):
    return distillation(prior, optimizer={"steps": steps, "accumulate": accumulate})


def shipped_strategy(folder, *overrides):
    """The strategy of conf/trainer/ddp.yaml."""
    with composed("trainer=ddp", *overrides, folder=folder) as config:
        return instantiate(config.trainer.strategy)


def recorded(prior, folder, devices=1, **options):
    """Train in float64, and write what this rank saw, sent and scored."""
    seen, sent = [], []

    def spy(physics, x0, sigma_y, streams):
        if torch.is_grad_enabled():  # validation observes its images in the same way
            seen.append((x0, physics.mask))
        return observe(physics, x0, sigma_y, streams)

    def count(state, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(state, bucket)

    class Hooks(Checkpoints):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            if devices > 1:
                trainer.strategy.model.register_comm_hook(None, count)
                assert not trainer.strategy.model.broadcast_buffers

    if devices > 1:
        options |= {"strategy": shipped_strategy(folder), "devices": devices}
    module = module_of(prior)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ud2m.physics.problem.observe", spy)
        patch.setattr("tiny_training.Checkpoints", Hooks)
        rank = fit(module, folder, data_of(), max_epochs=1, precision="64-true", **options).global_rank
    x0, masks = (torch.cat([pair[i] for pair in seen]) for i in (0, 1))
    result = {"x0": x0, "masks": masks, "sent": sent, "scores": module.scores, "state": module.state_dict()}
    torch.save(result, folder / f"rank{rank}.pt")


def ended(processes, seconds=60):
    """Return the exit codes of processes that must end by themselves."""
    try:
        for process in processes:
            process.join(seconds)
        assert all(process.exitcode is not None for process in processes), "a process hangs"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def both(prior, tmp_path_factory):
    """What one process recorded with batches of 4, and what each of two did with 2."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    recorded(prior, one)
    assert ended(ranks(2, recorded, prior, two, 2)) == [0, 0]
    load = lambda path: torch.load(path, weights_only=False)  # noqa: E731
    return load(one / "rank0.pt"), [load(two / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_end_with_the_parameters_of_one(both, prior):
    one, two = both
    start = module_of(prior).state_dict()
    for rank in two:
        assert largest_difference(one["state"], rank["state"]) < 1e-9  # float64: only another meaning would differ
    moved = {key for key, value in start.items() if not torch.equal(value.double(), one["state"][key])}
    assert moved == start.keys()


@pytest.mark.slow
def test_only_what_is_trained_is_sent_once_per_step(both, prior):
    _, two = both
    module = module_of(prior)
    numbers = sum(p.numel() for p in trained(module).values())
    frozen = sum(p.numel() for p in module.parameters()) - numbers
    assert frozen > numbers  # else the count would say little
    for rank in two:
        assert sum(rank["sent"]) == BATCHES * numbers * 8


@pytest.mark.slow
def test_nothing_is_said_of_unused_parameters(prior, tmp_path, capfd):
    assert ended(ranks(2, recorded, prior, tmp_path, 2)) == [0, 0]
    assert "find_unused_parameters" not in capfd.readouterr().err


def silent_start(prior, folder):
    """Train on two ranks with a parameter without a gradient, as the heads of RAM for other numbers of channels are."""
    module = module_of(prior)
    module.network.unused = nn.Parameter(torch.ones(3))
    strategy = shipped_strategy(folder, "network=ram")
    fit(module, folder, data_of(), max_epochs=1, devices=2, strategy=strategy)
    assert torch.equal(module.network.unused, torch.ones(3))


@pytest.mark.slow
def test_the_heads_of_ram_that_no_image_uses_hold_nobody_up(prior, tmp_path):
    assert ended(ranks(2, silent_start, prior, tmp_path)) == [0, 0]


def rows(x):
    return {tuple(row.flatten().tolist()) for row in x}


@pytest.mark.parametrize("kind", ["x0", "masks"])
def test_ranks_see_other_samples_and_operators_which_together_are_those_of_one_process(kind, both):
    one, two = both
    first, second = (rows(rank[kind]) for rank in two)
    assert len(first) == len(second) == BATCHES * ACCUMULATE * 2
    assert first.isdisjoint(second)
    assert first | second == rows(one[kind])


def test_validation_scores_are_those_of_one_process(both):
    one, two = both
    for rank in two:
        assert {k: v for k, v in rank["scores"].items() if "seconds" not in k} == pytest.approx(
            {k: v for k, v in one["scores"].items() if "seconds" not in k}, rel=1e-9
        )


class At(L.Callback):
    """Call a function on one rank before one batch."""

    def __init__(self, rank, batch, function):
        self.place, self.function = (rank, batch), function

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, batch_idx) == self.place:
            self.function()


def failing(prior, folder, function):
    """Train on two ranks, one of which comes to grief at its third batch, as the command line would."""

    def run():
        made = trainer(
            folder, callbacks=(At(1, 2, function),), max_epochs=1, devices=2, strategy=shipped_strategy(folder)
        )
        train.fit(made, module_of(prior), data_of(), None)

    user_facing(run)()


def fail():
    raise ValueError("cannot read x.png")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("function", "code"), [(fail, 1), (die, -signal.SIGKILL)], ids=["an error", "kill -9"])
def test_every_rank_ends_when_one_is_lost_and_says_so_in_one_line(function, code, prior, tmp_path, capfd):
    assert ended(ranks(2, failing, prior, tmp_path, function)) == [1, code]
    shown = capfd.readouterr().err
    assert "error: process 0 of 2 lost the connection to another one" in shown
    assert ("error: cannot read x.png" in shown) == (function is fail)
    assert "Traceback" not in shown


# --- preemption ------------------------------------------------------------------------------------------------------


def interrupted(prior, folder, resume, number):
    """Train on two ranks; unless resuming, rank 1 alone gets a signal within the third step."""
    callbacks = () if resume else (At(1, 2 * ACCUMULATE + 1, lambda: os.kill(os.getpid(), number)),)
    options = {"devices": 2, "strategy": shipped_strategy(folder), "callbacks": callbacks}
    fit(module_of(prior), folder, data_of(), resume, max_epochs=1, precision="64-true", **options)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_step_and_the_run_goes_on(number, both, prior, tmp_path):
    assert ended(ranks(2, interrupted, prior, tmp_path, False, number)) == [PREEMPTED, 0]
    kept = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert int(kept["state_dict"]["ema.num_updates"]) == 3
    assert ended(ranks(2, interrupted, prior, tmp_path, True, number)) == [0, 0]
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert largest_difference(both[1][0]["state"], last) == 0
