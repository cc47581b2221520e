"""A directory on a disk, and a block device there."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import looped
from tests.machine import lacks
from zswapd import backing


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a disk whose file system writes in place."""
    directory = Path("/var/tmp", f"zswapd-test-{os.getpid()}")
    directory.mkdir()
    try:
        fd = os.open(directory, os.O_PATH)
        kind = backing.mount_of(fd).kind
        os.close(fd)
        if kind not in backing.IN_PLACE:
            lacks(f"ext4 or xfs at /var/tmp: it is {kind}")
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def loop(disk: Path) -> Iterator[Path]:
    """A free block device of 32 MiB, on the disk."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        lacks("root and loop devices")
    (disk / "image").touch()
    os.truncate(disk / "image", 32 << 20)
    with looped(disk / "image") as device:
        yield device
