"""`zswapctl bench`: zswapd beside the kernel's own swap devices, on the same pages in the same kind of cgroup."""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from zswapd import swapdev
from zswapd.bench.ability import cannot_swap
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.commands import until_signal
from zswapd.bench.corpus import Corpus, build, describe
from zswapd.bench.devices import Device, SwapFile, Zram
from zswapd.bench.leftovers import leftovers
from zswapd.bench.locked import lock_memory
from zswapd.bench.programs import PAGE
from zswapd.bench.runner import workload
from zswapd.bench.screen import Screen, Size
from zswapd.bench.zswapd_device import Zswapd
from zswapd.config import format_size
from zswapd.errors import ZswapdError

LIMIT_SHARE = 4  # the workload may have a quarter of what it touches
# Twice what is touched: from half full on the kernel frees the slot of every page that it reads, and writes it anew.
SWAP_SHARE = 2
STRANGERS = 0.02  # more than this share of the pages in the device being other processes' disturbs the figures

# What is measured, and what it is called.
FIGURES = {
    "fill_mb_per_second": "fill MB/s",
    "random_p50_us": "random p50 µs",
    "random_p99_us": "random p99 µs",
    "sequential_mb_per_second": "sequential MB/s",
    "effective_ratio": "effective ratio",
    "cpu_seconds": "CPU s",
    "machine_cpu_seconds": "machine CPU s",
}


def device(row: str, directory: Path, size: int) -> Device:
    """The swap device that a row of the comparison names."""
    kind, _, algorithm = row.partition("-")
    if kind == "zswapd" and algorithm in ("lz4", "zstd"):
        return Zswapd(directory, size, algorithm)
    if kind == "zram" and algorithm:
        return Zram(algorithm, size)
    if row == "file":
        return SwapFile(directory, size)
    raise ZswapdError(f"no row is called {row}", "rows are zswapd-lz4, zswapd-zstd, zram-ALGORITHM, file")


async def measure(row: str, corpus: Corpus, directory: Path, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    """One run of one row: its figures. Every page is verified: raises WrongPages if one is wrong. Leaves nothing."""
    size = corpus.pages * PAGE
    with MemoryCgroup(size // LIMIT_SHARE) as group:
        async with device(row, directory, size * SWAP_SHARE) as swap, workload(corpus, group, report) as load:
            machine, daemon = _machine_cpu_seconds(), swap.cpu_seconds()
            fill = await load.run("fill")
            held = await swap.held()
            random = await load.run("random", seed=corpus.seed)
            sequential = await load.run("sequential")
            daemon, machine = swap.cpu_seconds() - daemon, _machine_cpu_seconds() - machine
            area = swap.area()
            strangers = max(0, (area.used_bytes if area else 0) - group.swap_bytes() - group.usage_bytes())
            await load.run("rewrite", seed=corpus.seed)
            await load.run("verify")
            swap.require_first()
            return {
                "row": row,
                "fill_mb_per_second": fill["mb_per_second"],
                "random_faults": random["faults"],
                **{f"random_{key}": value for key, value in random.items() if key.endswith("_us")},
                "sequential_mb_per_second": sequential["mb_per_second"],
                "effective_ratio": held.ratio if held else None,
                "cpu_seconds": daemon + sum(phase["cpu_seconds"] for phase in (fill, random, sequential)),
                "machine_cpu_seconds": machine,
                "pages_verified": load.verified,
                "strangers_bytes": strangers,
                "disturbed": strangers > STRANGERS * size,
            }


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float] | None]]:
    """Median, minimum and maximum of every figure, by row."""
    rows: dict[str, dict[str, dict[str, float] | None]] = {}
    for row in dict.fromkeys(run["row"] for run in runs):
        rows[row] = {}
        for figure in FIGURES:
            values = [run[figure] for run in runs if run["row"] == row and run[figure] is not None]
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
            rows[row][figure] = spread
    return rows


def table(rows: dict[str, dict[str, dict[str, float] | None]]) -> Table:
    """The summary for people: medians, and beneath how far the runs were from them at most."""
    grid = Table("swap device", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in FIGURES.values():
        grid.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row, figures in rows.items():
        cells = []
        for spread in figures.values():
            if spread is None:
                cells.append("-")
                continue
            median = spread["median"]
            away = max(spread["max"] - median, median - spread["min"]) / median if median else 0
            cells.append(f"{_number(median)}\n[dim]±{away:.0%}[/]")
        grid.add_row(row, *cells)
    return grid


def _number(value: float) -> str:
    """Three digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _machine_cpu_seconds() -> float:
    """CPU time that was not idle, of all CPUs since boot: kernel threads and other processes too."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq = (int(field) for field in stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@click.command()
@click.option("--rows", default="zswapd-lz4,zram-lz4,file", show_default=True, help="Swap devices, by commas.")
@click.option("--size", default="1GiB", type=Size(), show_default=True, help="Memory that the workload touches.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of every row.")
@click.option("--seed", default=1, show_default=True, help="Decides which pages, and in which order.")
@click.option(
    "--directory",
    default=Path("/var/tmp"),
    show_default=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="For runtime files and the plain swap file: on the disk to compare with.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(rows: str, size: int, repeats: int, seed: int, directory: Path, as_json: bool) -> None:
    """Compare zswapd with zram and a plain swap file.

    A workload touches memory of real programs, four times what its cgroup may have, so that the kernel swaps. Rows
    take turns, and every page is checked in every run. The swap devices come before all others while they exist.
    "CPU s" is the workload and the daemon; "machine CPU s" is everything, kernel threads and other processes too.
    """
    pages = size // PAGE
    names = [row.strip() for row in rows.split(",")]
    for row in names:
        device(row, directory, PAGE)
    if reason := cannot_swap():
        raise ZswapdError(f"this machine cannot swap: {reason}")
    # The corpus, and at the worst as much again in the pool or the programs that the pages come from.
    if 2 * pages * PAGE > swapdev.mem_available():
        raise ZswapdError(f"too little memory is free: {format_size(swapdev.mem_available())}", "use a smaller --size")
    lock_memory()

    runs: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    with Screen(Console(stderr=as_json)) as screen:

        async def work() -> None:
            with await build(pages, seed, screen.report) as corpus:
                screen.line("data", describe(corpus))
                about.update(pages=corpus.pages, seed=seed, sources=dict(corpus.sources))
                for number in range(1, repeats + 1):
                    for row in names:

                        def report(what: str, done: int, total: int, at: str = f"{row} {number}/{repeats}: ") -> None:
                            screen.report(at + what, done, total)

                        run = await measure(row, corpus, directory, report)
                        runs.append(run)
                        shown = (f"{title} {_number(run[key])}" for key, title in FIGURES.items() if run[key])
                        screen.line(f"{row} {number}/{repeats}", ", ".join(shown))
                        if run["disturbed"]:
                            strange = format_size(run["strangers_bytes"])
                            screen.line("", f"disturbed: {strange} of the swap were other processes' pages", "yellow")

        try:
            trio.run(until_signal, work)
        finally:
            if left := leftovers(directory):
                screen.line("left behind", "; ".join(left), "red")
    if left:
        raise ZswapdError("not everything was removed: see above")
    summary = summarize(runs)
    if as_json:
        click.echo(json.dumps({**about, "rows": summary, "runs": runs}, indent=2))
    else:
        Console().print(table(summary))
