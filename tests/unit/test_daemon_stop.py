"""The end of the daemon: who waits for the pager waits in a thread."""

import errno
import logging
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import trio

from zswapd import daemon, policy, stopping, swapdev
from zswapd.config import load

T = TypeVar("T")


class Waiting:
    """Waits until the trio loop lets it go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = trio.Event(), threading.Event()

    def __call__(self, result: T) -> T:
        trio.from_thread.run_sync(self.begun.set)
        assert self.go_on.wait(60), "the trio loop stands still"
        return result


async def while_waiting(waiting: Waiting, operation: Callable[[], Any]) -> Any:
    results: list[Any] = []

    async def run() -> None:
        results.append(await operation())

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await waiting.begun.wait()
            assert not results
            waiting.go_on.set()
    return results[0]


async def test_the_loop_goes_on_while_the_pager_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []
    waiting = Waiting()
    monkeypatch.setattr(policy, "end_budget", ended.append)
    pager: Any = SimpleNamespace(stop=lambda: waiting({"objects": 0}))
    assert await while_waiting(waiting, lambda: daemon._stop(pager)) == {"objects": 0}
    assert ended == [pager]


async def test_the_loop_goes_on_while_requests_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting()
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: None)
    config = load(None, [], {})
    assert await while_waiting(waiting, lambda: stopping.give_back(config, lambda: waiting(True)))


def test_a_reply_that_nobody_waits_for_is_not_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """As when the pager has ended over a command: who says so is pyfuse3, in these words."""
    failed = "fuse_write(): fuse_reply_* failed with %s"
    for number in (errno.EPIPE, errno.ENOENT, errno.EINVAL):
        logging.getLogger("pyfuse3").error(failed, os.strerror(number))
    logging.getLogger("pyfuse3").error("something else")
    assert [record.getMessage() for record in caplog.records] == [failed % os.strerror(errno.EINVAL), "something else"]
