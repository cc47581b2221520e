"""What zswapd and zram save on the memory of real programs, all memory counted: `python -m zswapd.bench.savings`.

The memory of each program is captured as it is, with pages that are equal or same-filled, and goes through every device
as swap: a process in a cgroup of its own fills memory with it and is then made to give nearly all of it to the device.
What the device then takes is read, with its tables and reserve, when it has settled, and every page is checked. First
come the pages of all programs together. With --guest the same pages are written to zram in a virtual machine too, whose
kernel has algorithms that this one may lack.
"""

import dataclasses
import json
import os
import random
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle
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
from zswapd.bench.commands import run, until_signal
from zswapd.bench.corpus import Corpus, files
from zswapd.bench.damon import switched_off
from zswapd.bench.devices import Held, Zram, zram_held
from zswapd.bench.leftovers import leftovers
from zswapd.bench.locked import lock_memory
from zswapd.bench.programs import PAGE, Program, Running, known
from zswapd.bench.rows import device
from zswapd.bench.runner import workload
from zswapd.bench.screen import Screen, Size
from zswapd.config import format_size
from zswapd.errors import ZswapdError

LEFT = 12 << 20  # what the process may keep of the pages: it has to run
ROOM = 64 << 20  # for the process itself
TOTAL = "all together"
GUEST_SECONDS, GUEST_GRACE_SECONDS = 7200, 30  # a virtual machine is emulated in software, and its boot may be repeated
Found = dict[str, dict[str, dict[str, Any]]]  # figures by program and row


async def capture(program: Program, size: int, seconds: float, texts: Sequence[str]) -> Corpus | None:
    """A program's anonymous pages in the order of their addresses, up to `size` bytes; None where it gave none."""
    corpus = Corpus(os.memfd_create("zswapd-bench-corpus", os.MFD_CLOEXEC), 0)
    running = Running(program, size, seconds, texts)
    try:
        if await running.ready():
            for page in running.pages():
                if corpus.pages == size // PAGE:
                    break
                os.write(corpus.fd, page)
                corpus.pages += 1
    except BaseException:
        os.close(corpus.fd)
        raise
    finally:
        running.end()
    if not corpus.pages:
        os.close(corpus.fd)
        return None
    return corpus


def together(corpora: Sequence[Corpus]) -> Corpus:
    """The pages of all, one after the other."""
    corpus = Corpus(os.memfd_create("zswapd-bench-corpus", os.MFD_CLOEXEC), 0)
    for one in corpora:
        for at in range(0, one.pages * PAGE, 1 << 20):
            os.write(corpus.fd, os.pread(one.fd, min(1 << 20, one.pages * PAGE - at), at))
        corpus.pages += one.pages
    return corpus


async def measure(row: str, corpus: Corpus, directory: Path, screen: Screen, what: str) -> dict[str, Any]:
    """What the device holds when nearly all of the pages are there. Raises WrongPages if one does not come back.

    `empty_bytes` it takes before it has any page: its reserve and tables, once for all programs.
    """
    size = corpus.pages * PAGE
    # Above half full the kernel would free the slots of what it reads.
    swap = device(row, directory, 2 * size)

    def report(phase: str, done: int, total: int) -> None:
        screen.report(f"{what}, {row}: {phase}", done, total)

    with MemoryCgroup(2 * size + ROOM) as group:
        async with swap, workload(corpus, group, report) as load:
            empty = await swap.held()
            await load.run("fill")
            own = max(0, group.usage_bytes() - size)
            await trio.to_thread.run_sync(group.set_limit, own + LEFT)
            if not await swap.settle(report):
                await swap.rest()
            held = await swap.held()
            assert held
            assert empty
            group.set_limit(2 * size + ROOM)
            await load.run("verify")
    return figures(held, empty.used_bytes)


def figures(held: Held, empty_bytes: int) -> dict[str, Any]:
    marginal = Held(held.original_bytes, held.used_bytes - empty_bytes)
    return {
        **dataclasses.asdict(held),
        "empty_bytes": empty_bytes,
        "ratio": held.ratio,
        "ratio_beyond_empty": marginal.ratio,
    }


