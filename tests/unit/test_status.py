import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.writeback import BOUNDS, RECOMPRESSION, writeback
from zswapd import status, swapdev
from zswapd.config import SEGMENT_BYTES
from zswapd.errors import DaemonError
from zswapd.swapdev import Attachment

HISTOGRAM = {"bounds_seconds": BOUNDS, "counts": [0, 100, 0, 0], "sum_seconds": 0.15}
MIB = 1 << 20


def stats(**changes: Any) -> dict[str, Any]:
    return {
        "version": "9.9",
        "pid": 42,
        "swap_size_bytes": 1 << 30,
        "algorithm": "zstd",
        "allocator": "z3fold",
        "zstd_level": 5,
        "pages": {"lz4": 1000, "zstd": 24, "same_filled": 7, "incompressible": 3, "on_disk": 0, "lost": 0},
        "original_bytes": 12 * MIB,
        "compressed_bytes": 3 * MIB,
        "pool_bytes": 4 * MIB,
        "pool_peak_bytes": 5 * MIB,
        "pool_reserve_bytes": MIB,
        "pool_limit_bytes": 8 * MIB,
        "metadata_bytes": MIB,
        "loads": 100,
        "stores": 200,
        "discards": 0,
        "pages_compacted": 0,
        "movers_awaited": 0,
        "ballast_bytes": 4 * MIB,
        "takeovers": 0,
        "takeover_seconds": 0.0,
        "objects_verified": 0,
        "objects_found_bad": 0,
        "rejected_stores": {"pool_full": 0, "no_memory": 0, "out_of_range": 0},
        "errors": {"lost": 0, "corrupt": 0},
        "load_latency": HISTOGRAM,
        "store_latency": {"bounds_seconds": BOUNDS, "counts": [0, 0, 0, 0], "sum_seconds": 0},
        "mover_waits": {"bounds_seconds": BOUNDS, "counts": [0, 0, 0, 0], "sum_seconds": 0},
        "recompression": RECOMPRESSION,
        "writeback": writeback(),
        **changes,
    }


def shown(stats: dict[str, Any], attachment: Attachment | None = None) -> str:
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(status.render(stats, attachment), highlight=False)
    return capture.get()


@pytest.mark.parametrize(
    ("q", "counts", "expected"),
    [
        (0.5, [0, 0, 0, 0], None),
        (0.5, [10, 0, 0, 0], 0.0005),
        (0.5, [0, 10, 0, 0], 0.0015),
        (0.99, [98, 0, 2, 0], 0.003),
        (0.5, [5, 0, 5, 0], 0.001),
        (0.99, [1, 0, 0, 99], 0.004),
    ],
)
def test_quantiles(q: float, counts: list[int], expected: float | None) -> None:
    assert status.quantile(q, BOUNDS, counts) == (expected if expected is None else pytest.approx(expected))


def test_effective_ratio_counts_all_the_memory() -> None:
    assert status.effective_ratio(stats()) == 2.0
    assert status.effective_ratio(stats(pool_bytes=0, pool_reserve_bytes=0, metadata_bytes=0)) is None


def test_the_state_is_shown() -> None:
    text = shown(stats(), Attachment("/dev/loop5", True, True, 1 << 30, MIB, 100))
    assert "/dev/loop5, 1.0 MiB of 1.0 GiB used, priority 100" in text
    assert "1,034 (lz4 1,000, zstd 24, same-filled 7, incompressible 3, on disk 0)" in text
    assert "12.0 MiB stored as 3.0 MiB, in a z3fold pool of 4.0 MiB (effective ratio 2.00)" in text
    assert "50.0% of 8.0 MiB used, peak 5.0 MiB" in text
    assert "100, p50 1.5 ms, p99 2.0 ms" in text
    assert "zstd level 5" in text
    assert "\x1b[1;31m" not in text


def test_what_was_recompressed_is_shown() -> None:
    assert "recompressed" not in shown(stats())
    counts = {
        **RECOMPRESSION,
        "pages_recompressed": 1234,
        "pages_not_smaller": 56,
        "saved_bytes": 2 * MIB,
        "processor_seconds": 0.5,
        "bytes": {"lz4": 3 * MIB, "zstd": 2 * MIB, "zstd_dictionary": MIB, "incompressible": 0},
        "dictionaries": [{"serial": 3, "bytes": 65536, "pages": 99}],
        "dictionary_bytes": 65536,
        "encoder_bytes": 3 * MIB - 65536,
    }
    pages = {"lz4": 10, "zstd": 20, "zstd_dictionary": 99, "incompressible": 0, "on_disk": 0, "lost": 0}
    text = shown(stats(recompression=counts, pages=pages))
    assert "1,234 pages, 2.0 MiB saved, in 500.0 ms; 56 would not get smaller" in text
    assert "lz4 10 as 3.0 MiB, zstd 20 as 2.0 MiB, zstd with dictionary 99 as 1.0 MiB" in text
    assert "3 (64.0 KiB) for 99 pages; 3.0 MiB of memory" in text
    assert "(effective ratio 1.33)" in text


