"""The kernel's own swap devices as rows of the benchmark: real swap, every page checked, nothing left."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.machine import lacks
from zswapd import swapdev
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.corpus import Corpus, build
from zswapd.bench.devices import CONTROL, Device, SwapFile, Zram
from zswapd.bench.leftovers import leftovers
from zswapd.bench.programs import PAGE
from zswapd.bench.runner import workload
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
