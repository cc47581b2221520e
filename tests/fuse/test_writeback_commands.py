"""Pages written back to a file and to a block device, through the daemon: what it is told, says and reads."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon import DEADLINE_SECONDS, HOST, Daemon, wait_until
from tests.errnos import raises_errno
from tests.machine import lacks
from tests.pages import PAGE, noise
from zswapd import backing, backing_file, swapdev
from zswapd.pager import Pager

MakeDaemon = Callable[..., Daemon]
MIB = 1 << 20
SIZE = 32 * MIB
DEBUG_PAGER = Path(__file__).parents[2] / "native/target/debug/zswapd-pager"


def text(number: int) -> bytes:
    """A page that gets smaller, but not too small."""
    return (noise(number)[: PAGE // 4] * 4)[:PAGE]


@pytest.fixture
def disk(_fuse: None) -> Iterator[Path]:
    """A directory on a disk whose file system writes in place."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    directory = Path("/var/tmp", f"zswapd-test-{os.getpid()}-{time.monotonic_ns()}")
    directory.mkdir()
    fd = os.open(directory, os.O_PATH)
    kind = backing.mount_of(fd).kind
    os.close(fd)
    if kind not in backing.IN_PLACE:
        directory.rmdir()
        lacks(f"ext4 or xfs at /var/tmp: it is {kind}")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def loop(disk: Path) -> Iterator[Path]:
    image = disk / "image"
    image.touch()
    os.truncate(image, SIZE)
    losetup = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    device = Path(losetup.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def make(disk: Path, make_daemon: MakeDaemon) -> MakeDaemon:
    """Makes daemons with a file on the disk, unless another backing is given; and without policies."""

    def make(**settings: object) -> Daemon:
        on = {"writeback__backing": str(disk / "backing"), "writeback__size": SIZE, "writeback__pressure": 0}
        return make_daemon(**{"swap__data_path": "pager", **on, **settings})

    return make


def fill(fd: int, pages: int) -> None:
    for n in range(pages):
        os.pwrite(fd, text(n), n * PAGE)


def check(fd: int, pages: int) -> None:
    for n in range(pages):
        assert os.pread(fd, PAGE, n * PAGE) == text(n), n


def on_disk(daemon: Daemon) -> int:
    count: int = daemon.stats()["pages"]["on_disk"]
    return count


def test_pages_go_to_a_file_and_come_back(make: MakeDaemon, disk: Path) -> None:
    daemon = make().start()
    assert daemon.read("backing_dev") == f"{disk}/backing\n"
    assert "writing the backing file" in daemon.log()
    with daemon.opened() as fd:
        fill(fd, 2000)
        os.pwrite(fd, b"\xaa" * PAGE, 3000 * PAGE)
        before = daemon.stats()
        daemon.write("writeback", "all")
        stats = daemon.stats()
        # What repeats one word takes no room anywhere.
        assert stats["pages"]["on_disk"] == stats["writeback"]["pages_written"] == 2000
        assert stats["pages"]["same_filled"] == 1
        assert stats["original_bytes"] == before["original_bytes"] == 2001 * PAGE
        assert stats["pool_bytes"] == 0
        # As they are compressed, and not as pages.
        assert stats["writeback"]["written_bytes"] < 2000 * PAGE / 2
        columns = [int(column) for column in daemon.read("bd_stat").split()]
        assert columns == [2000, 0, stats["writeback"]["written_bytes"] // PAGE]
        check(fd, 2000)
        assert int(daemon.read("bd_stat").split()[1]) > 0
        shown = daemon.ctl("status").stdout
        assert "backing disk" in shown
        assert "2,000 pages in" in shown


def test_a_block_device_serves_too(make: MakeDaemon, loop: Path) -> None:
    daemon = make(writeback__backing=str(loop), writeback__size=0).start()
    assert daemon.stats()["writeback"]["backing_bytes"] == SIZE
    with daemon.opened() as fd:
        fill(fd, 500)
        daemon.write("writeback", "all")
        assert on_disk(daemon) == 500
        check(fd, 500)
    # It is not free while a pager lives, which is not the daemon.
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    with raises_errno(errno.EBUSY):
        os.open(loop, os.O_RDONLY | os.O_EXCL)
    daemon.start_again()
    daemon.reset()
    assert daemon.stop() == 0
    os.close(os.open(loop, os.O_RDONLY | os.O_EXCL))


def test_nothing_of_memory_can_be_read_on_the_disk(make: MakeDaemon, disk: Path) -> None:
    secret = b"a secret that does not compress, among noise"
    page = (secret + noise(1))[:PAGE]
    for encryption in (True, False):
        daemon = make(writeback__encryption=encryption, writeback__backing=str(disk / f"{encryption}")).start()
        with daemon.opened() as fd:
            os.pwrite(fd, page, 0)
            daemon.write("writeback", "all")
            assert on_disk(daemon) == 1
            assert os.pread(fd, PAGE, 0) == page
        assert (secret in (disk / f"{encryption}").read_bytes()) == (not encryption)


def test_one_page_the_huge_and_the_idle(make: MakeDaemon) -> None:
    daemon = make().start()
    with daemon.opened() as fd:
        fill(fd, 64)
        for n in range(64, 96):
            os.pwrite(fd, noise(n), n * PAGE)
        daemon.write("writeback", "page_index=5")
        assert on_disk(daemon) == 1
        daemon.write("writeback", "6\n")
        assert on_disk(daemon) == 2
        daemon.write("writeback", "huge")
        assert on_disk(daemon) == 2 + 32
        daemon.write("idle", "all")
        assert daemon.stats()["writeback"]["idle_pages"] == 62
        assert os.pread(fd, PAGE, 0) == text(0)
        daemon.write("writeback", "idle")
        assert on_disk(daemon) == 2 + 32 + 61
        with raises_errno(errno.EINVAL):
            daemon.write("writeback", str(64 * MIB // PAGE))


def test_zswapctl_writes_back_and_says_so(make: MakeDaemon) -> None:
    daemon = make().start()
    with daemon.opened() as fd:
        fill(fd, 300)
        done = daemon.ctl("writeback", "page", "7")
        assert done.stdout.startswith("written back: 1 pages, ")
        done = daemon.ctl("writeback", "idle", "--older", "3600", "--json")
        assert json.loads(done.stdout) == {"pages": 0, "bytes": 0, "ended": "done"}
        done = daemon.ctl("writeback", "all", "--json")
        assert (done.returncode, json.loads(done.stdout)["pages"]) == (0, 299)
        assert json.loads(daemon.ctl("status", "--json").stdout)["pages"]["on_disk"] == 300
        assert daemon.ctl("writeback", "page").returncode == 2
        assert daemon.ctl("writeback", "all", "--older", "5").returncode == 2


def test_a_full_disk_ends_it_early(make: MakeDaemon) -> None:
    daemon = make(writeback__size=16 * MIB).start()
    with daemon.opened() as fd:
        pages = 8192
        for n in range(pages):
            os.pwrite(fd, noise(n), n * PAGE)
        with raises_errno(errno.ENOSPC):
            daemon.write("writeback", "all")
        assert "the backing disk is full" in daemon.log()
        done = daemon.ctl("writeback", "all")
        assert done.returncode == 2
        assert "ended early: the backing disk is full" in done.stderr
        assert 2000 < on_disk(daemon) < 4096
        for n in range(pages):
            assert os.pread(fd, PAGE, n * PAGE) == noise(n), n


def test_the_budget_ends_it_early_and_outlives_everybody(make: MakeDaemon, disk: Path) -> None:
    daemon = make(writeback__budget_per_day="1MiB").start()
    assert daemon.read("writeback_limit") == "256\n"
    with daemon.opened() as fd:
        fill(fd, 2000)
        with raises_errno(errno.EDQUOT):
            daemon.write("writeback", "all")
        counted = daemon.stats()["writeback"]
        assert 0 < counted["written_bytes"] <= MIB
        done = daemon.ctl("writeback", "all")
        assert done.returncode == 2
        assert "the budget is used up (1.0 MiB per day)" in done.stderr
        left = json.loads(daemon.ctl("status", "--json").stdout)["writeback"]["budget_bytes"]
        assert left == MIB - counted["written_bytes"] < MIB // 2
        # The same pager, another daemon.
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        daemon.start_again()
        assert daemon.stats()["writeback"]["budget_bytes"] == left
        check(fd, 2000)
    daemon.reset()
    assert daemon.stop() == 0
    daemon.start_again()
    assert daemon.stats()["writeback"]["budget_bytes"] == left
    # What a pager had left that was killed counts as written.
    daemon.kill_pagers()
    assert daemon.wait() == 1
    daemon.start_again()
    assert daemon.stats()["writeback"]["budget_bytes"] == 0
    assert daemon.read("writeback_limit") == "0\n"


def test_an_operator_limits_what_is_written_as_with_zram(make: MakeDaemon) -> None:
    daemon = make().start()
    assert (daemon.read("writeback_limit"), daemon.read("writeback_limit_enable")) == ("none\n", "0\n")
    with daemon.opened() as fd:
        fill(fd, 2000)
        daemon.write("writeback_limit_enable", "1")
        assert (daemon.read("writeback_limit"), daemon.read("writeback_limit_enable")) == ("0\n", "1\n")
        with raises_errno(errno.EDQUOT):
            daemon.write("writeback", "all")
        done = daemon.ctl("writeback", "all")
        assert "the budget is used up (writeback_limit, or another configuration's)" in done.stderr
        daemon.write("writeback_limit", "64")
        with raises_errno(errno.EDQUOT):
            daemon.write("writeback", "all")
        counted = daemon.stats()["writeback"]
        assert 0 < counted["written_bytes"] <= 64 * PAGE
        assert int(daemon.read("writeback_limit")) == 64 - counted["written_bytes"] // PAGE
        daemon.write("writeback_limit_enable", "0")
        daemon.write("writeback", "all")
        assert on_disk(daemon) == 2000
        check(fd, 2000)


def test_of_the_configured_budget_an_operator_takes_away_alone(make: MakeDaemon) -> None:
    daemon = make(writeback__budget_per_day="1MiB").start()
    for name, command in (("writeback_limit", "257"), ("writeback_limit_enable", "0")):
        with raises_errno(errno.EPERM):
            daemon.write(name, command)
    daemon.write("writeback_limit", "64")
    assert daemon.read("writeback_limit") == "64\n"
    assert json.loads(daemon.ctl("status", "--json").stdout)["writeback"]["budget_bytes"] == 64 * PAGE


def test_what_does_not_compress_is_kept_unless_it_is_named(make: MakeDaemon) -> None:
    daemon = make(writeback__incompressible="keep").start()
    with daemon.opened() as fd:
        fill(fd, 10)
        for n in range(10, 30):
            os.pwrite(fd, noise(n), n * PAGE)
        assert "20 pages that do not compress stay in the pool" in daemon.ctl("writeback", "all").stdout
        assert on_disk(daemon) == 10
        assert "stay" not in daemon.ctl("writeback", "huge").stdout
        assert on_disk(daemon) == 30


def test_settings_that_have_changed_are_applied_or_said(make: MakeDaemon, disk: Path) -> None:
    daemon = make().start()
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon.settings |= {
        "writeback.encryption": False,
        "writeback.shrinkers": 3,
        "writeback.accept_threshold_percent": 50,
        "writeback.backing": str(disk / "other"),
        "pool.mem_limit": "512MiB",
        "compression.algorithm": "zstd",
    }
    daemon.start_again()
    names = "writeback.backing, writeback.encryption, writeback.shrinkers"
    assert f"not what the pager was started with: {names};" in daemon.log()
    stats = daemon.stats()
    assert (stats["pool_limit_bytes"], stats["algorithm"]) == (512 * MIB, "zstd")
    assert daemon.read("backing_dev") == f"{disk}/backing\n"
    assert not (disk / "other").exists()


def test_what_is_not_used_is_written_back_by_age(make: MakeDaemon) -> None:
    daemon = make(writeback__idle_after=1).start()
    with daemon.opened() as fd:
        fill(fd, 100)
        wait_until(lambda: on_disk(daemon) == 100, "all is written back")
        check(fd, 100)


def test_a_start_that_is_stopped_goes_on_the_next_time(make: MakeDaemon, disk: Path) -> None:
    daemon = make(writeback__size="2GiB")
    daemon.launch()
    wait_until(lambda: (backing_file.written_bytes(disk / "backing") or 0) > 0, "some of it is written")
    status = daemon.ctl("status").stderr
    assert "the daemon does not run" in status
    # It may have been done just now.
    assert "it is writing the backing file first, " in status or not daemon.running or "serving" in daemon.log()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not swapdev.is_mounted(daemon.mount_point)
    written = backing_file.written_bytes(disk / "backing")
    assert written is not None
    assert 0 < written <= 2 << 30
    daemon.settings["writeback.size"] = SIZE
    daemon.start()
    assert Pager(daemon.mount_point).backing() == disk / "backing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"writeback__backing": "/dev/shm/x"}, "lies in memory itself"),
        ({"writeback__size": 0}, "a file needs a size"),
        ({"writeback__size": "1TiB"}, "are free in its file system"),
        ({"swap__data_path": "pyfuse3"}, "needs the pager"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_made(
    make: MakeDaemon, disk: Path, settings: dict[str, object], message: str
) -> None:
    daemon = make(**settings)
    assert message in daemon.fails()
    assert list(disk.iterdir()) == []


def test_a_device_with_something_on_it_is_left_alone(make: MakeDaemon, loop: Path) -> None:
    subprocess.run(["mkswap", loop], check=True, capture_output=True)
    before = loop.read_bytes()
    daemon = make(writeback__backing=str(loop), writeback__size=0)
    message = daemon.fails()
    assert f"{loop} holds swap" in message
    assert f"wipefs --all {loop}" in message
    assert loop.read_bytes() == before


def test_two_pagers_do_not_share_a_file(make: MakeDaemon) -> None:
    make().start()
    assert "in use by another pager" in make().fails()


def with_faults(daemon: Daemon, rules: str) -> Daemon:
    if not DEBUG_PAGER.exists():
        lacks("the pager's debug build: cargo build --package zswapd-pager, as make test does")
    daemon.pager = daemon.directory / "pager"
    daemon.pager.write_text(f'#!/bin/sh\nexec {DEBUG_PAGER} "$@" --faults {rules}\n')
    daemon.pager.chmod(0o755)
    return daemon


def scrape(daemon: Daemon) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{HOST}:{daemon.port}/metrics", timeout=DEADLINE_SECONDS) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_disk_that_fails_is_an_alert_and_costs_no_page(make: MakeDaemon) -> None:
    daemon = with_faults(make(), "write:3-:eio").start()
    with daemon.opened() as fd:
        fill(fd, 4000)
        assert scrape(daemon)["zswapd_backing_failed"] == 0
        # The third in a row is the last one that is tried.
        for errors in (1, 2, 3, 3):
            with raises_errno(errno.EIO):
                daemon.write("writeback", "all")
            stats = daemon.stats()
            counted = stats["writeback"]["write_errors"], stats["writeback"]["state"]
            assert counted == (errors, "ok" if errors < 3 else "failed")
        assert 0 < stats["pages"]["on_disk"] < 4000
        assert scrape(daemon)["zswapd_backing_failed"] == 1
        assert "failed: nothing more is written to it" in daemon.ctl("status").stdout
        assert "has failed: nothing more is written to it" in daemon.ctl("doctor").stdout
        assert "ended early: the backing disk cannot be written" in daemon.ctl("writeback", "all").stderr
        resumed = daemon.ctl("writeback", "resume")
        assert (resumed.returncode, resumed.stdout) == (1, "")
        assert "nothing is written to the backing disk yet: the backing disk cannot be written" in resumed.stderr
        assert daemon.stats()["writeback"]["state"] == "failed"
        check(fd, 4000)


def test_a_page_that_the_disk_cannot_read_is_an_error_and_counted(make: MakeDaemon) -> None:
    daemon = with_faults(make(), "read:1:eio").start()
    with daemon.opened() as fd:
        fill(fd, 100)
        daemon.write("writeback", "all")
        with raises_errno(errno.EIO):
            os.pread(fd, PAGE, 0)
        assert daemon.stats()["errors"]["disk"] == 1
        assert "1 loads that the backing disk failed" in daemon.ctl("status").stdout
        check(fd, 100)
