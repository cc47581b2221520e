"""The daemon's life, top to bottom: mount, serve, and on a signal give everything back."""

import errno
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from zswapd import memcg, metrics, swapdev
from zswapd.config import Config, format_size
from zswapd.engine import EmbeddedEngine, Engine, protect_process
from zswapd.errors import DaemonError, LostSwapError, ZswapdError
from zswapd.fusefs import check_mount_point, mounted, relayed, unmount_dead
from zswapd.pager import Pager

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 2
_RETRY_SECONDS = 10


async def run(config: Config) -> None:
    """Serves the swap file until a signal ends it and nobody uses it any more. Raises DaemonError if it cannot start.

    The swap is never taken away under the kernel: while it is attached, SIGTERM (or SIGINT, SIGHUP) first detaches it,
    or is refused (daemon.on_sigterm). If that fails, everything goes on serving, and it is tried again: every few
    seconds, since systemd asks only once, and at the next signal.
    """
    if limited := memcg.limit_of(os.getpid()):
        group, limit = limited
        log.warning("in a memory cgroup with a limit, and the pool with it: %s, %s", group, format_size(limit))
    # From here on a signal waits for us: it must not end a half-made mount.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        if config.swap.data_path == "pager":
            await _run_pager(config, signals)
        else:
            await _run_embedded(config, signals)


async def _run_pager(config: Config, signals: AsyncIterator[int]) -> None:
    leaked: dict[str, int] | None = None
    mount_point = config.swap.mount_point
    with _pager(config) as pager, metrics.served(pager, config.metrics.address):
        mount_device = pager.status()["device"]
        async with relayed(pager):
            _ready(config, pager)
            await _until_stopped(config, lambda: _drained(pager), signals)
            leaked = pager.stop()
    if leaked is None:
        if _find_pager(mount_point):
            raise DaemonError("the pager has hung up, and goes on serving pages", "start zswapd again")
        _refuse_lost(mount_point, mount_device)
        if not swapdev.is_mounted(mount_point):
            # Not before nobody had the swap file open any more: that is when the kernel ends a file system.
            log.warning("stopped: somebody else has unmounted %s, with nothing attached", mount_point)
            return
        raise DaemonError("the pager has ended unasked, with nothing attached", "its last words are above, or in dmesg")
    if leaked["objects"]:
        log.warning("%(objects)d objects in %(pages)d pages of the pool belonged to no slot", leaked)
    log.info("stopped: nothing is attached or mounted any more")


def _drained(pager: Pager) -> bool:
    try:
        pager.drain()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@contextmanager
def _pager(config: Config) -> Iterator[Pager]:
    """The pager that an earlier daemon has left, else a new one, which does not outlive a start that fails."""
    mount_point = config.swap.mount_point
    if pager := _find_pager(mount_point):
        log.info("found the pager of %s, pid %d, with its pages", mount_point, pager.status()["pid"])
        if pager.stats()["swap_size_bytes"] != config.swap.size:
            log.warning("swap.size is not what the pager serves: stop zswapd and start it again to change it")
        yield pager
        return
    _refuse_lost(mount_point)
    unmount_dead(mount_point)
    check_mount_point(mount_point)
    pager = Pager.start(config)
    try:
        yield pager
    except BaseException:
        # Refused while the swap file is open: who has pages in it keeps them.
        with suppress(OSError):
            pager.stop()
        raise


def _find_pager(mount_point: Path) -> Pager | None:
    """The pager of a mount point. None if it has ended, or there never was one; DaemonError if it does not answer."""
    try:
        return Pager(mount_point)
    except (FileNotFoundError, ConnectionError):
        return None
    except OSError as error:
        raise DaemonError(f"the pager of {mount_point} does not answer: {error}", "it is stopped or stuck") from None


def _refuse_lost(mount_point: Path, mount_device: int | None = None) -> None:
    """Raises LostSwapError if the pager, which is no more, has left a loop device on its swap file."""
    if attached := swapdev.discover(mount_point, mount_device=mount_device):
        device = attached.loop_device
        # What was unmounted with --lazy, nobody finds who has not known the pager.
        known = swapdev.discover(mount_point)
        remedy = "zswapctl detach --force" if known else f"swapoff {device}; losetup --detach {device}"
        raise LostSwapError(
            f"the pager has died while {device} was attached: "
            f"{format_size(attached.used_bytes)} in swap are lost, and who needs them gets SIGBUS",
            f"end what had pages there, then {remedy}, then start zswapd again",
        )


