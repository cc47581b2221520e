"""The watchdog: reads a page of the attached swap every few seconds, as a fault does, and watches the backing disk.

systemd is told each time that a page has come (WatchdogSec). Whatever does not come is in the log and in the metrics,
with what is known of the reason; nothing is done about it: as long as it may still come, no page is lost.
"""

import logging
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from zswapd import backing, stuck, swapdev
from zswapd.config import PAGE_SIZE
from zswapd.errors import BackingError
from zswapd.health import Health
from zswapd.notify import notify, watchdog_seconds
from zswapd.pager import Pager

log = logging.getLogger(__name__)

PERIOD_SECONDS = 10
#: For a page, and for a disk that has requests: beyond, it is said that they do not come.
LATE_SECONDS = 10
#: Of a reminder that all is as bad as it was.
REMIND_SECONDS = 300
_SIGNATURE = b"SWAPSPACE2"


class ProbeError(Exception):
    """A page was answered, but not as it should be."""


async def run(pager: Pager, health: Health) -> None:
    """Watches until it is cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_pages, pager, health)
        if path := pager.backing():
            nursery.start_soon(_watch_disk, path, health)


async def _watch_pages(pager: Pager, health: Health) -> None:
    period = min(PERIOD_SECONDS, (watchdog_seconds() or PERIOD_SECONDS * 3) / 3)
    while True:
        attached = swapdev.discover(pager.mount_point, device_number=health.status["device"])
        try:
            if attached and attached.is_swap:
                await _probe(attached.loop_device, health, lambda: stuck.pages(health.status))
            else:
                # Nobody waits for pages: it is enough that it answers.
                await trio.to_thread.run_sync(pager.status, abandon_on_cancel=True)
        except ProbeError as error:
            # It may have been detached, and the device be another's by now.
            if swapdev.discover(pager.mount_point, device_number=health.status["device"]) == attached:
                health.probe_failures += 1
                log.error("a page of %s was read as a test: %s", attached and attached.loop_device, error)
        except OSError:
            pass  # survival.follow says so
        else:
            notify("WATCHDOG=1")
        await trio.sleep(period)


async def _probe(device: str, health: Health, why: Callable[[], str]) -> None:
    """Reads one page, for as long as it takes: so there is never more than one that waits. Raises ProbeError."""
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_say_when_late, f"a page of {device} has not come", begun, health, why)
        failure: ProbeError | None = None
        try:
            await read_page(device)
        except ProbeError as error:  # not out of the nursery: it would come as a group
            failure = error
        nursery.cancel_scope.cancel()
    took = trio.current_time() - begun
    if health.page_waits_since is not None:
        health.page_waits_since = None
        log.warning("pages come again: one took %.1f s", took)
    elif not failure:
        health.probes += 1
    health.probe_seconds = took
    if failure:
        raise failure


async def _say_when_late(what: str, begun: float, health: Health, why: Callable[[], str]) -> None:
    await trio.sleep_until(begun + LATE_SECONDS)
    health.page_waits_since = begun
    health.probe_failures += 1
    while True:
        log.error("%s for %.0f s: %s", what, trio.current_time() - begun, why())
        await trio.sleep(REMIND_SECONDS)


async def read_page(device: str) -> None:
    """Reads the first page of a swap area, past the page cache, and looks whether it is what mkswap has written there.

    In a child: who waits for a page cannot be killed, so it must not be us. Cancelled, it is left to its fate. Raises
    ProbeError.
    """
    command = ["dd", f"if={device}", f"bs={PAGE_SIZE}", "count=1", "iflag=direct", "status=none"]
    pipe = subprocess.PIPE
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
        )
    except OSError as error:
        raise ProbeError(f"dd cannot be run: {error.strerror}") from None
    assert process.stdout
    assert process.stderr
    try:
        page, said = b"", b""
        async for part in process.stdout:
            page += part
        async for part in process.stderr:
            said += part
        status = await process.wait()
    except trio.Cancelled:
        process.kill()
        raise
    if status:
        raise ProbeError(said.decode(errors="replace").strip() or f"dd ended with status {status}")
    if len(page) != PAGE_SIZE or not page.endswith(_SIGNATURE):
        raise ProbeError("it is not what mkswap has written there")


async def _watch_disk(path: Path, health: Health) -> None:
    """Looks at what the kernel counts of the disk's requests. Nobody has to wait for it to find that it is stuck."""
    with suppress(BackingError, OSError):
        number, _ = backing.number_of(path)
        last: tuple[int, int] | None = None
        changed = trio.current_time()
        while True:
            counts = stuck.requests(number)
            if counts != last or not counts[0]:
                if health.disk_waits_since is not None:
                    log.warning("the backing disk %s goes on, after %.0f s", path, trio.current_time() - changed)
                health.disk_waits_since = None
                last, changed = counts, trio.current_time()
            elif health.disk_waits_since is None and trio.current_time() - changed >= LATE_SECONDS:
                health.disk_waits_since = changed
                log.error(
                    "the backing disk %s has %d requests, and has completed none for %.0f s: pages that lie there wait "
                    "for it, others do not",
                    path,
                    counts[0],
                    trio.current_time() - changed,
                )
            await trio.sleep(PERIOD_SECONDS / 2)
