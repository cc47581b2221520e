"""The kernel's own swap devices, as the benchmark's rows: zram, a plain swap file, and that with zswap in front.

Every device is an async context manager: entered, it is in use as swap at a priority above all others; left, it is
gone, whatever happened. The workload must have ended by then, or all its pages come back into memory.
"""

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from zswapd import kernel, swapdev
from zswapd.bench.commands import run, settle, write
from zswapd.bench.programs import PAGE
from zswapd.config import format_size
from zswapd.errors import ZswapdError

CONTROL = Path("/sys/class/zram-control")
ZSWAP = Path("/sys/module/zswap/parameters")
SWAPOFF_SECONDS = 30
# What the kernel keeps for a page beside the pool, on 64 bits, and does not count itself: struct zram_table_entry for
# each page of the device, struct zswap_entry for each stored page, zsmalloc's handle for each object.
ZRAM_ENTRY, ZSWAP_ENTRY, ZSMALLOC_HANDLE = 16, 56, 8


@dataclass(frozen=True)
class Held:
    """What a device that keeps pages in memory holds now: bytes of pages, and of memory for them, metadata too."""

    original_bytes: int
    used_bytes: int

    @property
    def ratio(self) -> float:
        return self.original_bytes / self.used_bytes if self.used_bytes else 0.0


class Device(ABC):
    """A swap device of our own. `path` is what /proc/swaps calls it, once entered."""

    name: str
    path: str = ""
    forgets = False  # whether pages come back as zeros

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

    async def refused(self) -> int:
        """Stores that it has refused: the kernel keeps those pages in memory and tries again."""
        return 0

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

    async def _swap_off(self, last_resort: Callable[[], None] = lambda: None) -> None:
        if self.area():
            await run("swapoff", self.path, seconds=SWAPOFF_SECONDS, last_resort=last_resort)


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
        original, _, used = (int(word) for word in (self._sys / "mm_stat").read_text().split()[:3])
        metadata = self._size // PAGE * ZRAM_ENTRY + original // PAGE * ZSMALLOC_HANDLE
        return Held(original, used + metadata)

    @property
    def _sys(self) -> Path:
        return Path(f"/sys/block/zram{self._number}")


class SwapFile(Device):
    """A plain swap file in `directory`, on whatever disk that is."""

    name = "file"

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._size = size_bytes
        self._file = directory.resolve() / f"zswapd-bench-{os.getpid()}.swap"
        self.path = str(self._file)

    async def _set_up(self, priority: int) -> None:
        free = os.statvfs(self._file.parent)
        if free.f_bavail * free.f_frsize < self._size:
            raise ZswapdError(f"{self._file.parent} has no room for {format_size(self._size)}", "use another directory")
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Written, not only allocated: swapon refuses holes, and some file systems' fallocate leaves them.
            for at in range(0, self._size, 1 << 20):
                os.write(fd, bytes(min(1 << 20, self._size - at)))
                await trio.lowlevel.checkpoint()
            os.fsync(fd)
        finally:
            os.close(fd)
        await run("mkswap", self.path)
        await run("swapon", "--priority", str(priority), self.path)

    async def _tear_down(self) -> None:
        await self._swap_off()
        self._file.unlink(missing_ok=True)


class Zswap(SwapFile):
    """A plain swap file with the kernel's zswap in front, whose settings are put back.

    As zswapd, it may take half of the machine's memory, and writes nothing back to the file before that. Under cgroup
    v2 its memory counts in the workload's cgroup, which the other rows' does not.
    """

    def __init__(self, compressor: str, directory: Path, size_bytes: int) -> None:
        super().__init__(directory, size_bytes)
        self.name = f"zswap-{compressor}"
        self._settings = {"compressor": compressor, "max_pool_percent": "50", "shrinker_enabled": "N", "enabled": "Y"}
        self._undo = ExitStack()

    @staticmethod
    def compressors() -> list[str]:
        """What zswap could compress with, as far as the kernel has it loaded; empty without zswap."""
        if not ZSWAP.exists():
            return []
        known = re.findall(r"^name +: (\S+)$", Path("/proc/crypto").read_text(), re.MULTILINE)
        return [name for name in ("lz4", "zstd", "lzo-rle", "lzo", "deflate", "842", "lz4hc") if name in known]

    async def _set_up(self, priority: int) -> None:
        if not ZSWAP.exists():
            raise ZswapdError("this kernel has no zswap")
        for name, value in self._settings.items():
            path = ZSWAP / name
            if not path.exists():  # older kernels lack the shrinker, and so need not switch it off
                continue
            self._undo.callback(write, path, path.read_text())
            try:
                write(path, value)
            except OSError as error:
                offered = f"it offers {', '.join(self.compressors())}" if name == "compressor" else ""
                raise ZswapdError(f"zswap does not take {value} as its {name}: {error.strerror}", offered) from None
        await super()._set_up(priority)

    async def _tear_down(self) -> None:
        with self._undo:  # last set, first put back: it is off before anything else changes
            await super()._tear_down()

    async def held(self) -> Held:
        kib = dict(re.findall(r"^(Zswap(?:ped)?): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        pool, original = int(kib["Zswap"]) << 10, int(kib["Zswapped"]) << 10
        return Held(original, pool + original // PAGE * (ZSWAP_ENTRY + ZSMALLOC_HANDLE))
