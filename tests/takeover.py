"""Pagers that are killed, and how long that is felt."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from tests.daemon import Daemon, wait_until
from zswapd.pager import Pager

#: How often the pager is killed in a test that kills it at random moments.
KILLS = int(os.environ.get("ZSWAPD_TEST_KILLS", "20"))
#: Longest time between two kills.
_APART_SECONDS = 0.4


def status(daemon: Daemon) -> dict[str, int]:
    """Of whoever serves now; asked again when that is killed meanwhile."""
    found: dict[str, int] = {}

    def ask() -> bool:
        with suppress(OSError):
            found.update(Pager(daemon.mount_point).status())
        return bool(found)

    wait_until(ask, "a pager answers")
    return found


def with_standby(daemon: Daemon) -> dict[str, int]:
    """The status when there is a standby."""
    found: dict[str, int] = {}

    def ready() -> bool:
        found.update(status(daemon))
        return found["standby"] != 0

    wait_until(ready, "a standby")
    return found


def kill(daemon: Daemon, pid: int | None = None) -> None:
    os.kill(pid or status(daemon)["pid"], signal.SIGKILL)


def kill_and_wait(daemon: Daemon) -> dict[str, int]:
    """Kills the active pager, and waits for another one to serve, with a standby. The status then."""
    before = status(daemon)
    kill(daemon, before["pid"])
    wait_until(lambda: status(daemon)["pid"] != before["pid"], "another pager serves")
    return with_standby(daemon)


def kill_at_random(daemon: Daemon, felt: Callable[[], object], seed: int, kills: int = KILLS) -> list[float]:
    """Kills the active pager again and again; `felt` does something that needs it. How long that took each time, right
    after the kill, in milliseconds, in order."""
    chance = random.Random(seed)
    pauses = []
    for _ in range(kills):
        time.sleep(chance.uniform(0, _APART_SECONDS))
        pid = with_standby(daemon)["pid"]
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        felt()
        pauses.append((time.monotonic() - start) * 1000)
    return sorted(pauses)


def report(what: str, pauses: list[float]) -> None:
    """Says how the pauses were, for who reads the log of a test."""
    middle, high = pauses[len(pauses) // 2], pauses[min(len(pauses) - 1, len(pauses) * 99 // 100)]
    print(f"{what}: {len(pauses)} kills, pause p50 {middle:.1f} ms, p99 {high:.1f} ms, most {pauses[-1]:.1f} ms")
