"""zswapctl analyze: that it looks at the pages that it says, and that its figures are those of the pool."""

import json
import os
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tests.machine import lacks
from tests.pages import PAGE, noise, real_pages
from zswapd import ctl, memcg
from zswapd._native import compress_page
from zswapd.analyze import elfcore
from zswapd.analyze.advice import Idle, advise
from zswapd.analyze.codecs import every, lz4_codec, score, train, zstd_codec
from zswapd.analyze.estimate import Classes, Estimate, Estimator, is_raw
from zswapd.analyze.idle import measure
from zswapd.analyze.sample import Sample, take
from zswapd.analyze.sources import Source, find
from zswapd.anonymous import Memory, family
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.config import Config, load
from zswapd.engine import EmbeddedEngine
from zswapd.errors import ZswapdError

ALL = 1 << 20  # pages
NOISE, EQUAL, ZERO, UNTOUCHED = 300, 40, 25, 2000

# Memory of its own: noise, pages that are equal, zeros that were written, and room that nobody has touched.
PROGRAM = f"""
import ctypes, mmap, random, sys
def memory(pages):
    return mmap.mmap(-1, pages * {PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m = memory({NOISE + EQUAL + ZERO + UNTOUCHED})
m.madvise(mmap.MADV_NOHUGEPAGE)
m.write(random.Random(1).randbytes({NOISE * PAGE}))
m.write(b"equal..." * {EQUAL * PAGE // 8})
m.write(bytes({ZERO * PAGE}))
"""
WAIT = """
print(ctypes.addressof(ctypes.c_char.from_buffer(m)), flush=True)
sys.stdin.read()
"""


def silent(what: str, done: int, total: int) -> None:
    pass


