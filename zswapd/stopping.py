"""The way back: the swap is detached, and only then is the pager ended. Whoever asks for it, it is tried until it is
done: swap is never taken away under the kernel."""

import errno
import logging
from collections.abc import Callable

import trio

from zswapd import detaching, policy, swapdev
from zswapd.config import Config, format_size
from zswapd.errors import DaemonError, SwapError, ZswapdError
from zswapd.pager import Pager
from zswapd.pager_socket import GONE

log = logging.getLogger(__name__)

RETRY_SECONDS = 10
_PROGRESS_SECONDS = 2


async def end_pager(config: Config) -> bool:
    """Detaches the swap and ends the pager, however often it has to be tried; the log says why not yet. False: there is
    no pager. For systemd, which asks once.

    Cancelled, it leaves everything serving. Raises SwapError where daemon.on_sigterm is refuse and the swap is
    attached, DaemonError if the pager does not answer.
    """
    pager = find_pager(config)
    if pager is None:
        return False
    if config.daemon.on_sigterm == "refuse" and swapdev.discover(config.swap.mount_point):
        raise SwapError("the swap is attached, and daemon.on_sigterm is refuse", "run zswapctl detach first")
    while not await give_back(config, lambda: drained(pager)):
        await trio.sleep(RETRY_SECONDS)
    try:
        policy.take_over_budget(pager, config.writeback)
        report_leaked(await trio.to_thread.run_sync(pager.stop))
        policy.end_budget(pager)
    except GONE:
        pass  # somebody else has ended it
    except OSError as error:
        raise DaemonError(f"the pager did not end: {error.strerror}", "see its log") from None
    return True


def find_pager(config: Config) -> Pager | None:
    """The configured mount point's pager. None if it has ended, or there never was one; DaemonError if it does not
    answer."""
    try:
        return Pager(config.swap.mount_point)
    except GONE:
        return None
    except OSError as error:
        message = f"the pager of {config.swap.mount_point} does not answer: {error.strerror}"
        raise DaemonError(message, "it is stopped or stuck, or its successor has not taken over yet") from None


def drained(pager: Pager) -> bool:
    """Whether nobody has the swap file open any more; from then on nobody can open it."""
    try:
        pager.drain()
    except GONE:
        pass  # somebody has unmounted its file system, which nobody used
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


async def give_back(config: Config, drained: Callable[[], bool]) -> bool:
    """Detaches the swap if it is attached. True if nobody uses the swap file any more; else the log says why not.

    `drained` tells whether nobody has it open any more.
    """
    mount_point = config.swap.mount_point
    try:
        if swapdev.discover(mount_point):
            if config.daemon.on_sigterm == "refuse":
                log.error("not stopping: the swap is attached (daemon.on_sigterm is refuse); run zswapctl detach first")
                return False
            log.info("detaching the swap first: %s", remaining(config))
            await detaching.detach(mount_point, progress=_log_progress())
        # In a thread: the requests that it waits for may be ours to answer.
        if not await trio.to_thread.run_sync(drained):
            log.error("not stopping: somebody has the swap file open (fuser -v %s/swapfile)", mount_point)
            return False
    except ZswapdError as error:
        log.error("not stopping, still serving: %s", error)
        return False
    except Exception:
        # Whatever it is, it is no reason to take the swap away.
        log.exception("not stopping, still serving: detaching failed in a way that it never should")
        return False
    return True


def remaining(config: Config) -> str:
    """What has to come back, for people."""
    attachment = swapdev.discover(config.swap.mount_point)
    if attachment is None or not attachment.is_swap:
        return "the swap is off, its loop device is being freed"
    return f"{format_size(attachment.used_bytes)} of {attachment.loop_device} must come back into memory"


def report_leaked(left: dict[str, int]) -> None:
    """Says what was left of a pool when it ended, if anything was."""
    if left["objects"]:
        log.warning("%(objects)d objects in %(pages)d pages of the pool belonged to no slot", left)


def _log_progress() -> Callable[[detaching.Remaining], None]:
    next_at = trio.current_time() + _PROGRESS_SECONDS

    def report(remaining: detaching.Remaining) -> None:
        nonlocal next_at
        if trio.current_time() >= next_at:
            next_at = trio.current_time() + _PROGRESS_SECONDS
            log.info("detaching: still in swap %s", remaining)

    return report
