"""Whether recompression keeps to its budget, and what it costs who fills swap: `python -m zswapd.bench.budget`.

The budget: pages of real programs go to swap, more than can be recompressed in the time, and all are idle at once. What
the thread that recompresses has used then, and those that train dictionaries, is compared with the percentage that was
set; on an idle machine, and beside as many busy processes as it has processors. The fill: the same pages, with a pager
that does not recompress and one that does so all the while, in turns.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import trio
from rich.console import Console

from zswapd.bench.ability import cannot_swap
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.commands import until_signal
from zswapd.bench.corpus import Corpus, build, describe
from zswapd.bench.leftovers import leftovers
from zswapd.bench.locked import lock_memory
from zswapd.bench.measure import LIMIT_SHARE, SWAP_SHARE
from zswapd.bench.programs import PAGE
from zswapd.bench.runner import workload
from zswapd.bench.screen import Screen, Size
from zswapd.bench.zswapd_device import SOON, Zswapd
from zswapd.errors import ZswapdError

LOOK_SECONDS = 0.5
NANO = 1e-9


class Processor:
    """Processor time of the threads of two processes, also of those that have ended since they were looked at."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._seconds: dict[str, dict[str, float]] = {"recompressor": {}, "training": {}}

    def look(self) -> None:
        for what, pid, name in (
            ("recompressor", self._pids["pager"], "recompressor"),
            ("training", self._pids["zswapd"], ""),
        ):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with suppress(OSError):  # it has ended
                    # In zswapd, whatever a thread beside the main one does counts as training: it is little.
                    if task.name != str(pid) and (task / "comm").read_text().strip().startswith(name):
                        ran = int((task / "schedstat").read_text().split()[0])
                        self._seconds[what][task.name] = ran * NANO

    def seconds(self) -> dict[str, float]:
        self.look()
        return {what: sum(threads.values()) for what, threads in self._seconds.items()}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """That many processes that use all the processor time that they get, until the end."""
    command = [sys.executable, "-I", "-S", "-c", "import sys, threading\nthreading.Thread(target=lambda: "]
    command[-1] += "(sys.stdin.read(), __import__('os')._exit(0))).start()\nwhile True: pass"
    started: list[subprocess.Popen[bytes]] = []
    try:
        # They end with us: then their input does.
        started += [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def swap_of(corpus: Corpus, directory: Path, percent: int) -> Zswapd:
    settings = SOON | {"recompression__cpu_percent": percent}
    return Zswapd("zswapd-lz4", directory, SWAP_SHARE * corpus.pages * PAGE, "lz4", None, **settings)


async def budget(
    corpus: Corpus, directory: Path, percent: int, seconds: float, processes: int, screen: Screen
) -> dict[str, Any]:
    """What is used in so long, from the moment that pages have come. Every page is checked in the end."""
    size = corpus.pages * PAGE
    with MemoryCgroup(size // LIMIT_SHARE) as group:
        async with swap_of(corpus, directory, percent) as swap, workload(corpus, group, screen.report) as load:
            await load.run("fill")
            processor = Processor(swap.daemon.processes())
            with busy_processes(processes):
                before, begun = processor.seconds(), trio.current_time()
                while (elapsed := trio.current_time() - begun) < seconds:
                    screen.report(f"{percent} %, {processes} busy processes", round(elapsed), round(seconds))
                    processor.look()
                    await trio.sleep(LOOK_SECONDS)
                after, elapsed = processor.seconds(), trio.current_time() - begun
            counts = (await swap.daemon.stats())["recompression"]
            group.set_limit(2 * size)
            await load.run("verify")
    used = {what: after[what] - before[what] for what in after}
    return {
        "percent": percent,
        "busy_processes": processes,
        "seconds": elapsed,
        **{f"{what}_seconds": value for what, value in used.items()},
        "used_percent": 100 * sum(used.values()) / elapsed,
        "pages_tried": counts["pages_recompressed"] + counts["pages_not_smaller"],
    }


async def fill(corpus: Corpus, directory: Path, percent: int, screen: Screen) -> float:
    """MB/s of a second fill, so that there is something to recompress from its beginning."""
    with MemoryCgroup(corpus.pages * PAGE // LIMIT_SHARE) as group:
        async with swap_of(corpus, directory, percent) as swap, workload(corpus, group, screen.report) as first:
            await first.run("fill")
            while percent and not (await swap.daemon.stats())["recompression"]["pages_recompressed"]:
                await trio.sleep(LOOK_SECONDS)
            async with workload(corpus, group, screen.report) as load:
                speed: float = (await load.run("fill"))["mb_per_second"]
    return speed


@click.command()
@click.option("--size", default="512MiB", type=Size(), show_default=True, help="Memory that the workload touches.")
@click.option("--percent", default=5, show_default=True, type=click.IntRange(1, 100), help="The budget.")
@click.option("--seconds", default=150.0, show_default=True, help="How long each measurement of it takes.")
@click.option("--fills", default=4, show_default=True, type=click.IntRange(0), help="Fills with and without.")
@click.option("--directory", default=Path("/var/tmp"), show_default=True, type=click.Path(path_type=Path, exists=True))
def main(size: int, percent: int, seconds: float, fills: int, directory: Path) -> None:
    """Measure the processor time of recompression, and the speed of filling beside it."""
    if reason := cannot_swap():
        raise ZswapdError(f"this machine cannot swap: {reason}")
    lock_memory()
    with Screen(Console()) as screen:

        async def work() -> None:
            with await build(size // PAGE, 1, screen.report) as corpus:
                screen.line("data", describe(corpus))
                speeds: dict[int, list[float]] = {0: [], percent: []}
                for _ in range(fills):
                    for one, found in speeds.items():
                        found.append(await fill(corpus, directory, one, screen))
                for one, found in speeds.items():
                    if found:
                        spread = f"{min(found):.0f} to {max(found):.0f}"
                        screen.line(f"fill, {one} %", f"{statistics.median(found):.0f} MB/s ({spread})")
                for processes in (0, os.cpu_count() or 1) if seconds else ():
                    used = await budget(corpus, directory, percent, seconds, processes, screen)
                    screen.line(
                        f"budget of {percent} %, {processes} busy processes",
                        "{used_percent:.2f} % used in {seconds:.0f} s: {recompressor_seconds:.2f} s recompressing, "
                        "{training_seconds:.2f} s training; {pages_tried} pages tried".format(**used),
                    )

        try:
            trio.run(until_signal, work)
        finally:
            if left := leftovers(directory):
                screen.line("left behind", "; ".join(left), "red")


if __name__ == "__main__":
    try:
        main()
    except (ZswapdError, OSError) as error:
        sys.exit(f"budget: {error}")
