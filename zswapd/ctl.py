"""`zswapctl`: attaches and detaches the swap, shows its status, checks the machine, benchmarks, analyzes pages."""

import dataclasses
import io
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import trio
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zswapd import attaching, backing, detaching, swapdev, wear
from zswapd import doctor as checks
from zswapd import status as stats_view
from zswapd.config import Config, format_size, load
from zswapd.errors import DaemonError, SwapError, ZswapdError
from zswapd.pager import Pager
from zswapd.pager_socket import GONE
from zswapd.stopping import end_pager
from zswapd.writeback import WritebackProgress, resume, why_ended, write_back

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LINE_SHARE = 10  # without a terminal: a line of progress per this many percent


class _Cli(click.Group):
    """Shows ZswapdError as `zswapctl: message`, and imports `bench` and `analyze` only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "analyze", "bench"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "bench":
            from zswapd.bench.command import bench

            return bench
        if cmd_name == "analyze":
            from zswapd.analyze.command import analyze

            return analyze
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ZswapdError as error:
            click.echo(f"zswapctl: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="Configuration file.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one key.")
@click.version_option(package_name="zswapd")
@click.pass_context
def cli(ctx: click.Context, path: Path | None, overrides: tuple[str, ...]) -> None:
    """Operate zswapd, the userspace compressed swap daemon."""
    ctx.obj = load(path, overrides, os.environ)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cli.command()
@click.option("--unsafe", is_flag=True, help="Attach although the daemon can wait for the memory it frees.")
@click.option("--forgetting", is_flag=True, hidden=True, help="Attach a pager that stores nothing: for bench.")
@_json
@click.pass_obj
def attach(config: Config, unsafe: bool, forgetting: bool, as_json: bool) -> None:
    """Make the daemon's swapfile a swap area of this machine."""
    swap = config.swap
    attached = _run(
        lambda: attaching.attach(
            swap.mount_point,
            priority=swap.priority,
            discard=swap.discard,
            unsafe=unsafe,
            forgetting=forgetting,
        ),
        lambda: "interrupted: nothing is attached",
    )
    if as_json:
        _print_json(dataclasses.asdict(attached))
    else:
        size = format_size(attached.size_bytes)
        click.echo(f"attached: {attached.loop_device}, {size} of swap, priority {attached.priority}")


@cli.command()
@click.option(
    "--force", is_flag=True, help="Skip the checks: memory may run out, pages be lost, or the daemon have died."
)
@_json
@click.pass_obj
def detach(config: Config, force: bool, as_json: bool) -> None:
    """Bring every page back into memory and take the swap area away.

    Ends early if a page cannot be read; with --force that page is given up, and the exit status is 1 all the same.
    """
    dead = force and _is_dead(config.swap.mount_point)
    with _DetachProgress(quiet=as_json) as progress:
        detached = _run(
            lambda: detaching.detach(config.swap.mount_point, force=force, progress=progress.update),
            lambda: _still_there(config.swap.mount_point),
        )
    if as_json:
        _print_json({"detached": detached and dataclasses.asdict(detached)})
    elif detached and dead:
        click.echo(f"detached: {detached.loop_device}; the daemon was dead, and what was in swap is lost")
    elif detached:
        click.echo(f"detached: {detached.loop_device}, {format_size(detached.used_bytes)} back in memory")
    else:
        click.echo(f"nothing is attached at {config.swap.mount_point}")


@cli.command()
@click.option("--classes", is_flag=True, help="Show instead how full the pool's size classes are, and what they waste.")
@_json
@click.pass_obj
def status(config: Config, classes: bool, as_json: bool) -> None:
    """Show what is attached, what is stored and what it costs."""
    mount_point = config.swap.mount_point
    attachment = swapdev.discover(mount_point)
    try:
        stats = stats_view.read_stats(mount_point)
    except DaemonError as error:
        raise DaemonError(error.message, backing.being_written(config.writeback) or error.hint) from None
    disk = stats["writeback"]
    if disk["state"] != "none":
        disk["budget_bytes"] = wear.left_of(config.writeback, disk["budget_bytes"])
    if classes and as_json:
        _print_json(stats["classes"])
    elif classes:
        _print(stats_view.render_classes(stats))
    elif as_json:
        _print_json({**stats, "attachment": attachment and dataclasses.asdict(attachment)})
    else:
        _print(stats_view.render(stats, attachment))


@cli.command()
@click.argument("what", type=click.Choice(["all", "idle", "huge", "huge_idle", "page", "resume"]))
@click.argument("number", type=click.IntRange(min=0), required=False)
@click.option(
    "--older",
    type=click.IntRange(min=1),
    metavar="SECONDS",
    help="First mark what nobody has used for so long as idle.",
)
@_json
@click.pass_obj
def writeback(config: Config, what: str, number: int | None, older: int | None, as_json: bool) -> None:
    """Move pages to the backing disk: all, those marked idle, those that do not compress (huge), those that are both
    (huge_idle), or page NUMBER. Where writeback.incompressible is keep, those that do not compress go only by the last
    three.

    resume: try a disk that has failed now, without waiting for the pager to do so; exit status 1 if it is not well yet.

    Exit status 2 if the disk or the budget ended it early.
    """
    if (number is None) == (what == "page"):
        raise click.UsageError("page takes the number of a slot; the others take none")
    if older and what != "idle":
        raise click.UsageError("--older goes with idle")
    if what == "resume":
        _resume(config, as_json)
        return
    order = what if number is None else f"page {number}"
    with WritebackProgress(quiet=as_json) as progress:
        written, kept = _run(
            lambda: write_back(config.swap.mount_point, order, older, progress.update),
            lambda: "interrupted: the pager goes on writing back; zswapctl status shows it",
        )
    if as_json:
        _print_json(dataclasses.asdict(written))
    else:
        click.echo(f"written back: {written.pages:,} pages, {format_size(written.bytes)} of the pool freed")
    if written.ended != "done":
        click.echo(f"zswapctl: ended early: {why_ended(config.writeback, written)}", err=True)
        sys.exit(2)
    if kept and not as_json:
        click.echo(
            f"{kept:,} pages that do not compress stay in the pool (writeback.incompressible is keep); "
            "zswapctl writeback huge moves them"
        )


