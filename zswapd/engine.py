"""The page store as the rest of the daemon sees it: what a pager's client (zswapd/pager.py) and the engine embedded
in this process have in common."""

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

from zswapd import _native
from zswapd._native import become_io_flusher, lock_memory

log = logging.getLogger(__name__)

NO_BACKING = "there is no backing disk (writeback.backing)"
NO_PAGER = "only a pager recompresses pages (swap.data_path)"


class LatencyStats(TypedDict):
    """A latency histogram. `counts` is per bucket, not cumulative, with one more for what exceeds every bound."""

    bounds_seconds: list[float]
    counts: list[int]
    sum_seconds: float


class ClassStats(TypedDict):
    """Occupancy of one size class of the pool.

    `zspages_by_fullness`: the empty (which do not stay), those with less than 10 % of their objects in use, … less than
    100 %, the full. `waste_bytes`: what zspages take beyond their objects in use.
    """

    size_bytes: int
    pages_per_zspage: int
    objects_per_zspage: int
    zspages: int
    objects: int
    zspages_by_fullness: list[int]
    waste_bytes: int


class WritebackStats(TypedDict):
    """What is counted of the backing disk. Bytes of it, idle pages and what is in flight: as of now; the rest: since
    the start.

    `state`: none, ok, or failed (nothing more is written to it; what is there is still read). `live_bytes`: records
    that slots name; what is neither live nor free is free when it was cleaned. `budget_bytes`: what may still be
    written; None: there is no budget. `written_bytes` were written for evictions, `cleaning_bytes` for cleaning, both
    in whole blocks. `pages_in_clusters`: of those on the disk, pages that share a record with their neighbours; making
    such records has taken `cluster_seconds` of processor time.
    """

    state: str
    backing_bytes: int
    backing_free_bytes: int
    live_bytes: int
    pages_in_clusters: int
    cluster_seconds: float
    budget_bytes: int | None
    idle_pages: int
    writebacks_in_flight: int
    cleanings_in_flight: int
    pages_written: int
    pages_promoted: int
    written_bytes: int
    cleaning_bytes: int
    cleaned_segments: int
    reads: int
    read_bytes: int
    write_errors: int
    stores_waited: int
    read_latency: LatencyStats
    write_latency: LatencyStats


class DictionaryStats(TypedDict):
    """A dictionary that the pager has. `pages` take it to be read, in the pool or on the backing disk."""

    serial: int
    bytes: int
    pages: int


class RecompressionStats(TypedDict):
    """What is counted of recompressing pages. `bytes` of compressed pages in the pool by codec, `dictionaries` and what
    they take (`dictionary_bytes`; `encoder_bytes`: to compress with the newest): as of now; the rest: since the start.

    `saved_bytes`: of the pool, by size class. `pages_not_smaller` were tried and left as they were.

    `pages_deduplicated` were found to be like another one; now there are `pages_shared` that share `shared_pages`, and
    finding more takes `index_bytes`.
    """

    pages_recompressed: int
    pages_not_smaller: int
    saved_bytes: int
    processor_seconds: float
    in_flight: int
    bytes: dict[str, int]
    dictionaries: list[DictionaryStats]
    dictionary_bytes: int
    encoder_bytes: int
    pages_deduplicated: int
    pages_shared: int
    shared_pages: int
    index_bytes: int


class EngineStats(TypedDict):
    """What the engine counts. Pages and bytes: as of now; the rest: since the start.

    `pages` are those of the pool by codec, those `on_disk` whatever their codec, and the lost; a `duplicate` shares one
    of these. `original_bytes` counts all but the lost, `compressed_bytes` the pool's alone.
    """

    algorithm: str
    allocator: str
    zstd_level: int
    swap_size_bytes: int
    page_size_bytes: int
    pages: dict[str, int]
    original_bytes: int
    compressed_bytes: int
    pool_bytes: int
    pool_peak_bytes: int
    pool_reserve_bytes: int
    pool_limit_bytes: int
    metadata_bytes: int
    loads: int
    stores: int
    discards: int
    #: What a pager holds for a machine that is out of memory, and stuck; less while it is given.
    ballast_bytes: int
    #: Requests on the swap file that a pager is at; the end of paging waits for them.
    page_operations: int
    pages_compacted: int
    movers_awaited: int
    #: How often a pager has taken over from another, and how long that took last.
    takeovers: int
    takeover_seconds: float
    #: Behind a takeover: how many were looked at, and how many of these were bad.
    objects_verified: int
    objects_found_bad: int
    rejected_stores: dict[str, int]
    errors: dict[str, int]
    load_latency: LatencyStats
    store_latency: LatencyStats
    mover_waits: LatencyStats
    #: Empty for z3fold, which has no size classes.
    classes: list[ClassStats]
    recompression: RecompressionStats
    writeback: WritebackStats


