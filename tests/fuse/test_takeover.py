"""A pager that is gone costs a pause, and no page: seen from the swap file, without swap."""

import errno
import itertools
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon import Daemon, descriptors, wait_until
from tests.errnos import raises_errno
from tests.fuse.scribbling import scribbling
from tests.machine import lacks
from tests.pages import PAGE, noise
from tests.takeover import kill, kill_and_wait, kill_at_random, report, status, with_standby
from zswapd import pager, swapdev
from zswapd.pager import Pager

MakeDaemon = Callable[..., Daemon]
ROOT = Path(__file__).parents[2]
DEBUG_PAGER = ROOT / "native/target/debug/zswapd-pager"


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    return make_daemon(swap__data_path="pager").start()


def one_page(daemon: Daemon) -> Callable[[], None]:
    """Writes and reads a page that the scribblers do not use."""
    at = (64 << 20) - PAGE

    def use() -> None:
        content = noise(time.monotonic_ns())
        with daemon.opened() as swapfile:
            os.pwrite(swapfile, content, at)
            assert os.pread(swapfile, PAGE, at) == content

    return use


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_killed_at_random_moments_it_loses_nothing(daemon: Daemon) -> None:
    before = with_standby(daemon)
    with scribbling(daemon) as end:
        pauses = kill_at_random(daemon, one_page(daemon), seed=1)
        end()
    report("file I/O", pauses)
    after = with_standby(daemon)
    assert after["keeper"] == before["keeper"]
    assert after["takeovers"] == before["takeovers"] + len(pauses)
    # zswapd has not noticed, and serves its files.
    assert daemon.stats()["loads"] > 0
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()
    assert "gone; pages are served" not in daemon.log()


def test_what_was_set_and_counted_and_opened_is_kept(daemon: Daemon) -> None:
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        daemon.write("comp_algorithm", "zstd")
        daemon.write("mem_limit", "20M")
        before = daemon.stats()
        kill_and_wait(daemon)
        after = daemon.stats()
        for same in ("pool_limit_bytes", "algorithm", "stores", "pages", "swap_size_bytes"):
            assert after[same] == before[same]
        assert status(daemon)["opens"] == 1
        with raises_errno(errno.EBUSY):
            Pager(daemon.mount_point).drain()
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    wait_until(lambda: status(daemon)["opens"] == 0, "closed")
    assert daemon.stop() == 0


def test_what_is_drained_stays_so(daemon: Daemon) -> None:
    Pager(daemon.mount_point).drain()
    kill_and_wait(daemon)
    with raises_errno(errno.ENODEV), daemon.opened():
        pass


def test_a_standby_that_is_killed_is_replaced(daemon: Daemon) -> None:
    before = with_standby(daemon)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        kill(daemon, before["standby"])
        wait_until(lambda: with_standby(daemon)["standby"] != before["standby"], "another standby")
        assert status(daemon)["pid"] == before["pid"]
        assert os.pread(swapfile, PAGE, 0) == noise(1)
        kill_and_wait(daemon)
        assert os.pread(swapfile, PAGE, 0) == noise(1)


def test_one_that_is_killed_while_it_takes_over_has_a_successor(daemon: Daemon) -> None:
    with scribbling(daemon) as end:
        for _ in range(10):
            before = with_standby(daemon)
            kill(daemon, before["pid"])
            kill(daemon, before["standby"])
            one_page(daemon)()
        end()


