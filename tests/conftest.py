"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# One thread per test process (and in the programs that tests start): make test runs one process per core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# precision=auto is float32 on every CPU: tests compare samples up to the rounding of float32.
torch.cpu.get_capabilities = dict

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with material that does not ship with the project; tests that need it skip where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent: this test needs material that does not ship with the project")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> str:
    """Return the folder of a micro prior."""
    from tiny import save_tiny_prior

    return save_tiny_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory) -> str:
    """Return the folder, named ``tiny``, of the prior of ``sampler``."""
    from tiny import save_tiny_prior

    return save_tiny_prior(tmp_path_factory.mktemp("prior") / "tiny")


@pytest.fixture(scope="module")
def sampler(prior_folder):
    """Return a micro sampler in the state in which training leaves it."""
    from tiny_sampler import build

    return build(prior_folder)
