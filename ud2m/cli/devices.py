"""Several devices for sampling and evaluation, one process each, by Lightning Fabric."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from omegaconf import DictConfig

from ud2m.cli.train import is_lost_rank
from ud2m.evaluation.team import ALONE, Team
from ud2m.precision import find_device
from ud2m.samplers.base import check_count

LONGEST_WAIT = timedelta(days=7)
"""How long a process may wait for one with more work; one that is gone is noticed at once."""
STARTED_OUTSIDE = "TORCHELASTIC_RUN_ID"
"""Set by torchrun in each process that it starts."""


class FabricTeam(Team):
    """The processes of a Fabric that has been launched."""

    def __init__(self, fabric: Fabric):
        self.rank, self.size = fabric.global_rank, fabric.world_size

    def gathered(self, own: Any) -> list[Any]:
        """Return what each process has handed in, by rank."""
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, own)
        return parts


class Devices:
    """The devices of a command's ``device``, ``devices`` and ``num_nodes``.

    Args:
        config: of conf/sample.yaml or conf/evaluate.yaml.

    Raises:
        ValueError: for devices that are not there, or one by name where several are asked for.
    """

    def __init__(self, config: DictConfig):
        device, count, nodes = config.device, config.devices, config.num_nodes
        if count != "auto":
            check_count("devices", count)
        check_count("num_nodes", nodes)
        self.fabric: Fabric | None = None
        self.device = find_device(device)
        if (count, nodes) == (1, 1) and STARTED_OUTSIDE not in os.environ:
            return
        if self.device.index is not None:
            raise ValueError(f"device={device} names one device; with devices={count} give auto, cpu, cuda or mps")
        # Objects alone are sent, none of them often: gloo does on every device, and notices at once who is gone.
        strategy = DDPStrategy(process_group_backend="gloo", timeout=LONGEST_WAIT)
        try:
            self.fabric = Fabric(accelerator=self.device.type, strategy=strategy, devices=count, num_nodes=nodes)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"no devices={count} of {self.device.type}, num_nodes={nodes}: {reason}") from error
        self.device = self.fabric.device

    @property
    def first(self) -> bool:
        """Whether this is the process that checks, writes what belongs to all, and speaks."""
        return self.fabric is None or self.fabric.global_rank == 0

    @contextmanager
    def team(self) -> Iterator[Team]:
        """Start the other processes, which run this program from its beginning, and yield all of them.

        Raises:
            OSError: when one of them is gone.
        """
        if self.fabric is None:
            yield ALONE
            return
        fabric = self.fabric
        try:
            fabric.launch()
            yield FabricTeam(fabric)
            torch.distributed.destroy_process_group()
        except BaseException as error:
            for child in getattr(fabric.strategy.launcher, "procs", ()):
                child.kill()  # it would work on, and wait for this one
            if is_lost_rank(error):
                raise OSError(
                    f"process {fabric.global_rank} of {fabric.world_size} lost the connection to another one, which "
                    "has failed or was killed (see its message above, or memory and time limits)"
                ) from error
            raise
