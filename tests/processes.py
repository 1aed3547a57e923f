"""Run a function of a test in other processes, forked from this one: the imports, which take seconds, are there."""

import contextlib
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import multiprocessing

FORK = multiprocessing.get_context("fork")


def start(function: Callable[..., Any], *arguments: Any) -> multiprocessing.Process:
    """Start a function in a new process, which ends with 1 when it raises."""
    process = FORK.Process(target=_run, args=(function, arguments))
    process.start()
    return process


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[multiprocessing.Process]:
    """Start ``function(*arguments)`` as each rank of a run that is launched from outside, as torchrun does."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "test",
        }
        with patch.dict(os.environ, environment):
            started.append(start(function, *arguments))
    return started