async def measure_in_guest(whole: Corpus, programs: dict[str, Corpus], screen: Screen) -> Found:
    """The rows of a virtual machine's zram, as `measure` has them."""
    screen.report("zram in a virtual machine", 0, 1)
    corpora = {**programs, TOTAL: whole}
    sizes = {what: corpus.pages * PAGE for what, corpus in corpora.items()}
    pages = f"/proc/{os.getpid()}/fd/{whole.fd}"
    command = (sys.executable, "-m", "tests.qemu.zram", pages, *(str(sizes[what]) for what in programs))
    said = await run(*command, name="zram in a virtual machine", seconds=GUEST_SECONDS, grace=GUEST_GRACE_SECONDS)
    found: Found = {what: {} for what in corpora}
    for line, (what, size) in zip(said.stdout.decode().splitlines(), cycle(sizes.items()), strict=False):
        algorithm, _, mm_stat = line.partition(" ")
        # Of the size that this machine's devices have.
        empty = zram_held("0 0 0", 2 * size).used_bytes
        found[what][f"guest-zram-{algorithm}"] = figures(zram_held(mm_stat, 2 * size), empty)
    return found


def table(found: Found) -> Table:
    """Effective ratios: programs by devices; in brackets without what the device takes when it is empty."""
    rows = list(next(iter(found.values())))
    grid = Table("program", "MiB", *rows, box=SIMPLE_HEAD)
    for what, of_rows in found.items():
        size = max(one["original_bytes"] for one in of_rows.values())
        grid.add_row(what, f"{size >> 20}", *(ratio(of_rows[row]) for row in rows))
    return grid


def ratio(of_row: dict[str, Any]) -> str:
    return f"{of_row['ratio']:.2f} ({of_row['ratio_beyond_empty']:.2f})"


@click.command()
@click.option("--rows", default="", help="Devices, by commas, as for zswapctl bench. Default: zswapd's and every zram.")
@click.option("--size", default="128MiB", type=Size(), show_default=True, help="The most memory of each program.")
@click.option("--seed", default=1, show_default=True, help="Decides which files the programs work on.")
@click.option("--directory", default=Path("/var/tmp"), show_default=True, type=click.Path(path_type=Path, exists=True))
@click.option("--guest", is_flag=True, help="Also zram in a virtual machine with Debian's kernel (see tests/qemu).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(rows: str, size: int, seed: int, directory: Path, guest: bool, as_json: bool) -> None:
    """Effective ratio of each program's pages, and of all together, by device.

    In brackets: without what the device takes when it is empty, once for all programs."""
    if reason := cannot_swap():
        raise ZswapdError(f"this machine cannot swap: {reason}")
    programs = known()
    if 3 * len(programs) * size > swapdev.mem_available():
        raise ZswapdError(f"too little memory is free: {format_size(swapdev.mem_available())}", "use a smaller --size")
    names = [row.strip() for row in rows.split(",") if row.strip()]
    texts, _ = files(random.Random(seed))
    found: Found = {}
    lock_memory()
    with Screen(Console(stderr=True)) as screen, ExitStack() as stack:

        async def work() -> None:
            devices = names or [
                "zswapd-lz4",
                "zswapd-zstd",
                "zswapd-lz4-tiers",
                *(f"zram-{name}" for name in await Zram.algorithms()),
            ]
            corpora: dict[str, Corpus] = {}
            for program in programs:
                screen.report(f"capturing {program.name}", 0, 1)
                if corpus := await capture(program, size, 40, texts[:2000]):
                    corpora[program.name] = stack.enter_context(corpus)
                else:
                    screen.line(program.name, "left out: it ended, or took too long", "yellow")
            whole = stack.enter_context(together(list(corpora.values())))
            in_guest = await measure_in_guest(whole, corpora, screen) if guest else {}
            for what, corpus in {TOTAL: whole, **corpora}.items():
                found[what] = {row: await measure(row, corpus, directory, screen, what) for row in devices}
                found[what] |= in_guest.get(what, {})
                total = format_size(corpus.pages * PAGE)
                shown = (f"{row} {ratio(of_row)}" for row, of_row in found[what].items())
                screen.line(what, f"{total}: " + ", ".join(shown))

        async def undisturbed() -> None:
            # It would push other processes' pages into the device, which count as if they were the programs'.
            async with switched_off(lambda what: screen.line("DAMON", what, "yellow")):
                await work()

        try:
            trio.run(until_signal, undisturbed)
        finally:
            if left := leftovers(directory):
                screen.line("left behind", "; ".join(left), "red")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        Console().print(table(found))


if __name__ == "__main__":
    try:
        main()
    except (ZswapdError, OSError) as error:
        sys.exit(f"savings: {error}")
