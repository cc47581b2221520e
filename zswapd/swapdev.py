"""The swap device as the machine shows it: swap areas, mounts, and the loop device over our swap file.

Nothing records what is attached: a loop device is ours when it is backed by MOUNT_POINT/swapfile, and it is swap when
/proc/swaps lists it. attaching.py and detaching.py change it.

A mount point here is as the kernel shows it: without symbolic links (mountpoint.resolve).
"""

import fcntl
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from zswapd import loops
from zswapd.errors import DaemonError
from zswapd.pager import Pager

ROOT = Path("/")
SETTLE_SECONDS = 10  # for what ends asynchronously: a loop device's release, the daemon's answer
POLL_SECONDS = 0.1
START_HINT = "start it: systemctl start zswapd, or zswapd run"


@dataclass(frozen=True)
class SwapArea:
    """A line of /proc/swaps."""

    path: str
    size_bytes: int
    used_bytes: int
    priority: int


@dataclass(frozen=True)
class Attachment:
    """The loop device over our swapfile. Until `is_swap`, the device is only half attached."""

    loop_device: str
    is_swap: bool
    direct_io: bool
    size_bytes: int
    used_bytes: int
    priority: int


def parse_swaps(text: str) -> list[SwapArea]:
    """The swap areas of /proc/swaps, whose sizes are in KiB."""
    areas = []
    for line in text.splitlines()[1:]:
        path, _, size, used, priority = line.split()
        path = _unescape(path)
        areas.append(SwapArea(path, int(size) << 10, int(used) << 10, int(priority)))
    return areas


def read_swaps(root: Path = ROOT) -> list[SwapArea]:
    """The machine's swap areas."""
    return parse_swaps(_text(root / "proc/swaps"))


def mem_available(root: Path = ROOT) -> int:
    """MemAvailable in bytes."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def is_mounted(mount_point: Path, root: Path = ROOT) -> bool:
    """Whether a FUSE file system is mounted there, alive or not. Does not touch the mount."""
    wanted = str(mount_point)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        if _unescape(left.split()[4]) == wanted and right.startswith("fuse"):
            return True
    return False


def discover(mount_point: Path, root: Path = ROOT, device_number: int | None = None) -> Attachment | None:
    """What is attached to the swapfile under `mount_point`, from /sys and /proc alone: does not touch the mount.

    After umount --lazy no path leads there: it is found by the mount's `device_number`, which a pager that lives tells.
    Of several loop devices (half attached, all but one), the one that is swap.
    """
    backing_file = str(mount_point / "swapfile")
    swaps = {area.path: area for area in read_swaps(root)}
    found = None
    for attribute in sorted(root.glob("sys/block/loop*/loop/backing_file")):
        try:
            backing = _text(attribute).rstrip("\n")
            name = attribute.parent.parent.name
            device = f"/dev/{name}"
            # What was unmounted with --lazy shows only its name within the file system.
            if backing == "/swapfile" and device_number is None:
                device_number = _device_number(mount_point)
            # The file system of a pager has but one file that can be.
            if backing != backing_file and not (backing == "/swapfile" and loops.find(name).device == device_number):
                continue
            direct_io = attribute.with_name("dio").read_text().strip() == "1"
            size = int((attribute.parent.parent / "size").read_text()) * 512
        except OSError:  # detached meanwhile
            continue
        if area := swaps.get(device):
            return Attachment(device, True, direct_io, size, area.used_bytes, area.priority)
        found = found or Attachment(device, False, direct_io, size, 0, 0)
    return found


def _device_number(mount_point: Path) -> int:
    """The number of the file system that the pager of `mount_point` serves; -1 without a pager."""
    pager = find_pager(mount_point)
    return pager.status()["device"] if pager else -1


def find_pager(mount_point: Path) -> Pager | None:
    """The pager of a mount point, which answers even where its file system hangs."""
    try:
        return Pager(mount_point)
    except OSError:
        return None


def not_serving(mount_point: Path, reason: str | None) -> DaemonError:
    """What is wrong where a file system is mounted and does not answer as it should, and what to do about it."""
    hint = f"unmount what it left: umount {mount_point}; then {START_HINT}"
    if attached := discover(mount_point):
        hint = (
            f"if it has died, what is in {attached.loop_device} is lost: end what has pages there, then "
            f"zswapctl detach --force; then {START_HINT}"
        )
    return DaemonError(f"the daemon does not serve {mount_point}: {reason}", hint)


async def require_serving(mount_point: Path) -> None:
    if not is_mounted(mount_point) and not await trio.to_thread.run_sync(find_pager, mount_point):
        raise DaemonError(f"the daemon does not run: nothing is mounted at {mount_point}", START_HINT)
    with trio.move_on_after(SETTLE_SECONDS):
        try:
            if not await trio.to_thread.run_sync(find_pager, mount_point, abandon_on_cancel=True):
                await trio.to_thread.run_sync(_open_and_close, mount_point / "swapfile", abandon_on_cancel=True)
            return
        except OSError as error:
            raise not_serving(mount_point, error.strerror) from None
    raise DaemonError(f"the daemon at {mount_point} does not answer", "it is stopped or stuck: see its log")


@asynccontextmanager
async def exclusive(mount_point: Path) -> AsyncIterator[None]:
    """One attach or detach at a time: waits for the other. The lock is on the directory above the mount point."""
    directory = os.open(mount_point.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await trio.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(directory)


def is_changing(mount_point: Path) -> bool:
    """Whether somebody attaches or detaches the swap now."""
    directory = os.open(mount_point.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(directory)
    return False


def _text(path: Path) -> str:
    """Names in /proc and /sys are bytes: surrogates stand for those that are not UTF-8, as in all of Python's paths."""
    return path.read_text(errors="surrogateescape")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _open_and_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
