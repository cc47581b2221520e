"""The benchmark's workload as a process that a page which cannot be read back does not kill.

It touches its memory by system calls that copy it to and from a pipe: what is a SIGBUS elsewhere is EFAULT there.
Started as the benchmark's (see tests/swap/workload.py), with its own heap locked ("swapped").
"""

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
        self._out, self._in = os.pipe()
        self._view = memoryview(self._map)

    def read(self, page: int) -> bytes:
        os.write(self._in, self._view[page * PAGE : (page + 1) * PAGE])
        return os.read(self._out, PAGE)

    def touch(self, page: int) -> object:
        with suppress(OSError):
            self.read(page)
        return None

    def write(self, page: int, content: bytes) -> None:
        """Where the old page cannot be read, it is dropped first."""
        for start in range(0, len(content), PAGE):
            at = page * PAGE + start
            os.write(self._in, content[start : start + PAGE])
            try:
                os.readv(self._out, [self._view[at : at + PAGE]])
            except OSError:
                self._map.madvise(mmap.MADV_DONTNEED, at, PAGE)
                os.readv(self._out, [self._view[at : at + PAGE]])

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
