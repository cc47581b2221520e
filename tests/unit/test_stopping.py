"""The way back, which is tried until it is done."""

import errno
from pathlib import Path
from typing import Any, cast

import pytest
from trio.testing import MockClock

from zswapd import detaching, policy, stopping, swapdev, wear
from zswapd.config import Config, load
from zswapd.errors import DaemonError, SwapError
from zswapd.swapdev import Attachment

ATTACHED = Attachment("/dev/loop9", True, True, 1 << 30, 1 << 20, 100)


class FakePager:
    def __init__(self, tmp_path: Path) -> None:
        self.told: list[str] = []
        self.busy = 0
        self.stops: OSError | None = None
        self.budget: wear.Budget | None = None

    def backing(self) -> Path:
        return Path("/dev/x")

    def unused_budget(self) -> int:
        return 1 << 20

    def drain(self) -> dict[str, int]:
        self.told.append("drain")
        if self.busy:
            self.busy -= 1
            raise OSError(errno.EBUSY, "busy")
        return {}

    def stop(self) -> dict[str, int]:
        self.told.append("stop")
        if self.stops:
            raise self.stops
        return {"objects": 3, "pages": 1}


@pytest.fixture
def pager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePager:
    pager = FakePager(tmp_path)
    monkeypatch.setattr(stopping, "find_pager", lambda config: pager)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: None)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    return pager


def config(*overrides: str) -> Config:
    return load(None, ["swap.mount_point=/run/zswapd-test/mnt", *overrides], {})


async def test_the_swap_goes_first_however_often_it_has_to_be_tried(
    pager: FakePager, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    attached: list[Attachment] = [ATTACHED]

    async def detach(mount_point: Path, progress: object) -> None:
        pager.told.append("detach")
        if pager.told.count("detach") < 3:
            raise SwapError("memory cannot take the pages back")
        attached.clear()

    monkeypatch.setattr(swapdev, "discover", lambda mount_point: attached[0] if attached else None)
    monkeypatch.setattr(detaching, "detach", detach)
    pager.busy = 2
    assert await stopping.end_pager(config())
    assert pager.told == ["detach"] * 3 + ["drain"] * 3 + ["stop"]
    assert caplog.text.count("not stopping, still serving: memory cannot take the pages back") == 2
    assert caplog.text.count("somebody has the swap file open") == 2
    assert "3 objects in 1 pages of the pool belonged to no slot" in caplog.text


async def test_what_refuses_is_asked_only_once(pager: FakePager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: ATTACHED)
    with pytest.raises(SwapError, match="on_sigterm is refuse"):
        await stopping.end_pager(config("daemon.on_sigterm=refuse"))
    assert pager.told == []


async def test_no_pager_is_no_error_and_one_that_fails_is(pager: FakePager, monkeypatch: pytest.MonkeyPatch) -> None:
    pager.stops = ConnectionRefusedError(errno.ECONNREFUSED, "gone")
    assert await stopping.end_pager(config())
    pager.stops = OSError(errno.EBUSY, "the swap file is open")
    with pytest.raises(DaemonError, match="did not end: the swap file is open"):
        await stopping.end_pager(config())
    monkeypatch.setattr(stopping, "find_pager", lambda config: None)
    assert not await stopping.end_pager(config())


async def test_what_a_budget_has_left_is_not_lost(pager: FakePager) -> None:
    """Although it was another zswapd that counted."""
    settings = config("writeback.backing=/dev/x", "writeback.budget_per_hour=1GiB")
    granted = wear.Budget(settings.writeback)
    granted.top_up(lambda size: None)
    left = granted.left()
    assert await stopping.end_pager(settings)
    budget = wear.Budget(settings.writeback)
    budget.observe(None)
    assert budget.left() == left - (1 << 30) + (1 << 20)
    policy.end_budget(cast(Any, FakePager(Path())))  # one without a budget
