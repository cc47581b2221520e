"""A swap area as /proc and /sys show it, and a pager with a backing disk, for the tests of what looks at them."""

import errno
from pathlib import Path
from typing import Any

from tests.writeback import writeback
from zswapd.swapdev import Attachment

MOUNT_POINT = Path("/run/zswapd-test/mnt")
GIB = 1 << 30
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
OURS = Attachment("/dev/loop3", True, True, 4 * GIB, GIB, 100)


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def add_loop(root: Path, name: str, backing_file: str, dio: int = 1) -> None:
    write(root, f"sys/block/{name}/loop/backing_file", f"{backing_file}\n")
    write(root, f"sys/block/{name}/loop/dio", f"{dio}\n")
    write(root, f"sys/block/{name}/size", "8192\n")


def machine(root: Path, available_kib: int, swaps: str = "", mounts: str = "") -> None:
    write(root, "proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable:   {available_kib} kB\n")
    write(root, "proc/swaps", SWAPS + swaps)
    write(root, "proc/self/mounts", mounts)


class DiskPager:
    def __init__(self, state: str) -> None:
        self.state = state
        self.told: list[bool] = []
        self.unreadable = False
        self.on_disk = 7
        self.errors = {"lost": 5, "corrupt": 0, "disk": 1}

    def stats(self) -> Any:
        disk = writeback(state=self.state, writebacks_in_flight=2, cleanings_in_flight=1)
        return {"pages": {"on_disk": self.on_disk}, "errors": self.errors, "writeback": disk}

    def promote(self, on: bool) -> None:
        self.told.append(on)

    def sample(self, pages: int) -> int:
        if self.unreadable:
            raise OSError(errno.EIO, "page 7 cannot be read from the backing disk: Input/output error")
        return 7
