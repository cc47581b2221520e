"""The process inside the memory cgroup: fills memory with corpus pages, touches it and checks it.

It is started with the corpus's descriptor and talks JSON lines: commands on standard input, events on standard
output. It says "ready" before it touches memory, so that its cgroup is charged for all of it. Every page has an
expected checksum, taken from the corpus before the page is written; `verify` compares the checksum and every byte.

Pages live in one of three places: anonymous memory, which the kernel swaps; a file opened with O_DIRECT (the
FUSE swapfile where nothing can be swapped); or the engine embedded in this process.
"""

import hashlib
import json
import math
import mmap
import os
import random
import resource
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from zswapd.bench.locked import lock_memory, unlock

PAGE = 4096
CHUNK = 64  # pages copied at a time
REPORT = 4096  # pages between two progress events
SHOWN = 16  # wrong pages that are named


class Memory(Protocol):
    """Where pages are kept."""

    def write(self, page: int, content: bytes) -> None: ...

    def read(self, page: int) -> bytes: ...

    def touch(self, page: int) -> object: ...


class Anonymous:
    """Private anonymous memory: what the kernel reclaims into swap."""

    def __init__(self, pages: int) -> None:
        # Python's default is shared memory, which is reclaimed in another way.
        self._map = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)

    def write(self, page: int, content: bytes) -> None:
        self._map[page * PAGE : page * PAGE + len(content)] = content

    def read(self, page: int) -> bytes:
        return self._map[page * PAGE : (page + 1) * PAGE]

    def touch(self, page: int) -> object:
        return self._map[page * PAGE]

    @classmethod
    def swapped(cls, pages: int) -> "Anonymous":
        """The only memory of this process that the kernel may swap: its heap stays, whatever the device does."""
        lock_memory()
        memory = cls(pages)
        unlock(memory._map)
        return memory


class DirectFile:
    """A file, past the page cache."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, CHUNK * PAGE)  # O_DIRECT wants aligned memory

    def write(self, page: int, content: bytes) -> None:
        self._buffer[: len(content)] = content
        if os.pwrite(self._fd, memoryview(self._buffer)[: len(content)], page * PAGE) != len(content):
            raise OSError(f"short write at page {page}")

    def read(self, page: int) -> bytes:
        if os.preadv(self._fd, [memoryview(self._buffer)[:PAGE]], page * PAGE) != PAGE:
            raise OSError(f"short read at page {page}")
        return self._buffer[:PAGE]

    touch = read


class Embedded:
    """The engine in this process."""

    def __init__(self, pages: int) -> None:
        from zswapd.engine import EmbeddedEngine

        size = pages * PAGE
        self.engine = EmbeddedEngine(
            size_bytes=size, allocator="zsmalloc", mem_limit=2 * size, algorithm="lz4", zstd_level=3
        )

    def write(self, page: int, content: bytes) -> None:
        self.engine.write(page * PAGE, content)

    def read(self, page: int) -> bytes:
        return bytes(self.engine.read(page * PAGE, PAGE))

    touch = read


def percentile(ordered: Sequence[int], fraction: float) -> int:
    """The nearest-rank percentile of an ascending sequence; 0 when it is empty."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0


def checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


