"""Turn what a user can mend into one line and a non-zero exit."""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

USER_ERRORS = (ValueError, FileNotFoundError, OSError, FloatingPointError, HydraException, OmegaConfBaseException)


def user_facing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print the message of an expected error and exit with 1; ``UD2M_TRACEBACK=1`` shows the whole traceback.

    Other exceptions are defects of the program and keep their traceback.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except USER_ERRORS as error:
            if os.environ.get("UD2M_TRACEBACK"):
                raise
            print(f"error: {message(error)}", file=sys.stderr)
            sys.exit(1)

    return wrapped


def message(error: BaseException) -> str:
    """Return what went wrong, in one paragraph; Hydra's instantiation errors carry the real one as their cause."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device while writing {error.filename or 'the output'}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
