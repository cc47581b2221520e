"""The rows of the benchmark: swap devices by name."""

from pathlib import Path

from zswapd.bench.devices import Device, Zram
from zswapd.bench.disk_devices import SwapFile, Zswap
from zswapd.bench.zswapd_device import SOON, Zswapd
from zswapd.errors import ZswapdError

#: The pager that stores nothing: what everything but the storing costs.
NULL = "null"
KNOWN = (
    "zswapd-ALGORITHM, zswapd-zstd-LEVEL, zswapd-ALGORITHM-tiers, zswapd-ALGORITHM-z3fold, zswapd-pyfuse3-ALGORITHM, "
    "zram-ALGORITHM, zswap-COMPRESSOR, file, null"
)


def device(row: str, directory: Path, size: int, pool: int | None = None) -> Device:
    """The swap device that a row names. `size` is in bytes. Raises ZswapdError.

    With `pool`, bytes, it may take no more memory than that for pages, and writes the rest to a disk: the plain swap
    file has no pool, and other rows no disk.
    """
    kind, _, algorithm = row.partition("-")
    if pool is not None and (kind in ("zram", NULL) or row.startswith("zswapd-pyfuse3")):
        raise ZswapdError(f"{row} writes nothing to a disk: it cannot have a bounded pool", "leave it or --pool out")
    if kind == "zswapd":
        path, _, portable = algorithm.partition("-")
        if path == "pyfuse3" and portable in ("lz4", "zstd"):
            return Zswapd(row, directory, size, portable, swap__data_path="pyfuse3")
        if algorithm in ("lz4", "zstd"):
            return Zswapd(row, directory, size, algorithm, pool)
        if path == "zstd" and portable.isdigit():
            return Zswapd(row, directory, size, path, pool, compression__zstd_level=int(portable))
        if portable == "z3fold" and path in ("lz4", "zstd"):
            return Zswapd(row, directory, size, path, pool, pool__allocator=portable)
        if portable == "tiers" and path in ("lz4", "zstd"):
            return Zswapd(row, directory, size, path, pool, **SOON)
    if kind == "zram" and algorithm:
        return Zram(algorithm, size)
    if kind == "zswap" and algorithm:
        return Zswap(algorithm, directory, size, pool)
    if row == "file":
        return SwapFile(directory, size)
    if row == NULL:
        return Zswapd(row, directory, size, pager__store="none")
    raise ZswapdError(f"no row is called {row}", f"rows are {KNOWN}")


async def offered(pool: int | None = None) -> list[str]:
    """Every row that this machine can measure, but null, which puts other processes at risk (see floor.py).

    With `pool`, those that have a disk, and zswap with every compressor; `device` refuses a pool that it cannot have.
    """
    if pool is not None:
        return ["zswapd-lz4", "zswapd-zstd", *(f"zswap-{compressor}" for compressor in Zswap.compressors()), "file"]
    try:
        zram = [f"zram-{algorithm}" for algorithm in await Zram.algorithms()]
    except ZswapdError:
        zram = []
    zswap = [f"zswap-{compressor}" for compressor in Zswap.compressors()[:1]]
    return ["zswapd-lz4", "zswapd-zstd", "zswapd-lz4-z3fold", "zswapd-pyfuse3-lz4", *zram, *zswap, "file"]
