"""The daemon's life, top to bottom: mount, serve, and on a signal give everything back."""

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import trio

from zswapd import launch, memcg, metrics, policy, recompression, survival, swapdev, watchdog
from zswapd.config import Config, format_size
from zswapd.engine import EmbeddedEngine, Engine, protect_process
from zswapd.errors import ConfigError, DaemonError, ZswapdError
from zswapd.footprint import refuse_huge
from zswapd.fusefs import connect, mounted, relayed
from zswapd.health import Health
from zswapd.inuse import in_use, refuse_in_use
from zswapd.notify import notify
from zswapd.pager import Pager
from zswapd.pager_socket import GONE
from zswapd.stopping import RETRY_SECONDS, drained, find_pager, give_back, remaining, report_leaked

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def run(config: Config, *, apart: bool = False) -> None:
    """Serves the swap file until a signal ends it and nobody uses it any more. Raises DaemonError if it cannot start.

    The swap is never taken away under the kernel: while it is attached, SIGTERM (or SIGINT, SIGHUP) first detaches it,
    or is refused (daemon.on_sigterm). If that fails, everything goes on serving, and it is tried again: every few
    seconds, since systemd asks only once, and at the next signal.

    `apart`: the pager is somebody else's (`zswapd pager`). It has to be there, and a signal ends us alone.
    """
    with _signals() as signals:
        if config.swap.data_path == "pager":
            with suppress(launch.StoppedEarlyError):
                await _run_pager(config, signals, apart)
        elif apart:
            raise ConfigError('swap.data_path is "pyfuse3": there is no pager to find', "leave out --external-pager")
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


async def _run_pager(config: Config, signals: AsyncIterator[int], apart: bool) -> None:
    leaked: dict[str, int] | None = None
    async with _pager(config, signals, apart) as (pager, relay):
        health = Health(pager.status())
        swap = metrics.SwapCollector(lambda: swapdev.discover(pager.mount_point, device_number=health.status["device"]))
        process = metrics.process(lambda: health.status["pid"])
        with metrics.served(pager, config.metrics.address, health, swap, process):
            async with relayed(pager, relay):
                _ready(config, pager)
                async with trio.open_nursery() as watchers:
                    watchers.start_soon(policy.run, pager, config.writeback)
                    watchers.start_soon(recompression.run, pager, config.recompression)
                    watchers.start_soon(survival.follow, pager, health)
                    watchers.start_soon(watchdog.run, pager, health)
                    if apart:
                        number = await anext(aiter(signals))
                    else:
                        await _until_stopped(config, lambda: drained(pager), signals)
                    watchers.cancel_scope.cancel()
                if apart:
                    log.info("%s: stopped; the pager goes on", signal.Signals(number).name)
                    return
                with suppress(*GONE):
                    leaked = await _stop(pager)
    if leaked is None:
        _refuse_unasked(config, health.status["device"])
        log.info("%s has been unmounted, and the pager has ended", config.swap.mount_point)
    else:
        report_leaked(leaked)
    log.info("stopped: nothing is attached or mounted any more")


async def _stop(pager: Pager) -> dict[str, int]:
    """Ends the pager, and returns what leaked. stats.json is served meanwhile: the pager waits for its own threads."""

    def stop() -> dict[str, int]:
        leaked = pager.stop()
        policy.end_budget(pager)
        return leaked

    return await trio.to_thread.run_sync(stop)


def _refuse_unasked(config: Config, device: int) -> None:
    """Raises DaemonError unless the pager has ended because its file system, number `device`, was unmounted."""
    if find_pager(config):
        raise DaemonError("the pager has hung up, and goes on serving pages", "start zswapd again")
    launch.refuse_lost(config.swap.mount_point, device)
    if swapdev.is_mounted(config.swap.mount_point):
        raise DaemonError("the pager has ended unasked, with nothing attached", "its last words are above, or in dmesg")


@asynccontextmanager
async def _pager(config: Config, signals: AsyncIterator[int], apart: bool) -> AsyncIterator[tuple[Pager, int]]:
    """The pager that an earlier daemon has left, else (unless `apart`) a new one, which does not outlive a start that
    fails; and the relay to it. Raises InUseError if another daemon has the relay, or serves the mount point without a
    pager."""
    mount_point = config.swap.mount_point
    if pager := find_pager(config):
        relay = await connect(pager)
        log.info("found the pager of %s, pid %d, with its pages", mount_point, pager.status()["pid"])
        if waiting := pager.apply(config):
            log.warning(
                "not what the pager was started with: %s; they wait until it is ended and started anew",
                ", ".join(waiting),
            )
        policy.start_budget(pager, config.writeback, new=False)
        yield pager, relay
        return
    if apart:
        launch.refuse_lost(mount_point)
        raise DaemonError(f"no pager serves {mount_point}", "start it: systemctl start zswapd-pager")
    try:
        pager = await _started(config, signals)
    except ZswapdError:
        # Another zswapd may have begun at the same moment, and its pager been first.
        if found := swapdev.find_pager(mount_point):
            raise in_use(mount_point, found.status()["pid"]) from None
        raise
    try:
        policy.start_budget(pager, config.writeback, new=True)
        yield pager, await connect(pager)
    except BaseException:
        # Refused while the swap file is open: who has pages in it keeps them.
        with suppress(OSError):
            pager.stop()
        raise


async def _started(config: Config, signals: AsyncIterator[int]) -> Pager:
    """A new pager. Raises ZswapdError, or StoppedEarlyError at one of `signals`."""
    lock = await launch.prepare(config, signals)
    try:
        return Pager.start(config, lock)
    finally:
        if lock is not None:
            os.close(lock)


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
    swap = metrics.SwapCollector(lambda: swapdev.discover(config.swap.mount_point))
    with metrics.served(engine, config.metrics.address, swap):
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
    notify("READY=1\nSTATUS=")


async def _until_stopped(config: Config, drained: Callable[[], bool], signals: AsyncIterator[int]) -> None:
    """Returns when a signal has asked for it and all is given back: see give_back."""
    async with trio.open_nursery() as nursery:
        stopping = False
        again = trio.Event()

        async def stop() -> None:
            nonlocal stopping, again
            while not await give_back(config, drained):
                if config.daemon.on_sigterm == "refuse":
                    stopping = False
                    return
                again = trio.Event()
                with trio.move_on_after(RETRY_SECONDS):
                    await again.wait()
            nursery.cancel_scope.cancel()

        async for number in signals:
            name = signal.Signals(number).name
            if stopping:
                log.warning("%s again: still waiting, %s", name, remaining(config))
                again.set()
                continue
            log.info("%s: stopping", name)
            stopping = True
            nursery.start_soon(stop)
