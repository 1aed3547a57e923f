"""What commands ask of their process: OpenMP's own account of how its threads wait, and page faults counted."""

import os
import platform
import subprocess
import sys

import pytest
from conftest import REPOSITORY

COUNT_FAULTS = """
import resource, sys, torch
from ud2m.cli.process import prepare_process
if sys.argv[1] == "prepared":
    prepare_process()
def layer():
    return torch.ones(64 * 2**20 // 4).sum()
for _ in range(6):
    layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    layer()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""
SAY_POLICY = "from ud2m.cli.process import prepare_process; prepare_process(); import torch"

linux = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc and libgomp do")


def run(program, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    kept |= {"PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@linux
@pytest.mark.slow
def test_the_memory_of_a_layer_is_kept_for_the_next_one():
    pages = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert int(run(COUNT_FAULTS, "prepared").stdout) < pages / 100
    assert int(run(COUNT_FAULTS, "as it was").stdout) > pages / 100  # or nothing had to be done


@linux
@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
@pytest.mark.slow
def test_openmp_says_how_its_threads_wait(given, policy):
    told = run(SAY_POLICY, OMP_DISPLAY_ENV="true", **given).stderr
    if "OMP_WAIT_POLICY" not in told:
        pytest.skip("this PyTorch has another OpenMP, which does not tell")
    assert f"OMP_WAIT_POLICY = '{policy}'" in told
