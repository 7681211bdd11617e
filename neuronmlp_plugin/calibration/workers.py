"""The processes of one run, as `torchrun` or `accelerate launch` started them; alone, without either, there
is one.

Each has its share of the calibration windows. Sums over tokens are added up; the first process decomposes and
writes.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime

import torch

from neuronmlp_plugin.errors import UsageError
from neuronmlp_plugin.lowrank.decompose import BLOCK, SecondMoment

# The others wait while the first decomposes a layer: minutes at 8B, where the default of half an hour could
# run out on a busy machine.
PATIENCE = datetime.timedelta(days=1)


class Workers:
    """`index` of `count` processes; `device` is this one's GPU where there is one."""

    def __init__(self) -> None:
        from accelerate import PartialState

        # Told explicitly: left alone it takes any accelerator there is, some without fp64, and without one it
        # forms no group.
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device: torch.device = self._state.device
        if self.count > 1:  # gloo aborts a process that exits inside a group
            atexit.register(self._state.destroy_process_group)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, windows: torch.Tensor) -> torch.Tensor:
        """This process's part of `windows [n, S]`."""
        if 0 < len(windows) < self.count:
            raise UsageError(
                f"expected at least one window for each of {self.count} processes, found {len(windows)}; "
                "start fewer."
            )
        # Cyclic: each sees all parts of the text, and shares differ by one window at most.
        return windows[self.index :: self.count]

    def own(self, name: str) -> str:
        """`name` of a file that each process writes for itself."""
        return name if self.count == 1 else f"{name}-{self.index + 1}of{self.count}"

    def wait(self) -> None:
        """Until all processes have come here."""
        self._state.wait_for_everyone()

    def first_ahead(self) -> contextlib.AbstractContextManager[None]:
        """A block that the first process has left before the others enter it."""
        ahead: contextlib.AbstractContextManager[None] = self._state.main_process_first()
        return ahead

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in each of them."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        total: torch.Tensor = reduce(tensor.to(self.device), "sum")
        return total.to(tensor.device)

    def add_up(self, moment: SecondMoment) -> None:
        """Make `moment` that of all processes' rows; block by block, since a copy of the whole could be too
        much.
        """
        for block in moment.total.split(BLOCK):
            block.copy_(self.sum(block))
        moment.count = int(self.sum(torch.tensor(moment.count)))
