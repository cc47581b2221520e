"""What every row of the benchmark is, a swap device of our own, and the first of the kernel's: zram.

Every device is an async context manager: entered, it is in use as swap at a priority above all others; left, it is
gone, whatever happened. The workload must have ended by then, or all its pages come back into memory.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from zswapd import kernel, swapdev
from zswapd.bench.commands import alongside, run, settle, write
from zswapd.bench.corpus import Report
from zswapd.bench.programs import PAGE
from zswapd.errors import ZswapdError

CONTROL = Path("/sys/class/zram-control")
SWAPOFF_SECONDS = 30  # of a device that nobody has pages in
EMPTYING_SECONDS = 900  # of one whose pages come back, from a slow disk too
# What the kernel keeps for a page beside the pool, on 64 bits, and does not count itself: struct zram_table_entry for
# each page of the device, zsmalloc's handle for each object.
ZRAM_ENTRY, ZSMALLOC_HANDLE = 16, 8


@dataclass(frozen=True)
class Held:
    """What a device that keeps pages in memory holds now: bytes of pages, and of memory for them, metadata too."""

    original_bytes: int
    used_bytes: int

    @property
    def ratio(self) -> float:
        return self.original_bytes / self.used_bytes if self.used_bytes else 0.0


@dataclass(frozen=True)
class Traffic:
    """What a device has written to its disk and read from it, bytes, and how many pages have gone there."""

    evicted_pages: int
    written_bytes: int
    read_bytes: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(
            self.evicted_pages - earlier.evicted_pages,
            self.written_bytes - earlier.written_bytes,
            self.read_bytes - earlier.read_bytes,
        )

    @property
    def written_per_page(self) -> float | None:
        """Pages written to the disk for one that is evicted to it; None where none was."""
        return self.written_bytes / PAGE / self.evicted_pages if self.evicted_pages else None


class Device(ABC):
    """A swap device of our own. `path` is what /proc/swaps calls it, once entered."""

    name: str
    path: str = ""
    forgets = False  # whether pages come back as zeros
    pool_limit: int | None = None  # bytes that its pages may take in memory, where that is bounded: the rest is on disk

    async def __aenter__(self) -> Self:
        try:
            kernel.refuse_settings()
            await self._set_up(self.priority())
            self.require_first()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._tear_down()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await self._tear_down()

    @abstractmethod
    async def _set_up(self, priority: int) -> None: ...

    @abstractmethod
    async def _tear_down(self) -> None:
        """Undo what was set up, however far that came. Bounded in time."""

    async def held(self) -> Held | None:
        """What it holds in memory; None for a device that keeps pages on disk."""
        return None

    async def settle(self, report: Report) -> bool:
        """Waits until it has done what it does by itself to pages that nobody uses. False if that is nothing."""
        return False

    async def rest(self) -> bool:
        """Waits until it has given back what it had in reserve for more pages. False if it does not do that."""
        return False

    async def refused(self) -> int:
        """Stores that it has refused: the kernel keeps those pages in memory and tries again."""
        return 0

    async def traffic(self) -> Traffic | None:
        """What has gone to its disk and come from there since it was set up; None without a disk."""
        return None

    async def disk_share(self) -> float | None:
        """The share of its pages that are on disk alone; None without a disk."""
        return None

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far of the processes that serve the device, by name. Kernel threads are not in it."""
        return {}

    def process_bytes(self) -> int:
        """Memory that those processes took when they held no page yet."""
        return 0

    def area(self) -> swapdev.SwapArea | None:
        """Its line in /proc/swaps."""
        return next((area for area in swapdev.read_swaps() if area.path == self.path), None)

    @staticmethod
    def priority() -> int:
        """A priority above that of every swap area of the machine."""
        highest = max((area.priority for area in swapdev.read_swaps()), default=0)
        if highest >= 32767:
            raise ZswapdError("a swap area has priority 32767 already: none can be above it", "swapoff it first")
        return max(100, highest + 1)

    def require_first(self) -> None:
        """Raises ZswapdError unless it comes before all other swap areas, so that the pages went to it."""
        mine = self.area()
        if mine is None:
            raise ZswapdError(f"{self.name}: /proc/swaps does not list {self.path}")
        for area in swapdev.read_swaps():
            if area.path != self.path and area.priority >= mine.priority:
                raise ZswapdError(
                    f"{area.path} came before {self.path} in priority", "pages would go there: swapoff it"
                )

    async def emptying(self, work: Callable[[], Awaitable[None]], what: str, report: Report) -> int:
        """Do `work`, which takes the swap off, with progress. Returns the bytes that were in swap."""
        area = self.area()
        inside = area.used_bytes if area else 0

        async def watch() -> None:
            while True:
                if area := self.area():
                    report(what, inside - area.used_bytes, inside)
                await trio.sleep(0.1)

        await alongside(watch, work)
        if self.area():
            raise ZswapdError(f"{what} succeeded, but {self.path} is still swap")
        return inside

    async def swap_off(self) -> None:
        """swapoff with pages in it: they come back into the memory of whose they are."""
        await self._swap_off(seconds=EMPTYING_SECONDS)

    async def _swap_off(self, last_resort: Callable[[], None] = lambda: None, seconds: float = SWAPOFF_SECONDS) -> None:
        if self.area():
            await run("swapoff", self.path, seconds=seconds, last_resort=last_resort)


