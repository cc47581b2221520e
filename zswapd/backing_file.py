"""A file as backing disk: made once, every block of it written, so that a write later finds its place on the disk.

What zswapd has made it recognises by an extended attribute, which also says how far it has come: a start that was
interrupted goes on from there.
"""

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import trio

from zswapd.config import PAGE_SIZE, format_size
from zswapd.errors import BackingError

#: Its value: bytes from the start that are written.
MARK = "user.zswapd.written"
CHUNK_BYTES = 1 << 20
#: Between two notes of how far it has come.
STEP_BYTES = 64 << 20

FS_IOC_FIEMAP, FS_IOC_GETFLAGS = 0xC020660B, 0x80086601  # linux/fs.h
FIEMAP_FLAG_SYNC, FIEMAP_EXTENTS = 1, 128
#: Unknown, not allocated yet, encoded, encrypted, not aligned, inline, in a tail, not written yet (linux/fiemap.h).
NOT_IN_PLACE, SHARED, LAST = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800, 0x2000, 0x1
ENCRYPTED, JOURNALED = 0x800, 0x4000  # inode flags, linux/fs.h


def written_bytes(path: Path) -> int | None:
    """How much of a file is written; None: no file of zswapd's."""
    try:
        return int(os.getxattr(path, MARK))
    except (OSError, ValueError):
        return None


def is_locked(path: Path) -> bool:
    """Whether a zswapd is making the file, or a pager uses it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def look(path: Path, size: int) -> None:
    """Raises BackingError if there is another file already, or too little space to make this one."""
    allocated = 0
    if path.exists():
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise BackingError(f"{path} is neither a block device nor a file", "name another: writeback.backing")
        if info.st_size and written_bytes(path) is None:
            raise BackingError(f"{path} is a file that zswapd has not made", "remove it, or name another")
        if info.st_nlink > 1:
            raise BackingError(f"{path} has other names too (hard links)", "remove it, or name another")
        allocated = info.st_blocks * 512
    space = os.statvfs(path.parent)
    free = space.f_bavail * space.f_frsize
    if size - allocated > free:
        raise BackingError(
            f"{path} needs {format_size(size - allocated)} more, {format_size(free)} are free in its file system",
            "free some, or lower writeback.size",
        )


async def make(path: Path, size: int, progress: Callable[[int], None]) -> int:
    """Makes the file unless it is there, mode 0600, and writes what of it was never written. Returns a descriptor that
    locks it (flock): whoever inherits it keeps the lock.

    `progress` is called with the bytes that are written. Takes as long as the disk does; may be cancelled, and goes on
    from there the next time. Raises BackingError; a file that was begun stays.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        why = "the file system does no direct I/O" if error.errno == errno.EINVAL else error.strerror
        raise BackingError(f"{path} cannot be opened: {why}", "name a block device, or a file on ext4 or xfs") from None
    try:
        _lock(fd, path)
        start = _begin(fd, path, size)
        with mmap.mmap(-1, CHUNK_BYTES) as zeros:
            while start < size:
                progress(start)
                end = min(size, start + STEP_BYTES)
                await trio.to_thread.run_sync(_write, fd, zeros, start, end)
                os.setxattr(fd, MARK, str(end).encode())
                start = end
        progress(size)
        if (hole := await trio.to_thread.run_sync(_first_hole, fd, size)) < size:
            raise BackingError(f"{path}: byte {hole} was written, but has no place on the disk", "use a block device")
    except OSError as error:
        os.close(fd)
        hint = "free some space, or lower writeback.size" if error.errno == errno.ENOSPC else "see dmesg"
        raise BackingError(f"{path} cannot be written: {error.strerror}", hint) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock_again(path: Path) -> int:
    """Locks a file that holds pages, whose last lock is gone; returns the descriptor. Raises BackingError, OSError."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _lock(fd, path)
    except BackingError:
        os.close(fd)
        raise
    return fd


def is_shared(fd: int) -> bool:
    """Whether a copy shares blocks with the file (cp --reflink): the next write to such a block takes a new one."""
    return any(flags & SHARED for _, _, flags in _extents(fd))


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BackingError(f"{path} is in use by another pager", "name another file for each") from None


def _begin(fd: int, path: Path, size: int) -> int:
    """Gives the file its size and its mark. Returns where writing must go on."""
    os.fchmod(fd, 0o600)
    flags: int = struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))[0]
    if flags & (ENCRYPTED | JOURNALED):
        what = "encrypted" if flags & ENCRYPTED else "journaled (chattr +j)"
        raise BackingError(f"{path}: files there are {what}: no direct I/O", "choose another directory")
    written = 0
    with suppress(OSError, ValueError):
        written = int(os.getxattr(fd, MARK))
    # Direct I/O begins at whole pages.
    written = min(written, size, _first_hole(fd, size)) // PAGE_SIZE * PAGE_SIZE
    if written < size:
        os.setxattr(fd, MARK, str(written).encode())
    os.ftruncate(fd, size)
    # Neighbouring blocks, and an error now rather than on the way.
    os.posix_fallocate(fd, 0, size)
    return written


def _write(fd: int, zeros: mmap.mmap, start: int, end: int) -> None:
    for offset in range(start, end, CHUNK_BYTES):
        with memoryview(zeros) as view:
            part = view[: min(CHUNK_BYTES, end - offset)]
            if os.pwrite(fd, part, offset) != len(part):
                raise OSError(errno.EIO, "short write")
    os.fdatasync(fd)


def _first_hole(fd: int, size: int) -> int:
    """The first byte that has no place on the disk, or was never written there; `size`: none has."""
    position = 0
    for start, length, flags in _extents(fd):
        if start > position or flags & NOT_IN_PLACE:
            break
        position = start + length
    return min(position, size)


def _extents(fd: int) -> Iterator[tuple[int, int, int]]:
    """Start, length and flags of each extent (Documentation/filesystems/fiemap.rst)."""
    header, extent = struct.Struct("=QQIIII"), struct.Struct("=QQQ16xI12x")
    start = 0
    while True:
        request = bytearray(header.size + FIEMAP_EXTENTS * extent.size)
        header.pack_into(request, 0, start, (1 << 63) - 1 - start, FIEMAP_FLAG_SYNC, 0, FIEMAP_EXTENTS, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, request)
        found = header.unpack_from(request)[3]
        for number in range(found):
            logical, _, length, flags = extent.unpack_from(request, header.size + number * extent.size)
            yield logical, length, flags
            if flags & LAST:
                return
            start = logical + length
        if not found:
            return
