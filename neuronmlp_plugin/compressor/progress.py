"""Progress bars with time left on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBars:
    """One bar per stage; `quiet` shows nothing."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` steps; yields the function that advances it."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.console, disable=self.quiet or not self.console.is_terminal
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda steps: progress.advance(task, steps)
            progress.update(task, completed=total)
        if not self.quiet and not self.console.is_terminal:
            self.console.print(f"{name}: done")
