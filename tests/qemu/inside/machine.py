"""What scenarios work with: a zswapd that is attached, memory of which every page is known, and the kernel's counts."""

import re
import select
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from tests.daemon import HOST, Daemon, wait_until
from zswapd import ctl as zswapctl
from zswapd import swapdev
from zswapd.bench.cgroup import MemoryCgroup

PAGE = 4096
NO_LIMIT = 1 << 40
#: MiB, in a guest of 384: some 50 more than it has beside everything else.
ALL_MEMORY = 290
#: For what takes a moment, in a machine that is emulated on a busy one, and out of memory.
DEADLINE_SECONDS = 600


class Found(NamedTuple):
    """What a hog has found in its pages."""

    pages: int
    wrong: int
    lost: int


class Hog:
    """hog.c, in memory of `mebibytes`, of which `noise` percent do not compress. In `group`, or one without a limit."""

    def __init__(self, mebibytes: int, group: MemoryCgroup | None = None, noise: int = 25, secret: str = "") -> None:
        command = ["./hog", str(mebibytes), str(noise), *([secret] if secret else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._mebibytes = mebibytes
        self._stack = ExitStack()
        self._stack.callback(self.end)
        self._stack.callback(self._process.kill)
        self.group = group or self._stack.enter_context(MemoryCgroup(NO_LIMIT))
        self.group.add(self._process.pid)

    def __enter__(self) -> "Hog":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, what: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(what.encode() + b"\n")

    def answers(self) -> bool:
        """Whether there is an answer by now."""
        assert self._process.stdout
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def answer(self) -> Found:
        wait_until(self.answers, "the hog is through with its pages", DEADLINE_SECONDS)
        assert self._process.stdout
        line = self._process.stdout.readline().decode()
        print(line, end="", flush=True)
        numbers = re.fullmatch(r"hog: \w+: (\d+) pages, (\d+) wrong, (\d+) lost, \d+ s\n", line)
        assert numbers, f"the hog has ended with status {self._process.wait()}"
        return Found(*map(int, numbers.groups()))

    def do(self, what: str) -> Found:
        self.ask(what)
        return self.answer()

    def out(self) -> None:
        """Swapped out, as far as the swap takes it. The first times write, the last one drops what was written from the
        swap cache."""
        for _ in range(4):
            with suppress(BlockingIOError):  # less than that
                (self.group.path / "memory.reclaim").write_text(f"{self._mebibytes}M")
        say(f"of {self._mebibytes} MiB in memory: {self.group.usage_bytes() >> 20}")

    def is_right(self, what: str = "check") -> None:
        """Every page is as it was written."""
        found = self.do(what)
        assert found[1:] == (0, 0), found

    def end(self) -> int:
        """Gives its memory back. Its exit status; negative: a signal."""
        self._process.communicate(timeout=DEADLINE_SECONDS)
        return self._process.returncode


@contextmanager
def narrow(mebibytes: int) -> Iterator[MemoryCgroup]:
    """A cgroup whose members are kept from having more (memory.high): at a limit the kernel would kill them if the swap
    is slow, as it is where everything is."""
    with MemoryCgroup(NO_LIMIT) as group:
        (group.path / "memory.high").write_text(f"{mebibytes}M")
        yield group


def widen(group: MemoryCgroup) -> None:
    (group.path / "memory.high").write_text("max")


@contextmanager
def attached(**settings: object) -> Iterator[Daemon]:
    """`zswapd run`, attached. At the end all is given back, unless a scenario has failed: then it is as it was."""
    daemon = Daemon(Path("/run"), **{"swap__size": "256MiB", "pool__mem_limit": "128MiB", **settings})
    try:
        start(daemon)
        ctl(daemon, "attach")
        yield daemon
        ctl(daemon, "detach")
        assert daemon.stop() == 0, daemon.log()
    except BaseException:
        print(daemon.log(), counters(), Path("/proc/swaps").read_text(), sep="\n")
        with suppress(OSError):
            print(urllib.request.urlopen(f"http://{HOST}:{daemon.port}/metrics", timeout=60).read().decode())
        raise


def start(daemon: Daemon) -> None:
    """Starts it (again) and waits until it serves, out of memory as the machine may be."""
    daemon.launch()
    wait_until(lambda: "INFO: serving " in daemon.log() or not daemon.running, "zswapd serves", DEADLINE_SECONDS)
    assert daemon.running


def ctl(daemon: Daemon, *arguments: str, status: int = 0) -> str:
    """What zswapctl says, which ends with `status`. In this process: emulated, another takes seconds to start."""
    done = CliRunner().invoke(zswapctl.cli, ["--config", str(daemon.config), *arguments])
    print(f"zswapctl {' '.join(arguments)}: {done.output}", end="", flush=True)
    assert done.exit_code == status, f"exit status {done.exit_code}, {done.exception}"
    return done.output


def counters() -> dict[str, int]:
    """/proc/vmstat, what of it is about swap and its want."""
    wanted = {"pswpin", "pswpout", "oom_kill"}
    pairs = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name: int(value) for name, value in pairs if name in wanted}


def when_swapped(pages: int, condition: Callable[[], bool] = lambda: False) -> None:
    """Waits until so many more pages have gone out, or `condition`."""
    enough = counters()["pswpout"] + pages
    wait_until(lambda: counters()["pswpout"] >= enough or condition(), f"{pages} pages go out", DEADLINE_SECONDS)


def used_of(device: str) -> int:
    """Bytes in a swap area."""
    return next((area.used_bytes for area in swapdev.read_swaps() if area.path.startswith(device)), 0)


def say(what: str) -> None:
    print(what, flush=True)
