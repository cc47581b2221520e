"""The backing disk: whether what writeback.backing names can be written to without taking memory, and is free for it.

Looking changes nothing; zswapd/backing_file.py makes the file.
"""

import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from zswapd import backing_file, loops
from zswapd.commands import SBIN
from zswapd.config import PAGE_SIZE, Writeback, format_size
from zswapd.errors import BackingError
from zswapd.swapdev import ROOT, read_swaps

log = logging.getLogger(__name__)

REPORT_SECONDS = 5
#: A few segments. Above the most a record's place on the disk has no number.
MIN_BYTES, MAX_BYTES = 16 << 20, 1 << 40
BLKROGET, BLKSSZGET, BLKGETSIZE64 = 0x125E, 0x1268, 0x80081272  # linux/fs.h

_ANOTHER = "name a block device, or a file on ext4 or xfs"
#: Those that write a block where it is, whoever asks. All others are refused, these with the reason.
IN_PLACE = ("ext2", "ext3", "ext4", "xfs")
_WHY_NOT = {
    "copies on write, and takes memory and space for every write": "btrfs bcachefs zfs overlay nilfs2 f2fs ubifs jffs2",
    "is reached over a network, which takes memory for every write": (
        "nfs nfs4 cifs smb3 9p virtiofs ceph afs lustre gfs2 ocfs2 orangefs"
    ),
    "is served by a process, which may wait for memory": "fuse fuseblk",
    "lies in memory itself": "tmpfs ramfs rootfs devtmpfs hugetlbfs",
}
#: How the ids that LVM gives mapped devices end, of those that take space as they are written.
_TAKES_SPACE = {"-tpool": "thinly provisioned", "-cow": "a snapshot", "-vpool": "deduplicated (VDO)"}
_IN_MEMORY, _ON_NETWORK = re.compile(r"(zram|ram)\d+"), re.compile(r"(nbd|rbd|drbd|e\d+\.)\d+")


@dataclass(frozen=True)
class Disk:
    """What a path was found to be. `number`: of the device, or of the one that the file system of a file is on."""

    path: Path
    is_file: bool
    size_bytes: int
    number: int
    rotational: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    kind: str
    mount_point: str


def look(wanted: Writeback, root: Path = ROOT) -> Disk:
    """Looks at the configured path. Raises BackingError with the reason and the remedy if it cannot be used.

    A block device must hold nothing that blkid knows, and nobody may have it. May wait for the disk.
    """
    assert wanted.backing is not None, "a backing disk is configured"
    path = Path(os.path.realpath(wanted.backing))
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            return _look_at_device(path, wanted, root)
    except FileNotFoundError:
        if path.is_relative_to("/dev") and not wanted.size:
            raise BackingError(f"{path}: there is no such device", "see lsblk for those that are there") from None
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}", _ANOTHER) from None
    return _look_at_file(path, wanted, root)


async def prepare(settings: Writeback, report: Callable[[str], None]) -> int | None:
    """Looks at the configured disk, and makes it if it is a file. Returns the descriptor that locks that, or None.

    `report` is told how far a file that has to be written has come, every REPORT_SECONDS. Raises BackingError.
    """
    if settings.backing is None:
        return None
    disk = await trio.to_thread.run_sync(look, settings)
    for remark in disk.remarks:
        log.warning("%s: %s", disk.path, remark)
    if not disk.is_file:
        return None
    next_at = trio.current_time()

    def progress(written: int) -> None:
        nonlocal next_at
        if written < disk.size_bytes and trio.current_time() >= next_at:
            next_at = trio.current_time() + REPORT_SECONDS
            report(f"writing the backing file {disk.path}: {written / disk.size_bytes:.0%}")

    lock = await backing_file.make(disk.path, disk.size_bytes, progress)
    if backing_file.is_shared(lock):
        log.warning("%s shares blocks with a copy (cp --reflink): writing to them takes space anew", disk.path)
    return lock


