"""Real swap: real pages go out through the loop device and come back, whatever else happens meanwhile.

The workload that is swapped out is the benchmark's: it knows the checksum of every page before it writes it.
"""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.daemon import Daemon, wait_until
from tests.machine import lacks
from tests.pages import PAGE
from tests.swap.workload import ENOUGH, LEAST_SWAPPED, assert_gone, swap_area, swapped
from zswapd import swapdev

pytestmark = pytest.mark.usefixtures("_swap")


@pytest.mark.parametrize(("algorithm", "allocator"), [("lz4", "zsmalloc"), ("zstd", "zsmalloc"), ("lz4", "z3fold")])
def test_every_page_comes_back(attached: Callable[..., Daemon], corpus: int, algorithm: str, allocator: str) -> None:
    daemon = attached(compression__algorithm=algorithm, pool__allocator=allocator, swap__priority=32766)
    area = swap_area(daemon)
    assert (area.priority, area.direct_io) == (32766, True)
    with swapped(daemon, corpus) as workload:
        workload.fill()
        pages = daemon.stats()["pages"]
        assert pages[algorithm] * PAGE > LEAST_SWAPPED // 2
        assert pages["incompressible"] > 0
        assert pages["zstd" if algorithm == "lz4" else "lz4"] == pages["lost"] == 0
        workload.verify()
        workload.run("sequential")

        status = json.loads(daemon.ctl("status", "--json").stdout)
        assert status["attachment"]["loop_device"] == area.loop_device
        assert status["attachment"]["used_bytes"] > LEAST_SWAPPED
        assert area.loop_device in daemon.ctl("status").stdout

        # swapoff with the pages in it.
        workload.group.set_limit(ENOUGH)
        result = daemon.ctl("detach")
        assert result.returncode == 0, result.stderr
        assert area.loop_device in result.stdout
        assert_gone(daemon, area.loop_device)
        stats = daemon.stats()
        assert sum(stats["pages"].values()) == stats["pool_bytes"] == 0
        assert stats["errors"] == {"lost": 0, "corrupt": 0, "disk": 0}
        workload.verify()
    assert daemon.stop() == 0


