"""Real swap whose pager is killed: the workload waits a moment, and finds every page.

ZSWAPD_TEST_KILLS says how often the pager is killed in the tests that do it at random moments.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle, islice

import pytest

from tests.daemon import Daemon, wait_until
from tests.pages import PAGE, noise, real_pages
from tests.swap.backing import DISK_BYTES, POOL_BYTES, disk_directory, loop_device
from tests.swap.workload import ENOUGH, LIMIT, PAGES, Workload, assert_gone, swap_area, swapped
from tests.takeover import KILLS, kill, kill_and_wait, kill_at_random, report, status, with_standby
from zswapd import swapdev
from zswapd.bench.damon import switches
from zswapd.pager import Pager

pytestmark = pytest.mark.usefixtures("_swap", "_only_ours")

#: What the kernel says of a page that it cannot read or write.
TROUBLE = ("I/O error", "Read-error on swap-device", "Write-error on swap-device", "swap_free: ", "Bad swap")


@pytest.fixture(scope="module")
def _only_ours() -> Iterator[None]:
    """Strangers' pages stay where they are: DAMON would have them swapped out, to what is killed here."""
    changed = [switch for switch in switches() if switch.is_on]

    def turn(on: bool) -> None:
        for switch in changed:

            def turned(switch=switch) -> bool:  # type: ignore[no-untyped-def]
                if switch.is_on != on:
                    try:
                        switch.path.write_text(switch.on if on else switch.off)
                    except BlockingIOError:
                        pass
                    except OSError as error:
                        if error.errno != 16:
                            raise
                return bool(switch.is_on == on)

            wait_until(turned, f"{switch.path} is switched")

    turn(False)
    yield
    turn(True)


