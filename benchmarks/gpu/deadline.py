"""Programs that end in time."""

import os
import signal
import subprocess
from collections.abc import Sequence

GRACE = 25
"""Seconds between the request to end and the end: a step and a checkpoint."""


def run_for(command: Sequence[str], seconds: float, grace: float = GRACE) -> int:
    """Run a program for at most so many seconds and return its exit status, negative for a signal.

    Then it gets SIGTERM, on which a training writes its checkpoint, and after ``grace`` seconds it is killed with all
    that it started. When this program is ended, so is the other one.
    """
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return _ended(process, grace)
    except BaseException:
        _ended(process, grace)
        raise


def _ended(process: subprocess.Popen, grace: float) -> int:
    process.terminate()
    try:
        return process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
