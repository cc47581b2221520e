"""The measurements of neighbours in swap, of what programs' pages save and of processor time: what they compute."""

import io
import os
import random
import threading
import time
from array import array
from contextlib import ExitStack
from subprocess import CompletedProcess

import pytest
from rich.console import Console

from tests.pages import PAGE, noise
from zswapd.bench.budget import Processor
from zswapd.bench.corpus import Corpus
from zswapd.bench.neighbours import Swapped, gains, wrong_stamps
from zswapd.bench.programs import known
from zswapd.bench.savings import TOTAL, capture, measure_in_guest, table, together
from zswapd.bench.screen import Screen


def swapped(*places: tuple[int, int, int], pages: list[bytes] | None = None) -> Swapped:
    """Slot, process and number of a page in its memory."""
    slots, pids, numbers = zip(*places, strict=True)
    addresses = [number * PAGE for number in numbers]
    return Swapped(array("Q", slots), array("Q", pids), array("Q", addresses), pages or [])


def test_neighbours_are_of_one_process_in_slots_that_follow_each_other() -> None:
    found = swapped((1, 7, 10), (2, 7, 11), (3, 7, 9), (4, 7, 40), (6, 7, 41), (7, 8, 42))
    assert [found.share(within) for within in (1, 2, 31, 64)] == [0.25, 0.5, 0.75, 0.75]


def test_a_slot_that_holds_another_page_is_noticed() -> None:
    def stamped(number: int) -> bytes:
        return number.to_bytes(8, "little") + bytes(PAGE - 8)

    pages = [stamped(number) for number in range(8)]
    places = [(slot, 7, 100 + slot) for slot in range(8)]
    assert wrong_stamps(swapped(*places, pages=pages), 8 * PAGE) == (0, 8)
    pages[2], pages[5] = pages[5], pages[2]
    assert wrong_stamps(swapped(*places, pages=pages), 8 * PAGE) == (2, 8)


def test_clusters_gain_where_neighbours_are_alike() -> None:
    """Groups of 16 pages have most of their bytes in common, and nothing with other groups."""
    count = 2048
    common = [noise(f"group {group}")[: PAGE - 400] for group in range(count // 16)]
    pages = [common[number // 16] + random.Random(number).randbytes(400) for number in range(count)]
    found = gains(pages, [(1, number * PAGE) for number in range(count)], 1).bytes
    for level in (3, 9):
        single = found["slots", level, 1]
        assert found["slots", level, 4] == found["ideal", level, 4] < 0.5 * single
        assert found["slots", level, 16] < 0.25 * single
        assert found["random", level, 4] > 0.9 * single
    assert found["pages", 0, 1] < count * 4 // 5  # none that has trained the dictionary


async def test_a_program_s_pages_are_captured_as_they_are() -> None:
    program = next(program for program in known() if program.name == "python-syntax-trees")
    corpus = await capture(program, 2 << 20, 30, [])
    assert corpus
    with corpus, together([corpus, corpus]) as both:
        assert corpus.pages == 512
        assert both.pages == 1024


@pytest.mark.parametrize("rows", [["zswapd-lz4"], ["zswapd-lz4", "zram-lzo-rle"]])
def test_savings_are_a_table_of_programs_by_devices(rows: list[str]) -> None:
    figures = {
        row: {"original_bytes": 5 << 20, "used_bytes": 2 << 20, "ratio": 2.5, "ratio_beyond_empty": 3} for row in rows
    }
    grid = table({"all together": figures, "node-words": figures})
    assert [list(column.cells) for column in grid.columns] == [
        ["all together", "node-words"],
        ["5", "5"],
        *[["2.50 (3.00)", "2.50 (3.00)"] for _ in rows],
    ]


async def test_what_a_guest_s_zram_says_is_counted_as_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    said = b"lz4 40960 1 8192 0\nlz4 81920 1 12288 0\nlz4 122880 1 20480 0\n" + b"zstd 40960 1 4096 0\n" * 3

    async def run(*command: str, **options: object) -> CompletedProcess[bytes]:
        assert command[-2:] == ("40960", "81920")
        return CompletedProcess(command, 0, said)

    monkeypatch.setattr("zswapd.bench.savings.run", run)
    sizes = {"one": 10, "other": 20, TOTAL: 30}
    corpora = {what: Corpus(os.memfd_create("corpus"), 0, pages) for what, pages in sizes.items()}
    with ExitStack() as stack:
        whole, *_ = [stack.enter_context(corpus) for corpus in reversed(corpora.values())]
        programs = {what: corpora[what] for what in ("one", "other")}
        found = await measure_in_guest(whole, programs, Screen(Console(file=io.StringIO())))
    assert found["other"]["guest-zram-lz4"]["used_bytes"] == 12288 + 2 * 20 * 16 + 20 * 8
    assert found["other"]["guest-zram-lz4"]["empty_bytes"] == 2 * 20 * 16
    assert found[TOTAL]["guest-zram-lz4"]["original_bytes"] == 122880
    assert {tuple(rows) for rows in found.values()} == {("guest-zram-lz4", "guest-zram-zstd")}


def test_processor_time_of_a_thread_that_has_ended_counts() -> None:
    processor = Processor({"pager": os.getpid(), "zswapd": os.getpid()})
    before = processor.seconds()
    go_on, burnt = threading.Event(), threading.Event()

    def burn() -> None:
        while time.thread_time() < 0.1:
            pass
        burnt.set()
        go_on.wait()

    thread = threading.Thread(target=burn)
    thread.start()
    burnt.wait()
    processor.look()
    go_on.set()
    thread.join()
    after = processor.seconds()
    assert after["training"] - before["training"] >= 0.1
    assert after["recompressor"] == before["recompressor"] == 0
