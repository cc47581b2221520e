"""The page store as the rest of the daemon sees it: the one boundary to native code.

In this form the engine is embedded in the daemon's process. Nothing outside this module imports `zswapd._native`.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from zswapd._native import Engine, become_io_flusher, lock_memory

__all__ = ["ClassStats", "Engine", "EngineStats", "LatencyStats", "protect_process"]

log = logging.getLogger(__name__)


class LatencyStats(TypedDict):
    """A latency histogram. `counts` is per bucket, not cumulative, with one more for what exceeds every bound."""

    bounds_seconds: list[float]
    counts: list[int]
    sum_seconds: float


class ClassStats(TypedDict):
    """Occupancy of one size class of the pool."""

    size_bytes: int
    pages_per_zspage: int
    objects_per_zspage: int
    zspages: int
    objects: int


class EngineStats(TypedDict):
    """What the engine counts. Pages and bytes: as of now; the rest: since the start."""

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
    rejected_stores: dict[str, int]
    errors: dict[str, int]
    load_latency: LatencyStats
    store_latency: LatencyStats
    classes: list[ClassStats]


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
