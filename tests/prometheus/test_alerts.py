"""Every alert fires when what it is for happens, and not before. How long that has to last is in rules.test.yml."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.daemon import ENVIRONMENT, Daemon, state_file, wait_until
from tests.machine import lacks
from tests.pages import PAGE, noise
from tests.prometheus.server import ROOT, Prometheus, alert_names, listen
from tests.swap.backing import POOL_BYTES, TOUCHED_BYTES, touching, with_faults
from tests.swap.workload import ENOUGH
from tests.takeover import kill, kill_and_wait, status, with_standby

MakeDaemon = Callable[..., Daemon]
Fires = Callable[[str, str | None], None]

#: Those that have fired here, with what they said.
FIRED: dict[str, dict[str, str]] = {}
#: What may be said of a daemon that nobody swaps to. Whether there is a standby yet is looked at every ten seconds, and
#: here a scrape that takes longer than a second has failed.
AT_FIRST = {"ZswapdNotAttached", "ZswapdStandbyMissing", "ZswapdDown"}


@pytest.fixture
def fires(prometheus: Prometheus) -> Fires:
    """Waits until an alert fires."""

    def wait(name: str, instance: str | None) -> None:
        FIRED[name] = prometheus.wait_for_alert(name, instance)["annotations"]

    return wait


def quiet_at_first(prometheus: Prometheus, instance: str) -> None:
    """Waits until it is scraped, and has no alert."""
    prometheus.wait_for(instance)
    prometheus.evaluated()
    assert prometheus.alerts(instance).keys() <= AT_FIRST


def fill(swapfile: int, pages: range, seed: int = 0) -> int:
    """Writes pages that do not compress. How many of them were refused."""
    refused = 0
    for page in pages:
        try:
            os.pwrite(swapfile, noise(seed + page), page * PAGE)
        except OSError:
            refused += 1
    return refused


def unreadable(swapfile: int, pages: range) -> int:
    """How many cannot be read."""
    found = 0
    for page in pages:
        try:
            os.pread(swapfile, PAGE, page * PAGE)
        except OSError:
            found += 1
    return found


@pytest.mark.usefixtures("_swap", "_only_ours")
def test_a_swap_that_fills_up_and_a_page_that_does_not_come(
    prometheus: Prometheus, make_daemon: MakeDaemon, fires: Fires, corpus: int
) -> None:
    daemon = make_daemon(swap__size=TOUCHED_BYTES + (2 << 20), swap__priority=32767, metrics__listen=listen("full"))
    # A page is read as a test three times in that.
    daemon.extra_environment["WATCHDOG_USEC"] = "3000000"
    daemon.start()
    assert daemon.ctl("attach", "--unsafe").returncode == 0
    quiet_at_first(prometheus, "full")
    with touching(daemon, corpus, ENOUGH) as workload:
        workload.page_out()
        fires("ZswapdSwapNearlyFull", "full")
        assert prometheus.alerts("full").keys() <= {"ZswapdSwapNearlyFull", *AT_FIRST}
        pager = status(daemon)["pid"]
        os.kill(pager, signal.SIGSTOP)
        try:
            fires("ZswapdPageStuck", "full")
        finally:
            os.kill(pager, signal.SIGCONT)
        prometheus.wait_for_end("ZswapdPageStuck", "full")
        assert daemon.ctl("detach").returncode == 0
        fires("ZswapdNotAttached", "full")


def test_a_pool_that_fills_up(prometheus: Prometheus, make_daemon: MakeDaemon, fires: Fires) -> None:
    """Without a disk."""
    daemon = make_daemon(pool__mem_limit="16MiB", metrics__listen=listen("without a disk")).start()
    quiet_at_first(prometheus, "without a disk")
    with daemon.opened() as swapfile:
        pages = itertools.count(0, 20)

        def stored(some: range) -> bool:
            return not fill(swapfile, some)

        def fill_to(share: float) -> None:
            while (stats := daemon.stats())["pool_bytes"] < share * stats["pool_limit_bytes"]:
                first = next(pages)
                # The reserve may be short of memory for a moment.
                wait_until(partial(stored, range(first, first + 20)), "they are stored")

        fill_to(0.88)
        prometheus.evaluated()
        assert prometheus.alerts("without a disk").keys() <= AT_FIRST
        fill_to(0.96)
        fires("ZswapdPoolNearLimit", "without a disk")
        assert "ZswapdStoresRefused" not in prometheus.alerts("without a disk")
        assert fill(swapfile, range(4000, 6000)) > 900
        fires("ZswapdStoresRefused", "without a disk")


def test_a_disk_that_fails(
    prometheus: Prometheus, disk: dict[str, object], make_daemon: MakeDaemon, fires: Fires
) -> None:
    daemon = make_daemon(**disk, metrics__listen=listen("failing"))
    with_faults(daemon, "read:5:eio,write:20-:eio").start()
    quiet_at_first(prometheus, "failing")
    with daemon.opened() as swapfile:
        # Some 10 segments.
        fill(swapfile, range(1700))
        assert unreadable(swapfile, range(100)) == 1
        fires("ZswapdPageErrors", "failing")
        assert "(disk)" in FIRED["ZswapdPageErrors"]["summary"]
        assert "ZswapdBackingFailed" not in prometheus.alerts("failing")
        fill(swapfile, range(1700, 4000))
        fires("ZswapdBackingFailed", "failing")
        assert "ZswapdPoolNearLimit" not in prometheus.alerts("failing")


def test_a_disk_that_fills_up_and_a_budget_that_is_used_up(
    prometheus: Prometheus, disk: dict[str, object], make_daemon: MakeDaemon, fires: Fires
) -> None:
    daemon = make_daemon(**disk, writeback__budget_per_hour=20 << 20, metrics__listen=listen("small")).start()
    quiet_at_first(prometheus, "small")
    with daemon.opened() as swapfile:
        fill(swapfile, range(6000))
        fires("ZswapdBackingNearlyFull", "small")
        assert "ZswapdBudgetUsedUp" not in prometheus.alerts("small")
        # What lies there is out of date, and makes room.
        fill(swapfile, range(6000), seed=1)
        fires("ZswapdBudgetUsedUp", "small")


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def freezable(directory: Path) -> Iterator[tuple[str, Path]]:
    """A block device in a file of a file system of our own, and where that is mounted."""
    for program in ("mkfs.ext4", "fsfreeze"):
        if not shutil.which(program):
            lacks(program)
    image, below = directory / "image", directory / "below"
    image.write_bytes(bytes(40 << 20))
    run("mkfs.ext4", "-q", "-b", 4096, image)
    below.mkdir()
    with ExitStack() as stack:
        run("mount", "-o", "loop", image, below)
        stack.callback(run, "umount", below)
        (below / "blocks").write_bytes(bytes(16 << 20))
        # Through the page cache: direct I/O of a loop device goes on in some kernels, however frozen its file is.
        device = run("losetup", "--find", "--show", below / "blocks")
        stack.callback(run, "losetup", "--detach", device)
        yield device, below


def test_a_disk_that_hangs(
    prometheus: Prometheus, freezable: tuple[str, Path], make_daemon: MakeDaemon, fires: Fires
) -> None:
    """The file system below it is frozen."""
    device, below = freezable
    disk = {"pool__mem_limit": POOL_BYTES, "writeback__backing": device}
    daemon = make_daemon(**disk, metrics__listen=listen("hanging")).start()
    quiet_at_first(prometheus, "hanging")
    with daemon.opened() as swapfile:
        fill(swapfile, range(500))
        run("fsfreeze", "--freeze", below)
        try:
            command = [sys.executable, "-m", "zswapd.ctl", "--config", str(daemon.config), "writeback", "all"]
            writing = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL)
            fires("ZswapdBackingStuck", "hanging")
        finally:
            run("fsfreeze", "--unfreeze", below)
        assert writing.wait() == 0
        prometheus.wait_for_end("ZswapdBackingStuck", "hanging")
        assert unreadable(swapfile, range(500)) == 0


def test_what_dies(prometheus: Prometheus, make_daemon: MakeDaemon, fires: Fires, tmp_path: Path) -> None:
    """Nobody has pages there."""
    broken = tmp_path / "broken"
    daemon = make_daemon(metrics__listen=listen("mortal"))
    daemon.pager = tmp_path / "pager"
    daemon.pager.write_text(f'#!/bin/sh\n[ ! -e {broken} ] && exec {ROOT}/zswapd/zswapd-pager "$@"\n')
    daemon.pager.chmod(0o755)
    daemon.start()
    quiet_at_first(prometheus, "mortal")
    # What a page in the pool has become is found behind a takeover.
    with daemon.opened() as swapfile, state_file(daemon) as state:
        fill(swapfile, range(1))
        # In the arena's first pages: beyond them the file has only holes.
        at = state.find(noise(0), 0, 8 << 20)
        assert at > 0
        state[at] ^= 1
    kill_and_wait(daemon)
    fires("ZswapdPagesDamaged", "mortal")
    assert "ZswapdTakeovers" not in prometheus.alerts("mortal")
    for _ in range(3):
        kill_and_wait(daemon)
    fires("ZswapdTakeovers", "mortal")

    assert "ZswapdRestarting" not in prometheus.alerts("mortal")
    changes = 'changes(process_start_time_seconds{instance="mortal"}[5m])'
    for restarts in (1, 2):
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        daemon.start_again()
        wait_until(lambda n=restarts: prometheus.value(changes) == n, "it is scraped again")  # type: ignore[misc]
    fires("ZswapdRestarting", "mortal")

    prometheus.wait_for_end("ZswapdStandbyMissing", "mortal")
    broken.touch()
    before = with_standby(daemon)
    kill(daemon, before["pid"])
    fires("ZswapdStandbyMissing", "mortal")
    broken.unlink()
    kill(daemon, before["keeper"])
    fires("ZswapdKeeperMissing", "mortal")

    daemon.signal(signal.SIGKILL)
    daemon.wait()
    fires("ZswapdDown", "mortal")
    assert "ZswapdAbsent" not in prometheus.alerts()
    with prometheus.without_targets():
        fires("ZswapdAbsent", None)


def test_none_is_left_out() -> None:
    """Of those that have been waited for, if this machine lacked nothing."""
    assert set(re.findall(r'fires\("(\w+)"', Path(__file__).read_text())) == set(alert_names())


def test_those_that_fired_said_what_to_do() -> None:
    """Comes last."""
    for said in FIRED.values():
        assert said.keys() == {"summary", "description", "action"}
        for text in said.values():
            assert "<" not in text, text
            assert "{{" not in text, text
