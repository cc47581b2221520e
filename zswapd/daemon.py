"""The daemon's life, top to bottom: protect the process, mount, serve, and on a signal give everything back."""

import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

import trio

from zswapd import metrics, swapdev
from zswapd.config import Config, format_size
from zswapd.engine import Engine, protect_process
from zswapd.errors import DaemonError, ZswapdError
from zswapd.fusefs import SwapFs, mounted

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 2


async def run(config: Config) -> None:
    """Serves the swap file until a signal ends it and nobody uses it any more. Raises DaemonError if it cannot start.

    The swap is never taken away under the kernel: while it is attached, SIGTERM (or SIGINT) first detaches it, or is
    refused (daemon.on_sigterm). If that fails, everything goes on serving, and the next signal tries again.
    """
    protect_process()
    # From here on a signal waits for us: it must not end a half-made mount.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        engine = _make_engine(config)
        with metrics.served(engine, config.metrics.address):
            async with mounted(engine, config.swap.mount_point) as fs:
                log.info(
                    "serving %s of swap at %s with %s, pool limit %s",
                    format_size(config.swap.size),
                    config.swap.mount_point / "swapfile",
                    config.compression.algorithm,
                    format_size(engine.mem_limit),
                )
                _notify_ready()
                await _until_stopped(config, fs, signals)
    log.info("stopped: nothing is attached or mounted any more")


def _make_engine(config: Config) -> Engine:
    try:
        return Engine(
            size_bytes=config.swap.size,
            mem_limit=config.pool.mem_limit_bytes,
            algorithm=config.compression.algorithm,
            zstd_level=config.compression.zstd_level,
        )
    except OSError as error:
        raise DaemonError(f"cannot make the pool: {error.strerror}", "see zswapctl doctor") from None


async def _until_stopped(config: Config, fs: SwapFs, signals: AsyncIterator[int]) -> None:
    async with trio.open_nursery() as nursery:
        stopping = False

        async def stop() -> None:
            nonlocal stopping
            if await _give_back(config, fs):
                nursery.cancel_scope.cancel()
            stopping = False

        async for number in signals:
            name = signal.Signals(number).name
            if stopping:
                log.warning("%s again: still waiting, %s", name, _remaining(config))
                continue
            log.info("%s: stopping", name)
            stopping = True
            nursery.start_soon(stop)


async def _give_back(config: Config, fs: SwapFs) -> bool:
    """Detaches the swap if it is attached. True if nobody uses the swap file any more; else the log says why not."""
    mount_point = config.swap.mount_point
    if swapdev.discover(mount_point):
        if config.daemon.on_sigterm == "refuse":
            log.error("not stopping: the swap is attached (daemon.on_sigterm is refuse); run zswapctl detach first")
            return False
        log.info("detaching the swap first: %s", _remaining(config))
        try:
            await swapdev.detach(mount_point, progress=_log_progress())
        except ZswapdError as error:
            log.error("not stopping, still serving: %s", error)
            return False
    if fs.swapfile_opens:
        log.error("not stopping: somebody has the swap file open (fuser -v %s/swapfile)", mount_point)
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
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        # A leading @ stands for the zero byte of an abstract address.
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(b"READY=1")