def being_written(settings: Writeback) -> str | None:
    """How far a zswapd is that is making the configured file before it serves, for people; None: none is at it."""
    if settings.backing is None or (written := backing_file.written_bytes(settings.backing)) is None:
        return None
    if written >= settings.size or not backing_file.is_locked(settings.backing):
        return None
    return f"it is writing the backing file first, {written / settings.size:.0%} of {format_size(settings.size)} so far"


def _look_at_device(path: Path, wanted: Writeback, root: Path) -> Disk:
    if wanted.size:
        raise BackingError(f"{path} is a block device: all of it is used", "writeback.size is for files: set it to 0")
    number = os.stat(path).st_rdev
    refuse_stack(number, str(path), root)
    refuse_shared(number, str(path), root)
    try:
        # Exclusive, as the pager's own opening is: mounts, holders and swap have it so too.
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if who := who_has(path, number, root):
            raise BackingError(f"{path} is in use: {who}", "free it, or name another") from None
        busy = "somebody has it open exclusively, another pager perhaps"
        why = busy if error.errno == errno.EBUSY else error.strerror
        raise BackingError(f"{path} cannot be opened: {why}", "free it, or name another") from None
    try:
        if _ioctl(fd, BLKROGET, "i"):
            raise BackingError(f"{path} is read-only", f"blockdev --setrw {path}, or name another")
        size, sector = _ioctl(fd, BLKGETSIZE64, "Q"), _ioctl(fd, BLKSSZGET, "i")
        if sector > PAGE_SIZE:
            raise BackingError(f"{path} has blocks of {sector} bytes", f"name one with blocks of at most {PAGE_SIZE}")
        refuse_size(path, size)
        refuse_contents(path)
        try_reading(fd, path)
    finally:
        os.close(fd)
    rotational = is_rotational(number, root)
    return Disk(path, False, size, number, rotational, (*_remarks(size, rotational), *loop_remarks(number, root)))


def _look_at_file(path: Path, wanted: Writeback, root: Path) -> Disk:
    if not wanted.size:
        raise BackingError(f"{path} is no block device, and a file needs a size", 'set it: writeback.size = "8GiB"')
    refuse_size(path, wanted.size)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BackingError(f"{path.parent}: {error.strerror}", f"mkdir -p {path.parent}") from None
    try:
        refuse_file_system(mount_of(directory, root), str(path))
        number = os.fstat(directory).st_dev
    finally:
        os.close(directory)
    refuse_stack(number, str(path), root)
    options = root / f"proc/fs/ext4/{_sys(number, root).name}/options"
    if options.exists() and "data=journal" in options.read_text().split():
        raise BackingError(f"{path}: the file system journals data (data=journal)", "mount it with data=ordered")
    backing_file.look(path, wanted.size)
    if path.exists() and (loop := next(iter(loops_over(path, root)), None)):
        raise BackingError(f"{path} is in use: /dev/{loop.name} is over it", f"losetup --detach /dev/{loop.name}")
    rotational = is_rotational(number, root)
    remarks = (*_remarks(wanted.size, rotational), *loop_remarks(number, root))
    return Disk(path, True, wanted.size, number, rotational, remarks)


def _remarks(size: int, rotational: bool) -> tuple[str, ...]:
    remarks = []
    if size > MAX_BYTES:
        remarks.append(f"only the first {format_size(MAX_BYTES)} are used")
    if rotational:
        remarks.append("on a rotating disk, or on one that says so: every page read back takes milliseconds there")
    return tuple(remarks)


def loop_remarks(number: int, root: Path = ROOT) -> list[str]:
    """What to know of the loop devices that a block device is, or lies on: those that take memory or space."""
    remarks = []
    for device in _stack(number, root):
        if not (file := _loop_file(device)):
            continue
        if (device / "loop/dio").read_text().strip() != "1":
            remarks.append(f"{device.name} has no direct I/O, so that writing takes memory: losetup --direct-io=on")
        with suppress(OSError):
            info = os.stat(file)
            if stat.S_ISREG(info.st_mode) and info.st_blocks * 512 < info.st_size:
                remarks.append(
                    f"{device.name} is over {file}, which has holes, so that writing takes space: write it first"
                )
    return remarks


