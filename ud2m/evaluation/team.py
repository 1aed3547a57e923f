"""Processes that share work. One alone is the smallest team; ``ud2m.cli.devices`` makes larger ones."""

from collections.abc import Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


class Team:
    """Processes that share work, seen from one of them; this one is alone.

    Attributes:
        rank: number of this process; that of rank 0 writes what belongs to all.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def gathered(self, own: Any) -> list[Any]:
        """Return what each process has handed in, by rank; waits for all."""
        return [own]

    def dealt(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of the items of rank 0: every ``size``-th one."""
        return self.gathered(items)[0][self.rank :: self.size]

    def in_order(self, parts: Sequence[Sequence[Item]]) -> list[Item]:
        """Return what came of the items that each process was dealt, in the order of the items."""
        return [parts[k % self.size][k // self.size] for k in range(sum(map(len, parts)))]


ALONE = Team()
