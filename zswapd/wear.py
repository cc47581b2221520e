"""The wear budget: how much may still be written to the backing disk in this hour, and in this day.

An hour is one of the clock, a day this hour and the 23 before it. The pager is granted all that is left, so that
nothing waits for zswapd before the hour's end, and takes every segment that it writes from that, before it writes it. A
grant is in the state file, on the disk, before the pager has it: after a crash of the pager or the machine, what was
granted counts as written. So no more is ever written than the budget, but less may be.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from zswapd.config import SEGMENT_BYTES, Writeback, format_size

log = logging.getLogger(__name__)

HOUR_SECONDS, DAY_HOURS = 3600, 24


def state_path(backing: Path) -> Path:
    """Where the budget of a backing disk is counted: in systemd's StateDirectory, or /var/lib/zswapd."""
    directory = os.environ.get("STATE_DIRECTORY", "").partition(":")[0] or "/var/lib/zswapd"
    return Path(directory, f"wear-{quote(os.fspath(backing), safe='')}.json")


class Budget:
    """What was written to a backing disk, by hour, and what the pager may still write. Any thread may ask `left`."""

    def __init__(self, settings: Writeback, now: Callable[[], float] = time.time) -> None:
        """Reads the state file. One that is damaged counts as if the whole budget were used up in this hour; one that
        cannot be read raises OSError."""
        assert settings.backing is not None, "a backing disk is configured"
        self._hourly, self._daily = settings.budget_per_hour, settings.budget_per_day
        self._now = now
        self._path = state_path(settings.backing)
        #: Bytes by hours since 1970. Never changed in place: another thread may be reading it.
        self._hours: dict[int, int] = {}
        #: Those that were in the future when they were last looked at, and count as of then.
        self._ahead: dict[int, int] = {}
        #: What the pager has been granted and is not known to have written: all of it may be.
        self._granted = 0
        #: For `observe`, which an operator's limit calls beside who keeps to the budget.
        self._observing = threading.Lock()
        try:
            self._read(self._path.read_text())
        except FileNotFoundError:
            log.info("counting what is written to %s in %s, from 0", settings.backing, self._path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.error(
                "the wear budget's state is damaged, and all of the budget counts as used up (%s); to begin at 0, "
                "remove %s",
                error,
                self._path,
            )
            self._hours, self._ahead, self._granted = {self._hour(): max(self._hourly, self._daily)}, {}, 0

    def left(self) -> int:
        """Bytes that may still be written in this hour, what is granted included. Not below 0."""
        hours, _ = self._day()
        lefts = []
        if self._hourly:
            lefts.append(self._hourly - hours.get(self._hour(), 0))
        if self._daily:
            lefts.append(self._daily - sum(hours.values()))
        return max(0, min(lefts))

    def observe(self, unused: int | None) -> None:
        """Counts what the pager has written: `unused` is what it has left of what it was granted; None: it is a pager
        that was not granted anything, and the one that was is gone."""
        with self._observing:
            (hours, ahead), hour = self._day(), self._hour()
            hours[hour] = hours.get(hour, 0) + max(0, self._granted - (unused or 0))
            self._hours, self._ahead, self._granted = hours, ahead, unused or 0

    def top_up(self, grant: Callable[[int], None]) -> None:
        """Calls `grant`, which tells the pager of more bytes that it may write, if there are any.

        Waits for the disk. Raises OSError: `grant`'s own, when the pager may have been told or not; else nothing was
        granted.
        """
        left = self.left()
        if left > self._granted:
            more = left - self._granted
            self._save(left)
            self._granted = left
            grant(more)

    def close(self, unused: int | None) -> None:
        """Takes back what the pager, which has ended in good order, had left. Waits for the disk. Raises OSError: it
        counts as written then."""
        self.observe(unused)
        self._save(0)

    def is_overdrawn(self) -> bool:
        """Whether more is granted than there is left: the settings are lower than they were."""
        return self._granted > self.left()

    def _save(self, granted: int) -> None:
        """Replaces the state file. Raises OSError: it is as it was."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        hours, ahead = ({str(hour): count for hour, count in counts.items()} for counts in self._day())
        state = {"hours": hours, "ahead": ahead, "granted": granted}
        new = self._path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _read(self, text: str) -> None:
        state = json.loads(text)
        hours, ahead = (
            {int(hour): int(count) for hour, count in counts.items()}
            for counts in (state["hours"], state.get("ahead", {}))
        )
        granted = int(state["granted"])
        if granted < 0 or any(count < 0 for count in (*hours.values(), *ahead.values())):
            raise ValueError("a number is negative")
        self._hours, self._ahead, self._granted = hours, ahead, granted

    def _hour(self) -> int:
        return int(self._now()) // HOUR_SECONDS

    def _day(self) -> tuple[dict[int, int], dict[int, int]]:
        """The hours that count, and those of the future.

        Either the clock was ahead when these were written, or it is behind now. They count as of now, so that they
        block for no longer than a day in the first case; and are kept for the second, until the clock has come to them.
        """
        now = self._hour()
        kept: dict[int, int] = {}
        ahead = {hour: count for hour, count in self._ahead.items() if hour > now}
        reached = {hour: count for hour, count in self._ahead.items() if hour <= now}
        for hours in (self._hours, reached):
            for hour, count in hours.items():
                if hour > now:
                    ahead[hour] = ahead.get(hour, 0) + count
                if hour > now - DAY_HOURS:
                    kept[min(hour, now)] = kept.get(min(hour, now), 0) + count
        return kept, ahead


def has_budget(settings: Writeback) -> bool:
    """Whether anything is to be counted."""
    return settings.backing is not None and bool(settings.budget_per_hour or settings.budget_per_day)


def left_of(settings: Writeback, unused: int | None) -> int | None:
    """What may still be written, as who is not the daemon sees it: from the state file, and what the pager has left.
    None: there is no limit. 0 where the state file cannot be read."""
    if not has_budget(settings):
        return unused
    try:
        budget = Budget(settings)
    except OSError:
        return 0
    budget.observe(unused)
    return budget.left()


def is_used_up(left: int | None) -> bool:
    """Whether there is a budget, of which less is left than a segment: nothing more can be written."""
    return left is not None and left < SEGMENT_BYTES


def describe(settings: Writeback) -> str:
    """The budget for people. Without one in these settings it is somebody else's."""
    limits = ((settings.budget_per_hour, "hour"), (settings.budget_per_day, "day"))
    text = ", ".join(f"{format_size(limit)} per {unit}" for limit, unit in limits if limit)
    return text or "writeback_limit, or another configuration's"
