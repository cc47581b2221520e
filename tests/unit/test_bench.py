"""The benchmark's own parts: what it measures with must be right before any figure is."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner
from rich.console import Console

from tests.daemon import DEADLINE_SECONDS
from tests.machine import lacks
from tests.pages import PAGE, noise, real_pages
from zswapd import memcg
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.command import bench
from zswapd.bench.commands import Interrupted, alongside, run, until_signal
from zswapd.bench.corpus import Corpus, Source, build, gather
from zswapd.bench.floor import why_not_forget
from zswapd.bench.leftovers import leftovers
from zswapd.bench.measure import kernel_threads, refuse_to_forget
from zswapd.bench.plot import plot, require
from zswapd.bench.programs import Program, Running, known
from zswapd.bench.rows import device
from zswapd.bench.runner import WrongPages, workload
from zswapd.bench.summary import COST, DISK, FIGURES, SPEED, line, summarize, table
from zswapd.bench.workload import Anonymous, DirectFile, Memory, Workload, percentile
from zswapd.errors import ZswapdError

PAGES = 512


def silent(what: str, done: int, total: int) -> None:
    pass


def content(corpus: Corpus) -> list[bytes]:
    return [os.pread(corpus.fd, PAGE, number * PAGE) for number in range(corpus.pages)]


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [
        (range(1, 101), 0.5, 50),
        (range(1, 101), 0.99, 99),
        (range(1, 101), 0.999, 100),
        (range(1, 1001), 0.999, 999),
        ([1, 2, 3], 0.5, 2),
        ([7], 0.01, 7),
        ([7], 1.0, 7),
        ([], 0.5, 0),
    ],
)
def test_percentiles_are_nearest_rank(values: Any, fraction: float, expected: int) -> None:
    assert percentile(values, fraction) == expected


def noises(name: str, count: int) -> Iterator[bytes]:
    return (noise(f"{name} {number}") for number in range(count))


async def gathered(seed: int, pages: int = 2000) -> list[bytes]:
    sources = [
        Source(name, kind, 1500, noises(name, 1500)) for name, kind in (("a", "heap"), ("b", "heap"), ("c", "file"))
    ]
    with await gather(sources, pages, seed, silent) as corpus:
        assert corpus.sources.total() == corpus.pages
        return content(corpus)


async def test_a_seed_decides_the_order() -> None:
    assert await gathered(1) == await gathered(1)
    assert await gathered(1) != await gathered(2)


async def test_any_prefix_is_a_mix_of_runs() -> None:
    origin = {page: name for name in "abc" for page in noises(name, 1500)}
    names = [origin[page] for page in await gathered(1)]
    assert set(names[:1000]) == {"a", "b", "c"}
    changes = sum(one != other for one, other in pairwise(names))
    assert changes < len(names) // 64


async def test_zeros_and_repetitions_are_left_out_and_nothing_is_made_up() -> None:
    some = list(islice(real_pages(), 100))
    distinct = len(set(some) - {bytes(PAGE)})
    pages = chain(some, repeat(bytes(PAGE), 50), some)
    with await gather([Source("all", "heap", 250, pages)], 250, 1, silent) as corpus:
        assert corpus.pages == distinct
        assert len(set(content(corpus))) == distinct
        assert bytes(PAGE) not in content(corpus)
        assert corpus.dropped.total() == 250 - distinct


async def test_programs_give_most_of_the_pages() -> None:
    with await build(4096, 1, silent) as corpus:
        heap = sum(corpus.sources[program.name] for program in known())
        assert corpus.pages == 4096
        assert len(set(content(corpus))) == corpus.pages
        assert heap >= 0.6 * corpus.pages
        assert corpus.left_out == []


async def test_a_program_s_memory_holds_what_it_works_on() -> None:
    program = next(program for program in known() if program.name == "python-syntax-trees")
    running = Running(program, 64 << 20, DEADLINE_SECONDS, [])
    try:
        assert await running.ready()
        # A name that only the sources which it parses can have brought there.
        assert any(b"_syntax_error" in page or b"decompress" in page for page in running.pages())
    finally:
        running.end()


@pytest.mark.parametrize("program", known(), ids=lambda program: program.name)
async def test_a_program_leaves_no_file(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"{number * 7919 % 99991} a line\n" for number in range(1 << 19)))
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    running = Running(program, 1 << 20, DEADLINE_SECONDS, [str(text)])
    try:
        assert await running.ready()
        assert list(Path("/tmp").glob(f"hsperfdata_*/{running.pid}")) == []
        if program.name == "sort-lines":  # more than its budget: the rest is in files
            assert [file for file in place.rglob("*") if file.is_file()]
    finally:
        running.end()
    assert list(place.iterdir()) == []


class Leaky(Anonymous):
    """Memory that loses, mixes up or spoils pages."""

    def __init__(self) -> None:
        super().__init__(PAGES)
        self.unreadable: set[int] = set()

    def read(self, page: int) -> bytes:
        if page in self.unreadable:
            raise OSError("EIO")
        return super().read(page)


@pytest.fixture
def corpus_fd() -> Iterator[int]:
    fd = os.memfd_create("zswapd-test-corpus")
    os.write(fd, b"".join(noises("corpus", PAGES)))
    yield fd
    os.close(fd)


def filled(fd: int, memory: Memory) -> Workload:
    workload = Workload(fd, PAGES, memory, lambda done, total: None)
    workload.fill()
    assert workload.verify() == {"verified": PAGES, "wrong": 0, "unreadable": 0, "wrong_pages": []}
    return workload


def test_the_workload_s_memory_is_private() -> None:
    """Shared memory is reclaimed in another way, and comes back in another way."""
    memory = Anonymous(PAGES)
    memory.write(0, noise("ours"))
    if (child := os.fork()) == 0:
        memory.write(0, noise("the child's"))
        os._exit(0)
    os.waitpid(child, 0)
    assert memory.read(0) == noise("ours")


def test_verify_catches_a_flipped_bit(corpus_fd: int) -> None:
    memory = Leaky()
    workload = filled(corpus_fd, memory)
    for page, offset in ((0, 0), (7, 4095), (PAGES - 1, 2048)):
        spoilt = bytearray(memory.read(page))
        spoilt[offset] ^= 1
        memory.write(page, bytes(spoilt))
    assert workload.verify()["wrong_pages"] == [0, 7, PAGES - 1]


def test_verify_catches_pages_in_each_other_s_place_and_pages_that_cannot_be_read(corpus_fd: int) -> None:
    memory = Leaky()
    workload = filled(corpus_fd, memory)
    one, other = memory.read(3), memory.read(4)
    memory.write(3, other)
    memory.write(4, one)
    memory.unreadable = {9}
    result = workload.verify()
    assert (result["wrong_pages"], result["unreadable"]) == ([3, 4, 9], 1)


def test_verify_does_not_trust_the_corpus_alone(corpus_fd: int) -> None:
    memory = Leaky()
    workload = filled(corpus_fd, memory)
    os.pwrite(corpus_fd, noise("another"), 5 * PAGE)
    memory.write(5, noise("another"))
    assert workload.verify()["wrong_pages"] == [5]


def test_rewriting_changes_a_quarter_and_what_is_expected(corpus_fd: int) -> None:
    memory = Leaky()
    workload = filled(corpus_fd, memory)
    before = [memory.read(page) for page in range(PAGES)]
    assert workload.rewrite(seed=1) == {"rewritten": PAGES // 4}
    changed = [page for page in range(PAGES) if memory.read(page) != before[page]]
    assert len(changed) == PAGES // 4
    assert workload.verify()["wrong"] == 0
    memory.write(changed[0], before[changed[0]])  # an overwrite that was lost
    assert workload.verify()["wrong_pages"] == [changed[0]]


def test_direct_files_are_filled_read_and_timed(corpus_fd: int, tmp_path: Path) -> None:
    path = tmp_path / "swapfile"
    path.write_bytes(bytes(PAGES * PAGE))
    try:
        memory = DirectFile(str(path))
    except OSError:
        lacks("a temporary directory with O_DIRECT")
    workload = filled(corpus_fd, memory)
    assert path.read_bytes() == b"".join(noises("corpus", PAGES))
    timed = workload.random(seed=1)
    assert timed["faults"] == PAGES
    assert 0 < timed["p50_us"] <= timed["p99_us"] <= timed["max_us"]


async def test_the_workload_process_reports_what_it_finds(corpus_fd: int) -> None:
    corpus = Corpus(corpus_fd, 1, PAGES)
    async with workload(corpus, None, silent, "anonymous") as load:
        await load.run("fill")
        await load.run("verify")
        assert load.verified == PAGES
        os.pwrite(corpus_fd, b"!", 17 * PAGE)
        with pytest.raises(WrongPages, match=r"1 of 512 pages are wrong: \[17\]"):
            await load.run("verify")
        os.kill(load.pid, signal.SIGKILL)
        with pytest.raises(ZswapdError, match="status -9"):
            await load.run("verify")


def test_a_cgroup_limits_and_goes_with_its_members() -> None:
    controller = memcg.find_controller()
    if os.geteuid() != 0 or controller is None or not os.access(controller.path, os.W_OK):
        lacks("root and a memory cgroup controller")
    hog = "import sys; print(); sys.stdin.read(1); b = bytearray(32 << 20); print(); sys.stdin.read()"
    with MemoryCgroup(64 << 20) as group:
        path = group.path
        assert path.name.startswith(f"zswapd-bench-{os.getpid()}-")
        assert (group.usage_bytes(), group.swap_bytes(), group.oom_kills()) == (0, 0, 0)
        process = subprocess.Popen([sys.executable, "-c", hog], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        group.add(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert group.members() == [process.pid]
        assert 32 << 20 <= group.usage_bytes() <= group.peak_bytes() <= 64 << 20
        assert f"cgroup {path}" in leftovers(Path("/nowhere"))
        group.set_limit(48 << 20)
    assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    assert f"cgroup {path}" not in leftovers(Path("/nowhere"))
    process.stdin.close()
    process.stdout.close()


def test_leftovers_are_found(tmp_path: Path) -> None:
    assert leftovers(tmp_path) == []
    file = tmp_path / f"zswapd-bench-{os.getpid()}.swap"
    file.touch()
    process = subprocess.Popen(["sleep", "600"])
    try:
        assert leftovers(tmp_path) == [f"file {file}", f"process {process.pid} (sleep)"]
    finally:
        process.kill()
        process.wait()


async def test_a_signal_ends_the_work_in_good_order() -> None:
    undone: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                os.kill(os.getpid(), signal.SIGINT)  # impatience changes nothing
                await trio.sleep(0.01)
                undone.append("everything")

    with pytest.raises(Interrupted, match="SIGTERM"):
        await until_signal(work)
    assert undone == ["everything"]


async def test_a_failure_beside_other_work_is_raised_as_it_is() -> None:
    async def fail() -> None:
        raise ZswapdError("no")

    with pytest.raises(ZswapdError, match="no"):
        await alongside(trio.sleep_forever, fail)


async def test_programs_are_bounded_in_time_and_their_failures_say_why() -> None:
    with pytest.raises(ZswapdError, match="did not end within"):
        await run("sleep", "600", seconds=0.01)
    with pytest.raises(ZswapdError, match="No such file"):
        await run("cat", "/nowhere")
    with pytest.raises(ZswapdError, match="is not installed"):
        await run("zswapd-no-such-program")


def runs() -> list[dict[str, Any]]:
    """Three of row a, and three of row b, which has no effective ratio."""
    return [
        {"row": row, **dict.fromkeys(FIGURES, 4 << 20), "fill_mb_per_second": fill, "effective_ratio": ratio}
        for row, ratio, fills in (("a", 2.0, (3, 1, 9)), ("b", None, (5, 5, 5)))
        for fill in fills
    ]


def test_a_summary_is_the_median_and_the_spread() -> None:
    summary = summarize(runs())
    assert list(summary) == ["a", "b"]
    assert set(summary["a"]) == set(FIGURES)
    assert summary["a"]["fill_mb_per_second"] == {"median": 3, "min": 1, "max": 9}
    assert summary["b"]["effective_ratio"] is None


def test_people_read_units_medians_and_how_far_runs_were_from_them() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(summarize(runs()), SPEED), table(summarize(runs()), COST))
    words = console.export_text().split()
    assert "3.00" in words
    assert "±200%" in words
    assert "4.00" in words  # MiB
    assert "-" in words
    assert line(runs()[0]).startswith("fill MB/s 3.00, ")
    assert "effective" not in line(runs()[3])


def test_a_bounded_pool_adds_what_the_disk_has_seen() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    some = [{**run, "disk_written_per_page": 0.375} for run in runs()]
    console.print(table(summarize(some), DISK))
    assert "0.38" in console.export_text().split()
    assert "written per page 0.38" in line(some[0])


def test_panels_without_a_figure_are_left_out(tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        lacks("matplotlib")
    without = [{**run, "disk_written_per_page": None, "swapoff_mb_per_second": None} for run in runs()]
    heights = []
    for number, some in enumerate((runs(), without)):
        picture = tmp_path / f"{number}.png"
        plot(summarize(some), "title", picture)
        heights.append(int.from_bytes(picture.read_bytes()[20:24]))
    assert heights[1] < heights[0]


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        lacks("matplotlib")
    plot(summarize(runs()), "title", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_plot_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ZswapdError, match="needs matplotlib"):
        require(tmp_path / "bench.png")


def test_a_plot_that_could_not_be_written_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("zswapd.bench.command.cannot_swap", lambda: "nothing is measured")
    monkeypatch.setattr("zswapd.bench.plot.find_spec", lambda name: name)
    for picture, why in ((tmp_path / "no" / "bench.png", "cannot be written"), (tmp_path / "bench.png", "measured")):
        assert why in str(CliRunner().invoke(bench, ["--rows", "file", "--plot", str(picture)]).exception)


@pytest.mark.parametrize(
    "row",
    [
        *("zswapd-lz4", "zswapd-zstd", "zswapd-lz4-z3fold", "zswapd-pyfuse3-lz4", "zswapd-pyfuse3-zstd"),
        "zswapd-lz4-tiers",
        *("zram-lzo", "zswap-lzo", "file", "null"),
    ],
)
def test_rows_are_devices_of_that_name_and_only_null_forgets(row: str, tmp_path: Path) -> None:
    assert device(row, tmp_path, PAGE).name == row
    assert device(row, tmp_path, PAGE).forgets == (row == "null")


@pytest.mark.parametrize(
    "row", ["", "zswapd", "zswapd-lzo", "zswapd-pyfuse3", "zswapd-lz4-pyfuse3", "zswapd-z3fold", "zram", "null-1"]
)
def test_other_rows_are_refused(row: str, tmp_path: Path) -> None:
    with pytest.raises(ZswapdError, match="no row is called"):
        device(row, tmp_path, PAGE)


def test_kernel_threads_are_told_from_processes() -> None:
    kthreadd = Path("/proc/2")
    if not (kthreadd / "schedstat").exists() or (kthreadd / "comm").read_text() != "kthreadd\n":
        lacks("kernel threads in sight, with their exact CPU time")
    threads = kernel_threads()
    assert "2" in threads
    assert str(os.getpid()) not in threads
    assert sum(threads.values()) > 0


def machine(root: Path, **files: str) -> Path:
    """A machine on which pages may be forgotten, but for `files`: what is in them, by path with __ for /."""
    for path, text in {
        "proc__self__mounts": "cgroup /cgroup cgroup rw,memory 0 0\n",
        "proc__meminfo": f"MemFree: {8 << 20} kB\n",
        "cgroup__memory.limit_in_bytes": f"{(1 << 63) - PAGE}\n",
        "cgroup__ours__memory.limit_in_bytes": "4096\n",
        "sys__kernel__mm__damon__admin__kdamonds__0__state": "off\n",
        "sys__module__damon_reclaim__parameters__enabled": "N\n",
        **files,
    }.items():
        file = root / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_pages_may_be_forgotten_where_only_the_workload_swaps(tmp_path: Path) -> None:
    root = machine(tmp_path)
    assert why_not_forget(root / "cgroup/ours", 1 << 30, root) == ""


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("sys__kernel__mm__damon__admin__kdamonds__1__state", "on\n", "kdamonds/1/state is on"),
        ("sys__module__damon_reclaim__parameters__enabled", "Y\n", "parameters/enabled is Y"),
        ("proc__meminfo", f"MemFree: {4095 << 10} kB\n", "less than 4.0 GiB is free"),
        ("cgroup__another__memory.limit_in_bytes", "1048576\n", r"another/memory.limit_in_bytes is 1.0 MiB"),
        ("cgroup__a__b__memory.high", "1048576\n", r"a/b/memory.high is 1.0 MiB"),
        ("proc__self__mounts", "", "no memory cgroup controller"),
    ],
)
def test_pages_may_not_be_forgotten_where_others_could_be_swapped_out(
    path: str, text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machine(tmp_path, **{path: text})
    why = why_not_forget(root / "cgroup/ours", 1 << 30, root)
    assert re.search(reason, why)
    monkeypatch.setattr("zswapd.bench.measure.why_not_forget", lambda group, size: why)
    with pytest.raises(ZswapdError, match="would lose other processes' pages"):
        refuse_to_forget(root, 1 << 30)


def test_the_workload_s_pages_may_be_swapped_and_its_heap_may_not() -> None:
    """A device may lose every page of the workload's, and the workload goes on."""
    if os.geteuid() != 0:
        lacks("root, to lock memory")
    script = """
import ctypes
from zswapd.bench.workload import PAGE, Anonymous
memory = Anonymous.swapped(5555)
heap = bytearray(7777 << 10)
for mapping in (memory._map, heap):
    print(ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
print(open("/proc/self/smaps").read())
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    mappings = re.findall(r"^(\w+)-(\w+) \S{4} (?:.*\n)*?VmFlags: (.*)$", said, re.MULTILINE)
    locked = [
        "lo" in flags.split()
        for address in map(int, said.split()[:2])
        for start, end, flags in mappings
        if int(start, 16) <= address < int(end, 16)
    ]
    assert locked == [False, True]
