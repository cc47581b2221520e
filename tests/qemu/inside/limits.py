"""Who else wants memory and swap: cgroups with limits, zram, the page cache, and swapoff without memory for it."""

import re
import signal
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

from tests.qemu.inside.machine import (
    ALL_MEMORY,
    Hog,
    attached,
    counters,
    ctl,
    narrow,
    say,
    used_of,
    when_swapped,
    widen,
)
from tests.takeover import status

SLEEP = Path("/sys/power/state")


def swap_max() -> None:
    """memory.max and memory.swap.max of cgroup v2: who needs no more than both swaps so much; who needs more is killed,
    he alone; who may not swap does not. Everybody else's pages are right."""
    with attached() as daemon, ExitStack() as stack:
        enough, too_little, none = (stack.enter_context(group) for group in (narrow(16), narrow(16), narrow(16)))
        too_little.set_limit(16 << 20)
        for group, mebibytes in ((enough, 48), (too_little, 16), (none, 0)):
            (group.path / "memory.swap.max").write_text(f"{mebibytes}M")
        with Hog(32, enough) as hog, Hog(8, none) as other:
            for _ in range(2):
                hog.is_right("write")
                other.is_right("write")
            assert 12 << 20 < enough.swap_bytes() <= 48 << 20
            with Hog(64, too_little) as greedy:
                greedy.ask("write")
                assert greedy.end() == -signal.SIGKILL
            assert int((too_little.path / "memory.swap.peak").read_text()) <= 16 << 20
            hog.is_right()
            other.is_right()
            assert none.swap_bytes() == 0
            assert [group.oom_kills() for group in (enough, too_little, none)] == [0, 1, 0]
            assert not any(daemon.stats()["errors"].values())


def beside_zram() -> None:
    """zram of a higher priority is filled first and zswapd takes the rest; of a lower one, it gets nothing. After
    zswapd was detached in between every page is right."""
    subprocess.run("echo 16M >/sys/block/zram0/disksize && mkswap -q /dev/zram0", shell=True, check=True)
    with attached() as daemon, narrow(24) as group, Hog(64, group) as hog:
        subprocess.run(["swapon", "--priority", "200", "/dev/zram0"], check=True)
        hog.is_right("write")
        assert used_of("/dev/zram") > 14 << 20
        assert used_of("/dev/loop") > 16 << 20
        hog.is_right()
        widen(group)
        ctl(daemon, "detach")
        subprocess.run(["swapoff", "/dev/zram0"], check=True)
        hog.is_right()
        daemon.settings["swap.priority"] = 300
        daemon.configure()
        ctl(daemon, "attach")
        subprocess.run(["swapon", "--priority", "200", "/dev/zram0"], check=True)
        (group.path / "memory.high").write_text("24M")
        hog.is_right("write")
        assert used_of("/dev/loop") > 32 << 20
        assert used_of("/dev/zram") == 0
        hog.is_right()
        subprocess.run(["swapoff", "/dev/zram0"], check=True)
        widen(group)


def all_memory() -> None:
    """The machine is out of memory as a whole, and nothing has a limit: every page is right, nobody is killed."""
    with attached(), Hog(ALL_MEMORY) as hog:
        for what in ("write", "write", "check"):
            hog.is_right(what)
        assert counters()["oom_kill"] == 0
        hog.end()


def suspend() -> None:
    """The machine sleeps (to memory) with pages in swap, and is woken. Told to sleep while it swaps it does, or not: a
    task that waits for a page cannot be stopped once the pager is. All go on, and every page is right."""
    with attached() as daemon, narrow(16) as group, Hog(48, group) as hog:
        hog.is_right("write")
        pager = status(daemon)["pid"]
        SLEEP.write_text("mem")
        hog.is_right()
        for _ in range(2):
            hog.ask("write")
            when_swapped(1000)
            try:
                SLEEP.write_text("mem")
                say("the machine has slept")
            except OSError as error:
                say(f"the machine has stayed awake: {error}")
            assert hog.answer()[1:] == (0, 0)
        hog.is_right()
        assert status(daemon)["pid"] == pager


def page_cache() -> None:
    """A hog and somebody who reads and writes a disk of half the memory, through the page cache, again and again: both
    get on, every page of the hog is right, the disk holds what it held, and nobody is killed for memory."""
    disk = "/dev/vda"
    before, killed = _checksum(disk), counters()["oom_kill"]
    with attached(), Hog(ALL_MEMORY - 40) as hog:
        passes, enough = 0, threading.Event()

        def read_and_write() -> None:
            nonlocal passes
            while not enough.is_set():
                subprocess.run(["dd", f"if={disk}", f"of={disk}", "bs=1M", "conv=notrunc", "status=none"], check=True)
                passes += 1

        hog.is_right("write")
        swapped = counters()["pswpout"]
        other = threading.Thread(target=read_and_write)
        other.start()
        try:
            hog.is_right("write")
        finally:
            enough.set()
            other.join()
        hog.is_right()
        say(f"through the disk: {passes} times")
        assert passes > 0
        assert counters()["pswpout"] > swapped
        assert counters()["oom_kill"] == killed
        hog.end()
    assert _checksum(disk) == before


def _checksum(path: str) -> str:
    return subprocess.run(["cksum", path], check=True, capture_output=True, text=True).stdout


def no_memory_for_swapoff() -> None:
    """More is in swap than memory can take: detach refuses. Forced, so does the kernel, which has promised more memory
    than there would be (vm.overcommit_memory): the swap stays in use, nobody is killed, and every page is right."""
    killed = counters()["oom_kill"]
    with attached() as daemon, Hog(ALL_MEMORY) as hog:
        hog.is_right("write")
        assert "memory cannot take the pages back" in ctl(daemon, "detach", status=1)
        promised = re.search(r"^Committed_AS: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        assert promised
        # The limit is that, and swap: so more can be promised, but without this swap it is too much.
        _overcommit(2, int(promised[1]) - (100 << 10))
        said = ctl(daemon, "detach", "--force", status=1)
        _overcommit(0, 0)
        assert "Cannot allocate memory (memory cannot take the pages back)" in said
        assert "stays in use" in said
        assert used_of("/dev/loop") > 0
        hog.is_right()
        assert counters()["oom_kill"] == killed
        hog.end()


def _overcommit(policy: int, kibibytes: int) -> None:
    Path("/proc/sys/vm/overcommit_kbytes").write_text(str(kibibytes))
    Path("/proc/sys/vm/overcommit_memory").write_text(str(policy))
