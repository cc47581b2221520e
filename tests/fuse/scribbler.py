"""Writes, reads and punches pages of a swap file, and knows what each of them holds: PATH FIRST COUNT SEED.

Works until its standard input ends, then reads all of its pages. Says as JSON what it has done, and what was wrong:
pages that held something else, and operations that failed.
"""

import ctypes
import json
import mmap
import os
import random
import select
import sys
import time

PAGE = 4096
MOST = 32  # pages of an operation
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def content(page: int, version: int | None) -> bytes:
    """Of a page as of its so many-th writing; 0: it was never written, or punched; None: nobody knows, an operation has
    failed. More or less compressible."""
    if not version:
        return bytes(PAGE)
    seed = page << 32 | version
    if version % 8 == 1:
        return seed.to_bytes(8)[-4:] * (PAGE // 4)
    return random.Random(seed).randbytes(64 + seed % 7 * 640).ljust(PAGE, b"-")


def main(path: str, first: int, count: int, seed: int) -> None:
    versions: list[int | None] = [0] * count
    written = 0
    result = {"operations": 0, "verified": 0, "wrong": 0, "failed": 0, "longest_ms": 0.0}
    chance = random.Random(seed)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, MOST * PAGE)  # aligned

    def expected(at: int, pages: int) -> bytes:
        return b"".join(content(first + n, versions[n]) for n in range(at, at + pages))

    def read(at: int, pages: int) -> None:
        view = memoryview(buffer)[: pages * PAGE]
        got = os.preadv(fd, [view], (first + at) * PAGE)
        wanted = expected(at, pages)
        result["verified"] += pages
        if got != pages * PAGE or view != wanted:
            known = (n for n in range(pages) if versions[at + n] is not None)
            parts = (slice(n * PAGE, (n + 1) * PAGE) for n in known)
            result["wrong"] += sum(view[part] != wanted[part] for part in parts)

    def write(at: int, pages: int) -> None:
        nonlocal written
        written += 1
        versions[at : at + pages] = [written] * pages
        view = memoryview(buffer)[: pages * PAGE]
        view[:] = expected(at, pages)
        if os.pwritev(fd, [view], (first + at) * PAGE) != pages * PAGE:
            result["failed"] += 1

    def punch(at: int, pages: int) -> None:
        versions[at : at + pages] = [0] * pages
        if _libc.fallocate(fd, PUNCH, (first + at) * PAGE, pages * PAGE) != 0:
            result["failed"] += 1

    def attempt(operation, at: int, pages: int) -> None:  # type: ignore[no-untyped-def]
        start = time.monotonic()
        try:
            operation(at, pages)
        except OSError as error:
            print(f"{operation.__name__} of {pages} pages at {first + at}: {error}", file=sys.stderr, flush=True)
            result["failed"] += 1
            if operation is not read:
                versions[at : at + pages] = [None] * pages
        result["longest_ms"] = max(result["longest_ms"], (time.monotonic() - start) * 1000)
        result["operations"] += 1

    while not select.select([sys.stdin], [], [], 0)[0]:
        pages = chance.randint(1, MOST)
        operation = chance.choices([write, read, punch], [6, 6, 1])[0]
        attempt(operation, chance.randrange(count - pages + 1), pages)
    for at in range(0, count, MOST):
        attempt(read, at, min(MOST, count - at))
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
