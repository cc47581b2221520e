"""Processes of zswapd that are killed (-9) while the machine needs them."""

import os
import signal

from tests.daemon import Daemon, wait_until
from tests.qemu.inside.machine import (
    ALL_MEMORY,
    DEADLINE_SECONDS,
    Hog,
    attached,
    counters,
    ctl,
    narrow,
    say,
    start,
    used_of,
    when_swapped,
    widen,
)
from tests.takeover import kill_and_wait, status

#: Pages of the requests that one task may have under way, read-ahead and all.
MOST_UNDER_WAY = 32
#: Between two kills.
PAGES_APART = 8000


def quick() -> None:
    """40 MiB, of which 16 may be in memory: the pager is killed while they are rewritten, and another takes over; then
    the swap is detached with pages in it. Every page is right."""
    with attached(swap__size="64MiB") as daemon, narrow(16) as group, Hog(40, group) as hog:
        hog.is_right("write")
        hog.ask("write")
        when_swapped(1000)
        kill_and_wait(daemon)
        assert hog.answer()[1:] == (0, 0)
        hog.is_right()
        widen(group)
        assert used_of("/dev/loop") > 16 << 20
        ctl(daemon, "detach")
        hog.is_right()
        assert counters()["oom_kill"] == 0


def under_pressure() -> None:
    """The machine is out of memory as a whole, and killed are: the pager, twice; zswapd; both at once. Each time a
    pager serves, with its memory locked and a standby. Every page is right, and nobody is killed for memory."""
    with attached() as daemon, Hog(ALL_MEMORY) as hog:
        hog.is_right("write")
        hog.ask("write")
        for victims in ("pager", "pager", "zswapd", "both"):
            when_swapped(PAGES_APART, hog.answers)
            if hog.answers():
                assert hog.answer()[1:] == (0, 0)
                hog.ask("write")
                when_swapped(PAGES_APART)
            before = status(daemon)
            if victims != "zswapd":
                os.kill(before["pid"], signal.SIGKILL)
            if victims != "pager":
                daemon.signal(signal.SIGKILL)
                daemon.wait()
                start(daemon)
            _serves(daemon, 0 if victims == "zswapd" else before["pid"])
            say(f"survived: {victims}")
        assert hog.answer()[1:] == (0, 0)
        hog.is_right()
        assert counters()["oom_kill"] == 0
        hog.end()


def without_resend() -> None:
    """The kernel does not send requests again (before 6.9). A pager that is killed when nothing is under way costs
    nothing; else it costs at most what was being read (SIGBUS). No page is wrong, and nothing waits for ever."""
    with attached(swap__size="64MiB") as daemon, narrow(16) as group, Hog(40, group) as hog:
        hog.is_right("write")
        kill_and_wait(daemon)
        hog.is_right()
        for _ in range(3):
            hog.ask("write")
            when_swapped(1000)
            kill_and_wait(daemon)
            found = hog.answer()
            assert found.wrong == 0
            assert found.lost <= MOST_UNDER_WAY
        found = hog.do("write")
        assert found.wrong == 0
        hog.is_right()


def _serves(daemon: Daemon, but: int) -> None:
    """Another pager than that one serves, as protected as the first was, and has a standby."""
    wait_until(lambda: status(daemon)["pid"] != but, "a pager takes over", DEADLINE_SECONDS)
    wait_until(lambda: status(daemon)["standby"] != 0, "a standby", DEADLINE_SECONDS)
    assert status(daemon)["protected"] == 1
