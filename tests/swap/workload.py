"""What the tests on real swap work with: memory of a cgroup, more than it may have, of which every page is known."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.daemon import ENVIRONMENT, Daemon
from tests.pages import PAGE
from zswapd import swapdev
from zswapd.bench.cgroup import MemoryCgroup

ROOT = Path(__file__).parents[2]
#: The same workload, which survives pages that cannot be read.
SURVIVING = "tests.swap.surviving"
PAGES = 16 << 10  # 64 MiB
LIMIT = 24 << 20
ENOUGH = 4 * PAGES * PAGE
LEAST_SWAPPED = 32 << 20


class Workload:
    """The process in the memory cgroup, driven phase by phase."""

    def __init__(self, process: subprocess.Popen[str], group: MemoryCgroup, pages: int) -> None:
        self._process, self.group, self.pages = process, group, pages
        self._result("ready")

    def run(self, phase: str, **arguments: int) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"phase": phase, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._result("result")

    def fill(self) -> None:
        self.run("fill")
        assert self.group.swap_bytes() > LEAST_SWAPPED

    def verify(self) -> None:
        result = self.run("verify")
        assert (result["verified"], result["wrong"]) == (self.pages, 0), result
        assert self.group.oom_kills() == 0

    def _result(self, event: str) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            message: dict[str, Any] = json.loads(line)
            if message["event"] == event:
                return message
        raise AssertionError(f"the workload ended with status {self._process.wait()}")

    def unreadable(self) -> int:
        """How many pages cannot be read; every other one is as it should be."""
        result = self.run("verify")
        assert (result["verified"], result["wrong"]) == (self.pages, result["unreadable"]), result
        assert self.group.oom_kills() == 0
        count: int = result["unreadable"]
        return count

    def page_out(self) -> None:
        """Has the kernel swap out what it can. What cannot be stored stays in memory."""
        self.run("page_out")


@contextmanager
def swapped(
    daemon: Daemon,
    corpus: int,
    pages: int = PAGES,
    limit: int = LIMIT,
    program: str = "zswapd.bench.workload",
    where: str = "anonymous",
) -> Iterator[Workload]:
    """A workload over its memory limit while `daemon` is attached, on the first `pages` of the corpus. Killed and gone
    at the end."""
    others = daemon.workloads
    with MemoryCgroup(limit) as group:
        daemon.workloads = group
        command = [sys.executable, "-m", program, str(corpus), str(pages), where]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, pass_fds=[corpus], env=ENVIRONMENT, cwd=ROOT
        ) as process:
            try:
                group.add(process.pid)
                yield Workload(process, group, pages)
            finally:
                process.kill()
    daemon.workloads = others


def swap_area(daemon: Daemon) -> swapdev.Attachment:
    attachment = swapdev.discover(daemon.mount_point)
    assert attachment
    assert attachment.is_swap
    return attachment


def assert_gone(daemon: Daemon, device: str) -> None:
    assert swapdev.discover(daemon.mount_point) is None
    assert device not in [area.path for area in swapdev.read_swaps()]
