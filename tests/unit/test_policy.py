"""When pages are written back, and what the pager is told."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.writeback import writeback
from zswapd import policy, swapdev, wear
from zswapd.config import SEGMENT_BYTES, Writeback, load
from zswapd.engine import Written
from zswapd.errors import DaemonError
from zswapd.policy import FEW_READS, Hysteresis

MIB = 1 << 20
GIB = 1 << 30


def settings(**keys: object) -> Writeback:
    return load(
        None, [f"writeback.{key}={value}" for key, value in {"backing": "/dev/x", **keys}.items()], {}
    ).writeback


class FakePager:
    """Notes what it is told, and how much of its budget is left."""

    def __init__(self, path: str | None = "/dev/x", state: str = "ok") -> None:
        self.mount_point = Path("/run/zswapd-test/mnt")
        self.path, self.state = path, state
        self.unused: int | None = None
        self.told: list[str] = []
        self.budget: wear.Budget | None = None
        self.refuses: int = 0
        self.counts: dict[str, Any] = {}
        self.errors = {"lost": 0, "corrupt": 3, "disk": 4}

    def promote(self, on: bool) -> None:
        self._tell(f"promote {on}")

    def backing(self) -> Path | None:
        return Path(self.path) if self.path else None

    def stats(self) -> Any:
        return {"pool_bytes": 640 * MIB, "errors": self.errors, "writeback": writeback(state=self.state, **self.counts)}

    def unused_budget(self) -> int | None:
        return self.unused

    def limit_writing(self, size: int | None) -> None:
        self.told.append(f"limit {size}")
        self.unused = size

    def grant(self, size: int) -> None:
        self.told.append(f"grant {size}")
        self.unused = (self.unused or 0) + size

    def shrink(self, size: int) -> Written:
        return self._tell(f"shrink {size}")

    def write_back(self, what: str) -> Written:
        return self._tell(f"writeback {what}")

    def mark_idle(self, older: int) -> None:
        self._tell(f"idle {older}")

    def _tell(self, command: str) -> Written:
        self.told.append(command)
        if self.refuses:
            raise OSError(self.refuses, "refused")
        return Written(1, 4096, "done")


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mock clock does not wait for them."""

    async def here(function: Callable[..., Any], *arguments: Any, abandon_on_cancel: bool = False) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", here)


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr(swapdev, "is_changing", lambda mount_point: False)
    monkeypatch.setattr(policy, "is_low", lambda: True)
    return tmp_path / "state"


# Pressure


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("some avg10=12.34 avg60=1.00 avg300=0.70 total=3\nfull avg10=5.00 avg60=0.53 avg300=0.62 total=3\n", 12.34),
        ("", None),
        ("odd\n", None),
    ],
)
def test_pressure_is_what_some_process_waits(tmp_path: Path, text: str, value: float | None) -> None:
    (tmp_path / "proc/pressure").mkdir(parents=True)
    assert policy.pressure(tmp_path) is None
    (tmp_path / "proc/pressure/memory").write_text(text)
    assert policy.pressure(tmp_path) == value


def test_it_begins_at_the_threshold_and_ends_at_half_of_it() -> None:
    hysteresis = Hysteresis(10)
    decisions = [hysteresis.step(now, writeback()) for now in (0, 9.9, 10, 7, 5.1, 5, 9.9, 40, 6, 1, 6)]
    assert decisions == [False, False, True, True, True, False, False, True, True, False, False]


def test_pages_that_come_back_from_the_disk_are_no_reason_to_write_more() -> None:
    hysteresis = Hysteresis(10)
    assert hysteresis.step(50, writeback(reads=10_000, pages_written=0))  # what was before does not count
    assert hysteresis.step(50, writeback(reads=10_000 + FEW_READS, pages_written=0))
    assert not hysteresis.step(50, writeback(reads=10_000 + 2 * FEW_READS + 1, pages_written=0))
    assert hysteresis.step(50, writeback(reads=11_000, pages_written=2_000))
    assert not hysteresis.step(50, writeback(reads=13_000, pages_written=4_000))


