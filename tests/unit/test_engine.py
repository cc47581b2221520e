"""The embedded engine as Python sees it: every range, every error, several threads."""

import errno
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errnos import raises_errno
from tests.pages import PAGE, noise
from zswapd.engine import EmbeddedEngine

PAGES = 40  # of noise, 31 fill a zspage of 32 pages
SIZE = PAGES * PAGE


ALLOCATORS = ["zsmalloc", "z3fold"]


def make_engine(
    mem_limit: int = 1 << 20,
    algorithm: str = "lz4",
    size_bytes: int = SIZE,
    zstd_level: int = 3,
    allocator: str = "zsmalloc",
) -> EmbeddedEngine:
    return EmbeddedEngine(
        size_bytes=size_bytes, allocator=allocator, mem_limit=mem_limit, algorithm=algorithm, zstd_level=zstd_level
    )


ranges = st.tuples(st.integers(0, SIZE), st.integers(0, 3 * PAGE)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), ranges, st.integers(0, 255)),
        st.tuples(st.just("noise"), ranges, st.integers(0, 255)),
        st.tuples(st.just("read"), ranges, st.just(0)),
        st.tuples(st.just("discard"), ranges, st.just(0)),
        st.tuples(st.just("reset"), st.just((0, 0)), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps=steps, algorithm=st.sampled_from(["lz4", "zstd"]), allocator=st.sampled_from(ALLOCATORS))
def test_it_reads_as_it_was_written(
    steps: list[tuple[str, tuple[int, int], int]], algorithm: str, allocator: str
) -> None:
    engine, model = make_engine(algorithm=algorithm, allocator=allocator), bytearray(SIZE)
    for step, (offset, length), seed in steps:
        end = offset + length
        if step in ("write", "noise"):
            data = bytes([seed]) * length if step == "write" else random.Random(seed).randbytes(length)
            engine.write(offset, data)
            model[offset:end] = data
        elif step == "discard":
            engine.discard(offset, length)
            model[offset:end] = bytes(length)
        elif step == "reset":
            engine.reset()
            model[:] = bytes(SIZE)
        assert engine.read(offset, length) == model[offset:end]
    assert engine.read(0, SIZE) == model
    assert engine.stats()["pages"]["lost"] == 0


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_full_pool_leaves_every_other_page_intact(allocator: str) -> None:
    engine = make_engine(mem_limit=32 * PAGE, allocator=allocator)
    stored = []
    for page in range(PAGES):
        with suppress(OSError):
            engine.write(page * PAGE, noise(page))
            stored.append(page)
    with raises_errno(errno.ENOSPC):
        engine.write((PAGES - 1) * PAGE, noise(PAGES - 1))
    assert 0 < len(stored) < PAGES
    lost = set(range(PAGES)) - set(stored)
    stats = engine.stats()
    assert stats["pages"]["lost"] == stats["rejected_stores"]["pool_full"] - 1 == len(lost)
    assert stats["pool_bytes"] <= 32 * PAGE
    for page in stored:
        assert engine.read(page * PAGE, PAGE) == noise(page)
    for page in lost:
        with raises_errno(errno.EIO):
            engine.read(page * PAGE, PAGE)
    # A page that needs no room heals a lost one, and freed room is used again.
    for page in lost:
        engine.write(page * PAGE, bytes(PAGE))
        assert engine.read(page * PAGE, PAGE) == bytes(PAGE)
    engine.discard(stored[0] * PAGE, PAGE)
    engine.write(min(lost) * PAGE, noise("again"))
    assert engine.read(min(lost) * PAGE, PAGE) == noise("again")


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_lowered_limit_refuses_growth_and_keeps_what_is_stored(allocator: str) -> None:
    engine = make_engine(allocator=allocator)
    for page in range(8):
        engine.write(page * PAGE, noise(page))
    engine.set_mem_limit(PAGE)
    assert engine.stats()["pool_limit_bytes"] == PAGE
    # The zspages that there are may still have room; new ones are refused.
    with raises_errno(errno.ENOSPC):
        for page in range(8, PAGES):
            engine.write(page * PAGE, noise(page))
    assert all(engine.read(page * PAGE, PAGE) == noise(page) for page in range(8))


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (2**63, 1), (2**64 - 1, 1)])
def test_outside_the_file(offset: int, length: int) -> None:
    engine = make_engine()
    before = b"\xee" * PAGE
    engine.write(SIZE - PAGE, before)
    with raises_errno(errno.EFBIG):
        engine.write(offset, bytes(length))
    with raises_errno(errno.EFBIG):
        engine.discard(offset, length)
    assert engine.read(SIZE - PAGE, PAGE) == before
    assert engine.stats()["rejected_stores"]["out_of_range"] == 2
    assert engine.read(SIZE - 10, 100) == before[:10]
    assert engine.read(SIZE, 100) == engine.read(offset, 0) == b""


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, (16 << 40) + PAGE, 2**64 - PAGE])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        make_engine(size_bytes=size)