@pytest.fixture
def attached(make_daemon: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """Starts a daemon with a pager, and attaches it."""

    def start(**settings: object) -> Daemon:
        daemon = make_daemon(
            **{"swap__data_path": "pager", "swap__size": "128MiB", "swap__priority": 32767} | settings
        ).start()
        result = daemon.ctl("attach", "--unsafe")
        assert result.returncode == 0, result.stderr
        return daemon

    return start


@contextmanager
def kernel_log() -> Iterator[Callable[[], str]]:
    """What the kernel says from now on."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    lines: list[str] = []

    def said() -> str:
        while True:
            try:
                lines.append(os.read(log, 8192).decode(errors="replace"))
            except BlockingIOError:
                return "".join(lines)
            except BrokenPipeError:  # it was faster than we
                continue

    try:
        yield said
    finally:
        os.close(log)


@contextmanager
def no_trouble() -> Iterator[None]:
    """The kernel has had no error of a device or of swap meanwhile."""
    with kernel_log() as said:
        yield
        assert not [line for line in said().splitlines() if any(trouble in line for trouble in TROUBLE)]


def a_read(daemon: Daemon) -> Callable[[], None]:
    """Reads a page of the swap file, as somebody else may do."""

    def read() -> None:
        fd = os.open(daemon.swapfile, os.O_RDONLY)
        try:
            assert len(os.pread(fd, PAGE, 0)) == PAGE
        finally:
            os.close(fd)

    return read


def kill_under_load(daemon: Daemon, workload: Workload, what: str) -> None:
    """Kills the pager at random moments while the workload pages, and verifies every page."""
    with ThreadPoolExecutor(1) as beside:
        killing = beside.submit(kill_at_random, daemon, a_read(daemon), 1)
        seed = 0
        while not killing.done():
            seed += 1
            workload.run("rewrite" if seed % 2 else "random", seed=seed)
        pauses = killing.result()
    report(what, pauses)
    workload.verify()
    stats = daemon.stats()
    assert not any(stats["errors"].values()), stats["errors"]
    assert stats["pages"]["lost"] == 0


@pytest.mark.parametrize("allocator", ["zsmalloc", "z3fold"])
def test_killed_under_load_it_loses_nothing(attached: Callable[..., Daemon], corpus: int, allocator: str) -> None:
    daemon = attached(pool__allocator=allocator)
    with no_trouble(), swapped(daemon, corpus) as workload:
        workload.fill()
        before = with_standby(daemon)
        kill_under_load(daemon, workload, "swap")
        assert with_standby(daemon)["takeovers"] == before["takeovers"] + KILLS
        workload.group.set_limit(ENOUGH)
        device = swap_area(daemon).loop_device
        assert daemon.ctl("detach").returncode == 0
        assert_gone(daemon, device)
        workload.verify()
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


@pytest.mark.parametrize("kind", ["file", "block"])
def test_killed_while_it_writes_back(make_daemon: Callable[..., Daemon], corpus: int, kind: str) -> None:
    """A pool an eighth of what is swapped."""
    with disk_directory() as directory, loop_device(directory, DISK_BYTES) as device:
        disk: dict[str, object] = {"writeback__backing": str(device)}
        if kind == "file":
            disk = {"writeback__backing": str(directory / "backing"), "writeback__size": DISK_BYTES}
        ours = {"swap__size": "64MiB", "swap__priority": 32767, "pool__mem_limit": POOL_BYTES}
        daemon = make_daemon(**ours | disk).start()
        assert daemon.ctl("attach", "--unsafe").returncode == 0
        with no_trouble(), swapped(daemon, corpus, (32 << 20) // PAGE, 12 << 20) as workload:
            workload.run("fill")
            kill_under_load(daemon, workload, f"writeback to a {kind}")
            assert daemon.stats()["pages"]["on_disk"] > 0
            workload.group.set_limit(ENOUGH)
            assert daemon.ctl("detach").returncode == 0
            workload.verify()
        assert daemon.stop() == 0
        assert "leaked" not in daemon.log()


def test_killed_while_it_recompresses(attached: Callable[..., Daemon], corpus: int) -> None:
    """With dictionaries that come and go; without zswapd's own policy, which would wait for pages to get cold."""
    daemon = attached(recompression__cpu_percent=0)
    pager, ended = Pager(daemon.mount_point), threading.Event()

    def recompress() -> None:
        round_ = 0
        while not ended.is_set():
            round_ += 1
            # Whoever is killed has not done it, or not all of it.
            with suppress(OSError):
                pager.tick()
                pager.recompress("zstd", tier=1, level=1 + round_ % 3, age=0)
                # Of whatever there is.
                pager.install_dictionary(pager.sample_cold(0, 16))
                pager.recompress("dictionary", tier=2, level=3, age=0)

    with no_trouble(), swapped(daemon, corpus) as workload, ThreadPoolExecutor(1) as beside:
        workload.fill()
        beside.submit(recompress)
        try:
            kill_under_load(daemon, workload, "recompression")
        finally:
            ended.set()
        counts = daemon.stats()["recompression"]
        assert counts["pages_recompressed"] > 1000
        assert counts["dictionaries"]
        workload.group.set_limit(ENOUGH)
        assert daemon.ctl("detach").returncode == 0
        workload.verify()
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


@pytest.fixture(scope="module")
def alike() -> Iterator[int]:
    """A memory file of pages of which one in four differs from all others, and the rest are a few hundred."""
    fd = os.memfd_create("zswapd-test-alike")
    with open(fd, "wb", closefd=False) as file:
        for number, page in enumerate(islice(cycle(real_pages()), PAGES)):
            what = number if number % 4 == 0 else number % 300
            file.write(what.to_bytes(8) + (page[8:] if what == number else noise(what)[:1000].ljust(PAGE - 8)))
    yield fd
    os.close(fd)


def test_killed_while_pages_that_are_alike_are_shared(attached: Callable[..., Daemon], alike: int) -> None:
    daemon = attached(recompression__cpu_percent=0)
    pager, ended = Pager(daemon.mount_point), threading.Event()

    def share() -> None:
        round_ = 0
        while not ended.is_set():
            round_ += 1
            # Another level, so that all are looked at again. Whoever is killed has not done it, or not all of it.
            with suppress(OSError):
                pager.recompress("zstd", tier=1, level=1 + round_ % 3, age=0)

    with no_trouble(), swapped(daemon, alike) as workload, ThreadPoolExecutor(1) as beside:
        workload.fill()
        beside.submit(share)
        try:
            kill_under_load(daemon, workload, "sharing")
        finally:
            ended.set()
        pager.recompress("zstd", tier=2, level=3, age=0)
        counts = daemon.stats()["recompression"]
        assert counts["pages_deduplicated"] > 1000
        assert counts["pages_shared"] > 2 * counts["shared_pages"] > 0
        workload.verify()
        workload.group.set_limit(ENOUGH)
        assert daemon.ctl("detach").returncode == 0
        workload.verify()
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


def test_killed_during_swapoff(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached()
    with no_trouble(), swapped(daemon, corpus) as workload, ThreadPoolExecutor(1) as beside:
        workload.fill()
        killed = 0
        for _ in range(3):
            workload.group.set_limit(ENOUGH)
            used = swap_area(daemon).used_bytes
            detaching = beside.submit(daemon.ctl, "detach")

            def begun(done=detaching.done, used=used) -> bool:  # type: ignore[no-untyped-def]
                area = swapdev.discover(daemon.mount_point)
                return bool(done() or area is None or area.used_bytes < used - (4 << 20))

            wait_until(begun, "swapoff has begun")
            if not detaching.done():
                kill(daemon)
                killed += 1
            # Asked again where the takeover has cut it short; the swap is off then.
            if detaching.result().returncode != 0:
                assert daemon.ctl("detach").returncode == 0
            workload.verify()
            assert daemon.ctl("attach", "--unsafe").returncode == 0
            workload.group.set_limit(LIMIT)
            workload.run("rewrite", seed=1)
        workload.verify()
        assert killed


def test_the_standby_and_then_its_heirs_are_killed(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached()
    with no_trouble(), swapped(daemon, corpus) as workload:
        workload.fill()
        before = with_standby(daemon)
        kill(daemon, before["standby"])
        wait_until(lambda: with_standby(daemon)["standby"] != before["standby"], "another standby")
        workload.run("random", seed=1)
        # While it takes over.
        for _ in range(5):
            now = with_standby(daemon)
            kill(daemon, now["pid"])
            kill(daemon, now["standby"])
            workload.run("random", seed=2)
        workload.verify()
        assert status(daemon)["keeper"] == before["keeper"]


def test_upgraded_under_load_and_killed_meanwhile(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached()

    def upgrade_and_kill() -> int:
        done, chance = 0, random.Random(1)
        for turn in range(KILLS):
            before = with_standby(daemon)
            with ThreadPoolExecutor(1) as beside:
                upgrading = beside.submit(Pager(daemon.mount_point).upgrade)
                if turn % 3:
                    time.sleep(chance.uniform(0, 0.2))
                    with suppress(ProcessLookupError):  # it was faster
                        kill(daemon, before["pid" if turn % 3 == 1 else "standby"])
                try:
                    upgrading.result()
                except OSError as error:
                    print(error)
                else:
                    assert status(daemon)["program"] > before["program"]
                    done += 1
        return done

    with no_trouble(), swapped(daemon, corpus) as workload, ThreadPoolExecutor(1) as beside:
        workload.fill()
        keeper = with_standby(daemon)["keeper"]
        upgrading, seed = beside.submit(upgrade_and_kill), 0
        while not upgrading.done():
            seed += 1
            workload.run("rewrite" if seed % 2 else "random", seed=seed)
        # Those beside which only a standby was killed, or nobody.
        assert upgrading.result() >= KILLS // 3
        workload.verify()
        assert with_standby(daemon)["keeper"] == keeper
        stats = daemon.stats()
        assert not any(stats["errors"].values()), stats["errors"]
        workload.group.set_limit(ENOUGH)
        assert daemon.ctl("detach").returncode == 0
        workload.verify()
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


def test_zswapd_and_the_pager_are_killed_at_once(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached()
    with no_trouble(), swapped(daemon, corpus) as workload:
        workload.fill()
        pid = with_standby(daemon)["pid"]
        daemon.signal(signal.SIGKILL)
        kill(daemon, pid)
        daemon.wait()
        workload.run("random", seed=1)
        daemon.start_again()
        workload.verify()
        kill_and_wait(daemon)
        workload.verify()
        workload.group.set_limit(ENOUGH)
        assert daemon.ctl("detach").returncode == 0
    assert daemon.stop() == 0