def _resume(config: Config, as_json: bool) -> None:
    had_failed = _run(lambda: resume(config.swap.mount_point), lambda: "interrupted: the pager goes on trying")
    if as_json:
        _print_json({"had_failed": had_failed})
    else:
        click.echo(f"the backing disk {'is written to again' if had_failed else 'had not failed'}")


@cli.command()
@_json
@click.pass_obj
def upgrade(config: Config, as_json: bool) -> None:
    """Put the installed version of the pager in the place of the one that serves, with its pages."""
    try:
        upgraded = Pager(config.swap.mount_point).upgrade()
    except BrokenPipeError:  # how the pager says so, and none of GONE
        raise DaemonError(
            "not upgraded, the old version goes on: its keeper is gone", "stop zswapd and start it again"
        ) from None
    except GONE:
        raise DaemonError(f"no pager serves {config.swap.mount_point}", swapdev.START_HINT) from None
    except TimeoutError as error:
        raise DaemonError(f"the upgrade has begun, and is not done: {error.strerror}", "see the log") from None
    except OSError as error:
        hint = "see its log; or bring every page back first: zswapctl stop, then start zswapd again"
        raise DaemonError(f"not upgraded, the old version goes on: {error.strerror}", hint) from None
    if as_json:
        _print_json(dataclasses.asdict(upgraded))
    else:
        pause = f"{upgraded.pause_seconds * 1000:.1f} ms"
        click.echo(f"upgraded: pager pid {upgraded.new_pid} for {upgraded.old_pid}, after {pause} without")


@cli.command()
@click.pass_obj
def stop(config: Config) -> None:
    """Detach the swap, and end the pager. What keeps it from that is said, and tried again until it is done."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ended = _run(lambda: end_pager(config), lambda: "interrupted: everything goes on serving")
    click.echo("stopped: nothing is attached or mounted any more" if ended else "no pager serves")


@cli.command()
@_json
@click.pass_obj
def doctor(config: Config, as_json: bool) -> None:
    """Check that this machine can run zswapd; exit status 1 if it cannot."""
    results = checks.run(config)
    if as_json:
        _print_json([dataclasses.asdict(check) for check in results])
    else:
        table = Table.grid(padding=(0, 2))
        style = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        for check in results:
            table.add_row(Text(check.status, style[check.status]), check.name, Text(check.detail))
            if check.remedy:
                table.add_row("", "", Text(check.remedy, "dim"))
        _print(table)
    if any(check.status == "fail" for check in results):
        sys.exit(1)


def _is_dead(mount_point: Path) -> bool:
    try:
        stats_view.read_stats(mount_point)
    except ZswapdError:
        return True
    return False


def _still_there(mount_point: Path) -> str:
    attached = swapdev.discover(mount_point)
    if attached is None:
        return "interrupted: the swap is detached, but its pool may not be empty"
    if not attached.is_swap:
        return f"interrupted: every page is back in memory; detach again to free {attached.loop_device}"
    left = format_size(attached.used_bytes)
    return f"interrupted: {left} stay in {attached.loop_device}, everything goes on serving"


def _run(operation: Callable[[], Awaitable[T]], interrupted: Callable[[], str]) -> T:
    """Runs `operation`, which a signal cancels: it then tidies up, and SwapError says how it was left.

    A second signal ends the program at once, whatever it was doing.
    """

    async def main() -> T:
        with trio.open_signal_receiver(*SIGNALS) as signals, trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_signal, signals, scope)
                try:
                    return await operation()
                finally:
                    nursery.cancel_scope.cancel()
        raise SwapError(interrupted())

    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        click.echo("stopping as soon as the kernel can; again to leave it to end by itself", err=True)


class _DetachProgress:
    """A progress bar on a terminal, else a line each tenth of the way; both on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._total = 0
        self._shown = 0
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("reading pages back"),
            BarColumn(),
            TextColumn("{task.fields[left]} left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=None, left="")

    def __enter__(self) -> "_DetachProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def update(self, remaining: detaching.Remaining) -> None:
        used = remaining.used_bytes
        self._total = max(self._total, used)
        done = self._total - used
        self._bar.start()  # only now: there may be nothing to detach
        self._bar.update(self._task, total=self._total, completed=done, left=str(remaining))
        share = 100 * done // self._total if self._total else 100
        if self._bar.disable and not self._quiet and share >= self._shown:
            click.echo(f"reading pages back: {share}%, left: {remaining}", err=True)
            self._shown = share // LINE_SHARE * LINE_SHARE + LINE_SHARE


def _print(renderable: RenderableType) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # lines stay whole for grep
    console.print(renderable)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no µ gets a question mark
    cli(prog_name="zswapctl")


if __name__ == "__main__":
    main()
