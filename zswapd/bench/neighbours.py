"""Whether neighbouring slots of the swap hold neighbouring pages, and what clusters of them would gain:
`python -m zswapd.bench.neighbours`.

Programs run on real swap, each in a cgroup that has room for a third of their memory (with --after, only when they have
done their work). Then they are stopped, and the kernel says in which slot each of their pages is (/proc/PID/pagemap).
Two more workloads are memory whose pages say which they are, touched one after the other and at random: in them every
slot is read, to see that the kernel said so rightly. Slots are then taken in their order, 4, 8 and 16 at a time,
compressed together, and compared with the same pages compressed one by one, as records of the backing disk.
"""

import mmap
import os
import random
import signal
import statistics
import struct
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import trio
import zstandard
from rich.console import Console

from zswapd import swapdev
from zswapd.analyze.codecs import MAGICLESS
from zswapd.anonymous import PAGE, PRESENT, SHARED, SWAPPED, family
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.corpus import files
from zswapd.bench.programs import Program, Running, known
from zswapd.bench.screen import Screen, Size
from zswapd.bench.zswapd_device import Zswapd
from zswapd.errors import ZswapdError

SHARE = 3  # of its memory a workload keeps one part in so many
AT_WORK_SECONDS = 25
CLUSTERS = (4, 8, 16)  # pages
LEVELS = (3, 9)
DICTIONARY_BYTES = 112 << 10
MOST, STRETCHES = 6144, 4  # pages of a program that are compressed at most, in so many stretches of slots
LEAST = 1024  # in swap, or a program is left out of it
TRAINING = 4  # one page of so many, by chance, trains the dictionary, ...
MOST_TRAINING = 3000  # ... up to so many; what is compressed is not among them
#: On the disk: header of the object, header and tag of the record; its length is a multiple of 16.
OBJECT, RECORD, ALIGN = 10, 32, 16
#: A cluster would have to say whose pages it has: slot and generation of each.
MEMBER = 8

# Memory whose every page begins with its number; the rest is what compresses to about a third. Touched one page after
# the other, or, after that, at random and changed. Reads its standard input when it is done.
_STAMPED = """
import mmap, random, sys
pages, how = int(sys.argv[1]) // 4096, sys.argv[2]
rng = random.Random(1)
memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(pages):
    memory[page * 4096 : (page + 1) * 4096] = page.to_bytes(8, "little") + rng.randbytes(1360) + bytes(2728)
if how == "random":
    for turn in range(2):
        for page in rng.sample(range(pages), pages):
            memory[page * 4096 + 100] = turn
sys.stdin.read()
"""


@dataclass
class Swapped:
    """The pages of a workload that are in swap, in the order of their slots: slot, process, address, content."""

    slots: "array[int]" = field(default_factory=lambda: array("Q"))
    pids: "array[int]" = field(default_factory=lambda: array("Q"))
    addresses: "array[int]" = field(default_factory=lambda: array("Q"))
    pages: list[bytes] = field(default_factory=list)

    def share(self, within: int) -> float:
        """Of all pairs of neighbouring slots, how many hold pages of one process that are so near to each other."""
        pairs = near = 0
        for at in range(1, len(self.slots)):
            if self.slots[at] == self.slots[at - 1] + 1:
                pairs += 1
                apart = abs(self.addresses[at] - self.addresses[at - 1]) // PAGE
                near += self.pids[at] == self.pids[at - 1] and apart <= within
        return near / pairs if pairs else 0.0


