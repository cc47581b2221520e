"""`zswapctl writeback`: has the pager write pages back, and shows how far it is; or try a disk that has failed."""

import errno
from collections.abc import Callable
from pathlib import Path

import click
import trio

from zswapd import wear
from zswapd.config import Writeback, format_size
from zswapd.control import ENDS
from zswapd.engine import NO_BACKING, WritebackStats, Written
from zswapd.errors import DaemonError, SwapError
from zswapd.pager import Pager
from zswapd.swapdev import START_HINT

POLL_SECONDS = 0.5
LINE_SECONDS = 2


async def write_back(
    mount_point: Path, order: str, older: int | None, progress: Callable[[WritebackStats], None]
) -> tuple[Written, int]:
    """Has the pager do `order`, after marking what nobody has used for `older` seconds as idle. Returns what was done,
    and how many pages have stayed since they do not compress (writeback.incompressible is keep).

    `progress` is called with what is counted meanwhile. Cancelled, it leaves the pager to it. Raises SwapError or
    DaemonError.
    """

    def command() -> tuple[Written, int]:
        if older:
            pager.mark_idle(older)
        written = pager.write_back(order)
        keeps = order in ("all", "idle") and pager.keeps_incompressible()
        return written, pager.stats()["pages"]["incompressible"] if keeps else 0

    async def report() -> None:
        while True:
            await trio.sleep(POLL_SECONDS)
            progress(pager.stats()["writeback"])

    pager = await trio.to_thread.run_sync(_find, mount_point, abandon_on_cancel=True)
    progress(pager.stats()["writeback"])
    failure: OSError | None = None
    outcome = Written(0, 0, "failed"), 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        try:
            outcome = await trio.to_thread.run_sync(command, abandon_on_cancel=True)
        except OSError as error:  # not out of the nursery: it would come as a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure:
        raise _explained(failure)
    return outcome


async def resume(mount_point: Path) -> bool:
    """Has the pager try a disk that has failed, by writing a segment. True if that has gone well: the disk is in use
    again; False: it had not failed. Waits for the disk. Raises SwapError, DaemonError."""
    pager = await trio.to_thread.run_sync(_find, mount_point, abandon_on_cancel=True)
    had_failed = pager.stats()["writeback"]["state"] == "failed"
    try:
        await trio.to_thread.run_sync(pager.write_back, "resume", abandon_on_cancel=True)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC):
            hint = "see dmesg; the pager tries it every 30 s"
            raise SwapError(f"nothing is written to the backing disk yet: {error.strerror}", hint) from None
        raise _explained(error) from None
    return had_failed


def _find(mount_point: Path) -> Pager:
    try:
        return Pager(mount_point)
    except OSError:
        hint = f'{START_HINT}; with swap.data_path = "pyfuse3" nothing is written back'
        raise DaemonError(f"no pager serves {mount_point}", hint) from None


def _explained(error: OSError) -> SwapError:
    if error.errno == errno.ENODEV:
        return SwapError(NO_BACKING, "name one and start zswapd anew: its pages come back into memory for that")
    if error.errno == errno.EINTR:
        return SwapError("another pager has taken over meanwhile: what is written back stays so", "run it again")
    hint = "try again when it is done" if error.errno == errno.EBUSY else "see the log of zswapd"
    return SwapError(f"nothing is written back: {error.strerror}", hint)


def why_ended(settings: Writeback, written: Written) -> str:
    """For people."""
    if written.ended == "budget":
        return f"the budget is used up ({wear.describe(settings)})"
    return ENDS[written.ended][1] if written.ended in ENDS else f"the pager: {written.ended}"


class WritebackProgress:
    """Lines on stderr, every LINE_SECONDS: what is to be written is not known before."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._first: WritebackStats | None = None
        self._next_at = 0.0

    def __enter__(self) -> "WritebackProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, stats: WritebackStats) -> None:
        if self._first is None:
            self._first = stats
            self._next_at = trio.current_time() + LINE_SECONDS
        elif not self._quiet and trio.current_time() >= self._next_at:
            self._next_at = trio.current_time() + LINE_SECONDS
            pages = stats["pages_written"] - self._first["pages_written"]
            size = stats["written_bytes"] - self._first["written_bytes"]
            click.echo(f"writing back: {pages:,} pages, {format_size(size)} written", err=True)
