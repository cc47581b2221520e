"""Before a power cut, and after it (test_power.py)."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.daemon import wait_until
from tests.qemu.inside.machine import DEADLINE_SECONDS, Hog, attached, counters, ctl, say

#: What compresses, and what does not. The disk has 64 MiB.
COMPRESSIBLE_MIB, NOISE_MIB = 32, 16
PAGES = (COMPRESSIBLE_MIB + NOISE_MIB) << 8


def plant() -> None:
    """When the power goes, a secret lies in every page, and nine of ten pages on the disk."""
    with on_disk():
        say("planted")
        signal.pause()


def again() -> None:
    """On what a power cut has left zswapd starts as on an empty disk, and every page comes back from there right."""
    with on_disk() as hogs:
        before = counters()["pswpin"]
        for hog in hogs:
            hog.out()
            hog.is_right()
        assert counters()["pswpin"] - before > PAGES * 9 // 10


@contextmanager
def on_disk() -> Iterator[list[Hog]]:
    """Hogs most of whose pages lie on the disk."""
    secret, encryption = os.environ["SECRET"], os.environ["ENCRYPTION"] == "on"
    with (
        attached(writeback__backing="/dev/vda", writeback__encryption=encryption) as daemon,
        Hog(COMPRESSIBLE_MIB, secret=secret) as compressible,
        Hog(NOISE_MIB, noise=100, secret=secret) as noise,
    ):
        hogs = [compressible, noise]
        assert daemon.stats()["pages"]["on_disk"] == 0

        def written() -> bool:
            """What was read or written just now goes out at the next time."""
            for hog in hogs:
                hog.out()
            ctl(daemon, "writeback", "all")
            pages: int = daemon.stats()["pages"]["on_disk"]
            say(f"on the disk: {pages}")
            return pages > PAGES * 9 // 10

        for hog in hogs:
            hog.is_right("write")
        wait_until(written, "all lies on the disk", DEADLINE_SECONDS)
        yield hogs