def test_where_the_kernel_cannot_ask_again_requests_fail_and_none_hangs(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    if not DEBUG_PAGER.exists():
        lacks("the pager's debug build: cargo build --package zswapd-pager, as make test does")
    daemon = make_daemon(swap__data_path="pager")
    daemon.pager = daemon.directory / "pager"
    script(daemon.pager, f'exec {DEBUG_PAGER} "$@" --resend off')
    daemon.start()
    failures = daemon.directory / "failures"
    failures.touch()
    with scribbling(daemon, failures) as end:
        # Until one was under way, and not only on its way.
        wait_until(lambda: kill_and_wait(daemon) and failures.stat().st_size > 0, "a request fails", 600)
        end()
    assert os.strerror(errno.ECONNABORTED) in failures.read_text()
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


def test_zswapd_and_the_pager_killed_at_once(daemon: Daemon) -> None:
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        pid = with_standby(daemon)["pid"]
        daemon.signal(signal.SIGKILL)
        kill(daemon, pid)
        daemon.wait()
        assert os.pread(swapfile, PAGE, 0) == noise(1)
        daemon.start_again()
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    wait_until(lambda: status(daemon)["opens"] == 0, "closed")
    assert daemon.stop() == 0


def test_without_its_keeper_a_pager_serves_on_and_says_so(daemon: Daemon) -> None:
    before = with_standby(daemon)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        kill(daemon, before["keeper"])
        daemon.wait_for_log("the keeper is gone")
        wait_until(lambda: status(daemon)["keeper"] == 0, "the status says so")
        wait_until(lambda: not alive(before["standby"]), "the standby ends")
        assert status(daemon)["pid"] == before["pid"]
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    wait_until(lambda: status(daemon)["opens"] == 0, "closed")
    assert daemon.stop() == 0
    wait_until(lambda: not alive(before["pid"]), "the pager ends")
    assert not swapdev.is_mounted(daemon.mount_point)
    assert not Path(f"{daemon.mount_point}.sock").exists()


def test_keeper_and_standby_are_small(daemon: Daemon) -> None:
    """In memory of their own, beside what the pager itself takes (test_pager.py)."""
    now = with_standby(daemon)
    sizes = {}
    for who in ("keeper", "standby"):
        fields = Path(f"/proc/{now[who]}/status").read_text()
        sizes[who] = sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB$", fields, re.MULTILINE))
    print(f"resident: {sizes} KiB")
    assert 0 < sizes["keeper"] < 4 << 10
    assert 0 < sizes["standby"] < 8 << 10


def test_at_the_end_nothing_is_left(daemon: Daemon) -> None:
    before = with_standby(daemon)
    kill_and_wait(daemon)
    processes = [before["keeper"], *(status(daemon)[who] for who in ("pid", "standby"))]
    assert daemon.stop() == 0
    wait_until(lambda: not any(map(alive, processes)), "all of them end")
    assert not swapdev.is_mounted(daemon.mount_point)
    assert not Path(f"{daemon.mount_point}.sock").exists()


def test_unmounted_by_somebody_else_all_of_it_ends(daemon: Daemon) -> None:
    before = with_standby(daemon)
    subprocess.run(["umount", str(daemon.mount_point)], check=True)
    processes = [before[who] for who in ("keeper", "pid", "standby")]
    wait_until(lambda: not any(map(alive, processes)), "all of them end")
    assert not Path(f"{daemon.mount_point}.sock").exists()


def test_while_no_successor_starts_the_pages_wait_for_one(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.pager, starts = daemon.directory / "pager", daemon.directory / "starts"
    script(daemon.pager, f'if [ -e {starts} ]; then echo >>{starts}; exit 1; fi; exec {pager.PROGRAM} "$@"')
    before = with_standby(daemon.start())
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        starts.touch()
        kill(daemon, before["standby"])
        kill(daemon, before["pid"])
        wait_until(lambda: starts.stat().st_size >= 6, "several starts")
        starts.unlink()
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    assert status(daemon)["keeper"] == before["keeper"]


def test_while_descriptors_are_short_nobody_is_left_unreaped(daemon: Daemon) -> None:
    """One that cannot be watched is not started: with room for its channel, and none for its own descriptor."""
    before = with_standby(daemon)
    keeper = before["keeper"]
    limits = resource.prlimit(keeper, resource.RLIMIT_NOFILE)

    def leave(free: int) -> None:
        """So many numbers for new descriptors; then waits until that was not enough."""
        # Between two attempts.
        used = set.intersection(*({int(path.name) for path in descriptors(keeper)} for _ in range(3)))
        unused = (number for number in itertools.count() if number not in used)
        limit = next(itertools.islice(unused, free, None))
        resource.prlimit(keeper, resource.RLIMIT_NOFILE, (limit, limits[1]))
        tried = daemon.log().count("cannot start a pager: Too many open files")
        with suppress(ProcessLookupError):  # the second time
            kill(daemon, before["standby"])
        wait_until(lambda: daemon.log().count("cannot start a pager: Too many open files") > tried + 1, "two tries")

    def children() -> list[int]:
        return sorted(map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()))

    leave(0)
    leave(2)
    wait_until(lambda: children() == [before["pid"]], "all are reaped")
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, limits)
    after = with_standby(daemon)
    assert children() == sorted([after["pid"], after["standby"]])


def test_standbys_that_are_stopped_take_over(daemon: Daemon) -> None:
    with scribbling(daemon) as end:
        for _ in range(10):
            now = with_standby(daemon)
            os.kill(now["standby"], signal.SIGSTOP)
            kill(daemon, now["pid"])
            one_page(daemon)()
            assert status(daemon)["pid"] == now["standby"]
        end()
