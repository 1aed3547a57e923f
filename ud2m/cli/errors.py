"""Turn errors that a user can correct into one line and a non-zero exit."""

import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from tqdm import tqdm

USER_ERRORS = (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException)
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""
FOREIGN = {
    r"^DataLoader worker \(pid(.|\n)*": "a process that loads images was ended, most likely for want of memory: "
    "give the job more memory (in a container also /dev/shm), or take fewer of these processes, data.num_workers=...",
    r"No working C\+\+ compiler found|Cannot find a working triton installation": "torch.compile needs it: install "
    "it, or leave the compilation out (compile=null, in training training.compile=null)",
}
"""What libraries raise as errors of no type of their own, and what a user can do about it."""

MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""What PyTorch says on GPUs and CPUs; on a CPU it is a plain ``RuntimeError``."""
LESS_MEMORY = (
    "take fewer images at once (training: data.batch_size with accumulate; sampling: chunk_size, tile), or see "
    "training.checkpointing and trainer.precision (docs/clusters.md#memory)"
)

_IN_WORKER = re.compile(r"Caught (?P<type>\w+) in .*\.\nOriginal Traceback \(most recent call last\):\n")


def user_facing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print the message of an error that a user can correct and exit with 1; ``UD2M_TRACEBACK=1`` shows the traceback.

    Other exceptions are defects of the program and keep their traceback.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not correctable(error):
                raise
            if os.environ.get("UD2M_TRACEBACK"):
                traceback.print_exc()
            close_bars()
            print(f"error: {message(error)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            close_bars()
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)

    return wrapped


def correctable(error: BaseException) -> bool:
    """Return whether a user can do something about an error; others are defects of the program."""
    return isinstance(error, USER_ERRORS) or is_out_of_memory(error) or _of_library(error) is not None


def _of_library(error: BaseException) -> str | None:
    """Return what a library says, on one line, and what to do about it; None for other errors."""
    for pattern, advice in FOREIGN.items():
        said = re.search(pattern, str(error))
        if said is not None:
            return f"{' '.join(said[0].split())}: {advice}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was asked for that a device does not have."""
    return isinstance(error, RuntimeError | MemoryError) and MEMORY.search(str(error)) is not None


def close_bars() -> None:
    """End the lines of open progress bars, so that a message starts on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def message(error: BaseException) -> str:
    """Return what went wrong, without tracebacks; Hydra's instantiation errors carry the real one as their cause."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    key = _missing_key(error)
    if key is not None:
        return f"{key} has no value; give one: {key}=..."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    foreign = _of_library(error)
    if foreign is not None:
        return foreign
    if is_out_of_memory(error):
        return f"{_asked_for(str(error))}; {LESS_MEMORY}"
    if isinstance(error, OmegaConfBaseException):
        return str(error).partition("\n")[0]  # what follows are OmegaConf's names of its own types
    text = _worker_message(str(error)) or type(error).__name__
    return text if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {text}"


def _asked_for(text: str) -> str:
    """Return PyTorch's sentences on what was asked for and is free, without its advice."""
    asked = re.split(MEMORY, text, maxsplit=1)[1]
    return f"out of memory: {re.split(r'[.] (?:Process|Including|Of the|Error)', asked)[0].strip('.: ')}"


def _missing_key(error: BaseException) -> str | None:
    """Return the configuration key without a value that an error is about."""
    return error.full_key if isinstance(error, MissingMandatoryValue) else None


def _worker_message(text: str) -> str:
    """Return the message of the error itself where a data loader's worker sent it inside its traceback."""
    caught = _IN_WORKER.match(text)
    if caught is None:
        return text
    name = re.escape(caught["type"])
    # The traceback ends in "Type: message"; a chained one holds several of them, and the last one counts.
    return re.split(rf"^(?:\w+\.)*{name}: ", text, flags=re.MULTILINE)[-1].strip()
