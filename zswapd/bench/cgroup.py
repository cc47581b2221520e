"""A memory cgroup of its own for the workload, under cgroup v1 or v2. The daemon is never put into it."""

import itertools
import os
import signal
import time
from contextlib import suppress
from types import TracebackType

from zswapd.errors import ZswapdError
from zswapd.memcg import find_controller

REMOVE_SECONDS = 20  # killed members give their memory back first
_numbers = itertools.count(1)


class MemoryCgroup:
    """`with MemoryCgroup(limit_bytes) as group:`: made on entry; on exit its members are killed and it is removed.

    Needs root. Entering raises ZswapdError and leaves nothing when it cannot be made. Swappiness is inherited.
    Leaving may wait up to REMOVE_SECONDS.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        controller = find_controller()
        if controller is None:
            raise ZswapdError("no memory cgroup controller is mounted", "mount cgroup2 on /sys/fs/cgroup")
        self._parent, self.version = controller.path, controller.version
        self.path = self._parent / f"zswapd-bench-{os.getpid()}-{next(_numbers)}"
        self._enabled = False

    def __enter__(self) -> "MemoryCgroup":
        try:
            if self.version == 2:
                control = self._parent / "cgroup.subtree_control"
                if "memory" not in control.read_text().split():
                    control.write_text("+memory")
                    self._enabled = True
            self.path.mkdir()
            self.set_limit(self._limit)
        except OSError as error:
            self._remove()
            raise ZswapdError(
                f"cannot make memory cgroup {self.path}: {error}", "run as root, outside a container"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + REMOVE_SECONDS
        while self.path.exists():
            self.kill()
            try:
                self._remove()
            except OSError as busy:
                if time.monotonic() > deadline:
                    raise ZswapdError(
                        f"cannot remove cgroup {self.path}: {busy}", f"members: {self.members()}"
                    ) from busy
                time.sleep(0.01)

    def _remove(self) -> None:
        if self.path.exists():
            self.path.rmdir()
        if self._enabled:
            (self._parent / "cgroup.subtree_control").write_text("-memory")
            self._enabled = False

    def add(self, pid: int) -> None:
        """Move a process in: what it touches from now on counts here, what it touched before does not."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def members(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def kill(self) -> None:
        """SIGKILL every member. Returns at once; they may take a moment to go."""
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def set_limit(self, limit_bytes: int) -> None:
        """Set the limit on memory, not counting swap. Lowering it may wait for reclaim."""
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (self.path / name).write_text(str(limit_bytes))

    def usage_bytes(self) -> int:
        return self._number("memory.usage_in_bytes", "memory.current")

    def peak_bytes(self) -> int:
        """Highest usage so far (v2: Linux 5.19 and later)."""
        return self._number("memory.max_usage_in_bytes", "memory.peak")

    def swap_bytes(self) -> int:
        """Swap that the members use."""
        if self.version == 2:
            return self._number("", "memory.swap.current")
        return self._field("memory.stat", "swap")

    def oom_kills(self) -> int:
        """How often the OOM killer ended a member because of the limit."""
        return self._field("memory.oom_control" if self.version == 1 else "memory.events", "oom_kill")

    def _number(self, v1: str, v2: str) -> int:
        return int((self.path / (v1 if self.version == 1 else v2)).read_text())

    def _field(self, file: str, key: str) -> int:
        table = dict(line.split() for line in (self.path / file).read_text().splitlines())
        return int(table[key])
