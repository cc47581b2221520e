"""What the log says of takeovers, and of what is left to take over."""

import logging
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from zswapd import stuck, survival
from zswapd.health import Health
from zswapd.pager import Pager

STATUS = {"pid": 42, "keeper": 40, "standby": 43, "takeovers": 5}


class FakePager:
    def __init__(self) -> None:
        self.now = dict(STATUS)
        self.asked = 0
        self.answers = True

    def stats(self) -> dict[str, Any]:
        return {"takeover_seconds": 0.0345}

    def status(self) -> dict[str, int]:
        self.asked += 1
        if not self.answers:
            raise ConnectionRefusedError(111, "Connection refused")
        return dict(self.now)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mock clock does not wait for them."""

    async def here(function: Any, abandon_on_cancel: bool = False) -> Any:
        await trio.lowlevel.checkpoint()
        return function()

    monkeypatch.setattr(trio.to_thread, "run_sync", here)


async def test_what_becomes_of_pagers_is_said_and_seen_within_two_seconds(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pager, health = FakePager(), Health(dict(STATUS))

    async def said() -> str:
        caplog.clear()
        await trio.sleep(2)
        await wait_all_tasks_blocked()
        assert health.status == pager.now
        return caplog.text

    async with trio.open_nursery() as nursery:
        nursery.start_soon(survival.follow, cast(Pager, pager), health)
        assert await said() == ""

        pager.now = {"pid": 43, "keeper": 40, "standby": 44, "takeovers": 6}
        await trio.sleep(survival.ASK_SECONDS)
        await wait_all_tasks_blocked()
        assert "another pager has taken over: pid 43 instead of 42, after 34.5 ms without (takeover 6)" in caplog.text
        assert "a standby is ready, pid 44" in caplog.text
        assert await said() == ""

        pager.now["standby"] = 0
        assert "no standby at the moment" in await said()
        pager.now["standby"] = 45
        assert "a standby is ready, pid 45" in await said()

        pager.now |= {"keeper": 0, "standby": 0}
        text = await said()
        assert "the keeper of the pager is gone" in text
        pager.now["keeper"] = 50
        assert "the pager has a keeper again, pid 50" in await said()
        nursery.cancel_scope.cancel()


async def test_one_that_does_not_answer_is_said_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pager, health = FakePager(), Health(dict(STATUS))
    monkeypatch.setattr(stuck, "pages", lambda status: f"what {status['pid']} is about")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(survival.follow, cast(Pager, pager), health)
        await trio.sleep(0.5)
        pager.answers = False
        pager.now |= {"pid": 43, "takeovers": 6}
        await trio.sleep(survival.ASK_SECONDS * 5)
        await wait_all_tasks_blocked()
        assert caplog.text.count("the pager does not answer: Connection refused; what 42 is about") == 1
        assert health.status == STATUS
        pager.answers = True
        await trio.sleep(survival.ASK_SECONDS)
        assert "pid 43 instead of 42" in caplog.text
        nursery.cancel_scope.cancel()
