"""What the runs of all rows come to: medians and spread, as tables."""

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

#: What is measured, and what it is called, with its unit.
SPEED = {
    "fill_mb_per_second": "fill MB/s",
    "random_p50_us": "random p50 µs",
    "random_p90_us": "random p90 µs",
    "random_p99_us": "random p99 µs",
    "random_p999_us": "random p99.9 µs",
    "sequential_mb_per_second": "sequential MB/s",
}
COST = {
    "used_bytes": "memory MiB",
    "effective_ratio": "effective ratio",
    "process_bytes": "processes MiB",
    "workload_cpu_seconds": "workload CPU s",
    "zswapd_cpu_seconds": "zswapd CPU s",
    "pager_cpu_seconds": "pager CPU s",
    "kernel_cpu_seconds": "kernel CPU s",
}
DISK = {
    "working_set_pools": "set / pool",
    "evicted_bytes": "evicted MiB",
    "disk_written_per_page": "written per page",
    "disk_read_bytes": "read MiB",
    "swapoff_mb_per_second": "swapoff MB/s",
    "swapoff_disk_share": "from disk",
}
FIGURES = SPEED | COST | DISK

Spread = dict[str, float]  # median, min, max
Summary = dict[str, dict[str, Spread | None]]  # by row and figure


def summarize(runs: list[dict[str, Any]]) -> Summary:
    """Median, minimum and maximum of every figure, by row."""
    rows: Summary = {}
    for row in dict.fromkeys(run["row"] for run in runs):
        rows[row] = {}
        for figure in FIGURES:
            values = [run[figure] for run in runs if run["row"] == row and run[figure] is not None]
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
            rows[row][figure] = spread
    return rows


def table(rows: Summary, figures: dict[str, str]) -> Table:
    """The summary for people: medians, and beneath how far the runs were from them at most."""
    grid = Table("swap device", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in figures.values():
        grid.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for row, spreads in rows.items():
        cells = []
        for figure in figures:
            spread = spreads[figure]
            if spread is None:
                cells.append("-")
                continue
            median = spread["median"]
            away = max(spread["max"] - median, median - spread["min"]) / median if median else 0
            cells.append(f"{show(figure, median)}\n[dim]±{away:.0%}[/]")
        grid.add_row(row, *cells)
    return grid


def line(run: dict[str, Any]) -> str:
    """One run in one line."""
    shown = (f"{title} {show(figure, run[figure])}" for figure, title in FIGURES.items() if run[figure] is not None)
    return ", ".join(shown)


def show(figure: str, value: float) -> str:
    """A figure in its unit, with three digits or more."""
    if figure.endswith("_bytes"):
        value /= 1 << 20
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