def zram_held(mm_stat: str, size_bytes: int) -> Held:
    """What a zram device of that size holds, by its mm_stat."""
    original, _, used = (int(word) for word in mm_stat.split()[:3])
    return Held(original, used + size_bytes // PAGE * ZRAM_ENTRY + original // PAGE * ZSMALLOC_HANDLE)


class Zram(Device):
    """A zram device of its own, added and removed again."""

    def __init__(self, algorithm: str, size_bytes: int) -> None:
        self.name = f"zram-{algorithm}"
        self._algorithm = algorithm
        self._size = size_bytes
        self._number: int | None = None

    @classmethod
    async def algorithms(cls) -> list[str]:
        """What zram of this kernel compresses with. Adds a device and removes it again."""
        device = cls("", 0)
        try:
            return device._add()
        finally:
            with trio.CancelScope(shield=True):
                await device._tear_down()

    def _add(self) -> list[str]:
        """Add a device; returns its algorithms."""
        if not (CONTROL / "hot_add").exists():
            raise ZswapdError("this kernel has no zram, or its module is not loaded", "modprobe zram")
        self._number = int((CONTROL / "hot_add").read_text())  # reading it adds a device
        self.path = f"/dev/zram{self._number}"
        return (self._sys / "comp_algorithm").read_text().replace("[", "").replace("]", "").split()

    async def _set_up(self, priority: int) -> None:
        offered = self._add()
        if self._algorithm not in offered:
            raise ZswapdError(f"zram does not offer {self._algorithm}", f"it offers {', '.join(offered)}")
        write(self._sys / "comp_algorithm", self._algorithm)
        write(self._sys / "disksize", str(self._size))
        await settle(lambda: os.path.exists(self.path), 10)
        await run("mkswap", self.path)
        await run("swapon", "--priority", str(priority), self.path)

    async def _tear_down(self) -> None:
        if self._number is None:
            return
        await self._swap_off()
        if not await settle(self._removed, 10):
            raise ZswapdError(f"{self.path} is no longer swap, but another process has it open")
        self._number = None

    def _removed(self) -> bool:
        try:
            write(CONTROL / "hot_remove", str(self._number))
        except OSError as error:
            if error.errno == errno.EBUSY:  # udev looks at it
                return False
            raise
        return True

    async def held(self) -> Held:
        return zram_held((self._sys / "mm_stat").read_text(), self._size)

    @property
    def _sys(self) -> Path:
        return Path(f"/sys/block/zram{self._number}")