def refuse_size(path: Path, size: int) -> None:
    if size < MIN_BYTES:
        raise BackingError(f"{path}: {size} bytes are too few", f"give it {format_size(MIN_BYTES)} or more")


def refuse_file_system(mount: Mount, path: str) -> None:
    """Raises BackingError if a file on it may need memory or space to be written to."""
    if mount.kind in IN_PLACE:
        return
    kind = mount.kind.partition(".")[0]
    why = next((why for why, kinds in _WHY_NOT.items() if kind in kinds.split()), "is not known to write in place")
    raise BackingError(f"{path} is on {mount.kind} (at {mount.mount_point}), which {why}", _ANOTHER)


def refuse_stack(number: int, path: str, root: Path = ROOT) -> None:
    """Raises BackingError if a block device, or one below it, lies in memory, on a network or in a file system that is
    refused, or takes space as it is written."""
    for device in _stack(number, root):
        if _IN_MEMORY.fullmatch(device.name):
            raise BackingError(f"{path} lies in memory itself ({device.name})", _ANOTHER)
        if network := _network(device):
            raise BackingError(f"{path} is reached over a network ({network}), which takes memory", _ANOTHER)
        uuid = (device / "dm/uuid").read_text().strip() if (device / "dm/uuid").exists() else ""
        if what := next((what for end, what in _TAKES_SPACE.items() if uuid.endswith(end)), None):
            raise BackingError(f"{path} is {what} ({device.name}), and takes space as it is written", _ANOTHER)
        if file := _loop_file(device):
            try:
                fd = os.open(file, os.O_PATH | os.O_CLOEXEC)
            except OSError as error:
                raise BackingError(f"{path} is a loop device over {file}: {error.strerror}", _ANOTHER) from None
            try:
                refuse_file_system(mount_of(fd, root), f"{path}, a loop device over {file},")
            finally:
                os.close(fd)


def refuse_shared(number: int, path: str, root: Path = ROOT) -> None:
    """Raises BackingError if a block device has bytes that a loop device has too, or that are a pager's backing file:
    nobody else would find that out, since each device is opened exclusively by itself."""
    mine = [device.name for device in _stack(number, root) if _loop_file(device)]
    for other in loops.find_all(root):
        if other.number == number:
            raise BackingError(f"{path} is in use: /dev/{other.name} is over it", f"losetup --detach /dev/{other.name}")
        if other.name not in mine and any(other.overlaps(loops.find(name)) for name in mine):
            raise BackingError(
                f"{path} and /dev/{other.name} are over the same file", f"losetup --detach /dev/{other.name}"
            )
    for device in _stack(number, root):
        if (file := _loop_file(device)) and backing_file.is_locked(Path(file)):
            raise BackingError(f"{path} is over {file}, which a pager uses", "name another")


def loops_over(path: Path, root: Path = ROOT) -> Iterator[loops.Loop]:
    """The loop devices over a file."""
    info = path.stat()
    return (loop for loop in loops.find_all(root) if (loop.device, loop.inode) == (info.st_dev, info.st_ino))


def refuse_contents(path: Path) -> None:
    """Raises BackingError if a block device holds a file system or anything else that blkid knows."""
    try:
        probe = subprocess.run(
            ["blkid", "--probe", "--output", "export", path],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "PATH": os.environ.get("PATH", "/usr/bin:/bin") + SBIN, "LC_ALL": "C"},
            check=False,
        )
    except OSError as error:
        raise BackingError(f"blkid cannot be run: {error.strerror}", "install util-linux") from None
    found = dict(line.split("=", 1) for line in probe.stdout.splitlines() if "=" in line)
    what = found.get("TYPE") or found.get("PTTYPE")
    # Random bytes, such as encrypted pages, pass for an Atari's partition table.
    if what == "atari":
        return
    if probe.returncode == 8:
        what = "something that can be taken for several things"
    if what or probe.returncode not in (0, 2):
        reason = f"holds {what}" if what else f"cannot be looked at: {probe.stderr.strip() or 'blkid failed'}"
        raise BackingError(f"{path} {reason}", f"if all of it may be overwritten: wipefs --all {path}")


