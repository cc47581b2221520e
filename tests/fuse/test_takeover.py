"""A pager that is gone costs a pause, and no page: seen from the swap file, without swap."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import DEADLINE_SECONDS, ENVIRONMENT, Daemon, state_file, wait_until
from tests.errnos import raises_errno
from tests.machine import lacks
from tests.pages import PAGE, noise
from tests.takeover import kill, kill_and_wait, kill_at_random, report, status, with_standby
from zswapd import pager, swapdev
from zswapd.pager import Pager

MakeDaemon = Callable[..., Daemon]
ROOT = Path(__file__).parents[2]
SCRIBBLERS = 3
DEBUG_PAGER = ROOT / "native/target/debug/zswapd-pager"


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    return make_daemon(swap__data_path="pager").start()


@contextmanager
def scribbling(daemon: Daemon, failures: Path | None = None) -> Iterator[Callable[[], None]]:
    """Processes that use all of the swap file. What is given ends them, and looks at what they have found: no wrong
    page and, unless `failures` is a file in which to say them, none of those.
    """
    pages = (64 << 20) // PAGE // SCRIBBLERS
    command = [sys.executable, "-m", "tests.fuse.scribbler", str(daemon.swapfile)]
    pipe = subprocess.PIPE
    said = failures.open("w") if failures else None
    processes = [
        subprocess.Popen(
            [*command, str(n * pages), str(pages), str(n)],
            stdin=pipe,
            stdout=pipe,
            stderr=said,
            text=True,
            env=ENVIRONMENT,
            cwd=ROOT,
        )
        for n in range(SCRIBBLERS)
    ]

    def end() -> None:
        failed = 0
        for process in processes:
            output, _ = process.communicate(timeout=DEADLINE_SECONDS)
            result = json.loads(output)
            assert process.returncode == 0
            assert result["wrong"] == 0, result
            assert result["operations"] > pages // 32
            failed += result["failed"]
            print(result)
        assert failures or failed == 0

    try:
        wait_until(lambda: status(daemon)["opens"] == SCRIBBLERS, "all of them have it open")
        yield end
    finally:
        for process in processes:
            process.kill()
            process.wait()
        if said:
            said.close()


def one_page(daemon: Daemon) -> Callable[[], None]:
    """Writes and reads a page that the scribblers do not use."""
    at = (64 << 20) - PAGE

    def use() -> None:
        content = noise(time.monotonic_ns())
        with daemon.opened() as swapfile:
            os.pwrite(swapfile, content, at)
            assert os.pread(swapfile, PAGE, at) == content

    return use


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
    install(daemon.pager, f'exec {DEBUG_PAGER} "$@" --resend off')
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


@pytest.fixture
def program(make_daemon: MakeDaemon) -> tuple[Daemon, Path]:
    """A daemon, and the file of its pager's program, which may be replaced."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.pager = daemon.directory / "pager"
    install(daemon.pager)
    return daemon.start(), daemon.pager


def install(path: Path, script: str | None = None) -> None:
    """The program, or a script in its place."""
    new = path.with_suffix(".new")
    new.write_bytes(pager.PROGRAM.read_bytes() if script is None else f"#!/bin/sh\n{script}\n".encode())
    new.chmod(0o755)
    new.rename(path)


def test_an_upgrade_hands_over(program: tuple[Daemon, Path]) -> None:
    daemon, path = program
    before = with_standby(daemon)
    with scribbling(daemon) as end:
        install(path)
        inode = path.stat().st_ino
        Pager(daemon.mount_point).upgrade()
        wait_until(lambda: status(daemon)["pid"] != before["pid"], "the new version serves")
        after = with_standby(daemon)
        assert after["keeper"] == before["keeper"]
        assert Path(f"/proc/{after['pid']}/exe").stat().st_ino == inode
        wait_until(lambda: not alive(before["standby"]), "the old standby ends")
        end()
    assert daemon.stop() == 0


def test_an_upgrade_that_cannot_be_is_refused_and_all_goes_on(program: tuple[Daemon, Path]) -> None:
    daemon, path = program
    before = with_standby(daemon)
    install(path, "exit 3")
    with pytest.raises(OSError, match="before it was ready"):
        Pager(daemon.mount_point).upgrade()
    after = with_standby(daemon)
    assert (after["pid"], after["standby"]) == (before["pid"], before["standby"])
    # And again, and then with one that can.
    with pytest.raises(OSError, match="before it was ready"):
        Pager(daemon.mount_point).upgrade()
    install(path)
    Pager(daemon.mount_point).upgrade()
    wait_until(lambda: status(daemon)["pid"] not in (0, before["pid"]), "the new version serves")


@pytest.mark.parametrize(("at", "reason"), [(8, "of version"), (0, "none of zswapd's"), (20, "header is damaged")])
def test_a_state_that_the_new_version_does_not_know_is_refused_and_left_alone(
    daemon: Daemon, at: int, reason: str
) -> None:
    before = with_standby(daemon)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        with state_file(daemon) as state:
            state[at] ^= 0xFF
            try:
                with pytest.raises(OSError, match=reason):
                    Pager(daemon.mount_point).upgrade()
            finally:
                state[at] ^= 0xFF
        assert status(daemon)["pid"] == before["pid"]
        assert os.pread(swapfile, PAGE, 0) == noise(1)
        Pager(daemon.mount_point).upgrade()
        assert os.pread(swapfile, PAGE, 0) == noise(1)


def test_while_no_successor_starts_the_pages_wait_for_one(program: tuple[Daemon, Path]) -> None:
    daemon, path = program
    before = with_standby(daemon)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        install(path, f"echo >>{path}.starts; exit 1")
        kill(daemon, before["standby"])
        kill(daemon, before["pid"])
        starts = Path(f"{path}.starts")
        wait_until(lambda: starts.exists() and starts.stat().st_size >= 6, "several starts")
        install(path)
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    assert status(daemon)["keeper"] == before["keeper"]