class Workload:
    """The phases. Each returns its result; `progress(done, pages)` is called now and then, outside timed spans."""

    def __init__(self, corpus: int, pages: int, memory: Memory, progress: Callable[[int, int], None]) -> None:
        self._corpus = corpus
        self._pages = pages
        self._memory = memory
        self._progress = progress
        self._page_of = array("I", range(pages))  # which corpus page stands in each page of memory
        self._expected = bytearray()  # 8 bytes a page

    def expect(self) -> dict[str, Any]:
        """Record what every page must be. `fill` does it, unless it was done before, out of what is measured."""
        for page in range(self._pages):
            self._expected += checksum(self._from_corpus(page))
        return {}

    def fill(self) -> dict[str, Any]:
        """Copy the corpus into memory."""
        if not self._expected:
            self.expect()
        took = 0
        for page in range(0, self._pages, CHUNK):
            if page % REPORT == 0:
                self._progress(page, self._pages)
            content = self._from_corpus(page, min(CHUNK, self._pages - page))
            begun = time.perf_counter_ns()
            self._memory.write(page, content)
            took += time.perf_counter_ns() - begun
        return self._speed(took)

    def random(self, seed: int) -> dict[str, Any]:
        """Touch every page once in seeded order. Latency of each touch that took a major fault; of a file or of
        the engine, of each read."""
        order = array("I", range(self._pages))
        random.Random(seed).shuffle(order)
        anonymous = isinstance(self._memory, Anonymous)
        took = array("Q")
        touch, clock = self._memory.touch, time.perf_counter_ns
        usage, who = resource.getrusage, resource.RUSAGE_THREAD
        faults = usage(who).ru_majflt
        for count, page in enumerate(order):
            begun = clock()
            touch(page)
            ended = clock()
            now = usage(who).ru_majflt
            if now != faults or not anonymous:
                took.append(ended - begun)
                faults = now
            if count % REPORT == 0:
                self._progress(count, self._pages)
                faults = usage(who).ru_majflt
        ordered = sorted(took)
        marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
        return {"faults": len(took)} | {f"{mark}_us": percentile(ordered, at) / 1e3 for mark, at in marks.items()}

    def sequential(self) -> dict[str, Any]:
        """Touch every page in order."""
        touch = self._memory.touch
        took = 0
        for first in range(0, self._pages, REPORT):
            begun = time.perf_counter_ns()
            for page in range(first, min(first + REPORT, self._pages)):
                touch(page)
            took += time.perf_counter_ns() - begun
            self._progress(first, self._pages)
        return self._speed(took)

    def rewrite(self, seed: int) -> dict[str, Any]:
        """Replace a seeded quarter of the pages by other pages of the corpus."""
        choice = random.Random(seed)
        victims = choice.sample(range(self._pages), self._pages // 4)
        for count, page in enumerate(victims):
            other = (self._page_of[page] + 1 + choice.randrange(self._pages - 1)) % self._pages
            content = self._from_corpus(other)
            self._page_of[page] = other
            self._expected[8 * page : 8 * page + 8] = checksum(content)
            self._memory.write(page, content)
            if count % REPORT == 0:
                self._progress(count, len(victims))
        return {"rewritten": len(victims)}

    def verify(self) -> dict[str, Any]:
        """Compare every page with its checksum and, byte by byte, with the corpus. What cannot be read is wrong."""
        wrong, unreadable = [], 0
        for page in range(self._pages):
            try:
                content = self._memory.read(page)
            except (OSError, ValueError):
                content = b""
                unreadable += 1
            right = content == self._from_corpus(self._page_of[page])
            if not right or checksum(content) != self._expected[8 * page : 8 * page + 8]:
                wrong.append(page)
            if page % REPORT == 0:
                self._progress(page, self._pages)
        return {"verified": self._pages, "wrong": len(wrong), "unreadable": unreadable, "wrong_pages": wrong[:SHOWN]}

    def stats(self) -> dict[str, Any]:
        """The embedded engine's statistics."""
        assert isinstance(self._memory, Embedded)
        return {"stats": self._memory.engine.stats()}

    def _from_corpus(self, page: int, count: int = 1) -> bytes:
        return os.pread(self._corpus, count * PAGE, page * PAGE)

    def _speed(self, took_ns: int) -> dict[str, Any]:
        return {"seconds": took_ns / 1e9, "mb_per_second": self._pages * PAGE * 1e3 / max(1, took_ns)}


def main(corpus: int, pages: int, where: str) -> None:
    """`where` is "swapped" (needs root), "anonymous", "engine" or the path of a file. Ends with standard input."""

    def say(**event: Any) -> None:
        print(json.dumps(event), flush=True)

    say(event="ready")
    workload: Workload | None = None
    for line in sys.stdin:
        command = json.loads(line)
        phase = command.pop("phase")
        if workload is None:
            places: dict[str, Callable[[], Memory]] = {
                "swapped": lambda: Anonymous.swapped(pages),
                "anonymous": lambda: Anonymous(pages),
                "engine": lambda: Embedded(pages),
            }
            memory = places.get(where, lambda: DirectFile(where))()
            workload = Workload(
                corpus, pages, memory, lambda done, total: say(event="progress", done=done, total=total)
            )
        begun = time.process_time()
        result = getattr(workload, phase)(**command)
        say(event="result", phase=phase, **result, cpu_seconds=time.process_time() - begun)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
