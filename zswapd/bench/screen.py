"""How the demo and the benchmark take a size, and what they show while they work."""

import time

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from zswapd.config import format_size, parse_size

SMALLEST = 64 << 20


class Size(click.ParamType[int]):
    """Bytes, written as in the configuration; fewer than `smallest` are refused, and `why` says why."""

    name = "size"

    def __init__(self, smallest: int = SMALLEST, why: str = "where the workload's own memory would show") -> None:
        self._smallest, self._why = smallest, why

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(f"{value}: {error}", param, ctx)
        if size < self._smallest:
            self.fail(f"{value}: below {format_size(self._smallest)}, {self._why}", param, ctx)
        return size


class Screen:
    """Result lines that stay, and below them, on a terminal, a bar for what is going on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # No automatic refreshing: rich would start a thread for it.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=1)
        self._drawn = 0.0
        self._what = ""

    def __enter__(self) -> "Screen":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def line(self, label: str, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self._console.print(
            f"[bold]{label:<10}[/] [{style or 'default'}]{escape(text)}[/]", highlight=False, soft_wrap=True
        )

    def report(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` of `what` is done; cheap, so call it often."""
        now = time.monotonic()
        if what == self._what and now - self._drawn < 0.1:
            return
        if what != self._what:
            self._progress.reset(self._task)
        self._what, self._drawn = what, now
        self._progress.update(self._task, description=what, completed=done, total=total)
        self._progress.refresh()