def test_what_is_stored_once_is_shown() -> None:
    assert "duplicates" not in shown(stats())
    counts = {
        **RECOMPRESSION,
        "pages_deduplicated": 1500,
        "pages_shared": 1234,
        "shared_pages": 56,
        "index_bytes": MIB,
    }
    text = shown(stats(recompression=counts))
    assert "1,234 pages stored as 56; 1.0 MiB of memory to find them" in text


def test_classes_are_shown_with_their_sum() -> None:
    def entry(size: int, zspages_by_fullness: list[int], objects: int, waste_bytes: int) -> dict[str, Any]:
        return {
            "size_bytes": size,
            "pages_per_zspage": 3,
            "objects_per_zspage": 10,
            "zspages": sum(zspages_by_fullness),
            "objects": objects,
            "zspages_by_fullness": zspages_by_fullness,
            "waste_bytes": waste_bytes,
        }

    classes = [
        entry(64, [0] * 12, 0, 0),
        entry(1024, [0, 1, 0, 2, 4, 0, 0, 8, 16, 0, 32, 1000], 10456, 2048),
        entry(2048, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 10, 1024),
    ]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(status.render_classes({"allocator": "zsmalloc", "classes": classes}))
    rows = [line.split() for line in capture.get().splitlines()[1:]]
    assert rows == [
        ["1024", "3", "10", "10,456", "1,063", "3", "12", "48", "1,000", "2.0", "KiB"],
        ["2048", "3", "10", "10", "1", "0", "0", "0", "1", "1.0", "KiB"],
        ["all", "10,466", "1,064", "3", "12", "48", "1,001", "3.0", "KiB"],
    ]


def test_what_is_not_attached_says_so() -> None:
    assert "not attached" in shown(stats())
    half = shown(stats(), Attachment("/dev/loop5", False, True, 1 << 30, 0, 0))
    assert "/dev/loop5 is half attached" in half


def test_latency_beyond_the_last_bound_is_a_lower_limit() -> None:
    beyond = {"bounds_seconds": BOUNDS, "counts": [0, 0, 0, 9], "sum_seconds": 9.0}
    assert "p50 >= 4.0 ms" in shown(stats(load_latency=beyond))


def on_disk(**changes: Any) -> dict[str, Any]:
    """Half of what is stored is on the disk."""
    pages = {"lz4": 1000, "zstd": 24, "same_filled": 7, "incompressible": 3, "on_disk": 1536, "lost": 0}
    counts = {"state": "ok", "backing_bytes": 64 * MIB, "backing_free_bytes": 40 * MIB, "live_bytes": 2 * MIB}
    counts |= {"pages_written": 2048, "written_bytes": 3 * MIB, "cleaning_bytes": MIB, "reads": 100}
    counts |= {"read_latency": HISTOGRAM, "pages_promoted": 9, **changes}
    return stats(pages=pages, writeback=writeback(**counts))


def test_the_backing_disk_is_shown() -> None:
    text = shown(on_disk())
    assert "6.0 MiB stored as 3.0 MiB, in a z3fold pool of 4.0 MiB (effective ratio 1.00)" in text
    assert "6.0 MiB of pages as 2.0 MiB; 40.0 MiB of 64.0 MiB free" in text
    clustered = "6.0 MiB of pages as 2.0 MiB, 25% of them in clusters; 40.0 MiB of 64.0 MiB free"
    assert clustered in shown(on_disk(pages_in_clusters=384))
    assert "2,048 pages in 3.0 MiB, 1.0 MiB for cleaning; per page 0.50" in text
    assert "100, p50 1.5 ms, p99 2.0 ms; 9 into the pool" in text
    assert "budget" not in text
    assert "\x1b[1;31m" not in text
    assert "backing disk" not in shown(stats())