# Running


async def run(pager: FakePager, wanted: Writeback, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await policy.run(pager, wanted)  # type: ignore[arg-type]
        await trio.sleep_forever()


async def test_under_pressure_the_pool_shrinks_by_a_share(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = [0.0, 20.0, 8.0, 3.0, 3.0]
    monkeypatch.setattr(policy, "pressure", lambda: readings.pop(0) if len(readings) > 1 else readings[0])
    pager = FakePager()
    await run(pager, settings(), 10)
    # The first reading was to see whether there are any. What is read back stays on the disk meanwhile.
    assert pager.told == ["promote False", *["shrink 10485760"] * 2, "promote True"]


async def test_who_waits_while_memory_is_there_is_no_reason_to_shrink(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A memory cgroup at its limit."""
    monkeypatch.setattr(policy, "pressure", lambda: 100.0)
    monkeypatch.setattr(policy, "is_low", lambda: False)
    pager = FakePager()
    await run(pager, settings(), 10)
    assert pager.told == []


def test_memory_is_low_below_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(policy, "mem_total", lambda: 4 * GIB)
    for available, low in ((GIB - 1, True), (GIB, False)):
        monkeypatch.setattr(swapdev, "mem_available", lambda available=available: available)
        assert policy.is_low() == low


async def test_promotion_is_left_alone_while_somebody_detaches(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings, changing = [0.0, 20.0, 20.0, 3.0, 3.0, 3.0, 3.0], [False, False, True, True, False]
    monkeypatch.setattr(policy, "pressure", lambda: readings.pop(0) if len(readings) > 1 else readings[0])
    monkeypatch.setattr(
        swapdev, "is_changing", lambda mount_point: changing.pop(0) if len(changing) > 1 else changing[0]
    )
    pager = FakePager()
    await run(pager, settings(), 10)
    assert [told for told in pager.told if told.startswith("promote")] == ["promote False", "promote True"]


async def test_what_becomes_of_the_disk_is_in_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    pager = FakePager()
    said: tuple[tuple[str, Callable[[], object]], ...] = (
        ("the backing disk has failed", lambda: setattr(pager, "state", "failed")),
        ("the backing disk is written to again", lambda: setattr(pager, "state", "ok")),
        ("the budget is used up", lambda: pager.counts.update(budget_bytes=SEGMENT_BYTES - 1)),
        ("the budget is there again", lambda: pager.counts.update(budget_bytes=SEGMENT_BYTES)),
        ("2 pages could not be read from the backing disk", lambda: pager.errors.update(disk=6)),
        ("1 pages were corrupt", lambda: pager.errors.update(corrupt=4)),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.run, pager, settings(pressure=0))  # type: ignore[arg-type]
        await trio.sleep(10)
        assert caplog.text == ""
        for text, change in said:
            # The daemon's are new at each look.
            pager.errors = dict(pager.errors)
            change()
            await trio.sleep(10)
            assert caplog.text.count(text) == 1, text
        assert len(caplog.records) == len(said)
        nursery.cancel_scope.cancel()


async def test_without_pressure_stall_information_it_is_said_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policy, "pressure", lambda: None)
    pager = FakePager()
    await run(pager, settings(), 100)
    assert pager.told == []
    assert caplog.text.count("no /proc/pressure/memory") == 1


async def test_pages_that_are_old_are_written_and_marks_left_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pager = FakePager()
    await run(pager, settings(idle_after=400, pressure=0), 250)
    assert pager.told == ["writeback unused 400"] * 2


@pytest.mark.parametrize("why", ["failed", "detaching"])
async def test_nothing_is_written_to_a_failed_disk_nor_while_detaching(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(policy, "pressure", lambda: 100.0)
    monkeypatch.setattr(swapdev, "is_changing", lambda mount_point: why == "detaching")
    pager = FakePager(state="failed" if why == "failed" else "ok")
    await run(pager, settings(idle_after=1), 100)
    assert pager.told == []


async def test_a_refusal_is_said_once_and_busy_never(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policy, "pressure", lambda: 100.0)
    pager = FakePager()
    pager.refuses = errno.EBUSY
    await run(pager, settings(), 20)
    assert len(pager.told) > 10
    assert "refuses" not in caplog.text
    pager.refuses = errno.EIO
    await run(pager, settings(), 20)
    assert caplog.text.count("the pager refuses to write back: refused") == 1


async def test_a_pager_without_a_disk_is_told_nothing(autojump_clock: MockClock) -> None:
    """One that was found: the configuration names a disk by now."""
    pager = FakePager(path=None, state="none")
    policy.start_budget(pager, settings(budget_per_hour="1GiB"), new=False)  # type: ignore[arg-type]
    await run(pager, settings(idle_after=1), 100)
    assert pager.told == []


# The budget


def start_budget(pager: FakePager, *, new: bool, **keys: object) -> None:
    policy.start_budget(pager, settings(**keys), new=new)  # type: ignore[arg-type]


def test_a_new_pager_is_limited_before_it_is_granted_anything() -> None:
    pager = FakePager()
    start_budget(pager, new=True, budget_per_hour="1GiB")
    assert pager.told == ["limit 0", f"grant {GIB}"]
    assert pager.budget
    assert pager.budget.left() == GIB


def test_one_that_was_found_goes_on_with_what_it_has() -> None:
    pager = FakePager()
    start_budget(pager, new=True, budget_per_hour="1GiB")
    pager.told.clear()
    assert pager.unused is not None
    pager.unused -= 4096
    start_budget(pager, new=False, budget_per_hour="1GiB")
    assert pager.told == []
    assert pager.budget
    assert pager.budget.left() == GIB - 4096


def test_a_budget_that_is_lowered_is_taken_back() -> None:
    pager = FakePager()
    start_budget(pager, new=True, budget_per_hour="1GiB")
    pager.told.clear()
    start_budget(pager, new=False, budget_per_hour="256MiB")
    assert pager.told == ["limit 0"]
    start_budget(pager, new=False)
    assert pager.told == ["limit 0", "limit None"]


def test_without_its_state_nothing_starts(state_directory: Path) -> None:
    state_directory.write_text("in the way")
    with pytest.raises(DaemonError, match="cannot be kept") as caught:
        start_budget(FakePager(), new=True, budget_per_hour="1GiB")
    assert str(state_directory) in caught.value.hint


async def test_a_new_hour_is_granted_when_it_comes(
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    state_directory: Path,
) -> None:
    now = 490_000 * 3600.0
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr(wear.Budget.__init__, "__defaults__", (lambda: now,))
    budget = settings(budget_per_hour="1GiB", pressure=0)
    pager = FakePager()
    start_budget(pager, new=True, budget_per_hour="1GiB")
    pager.unused = 0
    await run(pager, budget, 10)
    assert pager.told == ["limit 0", f"grant {GIB}"]

    # No grant that is not on the disk.
    moved = state_directory.rename(state_directory.with_name("moved"))
    state_directory.write_text("in the way")
    now += 3600
    await run(pager, budget, 10)
    assert len(pager.told) == 2
    assert caplog.text.count("its budget cannot be counted") == 1
    state_directory.unlink()
    moved.rename(state_directory)
    await run(pager, budget, 10)
    assert pager.told[2:] == [f"grant {GIB}"]


def test_what_a_pager_has_left_in_the_end_is_not_lost(state_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    pager = FakePager()
    start_budget(pager, new=True, budget_per_hour="1GiB")
    pager.unused = GIB - 4096
    policy.end_budget(pager)  # type: ignore[arg-type]
    start_budget(FakePager(), new=True)
    policy.end_budget(FakePager())  # type: ignore[arg-type]
    again = FakePager()
    start_budget(again, new=True, budget_per_hour="1GiB")
    assert again.told == ["limit 0", f"grant {GIB - 4096}"]
    state_directory.rename(state_directory.with_name("moved"))
    state_directory.write_text("in the way")
    policy.end_budget(again)  # type: ignore[arg-type]
    assert "counts as written" in caplog.text