async def _run_embedded(config: Config, signals: AsyncIterator[int]) -> None:
    # Here, page I/O passes through this process. Beside a pager it may be swapped out itself.
    protect_process()
    try:
        engine = EmbeddedEngine(
            size_bytes=config.swap.size,
            allocator=config.pool.allocator,
            mem_limit=config.pool.mem_limit_bytes,
            algorithm=config.compression.algorithm,
            zstd_level=config.compression.zstd_level,
        )
    except OSError as error:
        raise DaemonError(f"cannot make the pool: {error.strerror}", "see zswapctl doctor") from None
    with metrics.served(engine, config.metrics.address):
        async with mounted(engine, config.swap.mount_point):
            _ready(config, engine)
            await _until_stopped(config, lambda: not engine.opens, signals)
    log.info("stopped: nothing is attached or mounted any more")


def _ready(config: Config, engine: Engine) -> None:
    stats = engine.stats()
    log.info(
        "serving %s of swap at %s with %s, pool limit %s",
        format_size(stats["swap_size_bytes"]),
        config.swap.mount_point / "swapfile",
        stats["algorithm"],
        format_size(stats["pool_limit_bytes"]),
    )
    _notify_ready()


async def _until_stopped(config: Config, drained: Callable[[], bool], signals: AsyncIterator[int]) -> None:
    """Returns when a signal has asked for it and all is given back: see _give_back."""
    async with trio.open_nursery() as nursery:
        stopping = False
        again = trio.Event()

        async def stop() -> None:
            nonlocal stopping, again
            while not await _give_back(config, drained):
                if config.daemon.on_sigterm == "refuse":
                    stopping = False
                    return
                again = trio.Event()
                with trio.move_on_after(_RETRY_SECONDS):
                    await again.wait()
            nursery.cancel_scope.cancel()

        async for number in signals:
            name = signal.Signals(number).name
            if stopping:
                log.warning("%s again: still waiting, %s", name, _remaining(config))
                again.set()
                continue
            log.info("%s: stopping", name)
            stopping = True
            nursery.start_soon(stop)


async def _give_back(config: Config, drained: Callable[[], bool]) -> bool:
    """Detaches the swap if it is attached. True if nobody uses the swap file any more; else the log says why not.

    `drained` tells whether nobody has it open any more, and from then on nobody can open it, where there is a pager.
    """
    mount_point = config.swap.mount_point
    try:
        if swapdev.discover(mount_point):
            if config.daemon.on_sigterm == "refuse":
                log.error("not stopping: the swap is attached (daemon.on_sigterm is refuse); run zswapctl detach first")
                return False
            log.info("detaching the swap first: %s", _remaining(config))
            await swapdev.detach(mount_point, progress=_log_progress())
        if not drained():
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


def _remaining(config: Config) -> str:
    attachment = swapdev.discover(config.swap.mount_point)
    if attachment is None or not attachment.is_swap:
        return "the swap is off, its loop device is being freed"
    return f"{format_size(attachment.used_bytes)} of {attachment.loop_device} must come back into memory"


def _log_progress() -> Callable[[int], None]:
    next_at = trio.current_time() + _PROGRESS_SECONDS

    def report(remaining_bytes: int) -> None:
        nonlocal next_at
        if trio.current_time() >= next_at:
            next_at = trio.current_time() + _PROGRESS_SECONDS
            log.info("detaching: %s still in swap", format_size(remaining_bytes))

    return report


def _notify_ready() -> None:
    """Tells systemd that the file system is mounted (sd_notify(3)), where it is systemd that started us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            # A leading @ stands for the zero byte of an abstract address.
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(b"READY=1")
    except OSError as error:
        log.warning("cannot tell systemd that we are ready (NOTIFY_SOCKET): %s", error.strerror)