@dataclass(frozen=True)
class Written:
    """What a command to write pages back has done. `ended`: done; or why it ended early: budget (used up), full (the
    disk), failed (the disk)."""

    pages: int
    bytes: int
    ended: str


@dataclass(frozen=True)
class Recompressed:
    """What a command to recompress pages has done. `ended`: done (with the last page), budget (the next command goes
    on), full (no room in the pool), or stopped."""

    looked: int
    recompressed: int
    not_smaller: int
    #: They are like another one, and share it from now on.
    shared: int
    saved: int
    microseconds: int
    ended: str


class Engine(Protocol):
    """What control files and metrics need of an engine, wherever it runs. Errors: OSError, ValueError."""

    def stats(self) -> EngineStats:
        """A reading of all counters; waits for no page."""

    def set_mem_limit(self, size_bytes: int) -> None:
        """Changes what the pool may take. Below what it takes, stores fail until enough is freed."""

    def set_compression(self, algorithm: str, zstd_level: int) -> None:
        """Changes what new pages are compressed with; stored pages stay as they are, and readable."""

    def compact(self) -> None:
        """Moves stored objects together, and gives back the memory that they no longer need. A pager does so behind."""

    def reset(self) -> None:
        """Drops every page. EBUSY while the swap file is open."""

    def backing(self) -> Path | None:
        """The backing disk, as it was configured."""

    def mark_idle(self, older_seconds: int) -> None:
        """Marks the pages that nobody has used for so long as idle; 0: all. A page that is used is not idle any more.
        ENODEV without a backing disk."""

    def write_back(self, what: str) -> Written:
        """Moves pages to the backing disk: "all", "idle" (those marked), "unused N" (for so many seconds), "huge" (what
        does not compress), "huge_idle" (both), or "page N", one slot. Takes as long as the disk does. ENODEV without a
        backing disk."""

    def tick(self) -> None:
        """Makes all pages a tick older, but those that are used; up to 63. ENODEV without a pager."""

    def recompress(
        self,
        codec: str,
        *,
        tier: int,
        level: int,
        age: int,
        share: bool = True,
        pages: int = 1 << 32,
        microseconds: int = (1 << 32) - 1,
    ) -> Recompressed:
        """Makes pages smaller that are at least `age` ticks old, with "lz4", "zstd" or (zstd with) "dictionary", until
        so many were tried, or so much processor time used. What was tried for this tier (1 to 3) or a higher one is
        left alone. With `share`, those that are alike are stored once, where looking for them pays. ENOENT: there is no
        dictionary; ENODEV without a pager."""

    def limit_writing(self, size_bytes: int | None) -> None:
        """Sets what may still be written to the backing disk; None: there is no limit. Of a budget in the configuration
        it takes away what is more, which counts as written; EPERM for more than that leaves. ENODEV without a backing
        disk."""


class EmbeddedEngine(_native.Engine):
    """An engine in this process: the portable path, for tests, containers and comparison."""

    #: How often the swap file is open.
    opens: int = 0

    def reset(self) -> None:
        if self.opens:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        super().reset()

    def backing(self) -> Path | None:
        return None

    def mark_idle(self, older_seconds: int) -> None:
        raise OSError(errno.ENODEV, NO_BACKING)

    def write_back(self, what: str) -> Written:
        raise OSError(errno.ENODEV, NO_BACKING)

    def tick(self) -> None:
        raise OSError(errno.ENODEV, NO_PAGER)

    def recompress(
        self,
        codec: str,
        *,
        tier: int,
        level: int,
        age: int,
        share: bool = True,
        pages: int = 1 << 32,
        microseconds: int = (1 << 32) - 1,
    ) -> Recompressed:
        raise OSError(errno.ENODEV, NO_PAGER)

    def limit_writing(self, size_bytes: int | None) -> None:
        raise OSError(errno.ENODEV, NO_BACKING)


def protect_process() -> None:
    """Keeps the process fit to serve reclaim: memory locked, marked as I/O flusher, last in line for the OOM killer.

    Call it before any thread starts: threads inherit the flusher mark. What the process may not do is logged as a
    warning, and it goes on: such a daemon is fit for tests, not for a machine's swap.
    """
    steps: dict[str, Callable[[], object]] = {
        "lock its memory (CAP_IPC_LOCK)": lock_memory,
        "become an I/O flusher (CAP_SYS_RESOURCE)": become_io_flusher,
        "leave the OOM killer's sight (CAP_SYS_RESOURCE)": lambda: Path("/proc/self/oom_score_adj").write_text("-1000"),
    }
    for what, step in steps.items():
        try:
            step()
        except OSError as error:
            log.warning("the daemon may not %s: %s; do not use it for swap", what, error.strerror)
