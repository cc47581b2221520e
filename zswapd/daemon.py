"""The daemon's life, top to bottom: mount, serve, and on a signal give everything back."""

import errno
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio

from zswapd import backing, memcg, metrics, policy, swapdev
from zswapd.config import Config, format_size
from zswapd.engine import EmbeddedEngine, Engine, protect_process
from zswapd.errors import DaemonError, LostSwapError, ZswapdError
from zswapd.footprint import refuse_huge
from zswapd.fusefs import check_mount_point, connect, mounted, relayed, unmount_dead
from zswapd.inuse import refuse_in_use
from zswapd.pager import Pager
from zswapd.pager_socket import GONE

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PROGRESS_SECONDS = 2
_RETRY_SECONDS = 10
#: For which systemd waits from one report of a slow start to the next.
_START_PATIENCE_SECONDS = 120


class _StoppedEarlyError(Exception):
    """A signal came before anything was served."""


async def run(config: Config) -> None:
    """Serves the swap file until a signal ends it and nobody uses it any more. Raises DaemonError if it cannot start.

    The swap is never taken away under the kernel: while it is attached, SIGTERM (or SIGINT, SIGHUP) first detaches it,
    or is refused (daemon.on_sigterm). If that fails, everything goes on serving, and it is tried again: every few
    seconds, since systemd asks only once, and at the next signal.
    """
    with _signals() as signals:
        if config.swap.data_path == "pager":
            with suppress(_StoppedEarlyError):
                await _run_pager(config, signals)
        else:
            await _run_embedded(config, signals)


@contextmanager
def _signals() -> Iterator[AsyncIterator[int]]:
    """The signals that ask us to stop. From here on they wait for us: none ends a half-made mount.

    One that comes when we no longer listen changes nothing: all is given back, or the error that ends us says why not.
    """
    # None is lost between the two handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: None)
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        yield signals


async def _run_pager(config: Config, signals: AsyncIterator[int]) -> None:
    mount_point = config.swap.mount_point
    leaked: dict[str, int] | None = None
    async with _pager(config, signals) as (pager, relay):
        device = pager.status()["device"]
        with metrics.served(pager, config.metrics.address):
            async with relayed(pager, relay):
                _ready(config, pager)
                async with trio.open_nursery() as policies:
                    policies.start_soon(policy.run, pager, config.writeback)
                    await _until_stopped(config, lambda: _drained(pager), signals)
                    policies.cancel_scope.cancel()
                with suppress(*GONE):
                    leaked = pager.stop()
                    policy.end_budget(pager)
    if leaked is None:
        _refuse_unasked(mount_point, device)
        log.info("%s has been unmounted, and the pager has ended", mount_point)
    elif leaked["objects"]:
        log.warning("%(objects)d objects in %(pages)d pages of the pool belonged to no slot", leaked)
    log.info("stopped: nothing is attached or mounted any more")


def _drained(pager: Pager) -> bool:
    try:
        pager.drain()
    except GONE:
        pass  # somebody has unmounted its file system, which nobody used
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _refuse_unasked(mount_point: Path, device: int) -> None:
    """Raises DaemonError unless the pager has ended because its file system, number `device`, was unmounted."""
    if _find_pager(mount_point):
        raise DaemonError("the pager has hung up, and goes on serving pages", "start zswapd again")
    _refuse_lost(mount_point, device)
    if swapdev.is_mounted(mount_point):
        raise DaemonError("the pager has ended unasked, with nothing attached", "its last words are above, or in dmesg")


@asynccontextmanager
async def _pager(config: Config, signals: AsyncIterator[int]) -> AsyncIterator[tuple[Pager, int]]:
    """The pager that an earlier daemon has left, else a new one, which does not outlive a start that fails; and the
    relay to it. Raises InUseError if another daemon has the relay, or serves the mount point without a pager."""
    mount_point = config.swap.mount_point
    if pager := _find_pager(mount_point):
        relay = await connect(pager)
        log.info("found the pager of %s, pid %d, with its pages", mount_point, pager.status()["pid"])
        if waiting := pager.apply(config):
            log.warning(
                "not what the pager was started with: %s; stop zswapd to end it, then start", ", ".join(waiting)
            )
        policy.start_budget(pager, config.writeback, new=False)
        yield pager, relay
        return
    refuse_in_use(mount_point)
    _refuse_lost(mount_point)
    unmount_dead(mount_point)
    check_mount_point(mount_point)
    refuse_huge(config)
    lock = await _prepare_backing(config, signals)
    try:
        pager = Pager.start(config, lock)
    finally:
        if lock is not None:
            os.close(lock)
    try:
        policy.start_budget(pager, config.writeback, new=True)
        yield pager, await connect(pager)
    except BaseException:
        # Refused while the swap file is open: who has pages in it keeps them.
        with suppress(OSError):
            pager.stop()
        raise


