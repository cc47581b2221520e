"""The control files: zswapd's settings and counters as files beside the swap file, after zram's in sysfs.

A file is read whole as of its opening; each write is one command.
"""

import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from zswapd import __version__
from zswapd.config import MAX_POOL, PAGE_SIZE, parse_size
from zswapd.engine import Engine

log = logging.getLogger(__name__)

T = TypeVar("T")

ALGORITHMS = ("lz4", "zstd")
#: Why a command to write back ends early.
ENDS = {
    "budget": (errno.EDQUOT, "the budget is used up"),
    "full": (errno.ENOSPC, "the backing disk is full"),
    "failed": (errno.EIO, "the backing disk cannot be written"),
    "stopped": (errno.ESHUTDOWN, "the pager is ending"),
}


#: The same of a command to recompress.
RECOMPRESSION_ENDS = {
    "full": (errno.ENOSPC, "the pool has no room for what is smaller"),
    "stopped": (errno.ESHUTDOWN, "the pager is ending"),
}


@dataclass(frozen=True)
class ControlFile:
    """`read` gives the contents; `write` takes a command and raises ValueError (EINVAL) or OSError.

    One that is None makes the file write-only or read-only. Neither may wait for a page. A `write` that is `slow` waits
    for the disk: it is to be called in a thread of its own.
    """

    read: Callable[[], str] | None = None
    write: Callable[[str], None] | None = None
    slow: bool = False

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
        if not PAGE_SIZE <= size <= MAX_POOL:
            raise ValueError(f"a limit of {size} bytes: use at least a page, and at most 1 TiB")
        _logged(lambda: engine.set_mem_limit(size), "mem_limit")

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
        "writeback": ControlFile(write=lambda command: _write_back(engine, command), slow=True),
        "idle": ControlFile(write=lambda command: _mark_idle(engine, command), slow=True),
        "recompress": ControlFile(write=lambda command: _recompress(engine, command), slow=True),
        "bd_stat": ControlFile(read=lambda: _bd_stat(engine)),
        "backing_dev": ControlFile(read=lambda: f"{engine.backing() or 'none'}\n"),
        "writeback_limit": ControlFile(
            read=lambda: _writeback_limit(engine), write=lambda command: _limit_writing(engine, command), slow=True
        ),
        "writeback_limit_enable": ControlFile(
            read=lambda: f"{int(engine.stats()['writeback']['budget_bytes'] is not None)}\n",
            write=lambda command: _enable_limit(engine, command),
            slow=True,
        ),
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
    full = rejected["pool_full"] + rejected["no_memory"] + rejected["no_writeback"]
    return _columns((sum(stats["errors"].values()), full, rejected["out_of_range"], stats["discards"]))


