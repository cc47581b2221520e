"""The kernel's swap devices that have a disk: a plain swap file, and that with zswap in front."""

import os
import re
from contextlib import ExitStack
from pathlib import Path

import trio

from zswapd.bench.commands import run, write
from zswapd.bench.devices import ZSMALLOC_HANDLE, Device, Held, Traffic
from zswapd.bench.programs import PAGE
from zswapd.config import format_size, mem_total
from zswapd.errors import ZswapdError

ZSWAP = Path("/sys/module/zswap/parameters")
# What the kernel keeps for a stored page beside the pool and zsmalloc's handle, on 64 bits, and does not count itself:
# struct zswap_entry.
ZSWAP_ENTRY = 56
POOL_TOLERANCE = 0.05  # how far zswap's pool may be from the others'


class SwapFile(Device):
    """A plain swap file in `directory`, on whatever disk that is."""

    name = "file"

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._size = size_bytes
        self._file = directory.resolve() / f"zswapd-bench-{os.getpid()}.swap"
        self.path = str(self._file)
        self._before = Traffic(0, 0, 0)

    async def _set_up(self, priority: int) -> None:
        require_room(self._file.parent, self._size)
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
        self._before = vmstat_traffic(Path("/proc/vmstat").read_text())

    async def _tear_down(self) -> None:
        await self._swap_off()
        self._file.unlink(missing_ok=True)

    async def traffic(self) -> Traffic:
        return vmstat_traffic(Path("/proc/vmstat").read_text()) - self._before

    async def disk_share(self) -> float:
        return 1.0


class Zswap(SwapFile):
    """A plain swap file with the kernel's zswap in front, whose settings are put back.

    Without `pool` it may take half of the machine's memory, as zswapd, and writes nothing back to the file before that.
    With one, bytes, its shrinker is on and it may take the whole percents of memory that are nearest to it
    (`pool_limit`). Under cgroup v2 its memory counts in the workload's cgroup, which the other rows' does not.
    """

    def __init__(self, compressor: str, directory: Path, size_bytes: int, pool: int | None = None) -> None:
        super().__init__(directory, size_bytes)
        self.name = f"zswap-{compressor}"
        percent, shrinker = 50, "N"
        if pool is not None:
            percent, shrinker = zswap_percent(pool, mem_total()), "Y"
            self.pool_limit = zswap_limit(percent, mem_total())
        self._settings = {
            "compressor": compressor,
            "max_pool_percent": str(percent),
            "accept_threshold_percent": "90",
            "shrinker_enabled": shrinker,
            "enabled": "Y",
        }
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
        pool, original = self._meminfo()
        return Held(original, pool + original // PAGE * (ZSWAP_ENTRY + ZSMALLOC_HANDLE))

    async def disk_share(self) -> float:
        area = self.area()
        used = area.used_bytes if area else 0
        return max(0.0, 1 - self._meminfo()[1] / used) if used else 0.0

    @staticmethod
    def _meminfo() -> tuple[int, int]:
        """The pool, and the pages that are in it, bytes."""
        kib = dict(re.findall(r"^(Zswap(?:ped)?): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        return int(kib["Zswap"]) << 10, int(kib["Zswapped"]) << 10


def zswap_limit(percent: int, memory: int) -> int:
    """The bytes that zswap may take with this max_pool_percent, on a machine with so much memory."""
    return memory // PAGE * percent // 100 * PAGE


def zswap_percent(pool: int, memory: int) -> int:
    """The max_pool_percent that comes nearest to a pool of so many bytes.

    Raises ZswapdError where that is further off than POOL_TOLERANCE: the rows would not be comparable.
    """
    percent = min(100, max(1, round(100 * pool / memory)))
    limit = zswap_limit(percent, memory)
    if abs(limit - pool) > POOL_TOLERANCE * pool:
        raise ZswapdError(
            f"zswap cannot have a pool of {format_size(pool)}: its limit is in whole percents of memory, "
            f"and the nearest is {format_size(limit)}",
            f"use a --pool near a multiple of {format_size(zswap_limit(1, memory))}",
        )
    return percent


def vmstat_traffic(vmstat: str) -> Traffic:
    """What the kernel itself has written to swap areas and read from there since boot, out of /proc/vmstat.

    What zswap compresses is not in it, what it writes back is: whole pages.
    """
    counts = dict(line.split() for line in vmstat.splitlines())
    written, read = int(counts["pswpout"]), int(counts["pswpin"])
    return Traffic(written, written * PAGE, read * PAGE)


def require_room(directory: Path, size_bytes: int) -> None:
    """Raises ZswapdError unless the file system has room for a file of that size."""
    free = os.statvfs(directory)
    if free.f_bavail * free.f_frsize < size_bytes:
        raise ZswapdError(f"{directory} has no room for {format_size(size_bytes)}", "use another directory")
