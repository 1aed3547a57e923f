import contextlib
import fcntl
import os
import struct
import sys
import termios

import pytest
import torch
from tiny_sampler import build, observation

from ud2m.bars import Lines, progress_bar
from ud2m.physics import GaussianBlur
from ud2m.samplers.latino import Latino


@pytest.fixture
def sampler(prior_folder):
    return build(prior_folder)


@pytest.mark.parametrize("options", [{}, {"tile": 16}, {"num_steps": 3, "chunk_size": 2}])
@pytest.mark.slow
def test_what_is_told_is_what_the_network_evaluates(options, sampler):
    y, physics = observation(GaussianBlur(1.0), shape=(3, 24, 40))
    seen, told = [], []
    hook = sampler.prior.register_forward_hook(lambda module, arguments, result: seen.append(len(arguments[0])))
    plain = sampler(y, physics, 0.05, 3, torch.Generator().manual_seed(1), **options)
    hook.remove()
    shown = sampler(y, physics, 0.05, 3, torch.Generator().manual_seed(1), progress=told.append, **options)
    assert told == seen
    assert torch.equal(plain, shown)


@pytest.mark.slow
def test_the_bar_knows_how_many_there_are(sampler, capsys):
    y, physics = observation(GaussianBlur(1.0), shape=(3, 24, 40))
    sampler(y, physics, 0.05, 3, progress=True, tile=16)
    tiles, blocks, steps, rows = 2 * 3, 3, 2, 2 * 3
    assert f"{tiles * blocks * steps * rows}/{tiles * blocks * steps * rows} " in capsys.readouterr().err
    sampler(y, physics, 0.05, 3)
    assert capsys.readouterr().err == ""


def test_other_samplers_count_too(prior_folder, capsys):
    y, physics = observation(GaussianBlur(1.0))
    sampler = Latino(build(prior_folder).prior)
    told = []
    sampler(y, physics, 0.05, 2, progress=told.append)
    sampler(y, physics, 0.05, 2, progress=True)
    assert f"sampling: {sum(told)}evaluation" in capsys.readouterr().err


@pytest.fixture
def terminal(monkeypatch):
    """Make the standard error stream a terminal of a size; return what is written to it."""

    def make(rows, columns):
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        monkeypatch.setattr(sys, "stderr", os.fdopen(slave, "w"))

        def written():
            sys.stderr.close()
            parts = []
            with contextlib.suppress(OSError):  # EIO: all is read
                while part := os.read(master, 10_000):
                    parts.append(part)
            return b"".join(parts).decode()

        return written

    return make


def test_a_terminal_that_does_not_know_its_size_gets_lines(terminal):
    written = terminal(0, 0)
    with progress_bar(total=4, desc="working") as bar:
        bar.mininterval = 0
        for _ in range(4):
            bar.update()
    assert isinstance(bar, Lines)
    lines = [line for line in written().splitlines() if line.strip()]
    assert len(lines) >= 4
    assert all(line.startswith("working: ") for line in lines)


def test_a_terminal_that_knows_its_size_gets_a_bar(terminal):
    written = terminal(24, 80)
    with progress_bar(total=4, desc="working") as bar:
        bar.update()
    assert not isinstance(bar, Lines)
    assert "\r" in written()
