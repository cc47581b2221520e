"""The benchmark's workload as a process that a page which cannot be read back does not kill.

It touches its memory through /proc/self/mem, where that is an error instead of a SIGBUS. Started as the benchmark's:
see tests/swap/workload.py.
"""

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from typing import Any

from zswapd.bench import workload
from zswapd.bench.workload import PAGE, Anonymous, Workload

MADV_PAGEOUT = 21


class Surviving(Anonymous):
    """Anonymous memory; `read` raises OSError where the kernel would send SIGBUS."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._memory = os.open("/proc/self/mem", os.O_RDWR)

    def read(self, page: int) -> bytes:
        return os.pread(self._memory, PAGE, self._address + page * PAGE)

    def touch(self, page: int) -> object:
        with suppress(OSError):
            self.read(page)
        return None

    def write(self, page: int, content: bytes) -> None:
        """Where the old page cannot be read, it is dropped first."""
        address = self._address + page * PAGE
        try:
            done = os.pwrite(self._memory, content, address)
        except OSError:
            done = 0
        if done < len(content):
            self._map.madvise(mmap.MADV_DONTNEED, page * PAGE, len(content))
            if os.pwrite(self._memory, content, address) < len(content):
                raise OSError(f"page {page} cannot be written")

    def page_out(self) -> None:
        """Has the kernel swap out what it can, whatever the limit. What a device refuses stays in memory."""
        self._map.madvise(MADV_PAGEOUT)


class SurvivingWorkload(Workload):
    """One more phase than the benchmark's."""

    def page_out(self) -> dict[str, Any]:
        assert isinstance(self._memory, Surviving)
        self._memory.page_out()
        return {}


if __name__ == "__main__":
    workload.Anonymous, workload.Workload = Surviving, SurvivingWorkload  # type: ignore[misc]
    workload.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
