"""The anonymous memory of processes, as /proc has it: which pages are in RAM, and what is in them.

Reading changes nothing but that the kernel takes the pages for used. What is not in RAM is not asked for: it stays in
swap, or untouched.
"""

import os
import re
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

PAGE = 4096
# Of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
PRESENT, SWAPPED, SHARED, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 61, 1 << 56
FRAME = (1 << 55) - 1
ENTRIES = 1 << 15  # read at a time
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ \d+ *(.*)")


@dataclass(frozen=True)
class Mapping:
    """A private writable mapping. `runs`: its anonymous pages in RAM, from one address to another; `swapped`: how many
    pages are not there, but in swap."""

    name: str
    runs: list[tuple[int, int]]
    swapped: int


class Memory:
    """A process's memory, opened for reading. OSError where there is no such process, or we may not."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._memory)
            raise

    def __enter__(self) -> "Memory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._memory)
        os.close(self._pagemap)

    def mappings(self, frames: set[int] | None = None) -> Iterator[Mapping]:
        """All that have anonymous pages in RAM or in swap. Raises OSError.

        A page that a fork shares is given once to who has the same `frames` for all processes. None of a kernel
        thread, nor of a process that has ended.
        """
        frames = set() if frames is None else frames
        with open(f"/proc/{self.pid}/maps") as maps:
            for line in maps:
                match = _MAPPING.match(line)
                # The kernel's own ([vvar]) may not be read; huge pages are never swapped.
                if match and not match[3].startswith(("[v", "/anon_hugepage")):
                    mapping = self._look(match[3], int(match[1], 16), int(match[2], 16), frames)
                    if mapping.runs or mapping.swapped:
                        yield mapping

    def _look(self, name: str, start: int, end: int, frames: set[int]) -> Mapping:
        runs: list[tuple[int, int]] = []
        swapped = 0
        for first in range(start // PAGE, end // PAGE, ENTRIES):
            for number, entry in enumerate(self._entries(first, min(ENTRIES, end // PAGE - first)), first):
                if not entry & (PRESENT | SWAPPED) or entry & SHARED:
                    continue
                if not entry & PRESENT:
                    swapped += 1
                    continue
                frame = entry & FRAME  # 0 where we may not know it
                if not entry & EXCLUSIVE and frame:
                    if frame in frames:
                        continue
                    frames.add(frame)
                address = number * PAGE
                if runs and runs[-1][1] == address:
                    runs[-1] = (runs[-1][0], address + PAGE)
                else:
                    runs.append((address, address + PAGE))
        return Mapping(name, runs, swapped)

    def _entries(self, first: int, count: int) -> "array[int]":
        """Fewer where the process has ended; none where none of them is anything."""
        entries = array("Q")
        raw = os.pread(self._pagemap, 8 * count, 8 * first)
        if raw.count(0) < len(raw):  # else a reservation of a TiB would take minutes
            entries.frombytes(raw)
            if sys.byteorder == "big":
                entries.byteswap()
        return entries

    def read(self, address: int, buffer: memoryview) -> int:
        """Reads whole pages from `address` on, until the first that is no longer in RAM. Returns the bytes read; 0,
        too, where the process has ended, or the memory may not be read."""
        entries = self._entries(address // PAGE, len(buffer) // PAGE)
        present = next((number for number, entry in enumerate(entries) if not entry & PRESENT), len(entries))
        try:
            got = os.preadv(self._memory, [buffer[: present * PAGE]], address) if present else 0
        except OSError:
            return 0
        return got // PAGE * PAGE


def family(pid: int) -> list[int]:
    """A process and its descendants: a compiler driver keeps its memory in a child."""
    members = [pid]
    for member in members:
        for task in os.listdir(f"/proc/{member}/task"):
            with open(f"/proc/{member}/task/{task}/children") as children:
                members += map(int, children.read().split())
    return members
