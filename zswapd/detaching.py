"""Detaching: swapoff, the loop device is freed, and the pool emptied.

The daemon itself calls detach() while it goes on serving, so nothing here touches the mount from the trio thread:
that would wait for an answer from the very loop that has to give it.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import trio

from zswapd import blockqueue, commands, memcg, swapdev
from zswapd.config import PAGE_SIZE, format_size
from zswapd.errors import DaemonError, SwapError
from zswapd.pager import Pager
from zswapd.swapdev import ROOT, Attachment

MARGIN_BYTES = 128 << 20  # memory that must be left over when every page is back
SAMPLE_PAGES = 512  # of those on the backing disk, read before any is given up
PAGE_CLUSTER = Path("/proc/sys/vm/page-cluster")
_UNREADABLE = "swapoff gives up such pages for ever"


@dataclass(frozen=True)
class Remaining:
    """What is left while the swap is taken away: bytes in swap; pages on the backing disk, some of which the kernel may
    have freed already; and what the pager still does with that disk: segments that it writes, and that it cleans."""

    used_bytes: int
    pages_on_disk: int = 0
    writebacks: int = 0
    cleanings: int = 0

    def __str__(self) -> str:
        text = format_size(self.used_bytes)
        if self.pages_on_disk:
            most = min(self.used_bytes, self.pages_on_disk * PAGE_SIZE)
            text += f", at most {format_size(most)} of it on the backing disk"
        if self.writebacks or self.cleanings:
            text += f" ({self.writebacks} segments being written, {self.cleanings} cleaned)"
        return text


def refuse_full(attachment: Attachment, root: Path = ROOT) -> None:
    """Raises SwapError unless memory and the memory cgroups can take back every page in `attachment`.

    Does not count on the daemon's pool to shrink meanwhile. Walks the cgroup hierarchy: may take a while.
    """
    used = attachment.used_bytes
    others = [area for area in swapdev.read_swaps(root) if area.path != attachment.loop_device]
    elsewhere = sum(area.size_bytes - area.used_bytes for area in others)
    available = swapdev.mem_available(root)
    force = "--force detaches all the same: the kernel may then kill processes"
    if used and used + MARGIN_BYTES > available + elsewhere:
        raise SwapError(
            f"memory cannot take the pages back: {format_size(used)} in swap, {format_size(available)} available, "
            f"{format_size(elsewhere)} free in other swap areas, and {format_size(MARGIN_BYTES)} must be left",
            f"free memory or add swap first; {force}",
        )
    controller = memcg.find_controller(root)
    full = list(memcg.overflows(controller, used)) if controller and used else []
    if min(used, sum(group.need_bytes - group.limit_bytes for group in full)) > elsewhere:
        groups = ", ".join(
            f"{g.group} needs {format_size(g.need_bytes)}, its limit is {format_size(g.limit_bytes)}" for g in full
        )
        raise SwapError(
            f"processes would be killed for want of memory in these cgroups: {groups}",
            f"raise the limits, stop the workloads or add other swap first; {force}",
        )


async def detach(
    mount_point: Path, *, force: bool = False, progress: Callable[[Remaining], None] = lambda remaining: None
) -> Attachment | None:
    """Brings every page back into memory, frees the loop device and empties the daemon's pool.

    Returns what was attached; None: nothing was. A half attached loop device is cleaned up. Unless `force`, refuses
    if memory or a memory cgroup cannot take the pages back, those on the backing disk too, if that disk cannot be
    read, as far as a sample of its pages tells, or if the daemon does not answer. `progress` is called with what
    remains. Takes as long as reading every page back does. While pages lie on the disk vm.page-cluster, a setting of
    the whole machine, is 0.

    Raises SwapError or DaemonError. On failure or cancellation the swap stays in use and everything goes on
    serving; cancelling waits for the kernel to leave swapoff, which it does between two processes' pages. It is
    cancelled so, unless `force`, when the pager cannot read a page: swapoff gives up such a page for ever. Pages that
    were lost that way are an error even if all else went well and nothing is attached any more.
    """
    commands.require_root()
    detached = swapdev.discover(mount_point)
    if detached is None:
        return None
    if not force:
        try:
            await swapdev.require_serving(mount_point)
        except DaemonError as error:
            raise DaemonError(
                error.message,
                "if it is only stopped, continue it; if it has died, its pages are lost: --force frees the device, "
                "and a process that needs a lost page gets SIGBUS",
            ) from None
    async with swapdev.exclusive(mount_point):
        if not force and (attached := swapdev.discover(mount_point)):
            await trio.to_thread.run_sync(refuse_full, attached, abandon_on_cancel=True)
            await _refuse_unreadable(mount_point)
        unread = await dismantle(mount_point, progress, force=force)
    await _reset(mount_point)
    if unread:
        raise SwapError(
            f"detached: {detached.loop_device}, but at least {unread} pages could not be read: they are lost",
            "what they belong to gets SIGBUS when it needs them; see the log of zswapd, and dmesg",
        )
    return detached


async def dismantle(
    mount_point: Path, progress: Callable[[Remaining], None] = lambda remaining: None, *, force: bool = True
) -> int:
    """Takes away what is attached. Returns how many reads of pages have failed."""
    unread = 0
    while attached := swapdev.discover(mount_point):
        if attached.is_swap:
            unread += await _swapoff(mount_point, attached.loop_device, progress, force=force)
        blockqueue.restore(attached.loop_device)
        await _free_loop(mount_point, attached.loop_device)
    return unread


async def _swapoff(mount_point: Path, device: str, progress: Callable[[Remaining], None], *, force: bool = True) -> int:
    """Returns how many reads of pages have failed meanwhile; unless `force`, the first one ends it: SwapError."""
    # Goes on after a cancellation, until swapoff has really ended.
    reporting = trio.CancelScope(shield=True)
    reading = trio.CancelScope()
    pager = await trio.to_thread.run_sync(swapdev.find_pager, mount_point)
    failed_before, unreadable_before = _failed_reads(pager)

    async def report() -> None:
        with reporting:
            while True:
                for area in swapdev.read_swaps():
                    if area.path == device:
                        progress(_remaining(area.used_bytes, pager))
                if not force and _failed_reads(pager)[1] > unreadable_before:
                    reading.cancel()
                await trio.sleep(swapdev.POLL_SECONDS)

    failure: SwapError | None = None
    result: CompletedProcess[bytes] | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        try:
            await promote(pager, False)
            with reading, _reading_no_neighbours(pager):
                result = await commands.run("swapoff", device, check=False)
        except SwapError as error:  # not out of the nursery: it would come as a group
            failure = error
        finally:
            reporting.cancel()
            with trio.CancelScope(shield=True):
                await promote(pager, True)
    if failure:
        raise failure

    # Not the exit status: a signal that comes when the last page is back kills a swapoff that has succeeded.
    attached = swapdev.discover(mount_point)
    if attached is None or not attached.is_swap:
        return _failed_reads(pager)[0] - failed_before
    remaining = format_size(attached.used_bytes)
    stays = f"{device} stays in use with {remaining}, everything goes on serving"
    if result is None:
        unread = _failed_reads(pager)[1] - unreadable_before
        raise SwapError(
            f"at least {unread} pages could not be read, and {_UNREADABLE}; {stays}",
            "see dmesg and the backing disk, then detach again; --force gives up what cannot be read",
        )
    reason = result.stderr.decode(errors="replace").strip() or f"swapoff ended with status {result.returncode}"
    hint = "see the kernel log (dmesg)"
    if "Cannot allocate memory" in reason or result.returncode == -9:
        reason += " (memory cannot take the pages back)"
        hint = "free memory or add other swap, then detach again"
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            hint += "; vm.overcommit_memory is 2: the commit limit must hold without this swap too"
    elif "Invalid argument" in reason:
        hint = "another swapoff of it may be running: it ends by itself"
    raise SwapError(f"{reason}; {stays}", hint)


async def _refuse_unreadable(mount_point: Path) -> None:
    """Raises SwapError if pages on the backing disk cannot be read. Some are, from all over it, and stay there.

    swapoff itself would only tell when it has given up the first ones. Waits for the disk.
    """
    pager = await trio.to_thread.run_sync(swapdev.find_pager, mount_point)
    if pager is None or not pager.stats()["pages"]["on_disk"]:
        return
    try:
        await trio.to_thread.run_sync(pager.sample, SAMPLE_PAGES, abandon_on_cancel=True)
    except OSError as error:
        raise SwapError(
            f"the backing disk cannot give its pages back: {error.strerror}",
            f"{_UNREADABLE}: see dmesg and the disk, then detach again; --force gives up what cannot be read",
        ) from None


@contextmanager
def _reading_no_neighbours(pager: Pager | None) -> Iterator[None]:
    """Has the kernel read from swap only the pages that it wants (vm.page-cluster), if some lie on the backing disk.

    One that cannot be read takes along those that are read with it. A process that is killed meanwhile leaves it so.
    """
    before = PAGE_CLUSTER.read_text().strip()
    if pager is None or before == "0" or not pager.stats()["pages"]["on_disk"]:
        yield
        return
    with suppress(OSError):
        PAGE_CLUSTER.write_text("0")
    try:
        yield
    finally:
        # Unless somebody has set it meanwhile.
        if PAGE_CLUSTER.read_text().strip() == "0":
            PAGE_CLUSTER.write_text(before)


def _failed_reads(pager: Pager | None) -> tuple[int, int]:
    """Reads of pages that have failed so far: all, and those but for pages that were lost already."""
    if pager is None:
        return 0, 0
    errors = pager.stats()["errors"]
    return sum(errors.values()), errors["disk"] + errors["corrupt"]


def _remaining(used_bytes: int, pager: Pager | None) -> Remaining:
    if pager is None:
        return Remaining(used_bytes)
    stats = pager.stats()
    disk = stats["writeback"]
    return Remaining(used_bytes, stats["pages"]["on_disk"], disk["writebacks_in_flight"], disk["cleanings_in_flight"])


async def promote(pager: Pager | None, on: bool) -> None:
    """Whether pages that are read from the disk may move to the pool. Not during swapoff: it would grow meanwhile."""
    if pager and pager.stats()["writeback"]["state"] != "none":
        with suppress(OSError):
            await trio.to_thread.run_sync(pager.promote, on)


async def _free_loop(mount_point: Path, device: str) -> None:
    try:
        await commands.run("losetup", "--detach", device)
    except SwapError as error:
        # Somebody else has detached it: it was freed when swapoff let go of it.
        if "No such device or address" not in error.message:
            raise
    # The kernel frees the device when the last process that has it open closes it, udev for one.
    with trio.move_on_after(swapdev.SETTLE_SECONDS):
        while (attached := swapdev.discover(mount_point)) and attached.loop_device == device:
            await trio.sleep(swapdev.POLL_SECONDS)
        return
    raise SwapError(f"{device} is no longer swap, but another process has it open", f"see who: fuser -v {device}")


async def _reset(mount_point: Path) -> None:
    """Empties the pool; the swapfile stays busy until the loop device's release has reached the daemon."""
    deadline = trio.current_time() + swapdev.SETTLE_SECONDS
    while True:
        try:
            # Abandoned on cancellation: the daemon may have stopped for good.
            await trio.to_thread.run_sync(_reset_once, mount_point, abandon_on_cancel=True)
            return
        except OSError as error:
            if isinstance(error, FileNotFoundError | ConnectionError) or error.errno == errno.ENOTCONN:
                return  # the daemon is gone, and its pool with it
            if error.errno != errno.EBUSY or trio.current_time() > deadline:
                raise SwapError(
                    f"detached, but the pool was not emptied: {error.strerror}",
                    f"see who has the swapfile open: fuser -v {mount_point}/swapfile",
                ) from None
        await trio.sleep(swapdev.POLL_SECONDS)


def _reset_once(mount_point: Path) -> None:
    if pager := swapdev.find_pager(mount_point):
        pager.reset()
    else:
        _write(mount_point / "reset", b"1")


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