def try_reading(fd: int, path: Path) -> None:
    """Reads a page by direct I/O. Raises BackingError."""
    with mmap.mmap(-1, PAGE_SIZE) as buffer:
        try:
            os.preadv(fd, [buffer], 0)
        except OSError as error:
            raise BackingError(f"{path} cannot be read by direct I/O: {error.strerror}", _ANOTHER) from None


def who_has(path: Path, number: int, root: Path = ROOT) -> str | None:
    """Who has a block device or one of its partitions, for people; None: nobody whom /proc and /sys know of."""
    directory = _sys(number, root)
    parts = [directory, *(part.parent for part in directory.glob("*/partition"))]
    numbers = {(part / "dev").read_text().strip() for part in parts if (part / "dev").exists()}
    for line in (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        if fields[2] in numbers:
            return f"mounted on {fields[4]}"
    names = {f"/dev/{part.name}" for part in parts} | {str(path)}
    for area in read_swaps(root):
        if area.path in names or os.path.realpath(area.path) in names:
            return f"{area.path} is a swap area"
    for part in parts:
        for holder in part.glob("holders/*"):
            return f"{part.name} is part of {holder.name}"
    return None


def is_rotational(number: int, root: Path = ROOT) -> bool:
    """Whether a block device, or one below it, turns."""
    queues = (device / "queue/rotational" for device in _stack(number, root))
    return any(queue.exists() and queue.read_text().strip() == "1" for queue in queues)


def number_of(path: Path, root: Path = ROOT) -> tuple[int, bool]:
    """The number of a block device, or of the one that a file is on; and whether it turns."""
    info = path.stat()
    number = info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev
    return number, is_rotational(number, root)


def is_on(other: str, number: int, root: Path = ROOT) -> bool:
    """Whether a path (of a swap area) is on a disk that the block device `number` is on too."""
    try:
        theirs, _ = number_of(Path(other), root)
    except OSError:
        return False
    return not {device.name for device in _stack(theirs, root)}.isdisjoint(
        device.name for device in _stack(number, root)
    )


def mount_of(fd: int, root: Path = ROOT) -> Mount:
    """The mount that a file was opened through."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    wanted = re.search(r"^mnt_id:\s+(\d+)$", info, re.MULTILINE)
    for line in (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if wanted and fields[0] == wanted[1]:
            return Mount(right.split()[0], fields[4])
    return Mount("a file system that is not in /proc/self/mountinfo", "?")


def _stack(number: int, root: Path) -> Iterator[Path]:
    """The directories in /sys of a block device and of all that it lies on: disk of a partition, devices below a
    mapped one, device of the file below a loop device."""
    directory = _sys(number, root)
    yield directory
    below = [directory.parent] if (directory / "partition").exists() else []
    for device in [*below, *(slave.resolve() for slave in directory.glob("slaves/*"))]:
        major, minor = (device / "dev").read_text().strip().split(":")
        yield from _stack(os.makedev(int(major), int(minor)), root)
    if file := _loop_file(directory):
        try:
            yield from _stack(os.stat(file).st_dev, root)
        except OSError:
            return


def _network(device: Path) -> str | None:
    """What of a device's directory in /sys says that it is behind a network."""
    if _ON_NETWORK.fullmatch(device.name):
        return device.name
    if any(re.fullmatch(r"session\d+", part) for part in device.parts):
        return f"{device.name}, iSCSI"
    # Of the controller above, or of those of the subsystem (multipath).
    for transport in (device.parent / "transport", *device.parent.glob("nvme*/transport")):
        if transport.exists() and (kind := transport.read_text().strip()) in ("tcp", "rdma"):
            return f"{device.name}, NVMe over {kind}"
    return None


def _loop_file(directory: Path) -> str | None:
    try:
        return (directory / "loop/backing_file").read_text(errors="surrogateescape").rstrip("\n")
    except OSError:  # no loop device, or a free one
        return None


def _sys(number: int, root: Path) -> Path:
    return (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()


def _ioctl(fd: int, request: int, kind: str) -> int:
    value: int = struct.unpack(kind, fcntl.ioctl(fd, request, bytes(struct.calcsize(kind))))[0]
    return value
