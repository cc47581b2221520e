"""A backing disk that is full, fails, or is slow: an error costs at most the page that it is about; nothing hangs."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.daemon import Daemon, wait_until
from tests.qemu.inside.machine import DEADLINE_SECONDS, PAGE, Hog, attached, ctl, say

#: The node is the kernel's: there is no udev, which would make one in /dev/mapper.
NAME, DEVICE = "backing", "/dev/dm-0"
POOL = "4MiB"
#: Half of it does not compress: more than the pool takes.
HOG_MIB, NOISE_PERCENT = 24, 50
LEAST_ON_DISK = 8 << 20


class Disk:
    """A mapped device, all of /dev/vda, until it becomes something else."""

    def __init__(self, mebibytes: int) -> None:
        self._sectors = mebibytes << 11
        dmsetup("create", NAME, "--table", self._table("linear"))

    def _table(self, what: str) -> str:
        # As dmsetup(8) has them: flakey is down, with errors for writes only, for an hour; delays are milliseconds.
        arguments = {
            "linear": "/dev/vda 0",
            "error": "",
            "flakey": "/dev/vda 0 0 3600 1 error_writes",
            "delay": "/dev/vda 0 10 /dev/vda 0 100",
        }
        return f"0 {self._sectors} {what} {arguments[what]}"

    def becomes(self, what: str) -> None:
        """From now on; what is under way is done first."""
        dmsetup("load", NAME, "--table", self._table(what))
        dmsetup("suspend", NAME)
        dmsetup("resume", NAME)
        say(f"the disk is {what} now")


def dmsetup(*arguments: str) -> None:
    subprocess.run(["dmsetup", "--noudevsync", *arguments], check=True)


@contextmanager
def over(mebibytes: int) -> Iterator[tuple[Daemon, Disk]]:
    disk = Disk(mebibytes)
    with attached(writeback__backing=DEVICE, pool__mem_limit=POOL) as daemon:
        yield daemon, disk
        assert daemon.stats()["writeback"]["state"] == "ok"
    dmsetup("remove", NAME)


def on_disk(daemon: Daemon) -> int:
    """Bytes of pages."""
    pages: int = daemon.stats()["pages"]["on_disk"]
    return pages * PAGE


def out(hog: Hog, daemon: Daemon) -> None:
    """What goes out goes to the disk, as far as that takes it."""
    hog.out()
    with suppress(AssertionError):  # when the disk is full or has failed
        ctl(daemon, "writeback", "all")
    say(f"on the disk: {on_disk(daemon) >> 20} MiB")


def full() -> None:
    """32 MiB that do not compress, a pool of 4 and a disk of 16: stores are refused, those pages stay in memory, and
    every page is right, now and when it has been written again. The disk has not failed."""
    with over(16) as (daemon, _), Hog(32, noise=100) as hog:
        for _ in range(2):
            hog.is_right("write")
            out(hog, daemon)
            stats = daemon.stats()
            assert sum(stats["rejected_stores"].values()) > 0, stats
            assert on_disk(daemon) > LEAST_ON_DISK
            hog.is_right()
        assert not any(daemon.stats()["errors"].values())


def fails_to_write() -> None:
    """Every write fails, from the middle on: the disk is given up, what lies there stays readable, every page is right.
    When writes go well again the disk is used again."""
    with over(64) as (daemon, disk), Hog(HOG_MIB, noise=NOISE_PERCENT) as hog:
        hog.is_right("write")
        out(hog, daemon)
        assert on_disk(daemon) > LEAST_ON_DISK
        disk.becomes("flakey")

        def is_given_up() -> bool:
            hog.do("write")
            hog.out()
            return bool(daemon.stats()["writeback"]["state"] == "failed")

        wait_until(is_given_up, "the disk is given up", DEADLINE_SECONDS)
        hog.is_right()
        hog.is_right("write")
        disk.becomes("linear")
        ctl(daemon, "writeback", "resume")
        before = daemon.stats()["writeback"]["pages_written"]
        out(hog, daemon)
        assert daemon.stats()["writeback"]["pages_written"] > before
        hog.is_right()
        assert not any(daemon.stats()["errors"].values())


def fails() -> None:
    """Every read and write fails: pages that lie there are lost to who reads them (SIGBUS), no page is wrong, and the
    machine goes on. When the disk is well again, so is every page."""
    with over(64) as (daemon, disk), Hog(HOG_MIB, noise=NOISE_PERCENT) as hog:
        hog.is_right("write")
        out(hog, daemon)
        assert on_disk(daemon) > LEAST_ON_DISK
        disk.becomes("error")
        found = hog.do("check")
        assert found.wrong == 0
        assert found.lost > 0
        assert daemon.stats()["errors"]["disk"] > 0
        disk.becomes("linear")
        # What it could not read the kernel keeps in the swap cache, until it wants the memory.
        hog.out()
        hog.is_right()
        hog.is_right("write")
        out(hog, daemon)
        hog.is_right()


def slow() -> None:
    """Each write takes 100 ms more, each read 10: stores wait for room, none is refused, and every page is right."""
    with over(64) as (daemon, disk), Hog(HOG_MIB, noise=NOISE_PERCENT) as hog:
        disk.becomes("delay")
        for _ in range(2):
            hog.is_right("write")
            hog.out()
        hog.is_right()
        stats = daemon.stats()
        assert stats["writeback"]["stores_waited"] > 0, stats["writeback"]
        assert not any(stats["rejected_stores"].values()), stats["rejected_stores"]
        assert not any(stats["errors"].values()), stats["errors"]
        disk.becomes("linear")
