"""The control files: zswapd's settings and counters as files beside the swap file, after zram's in sysfs.

A file is read whole as of its opening; each write is one command.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

from zswapd import __version__
from zswapd.config import MAX_SIZE, PAGE_SIZE, parse_size
from zswapd.engine import Engine

ALGORITHMS = ("lz4", "zstd")


@dataclass(frozen=True)
class ControlFile:
    """`read` gives the contents; `write` takes a command and raises ValueError (EINVAL) or OSError.

    One that is None makes the file write-only or read-only. Neither may wait for a page.
    """

    read: Callable[[], str] | None = None
    write: Callable[[str], None] | None = None

    @property
    def mode(self) -> int:
        return (0o444 if self.read else 0) | (0o200 if self.write else 0)


def control_files(engine: Engine) -> dict[str, ControlFile]:
    """The files by name."""

    def reset(command: str) -> None:
        if command != "1":
            raise ValueError("write 1 to drop every page")
        engine.reset()

    def compact(command: str) -> None:
        if command != "1":
            raise ValueError("write 1 to compact the pool")
        engine.compact()

    def set_mem_limit(command: str) -> None:
        size = parse_size(command)
        if not PAGE_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"a limit of {size} bytes: use at least a page, and at most 16 TiB")
        engine.set_mem_limit(size)

    return {
        "stats.json": ControlFile(read=lambda: stats_json(engine)),
        "mm_stat": ControlFile(read=lambda: _mm_stat(engine)),
        "io_stat": ControlFile(read=lambda: _io_stat(engine)),
        "comp_algorithm": ControlFile(
            read=lambda: _comp_algorithm(engine), write=lambda command: _set_comp_algorithm(engine, command)
        ),
        "mem_limit": ControlFile(read=lambda: f"{engine.stats()['pool_limit_bytes']}\n", write=set_mem_limit),
        "compact": ControlFile(write=compact),
        "reset": ControlFile(write=reset),
    }


def stats_json(engine: Engine) -> str:
    """Everything that is counted, as one JSON object: the engine's counters, and who counts."""
    return json.dumps(
        {
            "version": __version__,
            "pid": os.getpid(),
            **engine.stats(),
        }
    )


def _mm_stat(engine: Engine) -> str:
    """zram's columns: original, compressed, used, limit and peak bytes, same pages, pages compacted, huge pages."""
    stats = engine.stats()
    columns = (
        stats["original_bytes"],
        stats["compressed_bytes"],
        stats["pool_bytes"],
        stats["pool_limit_bytes"],
        stats["pool_peak_bytes"],
        stats["pages"]["same_filled"],
        stats["pages_compacted"],
        stats["pages"]["incompressible"],
    )
    return _columns(columns)


def _io_stat(engine: Engine) -> str:
    """zram's columns: failed reads, failed writes, invalid requests, pages freed by discard."""
    stats = engine.stats()
    rejected = stats["rejected_stores"]
    full = rejected["pool_full"] + rejected["no_memory"]
    return _columns((sum(stats["errors"].values()), full, rejected["out_of_range"], stats["discards"]))


def _columns(values: tuple[int, ...]) -> str:
    return " ".join(f"{value:8d}" for value in values) + "\n"


def _comp_algorithm(engine: Engine) -> str:
    current = engine.stats()["algorithm"]
    return " ".join(f"[{name}]" if name == current else name for name in ALGORITHMS) + "\n"


def _set_comp_algorithm(engine: Engine, command: str) -> None:
    """Takes "lz4", "zstd", or "zstd level=N"."""
    algorithm, *parameters = command.split()
    level = engine.stats()["zstd_level"]
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if algorithm != "zstd" or name != "level":
            raise ValueError(f"unknown parameter {parameter!r}")
        if not value.isdecimal():
            raise ValueError(f"not a level: {value!r}")
        level = int(value)
    engine.set_compression(algorithm, level)
