"""Run a function of a test in other processes.

They are forked from this one, since the imports, which take seconds, are there; but CUDA cannot be used in a fork of a
process that has used it.
"""

import contextlib
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import multiprocessing


def start(function: Callable[..., Any], *arguments: Any) -> multiprocessing.Process:
    """Start a function in a new process, which ends with 1 when it raises."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    process = context.Process(target=_run, args=(function, arguments))
    process.start()
    return process


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    _reopen_logs()
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _reopen_logs() -> None:
    """Let loggers write to this process' standard error.

    A library that is imported within a test gives its logger the file into which pytest catches the output of that
    test. It is closed when the test ends, and logging would print a traceback.
    """
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in [logging.root, *loggers]:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
                handler.stream = sys.stderr  # setStream would flush the closed one


def ranks(
    count: int, function: Callable[..., Any], *arguments: Any, machines: int = 1
) -> list[multiprocessing.Process]:
    """Start ``function(*arguments)`` as each rank of a run that is launched from outside, as torchrun does.

    They are dealt to so many machines, as far as they can tell.
    """
    each = count // machines
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(each),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % each),
            "GROUP_RANK": str(rank // each),
            "TORCHELASTIC_RUN_ID": "test",
        }
        with patch.dict(os.environ, environment):
            started.append(start(function, *arguments))
    return started