def _bd_stat(engine: Engine) -> str:
    """zram's columns, in units of 4 KiB: pages on the disk, read from it, written to it (cleaning included)."""
    stats = engine.stats()
    counts = stats["writeback"]
    written = counts["written_bytes"] + counts["cleaning_bytes"]
    return _columns((stats["pages"]["on_disk"], counts["read_bytes"] // PAGE_SIZE, written // PAGE_SIZE))


def _writeback_limit(engine: Engine) -> str:
    """What may still be written, in units of 4 KiB as in zram; none: there is no budget."""
    left = engine.stats()["writeback"]["budget_bytes"]
    return "none\n" if left is None else f"{left // PAGE_SIZE}\n"


def _limit_writing(engine: Engine, command: str) -> None:
    """Takes a number of 4 KiB, as zram does. Enables the limit, unlike zram."""
    if not (command.isdecimal() and len(command) < 15):
        raise ValueError(f"not a number, in units of 4 KiB: {command!r}")
    _logged(lambda: engine.limit_writing(int(command) * PAGE_SIZE), "writeback_limit")


def _enable_limit(engine: Engine, command: str) -> None:
    """Takes 0, or 1: nothing may be written then until a limit is set, as with zram."""
    if command not in ("0", "1"):
        raise ValueError(f"neither 0 nor 1: {command!r}")
    if command == "0":
        _logged(lambda: engine.limit_writing(None), "writeback_limit_enable")
    elif engine.stats()["writeback"]["budget_bytes"] is None:
        _logged(lambda: engine.limit_writing(0), "writeback_limit_enable")


def _columns(values: tuple[int, ...]) -> str:
    return " ".join(f"{value:8d}" for value in values) + "\n"


def _comp_algorithm(engine: Engine) -> str:
    current = engine.stats()["algorithm"]
    return " ".join(f"[{name}]" if name == current else name for name in ALGORITHMS) + "\n"


def _set_comp_algorithm(engine: Engine, command: str) -> None:
    """Takes "lz4", "zstd", or "zstd level=N"."""
    algorithm, *parameters = command.split() or [""]
    if algorithm not in ALGORITHMS:
        raise ValueError(f"not lz4, zstd or zstd level=N: {command!r}")
    level = engine.stats()["zstd_level"]
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if algorithm != "zstd" or name != "level":
            raise ValueError(f"unknown parameter {parameter!r}")
        if not value.isdecimal():
            raise ValueError(f"not a level: {value!r}")
        level = int(value)
    _logged(lambda: engine.set_compression(algorithm, level), "comp_algorithm")


def _mark_idle(engine: Engine, command: str) -> None:
    """Takes "all", or an age in seconds."""
    if command != "all" and not (command.isdecimal() and 0 < int(command) < 1 << 32):
        raise ValueError(f"not all, nor an age in seconds: {command!r}")
    _logged(lambda: engine.mark_idle(0 if command == "all" else int(command)), "idle")


def _write_back(engine: Engine, command: str) -> None:
    """Takes "all", "idle", "huge", "huge_idle", "page_index=N" or "N". An early end is an error, as in zram."""
    page = command.removeprefix("page_index=")
    if page.isdecimal() and len(page) < 12:
        command = f"page {int(page)}"
    elif command not in ("all", "idle", "huge", "huge_idle"):
        raise ValueError(f"not all, idle, huge, huge_idle, nor page_index=N: {command!r}")
    written = _logged(lambda: engine.write_back(command), "writeback")
    if written.ended != "done":
        number, why = ENDS[written.ended]
        log.warning("writeback %s: %s after %d pages", command, why, written.pages)
        raise OSError(number, why)


def _recompress(engine: Engine, command: str) -> None:
    """Takes "tick" (all pages get a tick older), or zram's words: algo=zstd (or lz4, dictionary), level=N,
    priority=N (the tier, 1 to 3), max_pages=N; and age=N, in ticks, and duplicates=0, to leave these alone. An early
    end is an error."""
    if command == "tick":
        _logged(engine.tick, "recompress")
        return
    values = {"algo": "zstd", "level": "9", "priority": "1", "age": "0", "max_pages": str(1 << 32), "duplicates": "1"}
    for word in command.split():
        name, _, value = word.partition("=")
        if name not in values or not value:
            raise ValueError(f"not {', '.join(values)} with a value, nor tick: {word!r}")
        values[name] = value
    codec = values.pop("algo")
    if codec not in (*ALGORITHMS, "dictionary"):
        raise ValueError(f"not {', '.join(ALGORITHMS)} nor dictionary: {codec!r}")
    for name, value in values.items():
        if not (value.isdecimal() and len(value) < 15):
            raise ValueError(f"{name} is no number: {value!r}")
    tier, level, age, pages = (int(values[name]) for name in ("priority", "level", "age", "max_pages"))
    share = int(values["duplicates"]) > 0
    done = _logged(
        lambda: engine.recompress(codec, tier=tier, level=level, age=age, share=share, pages=pages),
        "recompress",
    )
    if done.ended in RECOMPRESSION_ENDS:
        number, why = RECOMPRESSION_ENDS[done.ended]
        log.warning("recompress %s: %s after %d pages", command, why, done.recompressed)
        raise OSError(number, why)


def _logged(action: Callable[[], T], name: str) -> T:
    try:
        return action()
    except OSError as error:
        log.warning("control file %s: %s", name, error.strerror)
        raise
