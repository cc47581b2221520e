"""A disk that fails, under real swap: an error costs at most the pages that it is about, and none comes back wrong.

What is on the disk is read through a pager that has been told which of its disk's operations fail. Pages that cannot be
read are counted by a workload that survives them (surviving.py).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import ENVIRONMENT, Daemon, wait_until
from tests.pages import PAGE, noise
from tests.swap.backing import (
    DISK_BYTES,
    LIMIT_BYTES,
    POOL_BYTES,
    TOUCHED_BYTES,
    disk_directory,
    metrics,
    settled,
    touching,
    with_faults,
)
from tests.swap.workload import ENOUGH, ROOT, Workload, swap_area
from zswapd.detaching import PAGE_CLUSTER, SAMPLE_PAGES

pytestmark = pytest.mark.usefixtures("_swap")

MakeFaulty = Callable[..., Daemon]
#: The kernel reads this many pages for a fault, in one request: with one that cannot be read, all of them fail.
READ_AHEAD = 1 << int(PAGE_CLUSTER.read_text())


@pytest.fixture
def directory() -> Iterator[Path]:
    """Of the disk; outlives the daemon."""
    with disk_directory() as directory:
        yield directory


@pytest.fixture
def faulty(directory: Path, make_daemon: Callable[..., Daemon]) -> MakeFaulty:
    """Starts a daemon whose disk has faults, and attaches it."""

    def start(faults: str, **settings: object) -> Daemon:
        ours = {
            "swap__size": "256MiB",
            "swap__priority": 32767,
            "pool__mem_limit": POOL_BYTES,
            "writeback__backing": str(directory / "backing"),
            "writeback__size": DISK_BYTES,
        }
        daemon = make_daemon(**ours | settings)
        if faults:
            with_faults(daemon, faults)
        result = daemon.start().ctl("attach", "--unsafe")
        assert result.returncode == 0, result.stderr
        return daemon

    return start


@contextmanager
def surviving(daemon: Daemon, corpus: int, limit: int = LIMIT_BYTES, wrong: int = 0) -> Iterator[Workload]:
    """A workload that survives pages that cannot be read. In the end the pager still lives, and gives all back.

    `wrong`: so many pages may have been written wrong. Where the kernel has freed the slot of one, nobody has read it,
    and the detach that comes upon it refuses, once."""
    pid = daemon.server_pid
    with touching(daemon, corpus, limit) as workload:
        yield workload
        assert daemon.server_pid == pid
    detached = daemon.ctl("detach")
    for _ in range(wrong):
        if "the stored bytes of page" in detached.stderr:
            detached = daemon.ctl("detach")
    assert detached.returncode == 0, detached.stderr
    assert daemon.stop() == 0


def all_out(daemon: Daemon, workload: Workload) -> None:
    """Out of the swap cache too, where pages stay that were written while nothing else needed the memory."""
    workload.page_out()
    settled(daemon)
    workload.group.set_limit(LIMIT_BYTES)
    workload.group.set_limit(ENOUGH)


def test_segments_that_cannot_be_written_stay_in_the_pool(faulty: MakeFaulty, corpus: int) -> None:
    daemon = faulty("write:3:eio,write:9:enospc,write:15:short")
    with surviving(daemon, corpus) as workload:
        assert workload.unreadable() == 0
        workload.run("rewrite", seed=1)
        assert workload.unreadable() == 0
        stats = daemon.stats()
        assert stats["writeback"]["write_errors"] == 3
        assert stats["writeback"]["state"] == "ok"
        assert not any(stats["errors"].values()), stats["errors"]
        assert metrics(daemon)["zswapd_backing_failed"] == 0


@pytest.mark.parametrize("what", ["torn", "flip"])
def test_what_was_written_wrong_is_lost_and_never_read(faulty: MakeFaulty, corpus: int, what: str) -> None:
    daemon = faulty(f"write:4:{what},write:7:{what},write:11:{what}")
    # A block, in records of some hundred bytes at least, or one record; three times.
    most = 3 * (PAGE // 256 + 1 if what == "torn" else 1)
    with surviving(daemon, corpus, wrong=most) as workload:
        unreadable = workload.unreadable()
        corrupt = daemon.stats()["errors"]["corrupt"]
        assert 0 < corrupt <= most
        assert 0 < unreadable <= corrupt * READ_AHEAD
        assert workload.unreadable() <= corrupt * READ_AHEAD
        workload.run("rewrite", seed=1)
        workload.unreadable()
        assert daemon.stats()["writeback"]["state"] == "ok"
        assert metrics(daemon)['zswapd_load_errors_total{reason="corrupt"}'] >= corrupt


@pytest.mark.parametrize("what", ["eio", "short"])
def test_a_page_that_could_not_be_read_can_be_read_later(faulty: MakeFaulty, corpus: int, what: str) -> None:
    daemon = faulty(f"read:5:{what},read:50:{what}")
    with surviving(daemon, corpus) as workload:
        assert 0 < workload.unreadable() <= 2 * READ_AHEAD
        assert daemon.stats()["errors"]["disk"] == 2
        assert workload.unreadable() == 0
        stats = daemon.stats()
        assert stats["pages"]["lost"] == 0
        assert stats["writeback"]["state"] == "ok"
        assert metrics(daemon)['zswapd_load_errors_total{reason="disk"}'] == 2


@pytest.mark.parametrize("what", ["flip", "torn"])
def test_what_is_read_wrong_is_read_again(faulty: MakeFaulty, corpus: int, what: str) -> None:
    """More reads between two faults than can be under way at a time: none goes wrong twice."""
    daemon = faulty(",".join(f"read:{number}:{what}" for number in range(20, 400, 20)))
    with surviving(daemon, corpus) as workload:
        assert workload.unreadable() == 0
        stats = daemon.stats()
        assert stats["writeback"]["reads"] > 400
        assert not any(stats["errors"].values()), stats["errors"]
        assert stats["pages"]["lost"] == 0


def test_a_slow_disk_only_takes_time(faulty: MakeFaulty, corpus: int) -> None:
    daemon = faulty("write:1-:slow,read:9:slow")
    with surviving(daemon, corpus) as workload:
        assert workload.unreadable() == 0
        stats = daemon.stats()
        assert stats["writeback"]["stores_waited"] > 0
        assert not any(stats["rejected_stores"].values()), stats["rejected_stores"]
        assert not any(stats["errors"].values()), stats["errors"]


def test_detach_can_be_interrupted_while_it_waits_for_the_disk(faulty: MakeFaulty, corpus: int) -> None:
    daemon = faulty("read:1-60:slow")
    with surviving(daemon, corpus, ENOUGH) as workload:
        all_out(daemon, workload)
        before = swap_area(daemon).used_bytes
        command = [sys.executable, "-m", "zswapd.ctl", "--config", str(daemon.config), "detach"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=pipe, text=True) as detaching:
            wait_until(lambda: swap_area(daemon).used_bytes < before, "swapoff is at work")
            detaching.send_signal(signal.SIGINT)
            _, said = detaching.communicate()
        assert detaching.returncode != 0
        # The kernel ends it between two processes' memory. That may be after the last one.
        if "every page is back in memory" not in said:
            assert "everything goes on serving" in said, said
            assert 0 < swap_area(daemon).used_bytes < before
        assert workload.unreadable() == 0


def test_detach_loses_nothing_on_a_disk_that_cannot_be_read(faulty: MakeFaulty, corpus: int) -> None:
    daemon = faulty("read:20:eio")
    with surviving(daemon, corpus, ENOUGH) as workload:
        all_out(daemon, workload)
        before = swap_area(daemon).used_bytes
        detached = daemon.ctl("detach")
        assert detached.returncode == 1
        assert "the backing disk cannot give its pages back: page " in detached.stderr
        assert swap_area(daemon).used_bytes == before
        assert not any(daemon.stats()["errors"].values())
        # It is well again.
        assert workload.unreadable() == 0


def test_a_detach_that_loses_pages_says_so(faulty: MakeFaulty, corpus: int) -> None:
    """There is one process: swapoff looks at nothing else before it is through with that."""
    daemon = faulty(f"read:{SAMPLE_PAGES + 50}-{SAMPLE_PAGES + 57}:eio")
    with surviving(daemon, corpus, ENOUGH) as workload:
        all_out(daemon, workload)
        detached = daemon.ctl("detach")
        assert detached.returncode == 1
        assert "at least 8 pages could not be read" in detached.stderr
        assert daemon.stats()["errors"]["disk"] == 8
        assert "stays in use" in detached.stderr or "detached: " in detached.stderr
        # None of those beside them.
        assert 0 < workload.unreadable() <= 8
        assert int(PAGE_CLUSTER.read_text()) == READ_AHEAD.bit_length() - 1


def test_a_disk_that_fails_midway_is_not_written_any_more_and_still_read(faulty: MakeFaulty, corpus: int) -> None:
    daemon = faulty("write:9-:eio")
    with surviving(daemon, corpus, ENOUGH) as workload:
        workload.page_out()
        wait_until(lambda: daemon.stats()["writeback"]["state"] == "failed", "the disk is given up")
        stats = daemon.stats()
        assert stats["writeback"]["write_errors"] >= 3
        assert stats["pages"]["on_disk"] > 0
        # Stores are refused at once now, and those pages stay in memory.
        assert workload.unreadable() == 0
        workload.page_out()
        assert daemon.stats()["rejected_stores"]["no_writeback"] > 0
        assert workload.unreadable() == 0
        workload.run("rewrite", seed=1)
        assert workload.unreadable() == 0
        stats = daemon.stats()
        assert not any(stats["errors"].values()), stats["errors"]
        scraped = metrics(daemon)
        assert scraped["zswapd_backing_failed"] == 1
        assert scraped['zswapd_rejected_stores_total{reason="no_writeback"}'] > 0
        status = daemon.ctl("status")
        assert status.returncode == 0
        assert "failed" in status.stdout


@pytest.fixture(scope="module")
def noisy() -> Iterator[int]:
    """A memory file of pages that do not compress."""
    fd = os.memfd_create("zswapd-test-noise")
    with open(fd, "wb", closefd=False) as file:
        for number in range(TOUCHED_BYTES // PAGE):
            file.write(noise(number))
    yield fd
    os.close(fd)


def test_a_full_disk_refuses_and_goes_on_when_there_is_room(faulty: MakeFaulty, noisy: int) -> None:
    """32 MiB that do not compress, in a pool of 4 MiB and on a disk of 16."""
    daemon = faulty("", writeback__size=16 << 20)
    with surviving(daemon, noisy, ENOUGH) as workload:
        workload.page_out()
        settled(daemon)
        stats = daemon.stats()
        assert sum(stats["rejected_stores"].values()) > 0
        assert stats["pages"]["on_disk"] * PAGE > 8 << 20
        assert stats["writeback"]["state"] == "ok"
        assert workload.unreadable() == 0
        workload.run("rewrite", seed=1)
        workload.page_out()
        assert workload.unreadable() == 0
        stats = daemon.stats()
        assert not any(stats["errors"].values()), stats["errors"]
        assert metrics(daemon)["zswapd_backing_failed"] == 0
