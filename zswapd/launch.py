"""Before there is a pager: what must be true for one to be started, and the ways to start it."""

import itertools
import json
import logging
import os
import select
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import trio

from zswapd import backing, backing_file, pager, swapdev
from zswapd.config import Config, format_size
from zswapd.errors import BackingError, ConfigError, DaemonError, LostSwapError, ZswapdError
from zswapd.footprint import refuse_huge
from zswapd.fusefs import check_mount_point, unmount_dead
from zswapd.inuse import in_use, refuse_in_use
from zswapd.notify import notify
from zswapd.pager_socket import socket_path
from zswapd.stopping import find_pager

log = logging.getLogger(__name__)

#: For which systemd waits from one report of a slow start to the next.
_PATIENCE_SECONDS = 120


class StoppedEarlyError(Exception):
    """A signal came before anything was served."""


def become_keeper(config: Config) -> NoReturn:
    """Turns this process into the keeper of a new pager, which is what systemd then watches.

    Where systemd kept the descriptors of a keeper that is gone, the next one goes on with them and with what that one
    was started with, whatever the configuration says by now. Raises ZswapdError: nothing was started.
    """
    if config.swap.data_path != "pager":
        raise ConfigError('swap.data_path is "pyfuse3": there is no pager', "zswapd run serves by itself then")
    mount_point = config.swap.mount_point
    options = _options_path(mount_point)
    is_new = os.environ.get("LISTEN_FDS", "0") == "0"
    if is_new:
        if found := find_pager(config):
            raise in_use(mount_point, found.status()["pid"])
        with suppress(OSError):  # what is wrong with it is said below
            mount_point.mkdir(mode=0o755)
        lock = trio.run(prepare, config)
        if lock is not None:
            os.set_inheritable(lock, True)
        options.write_text(json.dumps(pager.options(config)))
    try:
        started_with = json.loads(options.read_text())
        command = pager.command(started_with)
    except (OSError, ValueError) as error:
        hint = "while a pager still serves, zswapctl stop brings all back"
        raise DaemonError(f"cannot read what the pager was started with, {options}: {error}", hint) from None
    if not is_new:
        # Said before: the journal may be waiting for a page.
        log.warning("going on with the pages of a keeper that is gone")
        end_left_over(mount_point)
        _lock_again(started_with)
    try:
        os.execv(command[0], command)
    except OSError as error:
        raise DaemonError(f"cannot run {command[0]}: {error.strerror}", "install zswapd again") from None


def end_left_over(mount_point: Path, proc: Path = Path("/proc")) -> None:
    """Kills the pagers that an earlier keeper has left, and waits for their end: the next one's serve the same pages.

    From here on pages wait until one of those serves: nothing here may wait for a page, or for somebody who does.
    """
    wanted = [b"--control", os.fsencode(socket_path(mount_point))]
    for directory in proc.glob("[0-9]*"):
        with suppress(OSError), _process(int(directory.name)) as process:  # it may have ended meanwhile
            # The name is the kernel's. A command line lies in the process's own memory: only a pager's is not in swap.
            if (directory / "comm").read_text(errors="replace").rstrip("\n") != pager.PROGRAM.name:
                continue
            words = (directory / "cmdline").read_bytes().split(b"\0")
            if wanted in map(list, itertools.pairwise(words)):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                poll = select.poll()
                poll.register(process, select.POLLIN)
                poll.poll()


@contextmanager
def _process(pid: int) -> Iterator[int]:
    """A descriptor of the process that has this number now: it leads to no other that has the number later."""
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)


def _lock_again(options: Mapping[str, str]) -> None:
    """The backing file, if there is one, as `prepare` had it locked. Pages go on without."""
    path = Path(options.get("backing", "/"))
    if path.is_file():
        try:
            os.set_inheritable(backing_file.lock_again(path), True)
        except (OSError, BackingError) as error:
            log.warning("cannot lock the backing file %s: %s", path, error)


def _options_path(mount_point: Path) -> Path:
    """Beside the mount point, as the pager's socket."""
    return mount_point.with_name(mount_point.name + ".options")


async def prepare(config: Config, signals: AsyncIterator[int] | None = None) -> int | None:
    """Checks that a pager may be started, and makes what it needs. Returns the descriptor that locks its backing file,
    if it has one; the pager is to inherit it.

    May take minutes, where a backing file has to be written. Raises ZswapdError, or StoppedEarlyError at one of
    `signals`: the next start goes on with the file.
    """
    mount_point = config.swap.mount_point
    refuse_in_use(mount_point)
    refuse_lost(mount_point)
    unmount_dead(mount_point)
    check_mount_point(mount_point)
    refuse_huge(config)
    return await _prepare_backing(config, signals)


async def _prepare_backing(config: Config, signals: AsyncIterator[int] | None) -> int | None:
    lock: int | None = None
    failure: ZswapdError | None = None
    done = False
    async with trio.open_nursery() as nursery:

        async def stop(signals: AsyncIterator[int]) -> None:
            async for number in signals:
                log.info("%s: stopping, before anything is served", signal.Signals(number).name)
                nursery.cancel_scope.cancel()

        if signals is not None:
            nursery.start_soon(stop, signals)
        try:
            lock = await backing.prepare(config.writeback, _starting)
            done = True
        except ZswapdError as error:  # not out of the nursery: it would come as a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure:
        raise failure
    if not done:
        raise StoppedEarlyError
    return lock


def _starting(what: str) -> None:
    """Says what a start that takes long is about, and has systemd wait for it."""
    log.info("%s", what)
    notify(f"STATUS={what}\nEXTEND_TIMEOUT_USEC={_PATIENCE_SECONDS * 1_000_000}")


def refuse_lost(mount_point: Path, device: int | None = None) -> None:
    """Raises LostSwapError if the pager and its keeper, which are no more, have left a loop device on the swap file.

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
