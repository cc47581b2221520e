"""Recompression by hand, through control files and the control socket of a pager, without swap."""

import errno
import os
import random
from collections.abc import Callable

import pytest

from tests.daemon import Daemon, wait_until
from tests.errnos import raises_errno
from tests.machine import lacks
from tests.pages import PAGE
from tests.takeover import kill_and_wait, with_standby
from zswapd.pager import Pager
from zswapd.recompression import Dictionaries

MakeDaemon = Callable[..., Daemon]
PAGES = 2000


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    # Nothing but what the test says.
    return make_daemon(swap__data_path="pager", recompression__cpu_percent=0).start()


def page(n: int, like: int = 0) -> bytes:
    """Sentences that pages with the same `like` have in common, and numbers that they have not."""
    rng, common = random.Random(n), random.Random(like)
    sentences = ["".join(common.choices("abcdefghijklmnopqrstuvwxyz ", k=60)) for _ in range(300)]
    return " ".join(f"{rng.choice(sentences)} {rng.randrange(1 << 30)}" for _ in range(80)).encode()[:PAGE]


PAGE_OF = [page(n) for n in range(PAGES)]


def fill(daemon: Daemon) -> None:
    with daemon.opened() as swapfile:
        for n in range(PAGES):
            os.pwrite(swapfile, PAGE_OF[n], n * PAGE)


def assert_whole(daemon: Daemon) -> None:
    with daemon.opened() as swapfile:
        for n in range(PAGES):
            assert os.pread(swapfile, PAGE, n * PAGE) == PAGE_OF[n], f"page {n}"


def test_pages_get_smaller_as_told(daemon: Daemon) -> None:
    fill(daemon)
    before = daemon.stats()
    for _ in range(2):
        daemon.write("recompress", "tick\n")
    with daemon.opened() as swapfile:
        os.pread(swapfile, PAGE, 7 * PAGE)
    daemon.write("recompress", "algo=zstd level=3 age=2")
    after = daemon.stats()
    assert after["pages"]["zstd"] == PAGES - 1
    assert after["pages"]["lz4"] == 1
    counts = after["recompression"]
    assert counts["pages_recompressed"] == PAGES - 1
    assert counts["processor_seconds"] > 0
    assert after["compressed_bytes"] < before["compressed_bytes"] * 0.95
    assert sum(counts["bytes"].values()) == after["compressed_bytes"]
    assert "zstd 1,999 as" in daemon.ctl("status").stdout
    # Not again, until somebody asks for more.
    daemon.write("recompress", "algo=zstd level=3 age=0 max_pages=10")
    assert daemon.stats()["recompression"]["pages_recompressed"] == PAGES
    with raises_errno(errno.ENOENT):
        daemon.write("recompress", "algo=dictionary priority=2")
    assert_whole(daemon)


@pytest.mark.parametrize(
    "command",
    [
        "\n",
        "tock",
        "algo=lzo",
        "level=0",
        "level=23",
        "priority=0",
        "priority=4",
        "age=64",
        "age=x",
        "level=",
        "duplicates=x",
    ],
)
def test_what_is_no_recompression_is_refused(daemon: Daemon, command: str) -> None:
    if command == "\n":
        daemon.write("recompress", command)
        return
    with raises_errno(errno.EINVAL):
        daemon.write("recompress", command)


def test_pages_that_are_alike_are_stored_once(daemon: Daemon) -> None:
    with_standby(daemon)

    def write(n: int, what: int) -> None:
        with daemon.opened() as swapfile:
            os.pwrite(swapfile, PAGE_OF[what], n * PAGE)

    def assert_read(of: dict[int, int]) -> None:
        with daemon.opened() as swapfile:
            for n, what in of.items():
                assert os.pread(swapfile, PAGE, n * PAGE) == PAGE_OF[what], f"page {n}"

    of = {n: n % 50 for n in range(PAGES // 2)}
    for n, what in of.items():
        write(n, what)
    daemon.write("recompress", "algo=zstd level=3 duplicates=0")
    assert daemon.stats()["pages"]["duplicate"] == 0
    daemon.write("recompress", "algo=zstd level=3 priority=2")
    stats = daemon.stats()
    counts = stats["recompression"]
    assert (counts["pages_shared"], counts["shared_pages"]) == (1000, 50)
    assert (stats["pages"]["duplicate"], stats["pages"]["zstd"]) == (950, 50)
    assert stats["original_bytes"] == 1000 * PAGE
    assert counts["index_bytes"] > 0
    assert "1,000 pages stored as 50" in daemon.ctl("status").stdout
    assert_read(of)
    # Those that are written have their own.
    for n in range(0, 100, 2):
        of[n] = 1000 + n
        write(n, of[n])
    assert daemon.stats()["recompression"]["pages_shared"] == 950
    assert_read(of)
    kill_and_wait(daemon)
    counts = daemon.stats()["recompression"]
    assert (counts["pages_shared"], counts["shared_pages"]) == (950, 50)
    assert_read(of)
    for n in range(0, 1000, 50):
        of[n] = 1500
        write(n, 1500)
    assert daemon.stats()["recompression"]["shared_pages"] == 49
    assert_read(of)


def test_a_successor_has_the_dictionary_before_it_serves(daemon: Daemon) -> None:
    with_standby(daemon)
    fill(daemon)
    pager = Pager(daemon.mount_point)
    sample = pager.sample_cold(0, 1500)
    assert len(sample) == 1000 * PAGE  # one of every two, spread evenly
    dictionary = Dictionaries(level=9).train(sample)
    assert dictionary
    assert pager.install_dictionary(dictionary) == 1
    daemon.write("recompress", "algo=dictionary level=9")
    found = daemon.stats()
    assert found["pages"]["zstd_dictionary"] > PAGES / 2
    kill_and_wait(daemon)
    after = daemon.stats()
    assert after["pages"] == found["pages"]
    assert after["recompression"]["dictionaries"] == found["recompression"]["dictionaries"]
    assert after["recompression"]["dictionaries"][0]["pages"] == found["pages"]["zstd_dictionary"]
    wait_until(lambda: daemon.stats()["objects_verified"] >= PAGES, "all is looked at")
    assert_whole(daemon)
    assert daemon.stats()["objects_found_bad"] == 0
    # It goes when it is not needed any more.
    second = Dictionaries(level=9).train(b"".join(page(n, like=1) for n in range(500)))
    assert second
    assert pager.install_dictionary(second) == 2
    fill(daemon)
    daemon.write("recompress", "algo=dictionary level=9 age=63")
    assert [entry["serial"] for entry in daemon.stats()["recompression"]["dictionaries"]] == [2]