async def _prepare_backing(config: Config, signals: AsyncIterator[int]) -> int | None:
    """Looks at the backing disk, and makes it, if it is a file. Returns the descriptor that locks the file.

    May take minutes. Raises BackingError, or _StoppedEarlyError at a signal: the next start goes on with the file.
    """
    lock: int | None = None
    failure: ZswapdError | None = None
    done = False
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            async for number in signals:
                log.info("%s: stopping, before anything is served", signal.Signals(number).name)
                nursery.cancel_scope.cancel()

        nursery.start_soon(stop)
        try:
            lock = await backing.prepare(config.writeback, _starting)
            done = True
        except ZswapdError as error:  # not out of the nursery: it would come as a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure:
        raise failure
    if not done:
        raise _StoppedEarlyError
    return lock


def _starting(what: str) -> None:
    """Says what a start that takes long is about, and has systemd wait for it."""
    log.info("%s", what)
    _notify(f"STATUS={what}\nEXTEND_TIMEOUT_USEC={_START_PATIENCE_SECONDS * 1_000_000}")


def _find_pager(mount_point: Path) -> Pager | None:
    """The pager of a mount point. None if it has ended, or there never was one; DaemonError if it does not answer."""
    try:
        return Pager(mount_point)
    except GONE:
        return None
    except OSError as error:
        message = f"the pager of {mount_point} does not answer: {error.strerror}"
        raise DaemonError(message, "it is stopped or stuck") from None


def _refuse_lost(mount_point: Path, device: int | None = None) -> None:
    """Raises LostSwapError if the pager, which is no more, has left a loop device on its swap file.

    `device`: the number of its file system, by which the loop device is found after umount --lazy.
    """
    attached = swapdev.discover(mount_point, device_number=device)
    if attached is None:
        return
    remedy = "zswapctl detach --force"
    if not swapdev.discover(mount_point):
        # zswapctl would not find it.
        swapoff = f"swapoff {attached.loop_device}; " if attached.is_swap else ""
        remedy = f"{swapoff}losetup --detach {attached.loop_device}"
    raise LostSwapError(
        f"the pager has died while {attached.loop_device} was attached: "
        f"{format_size(attached.used_bytes)} in swap are lost, and who needs them gets SIGBUS",
        f"end what had pages there, then {remedy}, then start zswapd again",
    )


async def _run_embedded(config: Config, signals: AsyncIterator[int]) -> None:
    refuse_in_use(config.swap.mount_point)
    refuse_huge(config)
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
    if limited := memcg.limit_of(os.getpid()):
        group, limit = limited
        log.warning("in a memory cgroup with a limit, and the pool with it: %s, %s", group, format_size(limit))
    stats = engine.stats()
    log.info(
        "serving %s of swap at %s with %s, pool limit %s",
        format_size(stats["swap_size_bytes"]),
        config.swap.mount_point / "swapfile",
        stats["algorithm"],
        format_size(stats["pool_limit_bytes"]),
    )
    # That the file system is mounted.
    _notify("READY=1\nSTATUS=")


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


def _log_progress() -> Callable[[swapdev.Remaining], None]:
    next_at = trio.current_time() + _PROGRESS_SECONDS

    def report(remaining: swapdev.Remaining) -> None:
        nonlocal next_at
        if trio.current_time() >= next_at:
            next_at = trio.current_time() + _PROGRESS_SECONDS
            log.info("detaching: still in swap %s", remaining)

    return report


def _notify(state: str) -> None:
    """Tells systemd (sd_notify(3)), where it is systemd that started us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            # A leading @ stands for the zero byte of an abstract address.
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(state.encode())
    except OSError as error:
        log.warning("cannot tell systemd how we are (NOTIFY_SOCKET): %s", error.strerror)
