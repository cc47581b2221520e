"""Loop devices, and what they are over: by inode, since a path says little (links, other mounts, deleted files)."""

import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
#: Of struct loop_info64, which has 232 bytes: device, inode and rdevice of the file, offset and size of the part of it.
_INFO = struct.Struct("=QQQQQ192x")


@dataclass(frozen=True)
class Loop:
    """A loop device. `device` and `inode` name its file; `number` is that of the file where it is a block device.

    Of the file it has `size` bytes from `offset` on; 0: all."""

    name: str
    device: int
    inode: int
    number: int
    offset: int = 0
    size: int = 0

    def overlaps(self, other: "Loop") -> bool:
        """Whether a byte of one is a byte of the other."""
        if (self.device, self.inode) != (other.device, other.inode):
            return False
        first, second = sorted((self, other), key=lambda loop: loop.offset)
        return not first.size or first.offset + first.size > second.offset


def find(name: str) -> Loop:
    """The loop device of this name (loop0). Raises OSError; ENXIO: it is free."""
    fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Loop(name, *_INFO.unpack(fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(_INFO.size))))
    finally:
        os.close(fd)


def find_all(root: Path) -> Iterator[Loop]:
    """All that are in use, and can be looked at."""
    for directory in sorted(root.glob("sys/block/loop*/loop")):
        try:
            yield find(directory.parent.name)
        except OSError:  # detached meanwhile, or not in this container
            continue
