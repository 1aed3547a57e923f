"""Thousands of damaged files, opened by every reader in a process of its own: read, or one line that names the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from fuzzing import damaged, ending, right_outside

SCRIPT = Path(__file__).with_name("fuzzing.py")


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1_000_000, 2_000_000])
def test_damaged_files_are_read_or_told(first):
    """Another range: ``python tests/wild/fuzzing.py FIRST COUNT``."""
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", SCRIPT.parent)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(first), "630"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended by {done.returncode} in {lines[-1]}: {done.stderr[-500:]}"
    assert [line for line in lines if " ended in " in line] == []
    ends = json.loads(lines[-1])
    assert set(ends) == {"told", "read"}
    assert min(ends.values()) > 500  # damage is neither harmless nor all that is seen


def test_the_fuzzer_sees_what_it_looks_for(tmp_path):
    path = tmp_path / "a.png"

    def failing(error):
        def read(path):
            raise error

        return ending(read, path)

    assert failing(ValueError(f"{path} is damaged")) == "told"
    for error in (ValueError("damaged"), ValueError(f"{path}\n is damaged"), IndexError(str(path)), OSError(22, "no")):
        assert failing(error) not in ("told", "read")
    assert ending(lambda path: None, path) == "read"


def test_cases_are_functions_of_their_number():
    rngs = [np.random.default_rng(3) for _ in range(2)]
    assert damaged(b"abcdefgh" * 9, rngs[0]) == damaged(b"abcdefgh" * 9, rngs[1])
    assert right_outside(rngs[0]) == right_outside(rngs[1])
