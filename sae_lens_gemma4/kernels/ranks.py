"""What processes that work on one thing say to each other.

Code that may run in several processes takes a `Ranks` and asks it for totals and means; alone these are what one has,
and nothing is sent. So there is one code for one process and for many, and no question of which it is.

Reductions leave the same bits on all ranks, which is what keeps weights alike that are changed alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among others. Every method is called by all ranks, in the same order.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        group: of torch.distributed; None alone.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def parts(self, n: int) -> list[slice]:
        """Of `n` things in a row, those that are each rank's: as many for all, or nearly."""
        return [slice(rank * n // self.world, (rank + 1) * n // self.world) for rank in range(self.world)]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)
        return tensor

    def least(self, tensor: torch.Tensor) -> torch.Tensor:
        """The minimum over ranks, in place; of numbers, not of NaN."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, in place."""
        self.means([tensor])
        return tensor

    def means(self, tensors: Sequence[torch.Tensor]) -> None:
        """The mean over ranks of each, in place. They are dense in memory, in whatever order of dimensions."""
        if self.group is None:
            return
        rows = [_row(tensor) for tensor in tensors]
        for work in [dist.all_reduce(row, dist.ReduceOp.SUM, group=self.group, async_op=True) for row in rows]:
            work.wait()
        torch._foreach_div_(rows, self.world)

    def gathered(self, x_nd: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, one rank's after another's; all have as many."""
        if self.group is None:
            return x_nd
        parts = [torch.empty_like(x_nd) for _ in range(self.world)]
        dist.all_gather(parts, x_nd.contiguous(), group=self.group)
        return torch.cat(parts)

    def spread(self, tensor: torch.Tensor, rank: int = 0) -> None:
        """Overwrite it with that of one rank; it is dense, as in `means`."""
        if self.group is not None:
            dist.broadcast(_row(tensor), group=self.group, group_src=rank)

    def first(self, value: Value) -> Value:
        """Rank 0's, whatever the others have: anything that pickles."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def wait(self) -> None:
        """For all to be here."""
        self.first(None)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """A block that rank 0 goes through before the others: what it downloads or writes is there for them."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


def _row(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in one row, whatever the order of dimensions in it."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


ALONE = Ranks()
