"""How closely the pool packs real pages, beside zram: `python -m zswapd.bench.density`.

Writes the same pages to an engine in this process and to a zram device (no swap), frees a random half, and compacts.
What the pool takes is shown per byte of payload: headers, padding and partly filled zspages are all in it. Metadata is
shown per slot of the swap file. Also shows the lengths that native/core/src/pool/class.rs chooses its classes for.
"""

import errno
import fcntl
import os
import random
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import trio
from rich.console import Console

from zswapd._native import compress_page
from zswapd.bench.corpus import Corpus, build, describe
from zswapd.bench.devices import CONTROL
from zswapd.bench.programs import PAGE
from zswapd.bench.screen import SMALLEST, Screen, Size
from zswapd.config import format_size
from zswapd.engine import EmbeddedEngine
from zswapd.errors import ZswapdError

ALGORITHMS = ("lz4", "zstd")
CHUNK = 1 << 20
BLKDISCARD = 0x1277  # linux/fs.h
SAMPLE = 16  # one page of so many is compressed for the lengths


def measure(screen: Screen, corpus: Corpus, size: int, seed: int) -> None:
    """Fills swap of `size` bytes and shows lines for each algorithm."""
    assert corpus.mapping
    half = random.Random(seed).sample(range(size // PAGE), size // PAGE // 2)
    for algorithm in ALGORITHMS:
        engine = EmbeddedEngine(
            size_bytes=size, allocator="zsmalloc", mem_limit=2 * size, algorithm=algorithm, zstd_level=3
        )
        for at in range(0, size, CHUNK):
            engine.write(at, corpus.mapping[at : at + CHUNK])
        lines = [_engine_line(engine)]
        for page in half:
            engine.discard(page * PAGE, PAGE)
        engine.compact()
        lines.append(_engine_line(engine))
        screen.line(f"{algorithm} {format_size(size)}", f"zswapd: {lines[0]}; half freed, compacted: {lines[1]}")
        try:
            with _zram(algorithm, size) as (device, sys_path):
                for at in range(0, size, CHUNK):
                    os.pwrite(device, corpus.mapping[at : at + CHUNK], at)
                os.fsync(device)
                lines = [_zram_line(sys_path)]
                for page in half:
                    fcntl.ioctl(device, BLKDISCARD, struct.pack("QQ", page * PAGE, PAGE))
                (sys_path / "compact").write_text("1")
                lines.append(_zram_line(sys_path))
            screen.line("", f"zram:   {lines[0]}; half freed, compacted: {lines[1]}")
        except ZswapdError as error:
            screen.line("", f"zram:   {error}", "yellow")


def _engine_line(engine: EmbeddedEngine) -> str:
    stats = engine.stats()
    pages = stats["original_bytes"] // PAGE
    metadata = stats["metadata_bytes"] / (stats["swap_size_bytes"] // PAGE)
    return f"{_share(stats['pool_bytes'], stats['compressed_bytes'], pages)}, metadata {metadata:.1f} B/slot"


def _zram_line(sys_path: Path) -> str:
    original, payload, used = (int(word) for word in (sys_path / "mm_stat").read_text().split()[:3])
    return _share(used, payload, original // PAGE)


def _share(pool: int, payload: int, pages: int) -> str:
    return f"{pool / payload:.4f} of payload ({payload / pages:.0f} B + {(pool - payload) / pages:.1f} B a page)"


@contextmanager
def _zram(algorithm: str, size: int) -> Iterator[tuple[int, Path]]:
    """A zram device of its own, open past the page cache; removed again."""
    if not (CONTROL / "hot_add").exists():
        raise ZswapdError("this kernel has no zram, or its module is not loaded", "modprobe zram")
    number = int((CONTROL / "hot_add").read_text())  # reading it adds a device
    sys_path = Path(f"/sys/block/zram{number}")
    try:
        offered = (sys_path / "comp_algorithm").read_text().replace("[", "").replace("]", "").split()
        if algorithm not in offered:
            raise ZswapdError(f"zram does not offer {algorithm}, only {', '.join(offered)}")
        (sys_path / "comp_algorithm").write_text(algorithm)
        (sys_path / "disksize").write_text(str(size))
        device = os.open(f"/dev/zram{number}", os.O_RDWR)
        try:
            yield device, sys_path
        finally:
            os.close(device)
    finally:
        trio.run(_remove, number)


async def _remove(number: int) -> None:
    with trio.fail_after(10):
        while True:
            try:
                (CONTROL / "hot_remove").write_text(str(number))
                return
            except OSError as error:
                if error.errno != errno.EBUSY:  # udev looks at it
                    raise
            await trio.sleep(0.05)


def _lengths(corpus: Corpus) -> list[int]:
    """How many of 1000 pages compress to less than 256 bytes, less than 512, ...; last, those that do not."""
    assert corpus.mapping
    counts: Counter[int] = Counter()
    for at in range(0, corpus.pages * PAGE, SAMPLE * PAGE):
        for algorithm in ALGORITHMS:
            counts[len(compress_page(corpus.mapping[at : at + PAGE], algorithm, 3)[1]) // 256] += 1
    return [round(1000 * counts[bucket] / counts.total()) for bucket in range(PAGE // 256 + 1)]


@click.command()
@click.option("--size", default="1GiB", type=Size(), show_default=True, help="The most pages; smaller sets beside it.")
@click.option("--seed", default=1, show_default=True, help="Decides which pages, and which half is freed.")
def main(size: int, seed: int) -> None:
    """Compare how zswapd and zram pack the same real pages."""

    async def gather(screen: Screen) -> Corpus:
        return await build(size // PAGE, seed, screen.report)

    with Screen(Console()) as screen, trio.run(gather, screen) as corpus:
        screen.line("data", describe(corpus))
        screen.line("lengths", f"{_lengths(corpus)} of 1000 by 256 bytes, lz4 and zstd")
        while size >= SMALLEST:
            if size <= corpus.pages * PAGE:
                measure(screen, corpus, size, seed)
            size //= 4


if __name__ == "__main__":
    try:
        main()
    except (ZswapdError, OSError) as error:
        sys.exit(f"density: {error}")
