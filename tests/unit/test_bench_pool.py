"""The benchmark with pools of a bounded size: which rows can have one, and what is counted of their disks."""

from pathlib import Path

import click
import pytest

from tests.pages import PAGE
from zswapd.bench.devices import Traffic
from zswapd.bench.disk_devices import Zswap, vmstat_traffic, zswap_limit, zswap_percent
from zswapd.bench.rows import device, offered
from zswapd.bench.screen import Size
from zswapd.config import mem_total
from zswapd.errors import ZswapdError


@pytest.mark.parametrize("row", ["zswapd-lz4", "zswapd-zstd-z3fold", "file"])
def test_rows_with_a_disk_can_have_a_bounded_pool(row: str, tmp_path: Path) -> None:
    assert device(row, tmp_path, PAGE, 64 << 20).pool_limit == (None if row == "file" else 64 << 20)
    assert device(row, tmp_path, PAGE).pool_limit is None


@pytest.mark.parametrize("row", ["zswapd-pyfuse3-lz4", "zram-lz4", "null"])
def test_rows_without_a_disk_cannot_have_a_bounded_pool(row: str, tmp_path: Path) -> None:
    with pytest.raises(ZswapdError, match=f"{row} writes nothing to a disk"):
        device(row, tmp_path, PAGE, 64 << 20)


async def test_every_row_that_is_offered_for_a_bounded_pool_can_have_one(tmp_path: Path) -> None:
    pool = zswap_limit(1, mem_total())
    rows = await offered(pool)
    assert {"zswapd-lz4", "file"} <= set(rows)
    for row in rows:
        assert device(row, tmp_path, PAGE, pool).pool_limit == (None if row == "file" else pool)


MEMORY = 24105 << 20


@pytest.mark.parametrize(("pool", "percent"), [(241 << 20, 1), (230 << 20, 1), (482 << 20, 2), (MEMORY, 100)])
def test_zswap_has_whole_percents_of_memory(pool: int, percent: int) -> None:
    assert zswap_percent(pool, MEMORY) == percent
    assert abs(zswap_limit(percent, MEMORY) - pool) <= 0.05 * pool


@pytest.mark.parametrize("pool", [64 << 20, 220 << 20, 360 << 20, 2 * MEMORY])
def test_a_pool_that_zswap_cannot_have_is_refused(pool: int) -> None:
    with pytest.raises(ZswapdError, match="whole percents of memory, and the nearest is ") as caught:
        zswap_percent(pool, MEMORY)
    assert "near a multiple of 241.0 MiB" in caught.value.hint


def test_the_kernel_s_limit_is_a_whole_number_of_pages() -> None:
    assert zswap_limit(1, 250 * PAGE) == 2 * PAGE
    assert zswap_limit(50, 251 * PAGE) == 125 * PAGE


def test_zswap_s_shrinker_is_on_where_its_pool_is_bounded(tmp_path: Path) -> None:
    bounded, free = Zswap("lzo", tmp_path, PAGE, zswap_limit(3, mem_total())), Zswap("lzo", tmp_path, PAGE)
    assert (bounded._settings["max_pool_percent"], bounded._settings["shrinker_enabled"]) == ("3", "Y")
    assert (free._settings["max_pool_percent"], free._settings["shrinker_enabled"]) == ("50", "N")


def test_what_is_written_for_an_evicted_page_is_counted_in_pages() -> None:
    before = vmstat_traffic("nr_free_pages 7\npswpin 10\npswpout 100\nzswpout 1000\n")
    after = vmstat_traffic("nr_free_pages 8\npswpin 15\npswpout 160\nzswpout 9000\n")
    assert after - before == Traffic(60, 60 * PAGE, 5 * PAGE)
    assert (after - before).written_per_page == 1
    assert Traffic(8, 3 * PAGE, 0).written_per_page == 0.375
    assert Traffic(0, 0, 0).written_per_page is None


def test_sizes_that_are_too_small_are_refused() -> None:
    assert Size().convert("64MiB", None, None) == 64 << 20
    assert Size(8 << 20, "why").convert("8MiB", None, None) == 8 << 20
    with pytest.raises(click.BadParameter, match=r"7MiB: below 8.0 MiB, why"):
        Size(8 << 20, "why").convert("7MiB", None, None)
