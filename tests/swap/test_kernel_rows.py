"""The rows of the benchmark: real swap, every page checked, nothing left and every setting as it was."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.daemon import DEADLINE_SECONDS
from tests.machine import lacks
from zswapd import swapdev
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.commands import settle
from zswapd.bench.corpus import Corpus, build
from zswapd.bench.devices import CONTROL, Device, Zram
from zswapd.bench.disk_devices import ZSWAP, SwapFile, Zswap
from zswapd.bench.leftovers import leftovers
from zswapd.bench.measure import measure
from zswapd.bench.programs import PAGE
from zswapd.bench.rows import device as device_of
from zswapd.bench.rows import offered
from zswapd.bench.runner import WrongPages, workload
from zswapd.bench.summary import DISK, FIGURES
from zswapd.bench.zswapd_device import Daemon, Zswapd
from zswapd.errors import ZswapdError

pytestmark = pytest.mark.usefixtures("_swap")

PAGES = 16 << 10  # 64 MiB
LIMIT = 24 << 20
SIZE = 2 * PAGES * PAGE
LEAST_SWAPPED = 32 << 20

MakeDevice = Callable[[Path], Device]


def zram(directory: Path) -> Device:
    if not (CONTROL / "hot_add").exists():
        lacks("zram")
    return Zram("lz4", SIZE)


def swap_file(directory: Path) -> Device:
    return SwapFile(directory, SIZE)


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def corpus() -> Iterator[Corpus]:
    with trio.run(build, PAGES, 1, silent) as corpus:
        assert corpus.pages == PAGES
        yield corpus


def assert_gone(device: Device, directory: Path) -> None:
    assert device.area() is None
    assert leftovers(directory) == []
    if isinstance(device, Zram):
        assert not Path("/sys/block", Path(device.path).name).exists()


@pytest.mark.parametrize("make", [zram, swap_file])
async def test_every_page_comes_back(make: MakeDevice, corpus: Corpus, tmp_path: Path) -> None:
    device = make(tmp_path)
    with MemoryCgroup(LIMIT) as group:
        async with device, workload(corpus, group, silent) as load:
            await load.run("fill")
            assert group.peak_bytes() <= LIMIT
            assert group.swap_bytes() > LEAST_SWAPPED
            area = device.area()
            assert area
            assert area.used_bytes > LEAST_SWAPPED
            assert area.priority > max((one.priority for one in swapdev.read_swaps() if one != area), default=-1)
            if held := await device.held():
                assert held.original_bytes > LEAST_SWAPPED
                assert 0 < held.used_bytes < held.original_bytes
            await load.run("verify")
            await load.run("rewrite", seed=1)
            random = await load.run("random", seed=2)
            assert random["faults"] > LEAST_SWAPPED // PAGE // 8  # what was read ahead takes no major fault
            assert 0 < random["p50_us"] <= random["p99_us"] <= random["max_us"]
            await load.run("sequential")
            await load.run("verify")
            assert load.verified == 2 * PAGES
            assert group.oom_kills() == 0
    assert_gone(device, tmp_path)


@pytest.mark.parametrize("make", [zram, swap_file])
async def test_a_failure_leaves_nothing_behind(make: MakeDevice, corpus: Corpus, tmp_path: Path) -> None:
    device = make(tmp_path)

    async def fail() -> None:
        with MemoryCgroup(LIMIT):
            async with device:
                raise ZswapdError("on purpose")

    with pytest.raises(ZswapdError, match="on purpose"):
        await fail()
    assert_gone(device, tmp_path)


async def test_an_algorithm_that_zram_lacks_is_refused_and_no_device_stays(tmp_path: Path) -> None:
    zram(tmp_path)
    before = set(Path("/sys/block").glob("zram*"))
    with pytest.raises(ZswapdError, match="zram does not offer rot13"):
        async with Zram("rot13", SIZE):
            pass
    assert set(Path("/sys/block").glob("zram*")) <= before


async def test_a_device_comes_before_all_others_or_says_that_it_does_not(tmp_path: Path) -> None:
    async with SwapFile(tmp_path, 16 << 20) as first:
        async with zram(tmp_path) as second:
            one, other = first.area(), second.area()
            assert one
            assert other
            assert other.priority > one.priority
            with pytest.raises(ZswapdError, match=f"{second.path} came before {first.path}"):
                first.require_first()
        first.require_first()


async def test_too_little_swap_is_told_apart_from_wrong_pages(corpus: Corpus, tmp_path: Path) -> None:
    if len(swapdev.read_swaps()) > 0:
        lacks("a machine without other swap")
    with MemoryCgroup(LIMIT) as group:
        async with SwapFile(tmp_path, 16 << 20), workload(corpus, group, silent) as load:
            with pytest.raises(ZswapdError, match="killed for want of memory"):
                await load.run("fill")


def zswap_settings() -> dict[str, str]:
    return {path.name: path.read_text() for path in ZSWAP.iterdir()}


def compressor() -> str:
    if not Zswap.compressors():
        lacks("zswap")
    return Zswap.compressors()[0]


async def test_zswap_keeps_pages_and_its_settings_are_put_back(corpus: Corpus, tmp_path: Path) -> None:
    device = Zswap(compressor(), tmp_path, SIZE)
    before = zswap_settings()
    with MemoryCgroup(LIMIT) as group:
        async with device, workload(corpus, group, silent) as load:
            assert zswap_settings()["enabled"] == "Y\n"
            assert zswap_settings()["compressor"] == f"{compressor()}\n"
            await load.run("fill")
            assert group.swap_bytes() > LEAST_SWAPPED
            held = await device.held()
            assert held.original_bytes > LEAST_SWAPPED
            assert 0 < held.used_bytes < held.original_bytes
            group.set_limit(SIZE)
            await load.run("verify")
    assert_gone(device, tmp_path)
    assert zswap_settings() == before


async def test_zswap_s_settings_are_put_back_after_a_failure(tmp_path: Path) -> None:
    name, before = compressor(), zswap_settings()
    with pytest.raises(ZswapdError, match="zswap does not take rot13 as its compressor"):
        async with Zswap("rot13", tmp_path, SIZE):
            pass
    assert zswap_settings() == before
    with trio.CancelScope() as interrupted:
        async with Zswap(name, tmp_path, SIZE) as device:
            assert zswap_settings() != before
            interrupted.cancel()
            await trio.sleep_forever()
    assert_gone(device, tmp_path)
    assert zswap_settings() == before


async def test_every_row_that_is_offered_exists_and_null_is_not_among_them(tmp_path: Path) -> None:
    before = set(Path("/sys/block").glob("zram*"))
    rows = await offered()
    assert set(Path("/sys/block").glob("zram*")) <= before
    assert {"zswapd-lz4", "zswapd-zstd", "zswapd-pyfuse3-lz4", "file"} <= set(rows)
    assert "null" not in rows
    assert [device_of(row, tmp_path, SIZE).name for row in rows] == rows


WITHOUT_DISK = set(DISK) - {"swapoff_mb_per_second"}
NOT_FOR = {
    "zswapd-lz4": WITHOUT_DISK,
    "zswapd-pyfuse3-lz4": WITHOUT_DISK | {"pager_cpu_seconds"},
    "file": {
        *("used_bytes", "effective_ratio", "process_bytes", "zswapd_cpu_seconds", "pager_cpu_seconds"),
        "working_set_pools",
    },
}


@pytest.mark.parametrize("row", NOT_FOR)
async def test_a_run_has_every_figure_of_its_row_and_leaves_nothing(row: str, corpus: Corpus, tmp_path: Path) -> None:
    run = await measure(row, corpus, tmp_path, silent)
    assert {figure for figure in FIGURES if run[figure] is None} == NOT_FOR[row]
    marks = [run[f"random_{mark}_us"] for mark in ("p50", "p90", "p99", "p999", "max")]
    assert marks[0] > 0
    assert marks == sorted(marks)
    assert run["workload_cpu_seconds"] > 0
    assert run["pages_verified"] == PAGES
    server = "pager_cpu_seconds" if row == "zswapd-lz4" else "zswapd_cpu_seconds"
    assert run["swapoff_mb_per_second"] > 0
    if row == "file":
        assert run["evicted_bytes"] == run["disk_written_bytes"] > LEAST_SWAPPED
        assert run["swapoff_disk_share"] == 1
    else:
        assert run[server] > 0
        assert run["original_bytes"] > run["used_bytes"] > 0
    assert leftovers(tmp_path) == []


async def test_the_pager_of_the_null_row_forgets_pages_and_goes_with_its_daemon(corpus: Corpus, tmp_path: Path) -> None:
    """Without swap: who else would lose pages is not ours to risk."""
    device = device_of("null", tmp_path, SIZE)
    assert isinstance(device, Zswapd)
    try:
        await device.daemon.start()
        assert set(device.daemon.processes()) == {"zswapd", "pager"}
        async with workload(corpus, None, silent, str(device.daemon.mount_point / "swapfile")) as load:
            await load.run("fill")
            kept = (2 << 20) // PAGE
            with pytest.raises(WrongPages, match=rf"{PAGES - kept} of {PAGES} pages are wrong: \[{kept}, "):
                await load.run("verify")
        with pytest.raises(ZswapdError, match="stores nothing"):
            await device.daemon.control("attach", "--unsafe")
    finally:
        with trio.CancelScope(shield=True):
            await device.daemon.stop()
    assert leftovers(tmp_path) == []


async def test_a_pager_that_is_stuck_does_not_outlive_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zswapd.bench.zswapd_device.STOP_SECONDS", 2)
    daemon = Daemon(tmp_path, SIZE, "lz4")
    try:
        await daemon.start()
        pids = daemon.processes()
        os.kill(pids["pager"], signal.SIGSTOP)
        os.kill(pids["zswapd"], signal.SIGKILL)
    finally:
        with trio.CancelScope(shield=True):
            await daemon.stop()
    # init has seen the pager's end, and its keeper's.
    assert await settle(lambda: leftovers(tmp_path) == [], DEADLINE_SECONDS)
    assert not Path("/proc", str(pids["pager"])).exists()
