"""Who else wants memory and swap: cgroups with limits, zram, and sleep."""

import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.qemu.inside.machine import Hog, attached, counters, ctl, narrow, say, used_of, when_swapped, widen
from tests.takeover import status


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
    with attached(), Hog(420) as hog:
        for what in ("write", "write", "check"):
            hog.is_right(what)
        assert counters()["oom_kill"] == 0
        hog.end()


def suspend() -> None:
    """The machine is told to sleep with swap attached, and in use. It cannot (virtiofs has no way to), but has stopped
    every process for it by then, the pager too, or given that up: all go on, and every page is right."""
    with attached() as daemon, narrow(16) as group, Hog(48, group) as hog:
        hog.is_right("write")
        pager = status(daemon)["pid"]
        for _ in range(2):
            hog.ask("write")
            when_swapped(1000)
            try:
                Path("/sys/power/state").write_text("freeze")
            except OSError as error:
                say(f"the machine does not sleep: {error}")
            else:
                raise AssertionError("the machine has slept")
            assert hog.answer()[1:] == (0, 0)
        hog.is_right()
        assert status(daemon)["pid"] == pager
