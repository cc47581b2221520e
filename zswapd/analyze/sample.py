"""A sample of a source's pages, spread over its parts as its memory is, and held where nobody else gets at it."""

import hashlib
import mmap
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType

from zswapd.analyze.sources import Part, Reader, Source
from zswapd.anonymous import PAGE
from zswapd.errors import ZswapdError

CHUNK = 256  # pages read at a time, at most
TRAINING = 96  # of 256 digests: the pages that a dictionary is trained with, and no codec is scored on

Report = Callable[[str, int, int], None]  # what is going on, how much is done, of how much


class Held:
    """Room for so many pages that is in no core dump, and zeroed in the end."""

    def __init__(self, pages: int) -> None:
        self._map = mmap.mmap(-1, max(1, pages) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self.bytes = memoryview(self._map)

    def page(self, number: int) -> memoryview:
        return self.bytes[number * PAGE : (number + 1) * PAGE]

    def wipe(self) -> None:
        """Its memory goes back when nobody refers to a page any more."""
        self.bytes[:] = bytes(len(self.bytes))


@dataclass
class Sample:
    """Pages that do not repeat one word, and counts of all that were looked at.

    Invariant: no page of `training` equals one of `scoring`.
    """

    held: Held
    training: list[int]  # which pages of `held`
    scoring: list[int]
    looked_at: int = 0
    same_filled: int = 0
    duplicates: int = 0  # pages that equal one looked at before; same-filled ones are none
    gone: int = 0  # pages that were no longer there, or in swap by then

    def __enter__(self) -> "Sample":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held.wipe()

    @property
    def same_share(self) -> float:
        return self.same_filled / self.looked_at

    @property
    def duplicate_share(self) -> float:
        return self.duplicates / self.looked_at


def take(source: Source, scan: int, compress: int, seed: int, report: Report) -> Sample:
    """Look at `scan` pages of the source at most, and keep up to `compress` of them.

    Which, the seed decides. The kernel takes what was read for used. Raises ZswapdError where nothing could be read;
    nothing is kept then.
    """
    rng = random.Random(seed)
    looked = min(scan, source.pages)
    kept = set(rng.sample(range(looked), min(compress, looked)))
    key, seen = seed.to_bytes(8, "little", signed=True), set[bytes]()
    held = Held(len(kept))
    sample = Sample(held, [], [])
    buffer = Held(CHUNK)
    number = 0
    try:
        for part, wanted in zip(source.parts, _shares([part.pages for part in source.parts], looked), strict=True):
            for page in _pages(part, sorted(rng.sample(range(part.pages), wanted)), buffer):
                if number % 1024 == 0:
                    report("looking at pages", number, looked)
                number += 1
                if page is None:
                    sample.gone += 1
                    continue
                sample.looked_at += 1
                word = bytes(page[:4])
                if page[4:8] == word and page == word * (PAGE // 4):
                    sample.same_filled += 1
                    continue
                digest = hashlib.blake2b(page, digest_size=16, key=key).digest()
                sample.duplicates += digest in seen
                seen.add(digest)
                if number - 1 in kept:
                    # By the digest: all pages that are equal are on one side.
                    side = sample.training if digest[0] < TRAINING else sample.scoring
                    at = len(sample.training) + len(sample.scoring)
                    held.page(at)[:] = page
                    side.append(at)
        if not sample.looked_at:
            raise ZswapdError(
                f"{source.name}: none of its {looked} pages could be read",
                "it has ended, or was swapped out: try again",
            )
    except BaseException:
        held.wipe()
        raise
    finally:
        buffer.wipe()
    return sample


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to the sizes, each rounded so that nothing is left."""
    whole = sum(sizes)
    ends = [total * end // whole for end in accumulate(sizes)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _pages(part: Part, numbers: Sequence[int], buffer: Held) -> Iterator[memoryview | None]:
    """The pages of a part with these ascending numbers; None for one that cannot be read. Valid until the next."""
    if not numbers:
        return
    try:
        with part.opened() as reader:
            for at, count in _stretches(part, numbers):
                yield from _read(reader, at, count, buffer)
    except OSError:  # from opening it: reading says 0 instead
        yield from [None] * len(numbers)


def _read(reader: Reader, at: int, count: int, buffer: Held) -> Iterator[memoryview | None]:
    done = 0
    while done < count:
        got = reader.read(at + done * PAGE, buffer.bytes[: (count - done) * PAGE]) // PAGE
        yield from (buffer.page(number) for number in range(got))
        if not got:
            yield None
        done += max(got, 1)


def _stretches(part: Part, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where the pages with these numbers lie, and how many follow each other there, at most CHUNK."""
    runs = iter(part.runs)
    start, end = next(runs)
    before = 0  # pages of the part before this run
    at = count = 0
    for number in numbers:
        while number - before >= (end - start) // PAGE:
            before += (end - start) // PAGE
            start, end = next(runs)
        here = start + (number - before) * PAGE
        if count and here == at + count * PAGE and count < CHUNK:
            count += 1
        else:
            if count:
                yield at, count
            at, count = here, 1
    if count:
        yield at, count