def in_swap(pids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Slot, process and address of every page in swap, by slot. The processes have to be stopped."""
    found = set()
    for pid in pids:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap, open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                start, _, end = line.split()[0].partition("-")
                first, count = int(start, 16) // PAGE, (int(end, 16) - int(start, 16)) // PAGE
                if "[v" in line or "---p" in line:
                    continue
                for at in range(first, first + count, 512):
                    raw = os.pread(pagemap.fileno(), 8 * min(512, first + count - at), 8 * at)
                    for number, (entry,) in enumerate(struct.iter_unpack("Q", raw), at):
                        if entry & SWAPPED and not entry & (PRESENT | SHARED):
                            # Bits 5 to 54: the slot. 0 to 4 are the swap area: there is one.
                            found.add((entry >> 5 & (1 << 50) - 1, pid, number * PAGE))
    return sorted(found)


def gather(pids: Sequence[int], device: str) -> Swapped:
    """Reads the slots of stopped processes past the page cache. A slot of two processes counts once."""
    swapped = Swapped()
    buffer = mmap.mmap(-1, PAGE)
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        for slot, pid, address in in_swap(pids):
            if swapped.slots and swapped.slots[-1] == slot:
                continue
            if os.preadv(fd, [buffer], slot * PAGE) != PAGE:
                raise ZswapdError(f"{device}: slot {slot} cannot be read")
            swapped.slots.append(slot)
            swapped.pids.append(pid)
            swapped.addresses.append(address)
            swapped.pages.append(buffer[:])
    finally:
        os.close(fd)
    return swapped


def wrong_stamps(swapped: Swapped, size: int) -> tuple[int, int]:
    """Pages of stamped memory whose slot holds another page, of how many. Its first page may be anywhere."""
    where = list(zip(swapped.addresses, swapped.pages, strict=True))
    bases = Counter(address - int.from_bytes(page[:8], "little") * PAGE for address, page in where)
    base = bases.most_common(1)[0][0]
    inside = [(address, page) for address, page in where if base <= address < base + size]
    return sum(int.from_bytes(page[:8], "little") != (address - base) // PAGE for address, page in inside), len(inside)


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class Compressor:
    """zstd as the pager has it, for pages and for clusters of them."""

    def __init__(self, level: int, pages: int, dictionary: bytes = b"") -> None:
        shared = None
        if dictionary:
            shared = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_FULLDICT)
            shared.precompute_compress(level=level)
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, source_size=pages * PAGE, format=MAGICLESS, write_content_size=False, write_dict_id=False
        )
        self._compressor = zstandard.ZstdCompressor(dict_data=shared, compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor(dict_data=shared, format=MAGICLESS)
        self.read_ns: list[int] = []

    def record(self, pages: Sequence[bytes]) -> int:
        """Bytes on the disk for these pages as one record. A page alone that does not compress is kept as it is."""
        together = b"".join(pages)
        payload = self._compressor.compress(together)
        begun = time.perf_counter_ns()
        self._decompressor.decompress(payload, max_output_size=len(together))
        self.read_ns.append(time.perf_counter_ns() - begun)
        members = MEMBER * len(pages) if len(pages) > 1 else 0
        length = min(len(payload), len(together)) + OBJECT + RECORD + members
        return -(-length // ALIGN) * ALIGN


@dataclass(frozen=True)
class Gains:
    """Bytes on the disk, by what is said, level and pages of a cluster; and how long a read of one takes, µs."""

    bytes: dict[tuple[str, int, int], int]
    read_us: dict[tuple[str, int, int], float]


def gains(pages: Sequence[bytes], addresses: Sequence[tuple[int, int]], seed: int) -> Gains:
    """Compress the pages (in the order of their slots) one by one and in clusters.

    "slots": neighbours as they stand. "ideal": in the order of their addresses. "random": any. All without the pages
    that have trained the dictionary, in units of the largest cluster, so that neighbours stay neighbours.
    """
    rng = random.Random(seed)
    unit = max(CLUSTERS)
    length = min(len(pages), MOST) // STRETCHES // unit * unit
    begins = [len(pages) * nth // STRETCHES for nth in range(STRETCHES)]
    units = [range(at, at + unit) for begin in begins for at in range(begin, begin + length, unit)]
    training = [units.pop(rng.randrange(len(units))) for _ in range(len(units) // TRAINING)][: MOST_TRAINING // unit]
    size = min(DICTIONARY_BYTES, len(training) * unit * PAGE // 16)
    dictionary = zstandard.train_dictionary(size, [pages[n] for one in training for n in one], level=9).as_bytes()
    slots = [number for one in sorted(units, key=lambda one: one[0]) for number in one]
    orders = {
        "slots": slots,
        "ideal": sorted(slots, key=lambda number: addresses[number]),
        "random": rng.sample(slots, len(slots)),
    }
    total: dict[tuple[str, int, int], int] = {}
    read: dict[tuple[str, int, int], float] = {}
    for level in LEVELS:
        for words, order, shared in (
            ("slots", slots, b""),
            ("ideal", orders["ideal"], b""),
            ("random", orders["random"], b""),
            ("slots, dictionary", slots, dictionary),
        ):
            for pages_each in (1, *CLUSTERS):
                if pages_each == 1 and words in ("ideal", "random"):
                    continue
                compressor = Compressor(level, pages_each, shared)
                total[words, level, pages_each] = sum(
                    compressor.record([pages[number] for number in order[at : at + pages_each]])
                    for at in range(0, len(order), pages_each)
                )
                read[words, level, pages_each] = statistics.median(compressor.read_ns) / 1e3
    total["pages", 0, 1] = len(slots)
    return Gains(total, read)


def show(screen: Screen, name: str, found: Gains) -> None:
    pages = found.bytes["pages", 0, 1]
    for level in LEVELS:
        for words in ("slots", "slots, dictionary", "ideal", "random"):
            single = found.bytes["slots, dictionary" if "dictionary" in words else "slots", level, 1]
            parts = [f"single {single / pages:.0f} B"] if words.startswith("slots") else []
            parts += [
                f"{count} pages {1 - found.bytes[words, level, count] / single:+.1%}"
                + (f" ({found.read_us[words, level, count]:.0f} µs)" if found.read_us else "")
                for count in CLUSTERS
            ]
            screen.line("", f"{name}: zstd {level}, {words}: {', '.join(parts)}")


def workloads(size: int) -> list[tuple[Program, bool]]:
    """Every workload, and whether its pages are stamped."""
    python = [sys.executable, "-I", "-S", "-c", _STAMPED, str(size)]
    stamped = [Program(how, 1, [*python, how], sized=False) for how in ("sequential", "random")]
    return [(program, True) for program in stamped] + [(program, False) for program in known()]


async def measure(
    program: Program, swap: Zswapd, size: int, after: bool, texts: Sequence[str], screen: Screen
) -> Swapped | None:
    """Run a program on swap until it waits, and see where its pages are. Leaves nothing of it."""
    with MemoryCgroup(2 * size if after else size // SHARE) as group, ExitStack() as stack:
        screen.report(program.name, 0, 1)
        # On swap it never has so much in memory: then it ends by the clock.
        running = Running(program, size, AT_WORK_SECONDS, texts)
        stack.callback(running.end)
        group.add(running.pid)
        if not await running.ready():
            screen.line(program.name, "left out: it ended, or took too long", "yellow")
            return None
        if after:
            await trio.to_thread.run_sync(group.set_limit, running.present_bytes() // SHARE)
        pids = family(running.pid)
        with stopped(pids):
            swap.require_first()
            swapped = await trio.to_thread.run_sync(gather, pids, swap.path)
    return swapped


@click.command()
@click.option("--size", default="192MiB", type=Size(), show_default=True, help="Memory of every workload.")
@click.option("--seed", default=1, show_default=True, help="Decides which pages train the dictionary.")
@click.option("--directory", default=Path("/var/tmp"), show_default=True, type=click.Path(path_type=Path, exists=True))
@click.option("--after", is_flag=True, help="Take the memory away when a program has done its work, not while it does.")
def main(size: int, seed: int, directory: Path, after: bool) -> None:
    """How often neighbouring slots hold neighbouring pages, and what clusters of them would gain."""
    if swapdev.read_swaps():
        raise ZswapdError("this machine swaps already: slots could be another area's", "swapoff it first")
    texts, _ = files(random.Random(seed))
    programs: dict[str, Swapped] = {}

    async def work(screen: Screen) -> None:
        async with Zswapd("zswapd-lz4", directory, 8 * size) as swap:
            for program, stamped in workloads(size):
                swapped = await measure(program, swap, size, after, texts[:2000], screen)
                if swapped is None:
                    continue
                near = ", ".join(f"within {within}: {swapped.share(within):.0%}" for within in (1, 4, 16, 64))
                wrong = "; {} of {} stamps wrong".format(*wrong_stamps(swapped, size)) if stamped else ""
                screen.line(program.name, f"{len(swapped.pages)} pages in swap; neighbours {near}{wrong}")
                if len(swapped.pages) >= LEAST and not stamped:
                    programs[program.name] = swapped

    with Screen(Console(width=200)) as screen:
        trio.run(work, screen)
        every: Counter[tuple[str, int, int]] = Counter()
        for name, swapped in programs.items():
            where = list(zip(swapped.pids, swapped.addresses, strict=True))
            found = gains(swapped.pages, where, seed)
            show(screen, name, found)
            every.update(found.bytes)
        show(screen, f"{len(programs)} programs", Gains(every, {}))


if __name__ == "__main__":
    try:
        main()
    except (ZswapdError, OSError) as error:
        sys.exit(f"neighbours: {error}")