@contextmanager
def program(more: str = "") -> Iterator[tuple[int, int]]:
    """The pid of a process with PROGRAM's memory, and where that is. It cannot outlive us: then its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM + more + WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    try:
        yield process.pid, int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(ctl.cli, ["analyze", *arguments])


@pytest.fixture(autouse=True)
def default_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("ZSWAPD_CONFIG", str(tmp_path / "empty.toml"))
    monkeypatch.setattr("zswapd.analyze.command.lock_memory", lambda: None)  # not all that comes after in this process


def of_pages(directory: Path, *pages: bytes) -> Source:
    file = directory / "pages"
    file.write_bytes(b"".join(pages))
    return find("file", str(file))


def test_a_process_s_anonymous_pages_in_memory_are_found_and_read() -> None:
    with program() as (pid, address), Memory(pid) as memory:
        runs = [run for mapping in memory.mappings() for run in mapping.runs]
        end = address + (NOISE + EQUAL + ZERO) * PAGE
        assert any(start <= address and stop == end for start, stop in runs)
        buffer = memoryview(bytearray(NOISE * PAGE))
        assert memory.read(address, buffer) == len(buffer)
        assert buffer == random.Random(1).randbytes(NOISE * PAGE)


def test_what_is_not_in_memory_stays_so() -> None:
    with program() as (pid, address), Memory(pid) as memory:
        end = address + (NOISE + EQUAL + ZERO) * PAGE
        assert memory.read(end - 2 * PAGE, memoryview(bytearray(8 * PAGE))) == 2 * PAGE
        assert memory.read(end, memoryview(bytearray(8 * PAGE))) == 0
        assert any(stop == end for mapping in memory.mappings() for _, stop in mapping.runs)


def test_pages_that_a_fork_shares_are_found_once() -> None:
    if os.geteuid() != 0:
        lacks("root, to tell shared pages from equal ones")
    fork = "import os, signal\nif os.fork() == 0:\n    sys.stdin.read()\n    os._exit(0)\n"
    with program(fork) as (pid, _):
        frames: set[int] = set()
        counts = []
        for member in family(pid):
            with Memory(member) as memory:
                runs = [run for mapping in memory.mappings(frames) for run in mapping.runs]
            counts.append(sum(end - start for start, end in runs) // PAGE)
        assert len(counts) == 2
        assert counts[0] >= NOISE + EQUAL + ZERO
        assert counts[1] < NOISE


def test_equal_and_same_filled_pages_are_counted() -> None:
    with program() as (pid, _):
        source = find("pid", str(pid))
        with take(source, ALL, ALL, 1, silent) as sample:
            assert sample.looked_at == source.pages
            assert sample.same_filled >= ZERO
            assert sample.duplicates >= EQUAL - 1
            assert len(sample.training) + len(sample.scoring) == sample.looked_at - sample.same_filled
            assert sample.gone == 0


def test_exactly_the_pages_of_a_file_are_counted(tmp_path: Path) -> None:
    equal, filled = noise("twice"), b"\1\2\3\4" * (PAGE // 4)
    some = [equal, noise(1), filled, equal, bytes(PAGE), noise(2), equal]
    source = of_pages(tmp_path, *some, b"the beginning of another page")
    with take(source, ALL, ALL, 1, silent) as sample:
        assert (source.pages, sample.looked_at, sample.same_filled, sample.duplicates) == (7, 7, 2, 2)


def held(sample: Sample, numbers: list[int]) -> list[bytes]:
    return [bytes(sample.held.page(number)) for number in numbers]


def test_no_page_is_both_trained_with_and_scored_on(tmp_path: Path) -> None:
    source = of_pages(tmp_path, *[noise(number % 150) for number in range(600)])
    with take(source, ALL, ALL, 1, silent) as sample:
        training, scoring = held(sample, sample.training), held(sample, sample.scoring)
    assert training
    assert scoring
    assert len(training) + len(scoring) == 600
    assert not set(training) & set(scoring)


def test_a_seed_decides_the_sample(tmp_path: Path) -> None:
    source = of_pages(tmp_path, *[noise(number) for number in range(400)])

    def sampled(seed: int) -> tuple[list[bytes], list[bytes]]:
        with take(source, 200, 100, seed, silent) as sample:
            assert sample.looked_at == 200
            assert len(sample.training) + len(sample.scoring) == 100
            return held(sample, sample.training), held(sample, sample.scoring)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_every_part_is_sampled_by_its_size(tmp_path: Path) -> None:
    pages = [noise(number) for number in range(1000)]
    source = of_pages(tmp_path, *pages)
    [whole] = source.parts
    # 100, 300 and 600 pages, the second one in two runs.
    runs = [[(0, 100)], [(100, 150), (150, 400)], [(400, 1000)]]
    source.parts = [
        type(whole)(str(part), [(start * PAGE, end * PAGE) for start, end in part], path=whole.path) for part in runs
    ]
    number_of = {page: number for number, page in enumerate(pages)}
    with take(source, 200, 200, 1, silent) as sample:
        numbers = [number_of[page] for page in held(sample, sample.training + sample.scoring)]
    assert len(set(numbers)) == 200
    bounds = [(0, 100), (100, 400), (400, 1000)]
    assert [sum(low <= number < high for number in numbers) for low, high in bounds] == [20, 60, 120]


def test_pages_are_gone_in_the_end(tmp_path: Path) -> None:
    with take(of_pages(tmp_path, noise(1), noise(2)), ALL, ALL, 1, silent) as sample:
        assert any(sample.held.bytes)
    assert not any(sample.held.bytes)


def test_a_process_that_ends_meanwhile_is_an_error() -> None:
    with program() as (pid, _):
        source = find("pid", str(pid))
    with pytest.raises(ZswapdError, match="pages could be read"):
        take(source, ALL, ALL, 1, silent)


def test_all_processes_of_a_cgroup_and_those_below_are_found() -> None:
    controller = memcg.find_controller()
    if os.geteuid() != 0 or controller is None or not os.access(controller.path, os.W_OK):
        lacks("root and a memory cgroup controller")
    with MemoryCgroup(1 << 30) as group, program() as (pid, _), program() as (other, _):
        below = group.path / "below"
        below.mkdir()
        try:
            for directory, member in ((group.path, pid), (below, other)):
                (directory / "cgroup.procs").write_text(str(member))
            for name in (str(group.path), "/" + str(group.path.relative_to(controller.path))):
                assert {part.pid for part in find("cgroup", name).parts} == {pid, other}
            assert {part.pid for part in find("cgroup", str(below)).parts} == {other}
        finally:
            (group.path / "cgroup.procs").write_text(str(other))
            below.rmdir()


def core(*segments: tuple[int, int, bytes], bits: int = 64, order: str = "<", extended: bool = False) -> bytes:
    """A core dump with such segments (flags, address, content), as the kernel lays them out. `extended`: with the
    number of program headers where it stands if there are very many."""
    head, entry = (64, 56) if bits == 64 else (52, 32)
    word = "Q" if bits == 64 else "I"
    sections = head + entry * (len(segments) + 1)
    section = bytearray(64)
    struct.pack_into(order + "I", section, 44 if bits == 64 else 28, len(segments) + 1)
    at = -(-(sections + 64) // PAGE) * PAGE
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    count = 0xFFFF if extended else len(segments) + 1
    fields = (4, 62, 1, 0, head, sections, 0, head, entry, count, 64, 0, 0)
    out = ident + struct.pack(order + "HHI" + 3 * word + "I6H", *fields)
    rest = b""
    for kind, flags, address, content in [(4, 0, 0, b"note"), *((1, *segment) for segment in segments)]:
        place = at + len(rest)
        out += (
            struct.pack(order + "IIQQQQQQ", kind, flags, place, address, 0, len(content), len(content), PAGE)
            if bits == 64
            else struct.pack(order + "8I", kind, place, address, 0, len(content), len(content), flags, PAGE)
        )
        rest += content + bytes(-len(content) % PAGE)
    return (out + section).ljust(at, b"\0") + rest


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [32, 64])
def test_a_core_dump_s_writable_memory_is_found(bits: int, order: str, extended: bool, tmp_path: Path) -> None:
    one, two, odd = noise(1) + noise(2), noise(3), noise(4) + noise(5)
    path = tmp_path / "core"
    segments = ((6, 0x10000, one), (5, 0x20000, noise("code")), (6, 0x30000, two), (6, 0x40000 - 100, odd))
    path.write_bytes(core(*segments, bits=bits, order=order, extended=extended))
    source = find("core", str(path))
    with take(source, ALL, ALL, 1, silent) as sample:
        found = held(sample, sample.training + sample.scoring)
    assert sorted(found) == sorted([noise(1), noise(2), noise(3), odd[100 : 100 + PAGE]])
    assert source.notes == []


def test_a_core_dump_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(core((6, 0x10000, noise(1) + noise(2)), (6, 0x20000, noise(3)))[: -PAGE - 1])
    source = find("core", str(path))
    assert source.pages == 1
    assert source.notes == [f"the file ends {PAGE + 1} bytes early: the core dump was cut off"]


@given(at=st.integers(0, 400), junk=st.binary(min_size=1, max_size=16), cut=st.integers(0, 3 * PAGE))
def test_a_damaged_core_dump_is_refused_or_read_within_its_bounds(
    at: int, junk: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    whole = core((6, 0x10000, noise(1)), (6, 0x20000, noise(2)))
    damaged = whole[:at] + junk + whole[at + len(junk) :]
    path.write_bytes(damaged[: len(damaged) - cut])
    try:
        found = elfcore.read(path)
    except ZswapdError:
        return
    for segment in found.segments:
        assert 0 <= segment.offset <= segment.offset + segment.size <= path.stat().st_size
        assert segment.size % PAGE == 0 < segment.size


def some_pages(count: int) -> list[bytes]:
    return [*islice(real_pages(), count), *(noise(number) for number in range(count // 10))]


def test_objects_take_what_they_take_in_the_pool() -> None:
    """By class, as the engine has counted them: header, padding and pages that are kept as they are."""
    size = 16 << 20
    # Noise, then zeros: of every length, also just about a page.
    pages = some_pages(500) + [noise(n)[: PAGE - n] + bytes(n) for n in range(3, 40)]
    distinct = [page for page in dict.fromkeys(pages) if page != page[:4] * (PAGE // 4)]
    engine = EmbeddedEngine(size_bytes=size, allocator="zsmalloc", mem_limit=size, algorithm="zstd", zstd_level=1)
    for number, page in enumerate(distinct):
        engine.write(number * PAGE, page)
    classes, codec = Classes(size), zstd_codec(1)
    lengths = [len(codec.encode(memoryview(page))) for page in distinct]
    taken = Counter(round(classes.taken(length), 6) for length in lengths)
    counted = Counter(
        {
            round(one["pages_per_zspage"] * PAGE / one["objects_per_zspage"], 6): one["objects"]
            for one in engine.stats()["classes"]
            if one["objects"]
        }
    )
    assert taken == counted
    assert sum(map(is_raw, lengths)) == engine.stats()["pages"]["incompressible"] > 0


def test_lz4_is_nearly_the_pager_s() -> None:
    """The package has a library of its own, which finds other matches in another version."""
    pages = some_pages(1000)
    ours = sum(len(compress_page(page, "lz4", 1)[1]) for page in pages)
    codec = lz4_codec()
    theirs = sum(min(len(codec.encode(memoryview(page))), PAGE) for page in pages)
    assert theirs == pytest.approx(ours, rel=0.03)


def test_what_is_estimated_is_what_a_pool_takes(tmp_path: Path) -> None:
    pages = some_pages(2000) + [bytes(PAGE)] * 200
    source = of_pages(tmp_path, *pages)
    with take(source, ALL, ALL, 1, silent) as sample:
        for number in [*sample.training]:  # all of them are scored, so that nothing is left to chance
            sample.scoring.append(number)
        scores = score([zstd_codec(3)], sample, silent)
    estimate = Estimator(source.pages, sample, Classes(64 << 20)).codec(scores[0])
    engine = EmbeddedEngine(
        size_bytes=64 << 20, allocator="zsmalloc", mem_limit=1 << 30, algorithm="zstd", zstd_level=3
    )
    for number, page in enumerate(pages):
        engine.write(number * PAGE, page)
    stats = engine.stats()
    assert estimate.payload_bytes == pytest.approx(stats["compressed_bytes"] / len(pages))
    # The last zspage of every class is not full.
    spare = sum(one["pages_per_zspage"] * PAGE for one in stats["classes"] if one["zspages"])
    assert stats["pool_bytes"] - spare <= estimate.pool_bytes * len(pages) <= stats["pool_bytes"]
    assert estimate.ratio < PAGE / estimate.pool_bytes


def estimates(directory: Path, pages: list[bytes]) -> list[Estimate]:
    source = of_pages(directory, *pages)
    with take(source, ALL, ALL, 1, silent) as sample:
        scores = score(every(train(sample)), sample, silent)
    estimator = Estimator(source.pages, sample, Classes(1 << 30))
    return [estimator.codec(one) for one in scores]


def test_a_tier_lies_between_its_codecs_and_never_makes_a_page_larger(tmp_path: Path) -> None:
    source = of_pages(tmp_path, *some_pages(500))
    with take(source, ALL, ALL, 1, silent) as sample:
        weak, strong = score([lz4_codec(), zstd_codec(9)], sample, silent)
    estimator = Estimator(source.pages, sample, Classes(1 << 30))
    none, half, full = (estimator.tier(weak, strong, share) for share in (0.0, 0.5, 1.0))
    assert none.ratio == estimator.codec(weak).ratio < half.ratio < full.ratio
    assert full.ratio >= estimator.codec(strong).ratio
    assert half.recompressed_share == full.recompressed_share / 2 > none.recompressed_share == 0
    back = estimator.tier(strong, weak, 1.0)
    assert back.ratio >= estimator.codec(strong).ratio


def alike(number: int) -> bytes:
    """A page of words that others have, too, in another order: a dictionary knows them."""
    rng = random.Random(f"page {number}")
    words = [random.Random(f"word {word}").randbytes(24) for word in rng.sample(range(400), 100)]
    return b"".join(word + rng.randbytes(17) for word in words)[:PAGE]


def test_a_dictionary_pays_where_pages_are_alike_and_its_memory_counts(tmp_path: Path) -> None:
    found = {one.name: one for one in estimates(tmp_path, [alike(number) for number in range(2500)])}
    plain, with_one = found["zstd 9"], found["zstd 9 + dictionary"]
    assert with_one.payload_bytes < 0.9 * plain.payload_bytes
    assert with_one.dictionary_bytes > 8 << 10
    per_page = with_one.dictionary_bytes / 2500
    assert with_one.ratio < PAGE / (with_one.pool_bytes + per_page)


def test_few_pages_train_no_dictionary(tmp_path: Path) -> None:
    found = estimates(tmp_path, [alike(number) for number in range(60)])
    assert [one.name for one in found] == ["lz4", "zstd 1", "zstd 3", "zstd 9"]


def like(ratio: float, compress: float, decompress: float, **more: Any) -> Estimate:
    fields: dict[str, Any] = {
        **{"name": "zstd 1", "algorithm": "zstd", "level": 1, "payload_bytes": 1, "pool_bytes": 1, "ratio": ratio},
        **{"margin": 0, "incompressible_share": 0, "compress_us": compress, "decompress_us": decompress},
        **{"dictionary_bytes": 0, **more},
    }
    return Estimate(**fields)


LZ4 = like(2.7, 7.6, 1.6, name="lz4", algorithm="lz4", level=None)


NONE_IDLE = Idle(0, 1 << 20)
ZSTD = [like(4.1, 14, 5.6), like(4.2, 17, 5.6, level=3), like(4.4, 90, 5.6, level=9)]


@pytest.mark.parametrize(
    ("others", "level"),
    [
        ([like(4.1, 14, 5.6), like(4.2, 17, 5.6, level=3), like(4.4, 90, 5.6, level=9)], 1),
        ([like(2.8, 14, 5.6)], None),  # saves too little
        ([like(4.1, 14, 9.7)], None),  # comes back too late
        ([like(4.1, 23, 5.6)], None),  # costs too much
        ([like(4.1, 14, 5.6), like(4.7, 17, 5.6, level=3)], 3),
        ([like(4.1, 14, 5.6), like(5.0, 17, 5.6, level=3, dictionary_bytes=1)], 1),  # not for pages as they come
    ],
)
def test_what_is_recommended_and_that_it_is_a_configuration(
    others: list[Estimate], level: int | None, tmp_path: Path
) -> None:
    advice = advise([LZ4, *others], NONE_IDLE, Config())
    (tmp_path / "zswapd.toml").write_text(advice.toml())
    config = load(tmp_path / "zswapd.toml", (), {})
    assert config.compression.algorithm == ("lz4" if level is None else "zstd")
    assert level in (None, config.compression.zstd_level)
    pool = config.pool.mem_limit_bytes
    ratio = next((one.ratio for one in others if one.level == level), LZ4.ratio)
    assert 0.95 * pool * ratio <= config.swap.size <= pool * ratio
    assert config.recompression.cpu_percent == 0  # no page is idle
    assert advice.reasons


def recommended(idle: Idle, *others: Estimate) -> tuple[Config, str]:
    advice = advise([LZ4, *others], idle, Config())
    return Config.model_validate({**advice.settings, "swap": {}}), " ".join(advice.reasons)


def test_what_is_recommended_for_idle_pages() -> None:
    dictionary = like(4.8, 80, 5.6, level=9, dictionary_bytes=1 << 20)
    config, reasons = recommended(Idle(0.5, 4 << 18), *ZSTD, dictionary)
    found = config.recompression
    assert (found.idle_level, found.cold_level, found.dictionaries) == (3, 9, True)
    # What half of 4 GiB takes, in an hour: 17 µs after lz4's 1.6 (or zstd's 5.6), then 5.6 and 80.
    assert found.cpu_percent == 2
    assert "1.0 MiB" in reasons
    assert recommended(Idle(0.5, 64 << 18), *ZSTD, dictionary)[0].recompression.cpu_percent == 20
    assert not recommended(Idle(0.5, 4 << 18), *ZSTD)[0].recompression.dictionaries
    too_little = like(4.45, 80, 5.6, level=9, dictionary_bytes=1 << 20)
    assert not recommended(Idle(0.5, 4 << 18), *ZSTD, too_little)[0].recompression.dictionaries
    assert recommended(Idle(0.5, 4 << 18), ZSTD[0], like(4.6, 17, 5.6, level=3))[0].recompression.cold_level == 3
    assert recommended(Idle(0.5, 4 << 18), like(2.71, 14, 5.6, level=3))[0].recompression.cpu_percent == 0


def test_what_is_recompressed_anyway_needs_no_slow_codec_as_it_comes() -> None:
    assert recommended(Idle(0.5, 4 << 18), *ZSTD)[0].compression.algorithm == "zstd"
    assert recommended(Idle(0.9, 4 << 18), *ZSTD)[0].compression.algorithm == "lz4"


def test_what_was_watched_says_when_pages_are_idle() -> None:
    ages = [
        recommended(Idle(0.5, 4 << 18, seconds), *ZSTD)[0].recompression.model_dump() for seconds in (None, 5.0, 120.0)
    ]
    assert [one["idle_after"] for one in ages] == [60, 60, 120]
    assert [one["cold_after"] for one in ages] == [600, 600, 1200]


def test_with_a_disk_what_does_not_compress_goes_there_first(tmp_path: Path) -> None:
    disk = Config.model_validate({"writeback": {"backing": "/dev/disk"}})
    much = like(2, 7, 1, name="lz4", algorithm="lz4", level=None, incompressible_share=0.2)
    assert advise([much], NONE_IDLE, disk).settings["writeback"] == {"incompressible": "first"}
    assert "writeback" not in advise([much], NONE_IDLE, Config()).settings
    assert "writeback" not in advise([LZ4], NONE_IDLE, disk).settings


def test_what_nobody_uses_is_idle() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        lacks("/proc/PID/clear_refs")
    with program() as (pid, _):
        # It waits: hardly anything of what it has touched is touched again.
        assert 0.5 < measure([pid], 0.1, silent) <= 1


def test_a_process_is_analyzed_for_people_and_for_scripts(tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        lacks("matplotlib")
    picture = tmp_path / "analyze.png"
    with program() as (pid, _):
        people = run("pid", str(pid), "--sample", "4MiB", "--plot", str(picture))
        scripts = run("pid", str(pid), "--sample", "4MiB", "--idle", "70", "--json")
    assert people.exit_code == 0, people.output
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    for words in (f"pid {pid} (python", "zstd 9", "same-filled", "[compression]", "50% of the pages idle (assumed)"):
        assert words in people.stdout
    found = json.loads(scripts.stdout)
    assert found["looked_at_pages"] == found["pages"] >= NOISE + EQUAL + ZERO
    assert (found["idle_share"], found["idle_share_is"]) == (0.7, "given")
    assert found["codecs"][0]["name"] == "lz4"
    assert {tier["fresh"] for tier in found["tiers"]} == {"lz4", "zstd 1"}


def test_a_core_dump_and_a_file_are_analyzed(tmp_path: Path) -> None:
    pages = some_pages(300)
    (tmp_path / "pages").write_bytes(b"".join(pages))
    (tmp_path / "core").write_bytes(core((6, 0x10000, b"".join(pages))))
    for kind, file in (("file", "pages"), ("core", "core")):
        found = json.loads(run(kind, str(tmp_path / file), "--json").stdout)
        assert found["pages"] == len(pages)


def no_process() -> str:
    return str(int(Path("/proc/sys/kernel/pid_max").read_text()) + 1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("pid", no_process()), "there is no process"),
        (("pid", "init"), "init is not a pid"),
        (("cgroup", "/no/such/group"), "there is no cgroup /no/such/group"),
        (("file", "/no/such/file"), "/no/such/file cannot be read: No such file"),
        (("file", "/dev/null"), "/dev/null is not a regular file"),
        (("core", sys.executable), "it is an ELF file of type"),
        (("core", __file__), "it does not begin as an ELF file"),
        (("file", "{empty}"), "has no page to analyze"),
        (("file", "{zeros}"), "repeat one word"),
        (("pid", "1", "--plot", "/no/such/directory/a.png"), "cannot be written"),
    ],
)
def test_what_cannot_be_analyzed_is_said(arguments: tuple[str, ...], why: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(bytes(64 * PAGE))
    files = {"empty": tmp_path / "empty", "zeros": tmp_path / "zeros"}
    result = run(*(argument.format(**files) for argument in arguments))
    assert result.exit_code == 1
    assert why in result.stderr
    assert result.stderr.startswith("zswapctl: ")
    assert result.stdout == ""


def test_a_kernel_thread_has_no_pages() -> None:
    if not Path("/proc/2/comm").exists() or Path("/proc/2/comm").read_text() != "kthreadd\n" or os.geteuid() != 0:
        lacks("root, and kernel threads in sight")
    with pytest.raises(ZswapdError, match="is a kernel thread"):
        find("pid", "2")


def test_memory_that_may_not_be_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(pid: int) -> Memory:
        raise PermissionError

    monkeypatch.setattr("zswapd.analyze.sources.Memory", refuse)
    (tmp_path / "cgroup.procs").write_text("1\n")
    for kind, which in (("pid", str(os.getpid())), ("cgroup", str(tmp_path))):
        with pytest.raises(ZswapdError, match=r"may be read|may not be read") as error:
            find(kind, which)
        assert error.value.hint == "run it as root"


def test_a_zombie_has_no_pages() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(ZswapdError, match="has ended, and waits"):
            find("pid", str(process.pid))
    finally:
        process.wait()


def test_usage_that_makes_no_sense_is_refused() -> None:
    assert run("core", __file__, "--watch", "1").exit_code == 2
    assert run("pid", "1", "--watch", "1", "--idle", "3").exit_code == 2
    assert run("pid", "1", "--sample", "4KiB").exit_code == 2