def test_the_largest_size_costs_only_what_is_touched() -> None:
    engine = make_engine(size_bytes=16 << 40)
    engine.write((16 << 40) - PAGE, noise(1))
    assert engine.read((16 << 40) - PAGE, PAGE) == noise(1)
    engine.reset()
    assert engine.read((16 << 40) - PAGE, PAGE) == bytes(PAGE)


def test_bad_settings_change_nothing() -> None:
    engine = make_engine(algorithm="zstd", zstd_level=7)
    for algorithm, level in [("lzo", 3), ("zstd", 0), ("zstd", 23), ("LZ4", 3), ("", 3)]:
        with pytest.raises(ValueError, match=r"lz4 or zstd|1 to 22"):
            engine.set_compression(algorithm, level)
        with pytest.raises(ValueError, match=r"lz4 or zstd|1 to 22"):
            make_engine(algorithm=algorithm, zstd_level=level)
    with pytest.raises(ValueError, match="zsmalloc or z3fold"):
        make_engine(allocator="zbud")
    with pytest.raises(OverflowError):
        engine.set_mem_limit(2**64)
    with pytest.raises(OverflowError):
        engine.read(-1, 1)
    stats = engine.stats()
    assert (stats["algorithm"], stats["zstd_level"], stats["pool_limit_bytes"]) == ("zstd", 7, 1 << 20)


def test_pages_stay_readable_when_the_algorithm_changes() -> None:
    engine = make_engine()
    text = [(f"page {number} " * PAGE).encode()[:PAGE] for number in range(3)]
    for number, algorithm in enumerate(["lz4", "zstd", "lz4"]):
        engine.set_compression(algorithm, 3)
        engine.write(number * PAGE, text[number])
    assert [engine.read(number * PAGE, PAGE) for number in range(3)] == text
    assert (engine.stats()["pages"]["lz4"], engine.stats()["pages"]["zstd"]) == (2, 1)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_threads_never_see_a_torn_page(allocator: str) -> None:
    """All on the same few pages, whose contents name themselves: any mix of two writes would show."""
    engine = make_engine(size_bytes=4 * PAGE, allocator=allocator)

    def content(page: int, seed: int) -> bytes:
        head = page.to_bytes(2) + seed.to_bytes(2)
        return head + (random.Random(seed).randbytes(PAGE - 4) if seed % 2 else (head * PAGE)[: PAGE - 4])

    def work(thread: int) -> int:
        choice, seen = random.Random(thread), 0
        for _ in range(2000):
            page = choice.randrange(4)
            match choice.randrange(4):
                case 0:
                    engine.write(page * PAGE, content(page, choice.randrange(2**16)))
                case 1 if thread == 0:
                    engine.discard(page * PAGE, PAGE)
                case _:
                    read = engine.read(page * PAGE, PAGE)
                    if read != bytes(PAGE):
                        assert read == content(page, int.from_bytes(read[2:4]))
                        seen += 1
        return seen

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) > 1000
    stats = engine.stats()
    assert sum(stats["pages"].values()) <= 4
    assert stats["errors"] == {"lost": 0, "corrupt": 0, "disk": 0}
    engine.reset()
    assert engine.stats()["pool_bytes"] == engine.stats()["original_bytes"] == 0


def test_without_a_backing_disk_nothing_is_written_back() -> None:
    engine = EmbeddedEngine(size_bytes=PAGE, allocator="zsmalloc", mem_limit=PAGE, algorithm="lz4", zstd_level=3)
    assert engine.backing() is None
    assert engine.stats()["writeback"]["state"] == "none"
    for command in (lambda: engine.mark_idle(0), lambda: engine.write_back("all")):
        with raises_errno(errno.ENODEV):
            command()
