"""`python -m zswapd.bench.demo`: real pages through a real swap device, every one of them checked.

A workload in a memory cgroup touches four times the memory it may have, so the kernel swaps to zswapd; in the end the
swap is detached with the pages still in it. Where nothing can be swapped, the same phases run on the mounted swap
file with O_DIRECT, and where nothing can be mounted, on the engine embedded in the workload.
"""

import sys
from pathlib import Path
from typing import Any

import click
import trio
from rich.console import Console

from zswapd import swapdev
from zswapd.bench.ability import cannot_swap
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.commands import Interrupted, until_signal
from zswapd.bench.corpus import Corpus, build, describe
from zswapd.bench.devices import Held
from zswapd.bench.leftovers import leftovers
from zswapd.bench.locked import lock_memory
from zswapd.bench.programs import PAGE
from zswapd.bench.runner import Workload, workload
from zswapd.bench.screen import SMALLEST, Screen, Size
from zswapd.bench.zswapd_device import Daemon, Zswapd, held
from zswapd.config import format_size
from zswapd.errors import ZswapdError

ALGORITHM = "lz4"


async def demo(screen: Screen, size: int, seed: int, directory: Path) -> None:
    """Everything the demo does. Leaves nothing behind, cancelled or failed. Raises ZswapdError, WrongPages."""
    # The corpus, the pool, the workload and the programs that the pages come from want room beside each other.
    # The swap keeps room for pages of other processes, since it comes first in priority.
    touched = min(size * 5 // 8, swapdev.mem_available() * 3 // 10) >> 20 << 20
    if touched < SMALLEST // 2:
        raise ZswapdError(f"too little memory is free: {format_size(swapdev.mem_available())}", "free some")
    reason = cannot_swap()
    if not reason:
        lock_memory()
    directory.mkdir(exist_ok=True)
    with await build(touched // PAGE, seed, screen.report) as corpus:
        screen.line("data", describe(corpus))
        if corpus.left_out:
            screen.line("", f"left out: {', '.join(corpus.left_out)} (failed or took too long)")
        if not reason:
            await _swapped(screen, corpus, size, directory)
            return
        screen.line("no swap", f"{reason}; the same pages and checks on the mounted swap file instead", "yellow")
        daemon = Daemon(directory, size, ALGORITHM)
        try:
            try:
                await daemon.start()
            except (ZswapdError, OSError) as error:
                lines = str(error).splitlines()
                why = next((line for line in reversed(lines) if line.startswith("zswapd: ")), lines[0])
                screen.line("no mount", f"{why}; the engine embedded in the workload instead", "yellow")
                await _embedded(screen, corpus)
            else:
                await _mounted(screen, corpus, daemon)
        finally:
            with trio.CancelScope(shield=True):
                await daemon.stop()


async def _swapped(screen: Screen, corpus: Corpus, size: int, directory: Path) -> None:
    limit = corpus.pages * PAGE // 4
    before = _vmstat()
    screen.report("starting the daemon", 0, 1)
    with MemoryCgroup(limit) as group:
        async with Zswapd("zswapd", directory, size, ALGORITHM) as device:
            screen.line(
                "swap",
                f"{device.path}, {format_size(size)}, {ALGORITHM}; the workload touches "
                f"{format_size(corpus.pages * PAGE)} and may have {format_size(limit)}",
            )
            async with workload(corpus, group, screen.report) as load:
                await _fill(screen, load)
                _show_held(screen, await device.held())
                await _exercise(screen, load)

                stats = await device.daemon.stats()
                counted = {name: count - before[name] for name, count in _vmstat().items()}
                screen.line(
                    "traffic",
                    f"the kernel: {counted['pswpout']} pages out ({format_size(counted['pswpout'] * PAGE)}), "
                    f"{counted['pswpin']} in ({format_size(counted['pswpin'] * PAGE)}); "
                    f"the daemon: {stats['stores']} stored, {stats['loads']} loaded",
                )

                # swapoff with pages in it: they all come back into the workload's memory.
                group.set_limit(2 * corpus.pages * PAGE)
                inside = await device.emptying(device.detach, "detach", screen.report)
                screen.line("detach", f"{format_size(inside)} came back while the workload lived")
                await _verify(screen, load)
                screen.line("result", f"{load.verified} pages verified, 0 wrong", "green")


async def _mounted(screen: Screen, corpus: Corpus, daemon: Daemon) -> None:
    async with workload(corpus, None, screen.report, str(daemon.mount_point / "swapfile")) as load:
        await _fill(screen, load)
        _show_held(screen, held(await daemon.stats()))
        await _exercise(screen, load)
        stats = await daemon.stats()
        screen.line("traffic", f"the daemon: {stats['stores']} pages stored, {stats['loads']} loaded")
        screen.line("result", f"{load.verified} pages verified, 0 wrong (through FUSE, not swapped)", "green")


async def _embedded(screen: Screen, corpus: Corpus) -> None:
    async with workload(corpus, None, screen.report, "engine") as load:
        await _fill(screen, load)
        _show_held(screen, held((await load.run("stats"))["stats"]))
        await _exercise(screen, load)
        screen.line("result", f"{load.verified} pages verified, 0 wrong (in the engine, not swapped)", "green")


async def _fill(screen: Screen, load: Workload) -> None:
    result = await load.run("fill")
    screen.line("fill", f"{result['mb_per_second']:.0f} MB/s")


def _show_held(screen: Screen, now: Held) -> None:
    screen.line(
        "pool",
        f"{format_size(now.original_bytes)} of pages in {format_size(now.used_bytes)} of memory: "
        f"effective ratio {now.ratio:.2f}",
    )


async def _exercise(screen: Screen, load: Workload) -> None:
    await _verify(screen, load)
    result = await load.run("rewrite", seed=2)
    screen.line("rewrite", f"{result['rewritten']} pages replaced")
    result = await load.run("random", seed=3)
    screen.line(
        "random",
        f"{result['faults']} faults: p50 {result['p50_us']:.0f} µs, p90 {result['p90_us']:.0f}, "
        f"p99 {result['p99_us']:.0f}, p99.9 {result['p999_us']:.0f}, max {result['max_us']:.0f}",
    )
    result = await load.run("sequential")
    screen.line("sequential", f"{result['mb_per_second']:.0f} MB/s")
    await _verify(screen, load)


async def _verify(screen: Screen, load: Workload) -> None:
    result = await load.run("verify")
    screen.line("verify", f"{result['verified']} pages, {result['wrong']} wrong")


def _vmstat() -> dict[str, Any]:
    """Pages that the kernel has swapped out and in since boot."""
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name: int(count) for name, count in lines if name in ("pswpout", "pswpin")}


@click.command()
@click.option(
    "--size",
    default="1GiB",
    type=Size(),
    show_default=True,
    help="Size of the swap file; the workload touches five eighths of it.",
)
@click.option("--seed", default=1, show_default=True, help="Decides which pages, and in which order.")
@click.option(
    "--directory",
    default=Path("var"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Runtime files.",
)
def main(size: int, seed: int, directory: Path) -> None:
    """Swap real pages through zswapd and check every one."""
    status = 1
    with Screen(Console()) as screen:
        try:
            trio.run(until_signal, lambda: demo(screen, size, seed, directory))
            status = 0
        except Interrupted as error:
            screen.line("stopped", str(error), "yellow")
            status = 130
        except (ZswapdError, OSError) as error:
            screen.line("failed", str(error), "red")
        left = leftovers(directory)
        if left:
            screen.line("left behind", "; ".join(left), "red")
            status = status or 1
        else:
            screen.line("clean", "nothing left behind: no swap, loop device, mount, file, cgroup or process")
    sys.exit(status)


if __name__ == "__main__":
    main()
