"""Attaching: swapfile -> loop device -> mkswap -> swapon.

Nothing here touches the mount from the trio thread: that would wait for an answer from the very loop that has to give
it.
"""

import errno
import os
from pathlib import Path

import trio

from zswapd import blockqueue, commands, kernel, memcg, swapdev
from zswapd.config import format_size
from zswapd.detaching import dismantle, promote
from zswapd.errors import DaemonError, SwapError
from zswapd.pager import Pager
from zswapd.swapdev import Attachment

_PYTHON_UNSAFE = """\
attaching is not safe on a machine that may run out of memory as a whole: with swap.data_path = "pyfuse3" pages are \
served from Python, which can itself wait for the memory that it is meant to free; the machine then hangs"""
_UNPROTECTED = """\
attaching is not safe on a machine that may run out of memory as a whole: the kernel did not let the pager lock its \
memory, serve reclaim or outlive the OOM killer (CAP_IPC_LOCK, CAP_SYS_RESOURCE); its log says which"""
_UNSAFE_HINT = """\
for workloads in a memory cgroup that has a limit, with zswapd outside it, say --unsafe"""


async def attach(
    mount_point: Path, *, priority: int, discard: bool, unsafe: bool, forgetting: bool = False
) -> Attachment:
    """Makes the swapfile under `mount_point` a swap area of this machine, and returns it once it is in use.

    Discards are used only if the swapfile can free pages. A pager that stores nothing is refused unless `forgetting`.
    On failure or cancellation what was done is undone, and nothing is attached. Raises SwapError or DaemonError.
    Touches no disk.
    """
    commands.require_root()
    await swapdev.require_serving(mount_point)
    async with swapdev.exclusive(mount_point):
        if attached := swapdev.discover(mount_point):
            state = "attached already" if attached.is_swap else "half attached (not in use as swap)"
            raise SwapError(f"{attached.loop_device} is {state}", "zswapctl detach undoes it")
        kernel.refuse_settings()
        if not forgetting and await trio.to_thread.run_sync(_forgets, mount_point):
            raise SwapError("this pager stores nothing (pager.store is none): it is for zswapctl bench alone")
        if not unsafe and (reason := await trio.to_thread.run_sync(_why_unsafe, mount_point)):
            raise SwapError(reason, _UNSAFE_HINT)
        if not unsafe:
            kernel.refuse_what_hangs()
        try:
            return await _attach(mount_point, priority, discard)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                try:
                    await dismantle(mount_point)
                except SwapError as undo:
                    raise SwapError(f"{error}; undoing it failed too: {undo.message}", undo.hint) from error
            raise


async def _attach(mount_point: Path, priority: int, discard: bool) -> Attachment:
    swapfile = str(mount_point / "swapfile")
    # A child: who waits for a zswapd that is stopped cannot be killed.
    if os.strerror(errno.EAGAIN).encode() in (await commands.run("stat", swapfile, check=False)).stderr:
        raise DaemonError(f"the pager runs, but no zswapd serves {mount_point}", swapdev.START_HINT)
    if discard:
        # A loop device over FUSE offers discards whether or not the daemon can punch holes; each would then fail.
        punch = ("fallocate", "--punch-hole", "--keep-size", "--offset", "0", "--length", "4096", swapfile)
        discard = (await commands.run(*punch, check=False)).returncode == 0
    loop = await commands.run("losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", swapfile)
    device = loop.stdout.decode().strip()
    attached = swapdev.discover(mount_point)
    if attached is None or attached.loop_device != device or not attached.direct_io:
        raise SwapError(
            f"{device} over {swapfile} does not do direct I/O: pages would be held twice, in the page cache too",
            "the kernel or the daemon's file system does not support it",
        )
    blockqueue.set_for_swap(device)
    await commands.run("mkswap", device)
    await commands.run("swapon", "--priority", str(priority), *(["--discard"] if discard else []), device)
    # A zswapctl that died in the middle of a detach has left it off.
    await promote(await trio.to_thread.run_sync(swapdev.find_pager, mount_point), True)
    attached = swapdev.discover(mount_point)
    if attached is None or not attached.is_swap:
        raise SwapError(f"swapon succeeded, but /proc/swaps does not list {device}")
    return attached


def _forgets(mount_point: Path) -> bool:
    pager = swapdev.find_pager(mount_point)
    return pager is not None and bool(_status(pager)["forgets"])


def _why_unsafe(mount_point: Path) -> str | None:
    pager = swapdev.find_pager(mount_point)
    if pager is None:
        return _PYTHON_UNSAFE
    status = _status(pager)
    if limited := memcg.limit_of(status["pid"]):
        group, limit = limited
        return f"the pager is in a memory cgroup with a limit, and the pool with it: {group}, {format_size(limit)}"
    return None if status["protected"] else _UNPROTECTED


def _status(pager: Pager) -> dict[str, int]:
    try:
        return pager.status()
    except OSError as error:
        raise DaemonError(
            f"the pager does not answer: {error.strerror}", "it is stopped or stuck: see its log"
        ) from None
