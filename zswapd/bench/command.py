"""`zswapctl bench`: zswapd beside the kernel's own swap devices, on the same pages in the same kind of cgroup."""

import json
import os
from pathlib import Path
from typing import Any

import click
import trio
from rich.console import Console

from zswapd import __version__, swapdev
from zswapd.bench.ability import cannot_swap
from zswapd.bench.commands import until_signal
from zswapd.bench.corpus import build, describe
from zswapd.bench.damon import switched_off
from zswapd.bench.leftovers import leftovers
from zswapd.bench.locked import lock_memory
from zswapd.bench.measure import LIMIT_SHARE, measure, refuse_to_forget
from zswapd.bench.plot import plot, require
from zswapd.bench.programs import PAGE
from zswapd.bench.rows import KNOWN, NULL, device, offered
from zswapd.bench.screen import Screen, Size
from zswapd.bench.summary import COST, DISK, SPEED, line, summarize, table
from zswapd.config import format_size
from zswapd.errors import ZswapdError


@click.command()
@click.option("--rows", default="", help=f"Swap devices, by commas: {KNOWN}. Default: all that there are, but null.")
@click.option("--size", default="1GiB", type=Size(), show_default=True, help="Memory that the workload touches.")
@click.option(
    "--pool",
    type=Size(8 << 20, "which is the reserve of zswapd's pool alone"),
    help="Memory that a device may have for pages; the rest goes to a disk. Rows without one are left out.",
)
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of every row.")
@click.option("--seed", default=1, show_default=True, help="Decides which pages, and in which order.")
@click.option(
    "--directory",
    default=Path("/var/tmp"),
    show_default=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="For runtime files and the plain swap file: on the disk to compare with.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Draw the medians into this PNG file (needs matplotlib).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every run's figures too.")
def bench(
    rows: str,
    size: int,
    pool: int | None,
    repeats: int,
    seed: int,
    directory: Path,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Compare zswapd with zram, zswap and a plain swap file.

    A workload touches memory of real programs, four times what its cgroup may have, so that the kernel swaps. Rows
    take turns, and every page is checked in every run. The swap devices come before all others while they exist.
    "memory" is what the pages take, metadata included, after the fill; "processes" is what zswapd and its pager take
    beside it. "kernel CPU" is that of kernel threads; what the kernel does in a process's name is in the process's.

    With --pool, zswapd gets a backing file under --directory, as large as what is touched, and zswap the pool that
    is nearest (whole percents of memory) over a swap file there, with its shrinker on. "set / pool" says how many pools
    all that is touched would fill, compressed as the pages in the pool are: four, where --size is four times --pool
    times the effective ratio. A quarter of it stays in the cgroup. "written per page" is what the kernel has seen going
    to the disk, cleaning included, for each page evicted to it, in pages; "from disk" the share of what swapoff brought
    back that was only there.

    The row null is a pager that stores nothing: the floor, unverified. It is refused where the kernel could swap out
    other processes meanwhile, whose pages would be lost. For it, DAMON is off during the run, and on again afterwards.
    """
    pages = size // PAGE
    if picture:
        require(picture)
    names = [row.strip() for row in rows.split(",") if row.strip()]
    for row in names:
        device(row, directory, PAGE, pool)
    if reason := cannot_swap():
        raise ZswapdError(f"this machine cannot swap: {reason}")
    # The corpus, at the worst as much again in the pool or the programs that the pages come from, and in the end all
    # of the workload's pages.
    if 3 * pages * PAGE > swapdev.mem_available():
        raise ZswapdError(f"too little memory is free: {format_size(swapdev.mem_available())}", "use a smaller --size")
    lock_memory()

    runs: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    with Screen(Console(stderr=as_json)) as screen:

        async def work() -> None:
            if NULL not in names:
                await compare()
                return
            async with switched_off(lambda what: screen.line("DAMON", what, "yellow")):
                refuse_to_forget(Path(), size)
                await compare()

        async def compare() -> None:
            for row in [] if names else await offered(pool):
                try:
                    device(row, directory, PAGE, pool)
                    names.append(row)
                except ZswapdError as error:
                    screen.line(row, f"left out: {error}", "yellow")
            with await build(pages, seed, screen.report) as corpus:
                screen.line("data", describe(corpus))
                about.update(
                    version=__version__,
                    kernel=os.uname().release,
                    cpus=os.cpu_count(),
                    seed=seed,
                    pages=corpus.pages,
                    pool_bytes=pool,
                    limit_bytes=corpus.pages * PAGE // LIMIT_SHARE,
                    sources=dict(corpus.sources),
                    dropped=dict(corpus.dropped),
                )
                for number in range(1, repeats + 1):
                    for row in names:

                        def report(what: str, done: int, total: int, at: str = f"{row} {number}/{repeats}: ") -> None:
                            screen.report(at + what, done, total)

                        run = await measure(row, corpus, directory, report, pool)
                        runs.append(run)
                        screen.line(f"{row} {number}/{repeats}", line(run))
                        if not run["pages_verified"]:
                            screen.line("", "not verified: it stores nothing", "yellow")
                        if run["refused_stores"]:
                            screen.line(
                                "",
                                f"{run['refused_stores']} stores were refused: those pages stayed in memory",
                                "yellow",
                            )
                        if run["pool_limit_bytes"] and not run["evicted_bytes"]:
                            screen.line("", "nothing went to the disk: the pool was never full", "yellow")
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
    if picture:
        bounded = f", pools of {format_size(pool)}" if pool else ""
        plot(summary, f"zswapd {__version__}: {format_size(size)} touched{bounded}, seed {seed}", picture)
    if as_json:
        click.echo(json.dumps({**about, "rows": summary, "runs": runs}, indent=2))
    else:
        Console().print(table(summary, SPEED), table(summary, COST), *([table(summary, DISK)] if pool else []))