def test_pages_are_moved_while_they_are_swapped(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached()
    done = threading.Event()

    def compact() -> int:
        rounds = 0
        while not done.is_set():
            daemon.write("compact", "1")
            rounds += 1
        return rounds

    with swapped(daemon, corpus) as workload, ThreadPoolExecutor(1) as mover:
        rounds = mover.submit(compact)
        try:
            workload.fill()
            workload.run("rewrite", seed=1)
            workload.verify()
            workload.group.set_limit(ENOUGH)
            result = daemon.ctl("detach")
        finally:
            done.set()
        assert result.returncode == 0, result.stderr
        assert rounds.result() > 0
        workload.verify()
    stats = daemon.stats()
    assert stats["pages_compacted"] > 0
    assert stats["errors"] == {"lost": 0, "corrupt": 0, "disk": 0}
    assert daemon.stop() == 0
    assert "belonged to no slot" not in daemon.log()


def test_attach_needs_to_be_told_that_it_is_unsafe(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    result = daemon.ctl("attach")
    assert result.returncode == 1
    assert "--unsafe" in result.stderr
    assert swapdev.discover(daemon.mount_point) is None
    result = daemon.ctl("detach")
    assert result.returncode == 0
    assert "nothing is attached" in result.stdout


def test_attach_twice(attached: Callable[..., Daemon]) -> None:
    daemon = attached()
    area = swap_area(daemon)
    result = daemon.ctl("attach", "--unsafe")
    assert result.returncode == 1
    assert f"{area.loop_device} is attached already" in result.stderr
    assert swap_area(daemon).loop_device == area.loop_device


def test_the_loop_device_is_tuned_while_it_is_swap(attached: Callable[..., Daemon]) -> None:
    daemon = attached()
    queue = Path("/sys/block", Path(swap_area(daemon).loop_device).name, "queue")
    assert (queue / "rq_affinity").read_text() == "2\n"
    assert daemon.ctl("detach").returncode == 0
    assert (queue / "rq_affinity").read_text() == "1\n"
    # Nor does a test that ends with it attached leave it so.
    assert daemon.ctl("attach", "--unsafe").returncode == 0
    queue = Path("/sys/block", Path(swap_area(daemon).loop_device).name, "queue")
    assert (queue / "rq_affinity").read_text() == "2\n"
    daemon.destroy()
    assert (queue / "rq_affinity").read_text() == "1\n"


def test_detach_is_refused_where_the_pages_have_no_room(attached: Callable[..., Daemon], corpus: int) -> None:
    if swapdev.read_swaps():
        lacks("no swap of its own, which would take the pages")
    daemon = attached()
    area = swap_area(daemon)
    with swapped(daemon, corpus) as workload:
        workload.fill()
        result = daemon.ctl("detach")
        assert result.returncode == 1
        assert workload.group.path.name in result.stderr
        assert "limit" in result.stderr
        assert swap_area(daemon).loop_device == area.loop_device

        # The daemon's own detaching at SIGTERM is as careful.
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_log("not stopping, still serving")
        assert workload.group.path.name in daemon.log()
        workload.verify()

        workload.group.set_limit(ENOUGH)
        assert daemon.ctl("detach").returncode == 0
        workload.verify()
    assert daemon.stop() == 0


def test_sigterm_detaches_first(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached()
    area = swap_area(daemon)
    with swapped(daemon, corpus) as workload:
        workload.fill()
        workload.group.set_limit(ENOUGH)
        assert daemon.stop() == 0
        assert_gone(daemon, area.loop_device)
        assert not swapdev.is_mounted(daemon.mount_point)
        assert "detaching the swap first" in daemon.log()
        workload.verify()


def test_sigterm_can_be_refused(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached(daemon__on_sigterm="refuse")
    with swapped(daemon, corpus) as workload:
        workload.fill()
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_log("not stopping: the swap is attached (daemon.on_sigterm is refuse)")
        workload.verify()
        assert swap_area(daemon).used_bytes > 0
        workload.group.set_limit(ENOUGH)
        assert daemon.ctl("detach").returncode == 0
        workload.verify()
    assert daemon.stop() == 0


def test_a_second_sigterm_says_what_the_first_waits_for(attached: Callable[..., Daemon]) -> None:
    daemon = attached()
    area = swap_area(daemon)
    # Whoever has the device open delays its release: the daemon waits here, for some seconds.
    device = os.open(area.loop_device, os.O_RDONLY)
    try:
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: area.loop_device not in [one.path for one in swapdev.read_swaps()], "swapoff")
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_log("SIGTERM again: still waiting, the swap is off, its loop device is being freed")
    finally:
        os.close(device)
    assert daemon.wait() == 0
    assert_gone(daemon, area.loop_device)


def test_a_half_attached_device_is_cleaned_up(make_daemon: Callable[..., Daemon]) -> None:
    """losetup without swapon, as an attach that was killed leaves it."""
    daemon = make_daemon().start()
    losetup = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(daemon.swapfile)]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    result = daemon.ctl("attach", "--unsafe")
    assert result.returncode == 1
    assert f"{device} is half attached" in result.stderr
    assert daemon.ctl("detach").returncode == 0
    assert_gone(daemon, device)
    assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_daemon_that_is_killed_or_stopped_costs_no_page(
    make_daemon: Callable[..., Daemon], corpus: int, number: signal.Signals
) -> None:
    """The pager goes on: in the middle of a fill, for reads and overwrites, and until all is detached."""
    daemon = make_daemon(swap__size="128MiB", swap__priority=32767).start()
    assert daemon.ctl("attach", "--unsafe").returncode == 0
    area = swap_area(daemon)
    with swapped(daemon, corpus) as workload:
        daemon.signal(number)
        try:
            workload.fill()
            workload.verify()
            workload.run("rewrite", seed=1)
            workload.verify()
            assert daemon.ctl("status").returncode == 0
            workload.group.set_limit(ENOUGH)
            result = daemon.ctl("detach")
            assert result.returncode == 0, result.stderr
        finally:
            if number == signal.SIGSTOP:
                daemon.signal(signal.SIGCONT)
        workload.verify()
    assert_gone(daemon, area.loop_device)


def test_what_a_workload_leaves_is_discarded(make_daemon: Callable[..., Daemon], corpus: int) -> None:
    """The kernel punches the clusters of a process that has ended, late: the pool shrinks towards nothing."""
    daemon = make_daemon(swap__size="128MiB", swap__priority=32767).start()
    assert daemon.ctl("attach", "--unsafe").returncode == 0
    with swapped(daemon, corpus) as workload:
        workload.fill()
        full = daemon.stats()["pool_bytes"]
        assert full > LEAST_SWAPPED // 4
    wait_until(lambda: daemon.stats()["pool_bytes"] < full // 10, "the pool shrinks after the workload's end")
    assert daemon.stats()["discards"] > 0
    assert daemon.stop() == 0


def test_what_was_lazily_unmounted_can_be_detached(make_daemon: Callable[..., Daemon], corpus: int) -> None:
    """The kernel goes on swapping to it, and shows no path to it any more."""
    daemon = make_daemon(swap__size="128MiB", swap__priority=32767).start()
    assert daemon.ctl("attach", "--unsafe").returncode == 0
    device = swap_area(daemon).loop_device
    try:
        with swapped(daemon, corpus) as workload:
            workload.fill()
            subprocess.run(["umount", "--lazy", daemon.mount_point], check=True)
            assert swap_area(daemon).loop_device == device
            workload.verify()
            workload.group.set_limit(ENOUGH)
            result = daemon.ctl("detach")
            assert result.returncode == 0, result.stderr
            assert device not in [area.path for area in swapdev.read_swaps()]
            workload.verify()
    finally:
        # If it was not found, neither will it be by whoever tidies up.
        if device in [area.path for area in swapdev.read_swaps()]:
            subprocess.run(["swapoff", device], check=True)
            subprocess.run(["losetup", "--detach", device], check=True)
    # Nothing holds the file system any more: it is gone, and its pager with it.
    assert daemon.wait() == 0
    daemon.start_again()
    assert daemon.stop() == 0


def test_swap_of_a_daemon_that_was_killed_can_be_taken_away(attached: Callable[..., Daemon], data_path: str) -> None:
    """Without pages in it: some could be those of another process, and would be lost."""
    daemon = attached(swap__priority=0)
    area = swap_area(daemon)
    # Whoever has the pages.
    if data_path == "pager":
        daemon.kill_pagers()
    else:
        daemon.signal(signal.SIGKILL)
    daemon.wait()
    result = daemon.ctl("detach")
    assert result.returncode == 1
    assert "--force" in result.stderr
    assert swap_area(daemon).loop_device == area.loop_device
    result = daemon.ctl("detach", "--force")
    assert result.returncode == 0, result.stderr
    assert_gone(daemon, area.loop_device)