def test_a_failed_disk_is_red_and_a_used_up_budget_yellow() -> None:
    assert "\x1b[1;31mfailed: nothing more is written to it; it has 6.0 MiB of pages" in shown(on_disk(state="failed"))
    assert "\x1b[1;33mused up" in shown(on_disk(budget_bytes=SEGMENT_BYTES - 1))
    assert "3.0 MiB may still be written" in shown(on_disk(budget_bytes=3 * MIB))
    assert "\x1b[1;31m7 segments that the backing disk could not write" in shown(on_disk(write_errors=7))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"errors": {"disk": 5}}, "5 loads that the backing disk failed"),
        ({"rejected_stores": {"no_writeback": 2}}, "2 stores refused, pool full and nothing could be written back"),
        ({"errors": {"lost": 3, "corrupt": 0}}, "3 loads of lost pages"),
        ({"errors": {"lost": 0, "corrupt": 4}}, "4 loads of corrupt pages"),
        ({"rejected_stores": {"pool_full": 5, "out_of_range": 0}}, "5 stores refused, pool full"),
    ],
)
def test_errors_are_red(changes: dict[str, Any], text: str) -> None:
    assert f"\x1b[1;31m{text}" in shown(stats(**changes))


def test_slots_without_a_page_are_no_alarm() -> None:
    assert "\x1b[33m6 slots hold no page" in shown(stats(pages={"lz4": 1, "on_disk": 0, "lost": 6}))


def test_what_the_end_waits_for_is_shown() -> None:
    assert "\x1b[33mending: waiting for 1 to finish moving objects" in shown(stats(movers_awaited=1))
    assert "ending" not in shown(stats())


def test_no_mount_means_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="does not run") as caught:
        status.read_stats(tmp_path)
    assert "zswapd run" in caught.value.hint


def test_a_daemon_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "stats.json")  # opening it waits for a writer that never comes
    monkeypatch.setattr(status, "is_mounted", lambda mount_point: True)
    monkeypatch.setattr(status, "DEADLINE_SECONDS", 0.1)
    with pytest.raises(DaemonError, match="does not answer"):
        status.read_stats(tmp_path)


def test_what_is_read_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "is_mounted", lambda mount_point: True)
    with pytest.raises(DaemonError, match=r"does not serve .*: No such file or directory") as caught:
        status.read_stats(tmp_path)
    assert f"umount {tmp_path}" in caught.value.hint
    (tmp_path / "stats.json").write_text("{")
    with pytest.raises(DaemonError, match="not JSON"):
        status.read_stats(tmp_path)
    (tmp_path / "stats.json").write_text('{"pid": 1}')
    assert status.read_stats(tmp_path) == {"pid": 1}


def test_what_died_under_attached_swap_is_not_to_be_unmounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """umount would be refused: the loop device has the swap file open."""
    attached = Attachment("/dev/loop3", True, True, MIB, MIB, 100)
    monkeypatch.setattr(status, "is_mounted", lambda mount_point: True)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: attached)
    with pytest.raises(DaemonError, match="does not serve") as caught:
        status.read_stats(tmp_path)
    assert "/dev/loop3 is lost" in caught.value.hint
    assert "zswapctl detach --force" in caught.value.hint
    assert "umount" not in caught.value.hint


PAGER = {"pid": 7, "keeper": 8, "standby": 9, "resend": 1, "protected": 1, "footprint": MIB}


@pytest.mark.parametrize(
    ("changes", "counts", "line"),
    [
        ({}, {}, "keeper pid 8, standby pid 9"),
        ({}, {"takeovers": 1, "takeover_seconds": 0.0456}, "standby pid 9; 1 takeover, the last one took 45.6 ms"),
        ({}, {"takeovers": 3, "takeover_seconds": 1.2}, "standby pid 9; 3 takeovers, the last one took 1.2 s"),
        ({"standby": 0}, {}, "keeper pid 8, no standby yet"),
        ({"resend": 0}, {}, "standby pid 9; not what is under way at a takeover: see zswapctl doctor"),
        ({"keeper": 0, "standby": 0}, {}, "no keeper: if the pager dies, its pages are lost"),
    ],
)
def test_what_a_pager_s_death_would_cost_is_shown(changes: dict[str, int], counts: dict[str, Any], line: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(stats(pager={**PAGER, **changes}, **counts)))
    [shown_line] = [row for row in text.splitlines() if "survives" in row]
    assert line in shown_line
    assert "survives" not in shown(stats())


def test_a_pager_without_zswapd_is_shown() -> None:
    assert "none: pages go on" in shown(stats(pager={**PAGER, "zswapd": 0}))
    for unsuspected in ({**PAGER, "zswapd": 1}, PAGER):
        assert "none: pages go on" not in shown(stats(pager=unsuspected))


def test_objects_that_were_found_to_be_bad_are_shown() -> None:
    assert "2 pages were found to be bad behind a takeover" in shown(stats(objects_found_bad=2))
