"""The wear budget: never more than it, across restarts and crashes of anything."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd import wear
from zswapd.config import Writeback, load
from zswapd.wear import HOUR_SECONDS, Budget

GIB = 1 << 30
NOON = 490_000 * HOUR_SECONDS


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path / 'state'}:/elsewhere")
    return tmp_path / "state"


class Clock:
    def __init__(self) -> None:
        self.now = float(NOON)

    def __call__(self) -> float:
        return self.now


def settings(hour: int = 0, day: int = 0) -> Writeback:
    keys = {"backing": "/dev/x", "budget_per_hour": hour, "budget_per_day": day}
    return load(None, [f"writeback.{key}={value}" for key, value in keys.items()], {}).writeback


def topped_up(budget: Budget) -> int:
    grants: list[int] = []
    budget.top_up(grants.append)
    return sum(grants)


def test_an_hour_and_a_day(state_directory: Path) -> None:
    clock = Clock()
    budget = Budget(settings(hour=GIB, day=3 * GIB), clock)
    assert budget.left() == GIB
    for hour in range(3):
        assert topped_up(budget) == GIB
        assert topped_up(budget) == 0
        budget.observe(GIB // 4)
        assert budget.left() == GIB // 4
        budget.observe(0)
        assert budget.left() == 0
        assert topped_up(budget) == 0
        clock.now += HOUR_SECONDS
        assert budget.left() == (GIB if hour < 2 else 0)
    clock.now = NOON + 24 * HOUR_SECONDS - 1
    assert budget.left() == 0
    clock.now += 1
    assert topped_up(budget) == GIB
    # What is a day past is not kept.
    assert len(json.loads(next(state_directory.iterdir()).read_text())["hours"]) == 2


def test_all_that_is_left_of_the_hour_is_granted_at_once() -> None:
    """Nothing waits for zswapd then, which may be away."""
    clock = Clock()
    budget = Budget(settings(hour=2 * GIB, day=3 * GIB), clock)
    assert topped_up(budget) == 2 * GIB
    budget.observe(GIB)
    assert topped_up(budget) == 0
    clock.now += HOUR_SECONDS
    assert topped_up(budget) == GIB
    budget.observe(0)
    assert budget.left() == 0


def test_a_grant_is_on_the_disk_before_the_pager_has_it(state_directory: Path) -> None:
    def grant(more: int) -> None:
        [file] = state_directory.iterdir()
        assert json.loads(file.read_text())["granted"] == more == GIB
        raise OSError("the pager is gone")

    budget = Budget(settings(hour=GIB), Clock())
    with pytest.raises(OSError, match="gone"):
        budget.top_up(grant)
    # It may have been told.
    budget.observe(0)
    assert budget.left() == 0


def test_a_pager_that_was_started_anew_has_used_up_what_the_last_one_was_granted() -> None:
    clock = Clock()
    topped_up(Budget(settings(hour=GIB), clock))
    again = Budget(settings(hour=GIB), clock)
    again.observe(None)
    assert again.left() == 0


def test_after_an_end_in_good_order_nothing_is_lost() -> None:
    clock = Clock()
    first = Budget(settings(hour=GIB), clock)
    topped_up(first)
    first.close(GIB - 4096)
    again = Budget(settings(hour=GIB), clock)
    again.observe(None)
    assert again.left() == GIB - 4096


def test_a_daemon_that_was_started_anew_asks_the_pager_what_is_left() -> None:
    clock = Clock()
    topped_up(Budget(settings(hour=GIB), clock))
    again = Budget(settings(hour=GIB), clock)
    again.observe(GIB - 4096)
    assert again.left() == GIB - 4096
    assert topped_up(again) == 0


def test_settings_that_were_lowered_are_overdrawn() -> None:
    clock = Clock()
    topped_up(Budget(settings(hour=GIB), clock))
    again = Budget(settings(hour=GIB // 2), clock)
    again.observe(GIB)
    assert again.is_overdrawn()
    again.observe(0)
    assert not again.is_overdrawn()
    assert again.left() == 0


def test_a_pager_with_more_than_is_known_may_write_all_of_it() -> None:
    """The state file was removed meanwhile."""
    budget = Budget(settings(hour=2 * GIB), Clock())
    budget.observe(GIB)
    assert budget.left() == 2 * GIB
    budget.observe(0)
    assert budget.left() == GIB


DAMAGES = (
    *("", "{", "[]", "{}", "\x00"),
    *('{"hours": {"x": 1}, "granted": 0}', '{"hours": [], "granted": 0}'),
    *('{"hours": {"1": -5}, "granted": 0}', '{"hours": {}, "granted": null}'),
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_the_whole_budget_used_up(
    damage: str, state_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    topped_up(Budget(settings(hour=GIB, day=2 * GIB), clock))
    [file] = state_directory.iterdir()
    file.write_text(damage)
    budget = Budget(settings(hour=GIB, day=2 * GIB), clock)
    assert budget.left() == 0
    assert "is damaged" in caplog.text
    assert str(file) in caplog.text
    clock.now += 23 * HOUR_SECONDS
    assert budget.left() == 0
    clock.now += HOUR_SECONDS
    assert budget.left() == GIB


def test_bytes_that_are_no_text_are_damage_too(state_directory: Path) -> None:
    topped_up(Budget(settings(hour=GIB), Clock()))
    [file] = state_directory.iterdir()
    file.write_bytes(b"\xff\xfe")
    assert Budget(settings(hour=GIB), Clock()).left() == 0


def test_a_clock_that_was_ahead_blocks_for_no_longer_than_a_day() -> None:
    clock = Clock()
    clock.now += 365 * 24 * HOUR_SECONDS
    budget = Budget(settings(hour=GIB), clock)
    topped_up(budget)
    budget.observe(0)
    clock.now = NOON
    budget.observe(0)
    assert budget.left() == 0
    clock.now += HOUR_SECONDS
    assert budget.left() == GIB


def test_a_clock_that_is_behind_at_the_start_forgets_nothing() -> None:
    """As one without a battery is, until NTP has set it."""
    clock = Clock()
    budget = Budget(settings(hour=GIB, day=2 * GIB), clock)
    topped_up(budget)
    budget.close(0)
    right, clock.now = clock.now + HOUR_SECONDS, 1000.0
    budget = Budget(settings(hour=GIB, day=2 * GIB), clock)
    budget.observe(None)
    assert budget.left() == 0
    for _ in range(3):
        budget.close(0)  # writes the state
    clock.now = right
    assert budget.left() == GIB
    assert Budget(settings(hour=GIB, day=2 * GIB), clock).left() == GIB
    topped_up(budget)
    budget.observe(0)
    clock.now += HOUR_SECONDS
    assert budget.left() == 0


def test_a_state_that_cannot_be_written_stays_as_it_was(state_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    budget = Budget(settings(hour=GIB), clock)
    topped_up(budget)
    [file] = state_directory.iterdir()
    before = file.read_text()
    budget.observe(GIB // 4)
    clock.now += HOUR_SECONDS

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        budget.top_up(lambda more: pytest.fail("granted what is not on the disk"))
    assert file.read_text() == before
    monkeypatch.undo()
    monkeypatch.setenv("STATE_DIRECTORY", str(state_directory))
    assert topped_up(budget) == GIB - GIB // 4


def test_each_disk_has_a_file_of_its_own(state_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {wear.state_path(Path(path)) for path in ("/dev/x", "/dev/x-", "/dev-x", "/a%2Fb", "/a/b")}
    assert len(paths) == 5
    assert {path.parent for path in paths} == {state_directory}
    monkeypatch.delenv("STATE_DIRECTORY")
    assert wear.state_path(Path("/dev/x")) == Path("/var/lib/zswapd/wear-%2Fdev%2Fx.json")


class World:
    """A pager that writes, and daemons that come and go. Counts what is really written, by hour."""

    def __init__(self, hour: int, day: int) -> None:
        self.clock, self.wanted = Clock(), settings(hour, day)
        self.written: dict[int, int] = {}
        self.left: int = 0
        self.budget = Budget(self.wanted, self.clock)
        self.budget.observe(None)

    def write(self, size: int) -> None:
        size = min(size, self.left)
        self.left -= size
        hour = int(self.clock.now) // HOUR_SECONDS
        self.written[hour] = self.written.get(hour, 0) + size

    def tick(self, *, told: bool = True, meanwhile: int = 0) -> None:
        def grant(more: int) -> None:
            self.write(meanwhile)
            self.left += more if told else 0

        self.budget.observe(self.left)
        self.budget.top_up(grant)

    def restart_daemon(self) -> None:
        self.budget = Budget(self.wanted, self.clock)

    def end(self) -> None:
        self.budget.close(self.left)
        self.restart_pager()

    def restart_pager(self) -> None:
        self.left = 0
        self.budget = Budget(self.wanted, self.clock)
        self.budget.observe(None)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 3 * GIB)),
            st.tuples(st.sampled_from(["tick", "killed in a tick", "daemon", "pager", "end"]), st.integers(0, GIB)),
            st.tuples(st.just("wait"), st.integers(1, 30 * HOUR_SECONDS)),
        ),
        max_size=40,
    )
)
def test_whatever_happens_a_day_has_no_more_than_its_budget(steps: list[tuple[str, int]]) -> None:
    wear.state_path(Path("/dev/x")).unlink(missing_ok=True)
    world = World(hour=2 * GIB, day=5 * GIB)
    for what, number in steps:
        match what:
            case "write":
                world.write(number)
            case "tick":
                world.tick(meanwhile=number)
            case "killed in a tick":
                world.tick(told=False)
                world.restart_daemon()
            case "daemon":
                world.restart_daemon()
            case "pager":
                world.restart_pager()
            case "end":
                world.end()
            case "wait":
                world.clock.now += number
    for hour in world.written:
        assert sum(count for h, count in world.written.items() if hour - 24 < h <= hour) <= 5 * GIB
        assert world.written[hour] <= 2 * GIB
