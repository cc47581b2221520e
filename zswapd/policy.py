"""When pages are written back beyond what a full pool asks for: on memory pressure and by age; and how much may be."""

import errno
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from zswapd import swapdev, wear
from zswapd.config import Writeback, format_size, mem_total
from zswapd.engine import WritebackStats, Written
from zswapd.errors import DaemonError
from zswapd.pager import Pager

log = logging.getLogger(__name__)

T = TypeVar("T")

PRESSURE_SECONDS, BUDGET_SECONDS, WATCH_SECONDS = 1, 2, 2
#: Pressure counts only while less than this share of memory is available: that of a memory cgroup at its limit is in
#: /proc/pressure too.
LOW_SHARE = 4
#: Of the pool, each PRESSURE_SECONDS while there is pressure.
SHRINK_SHARE, SHRINK_LEAST_BYTES = 64, 1 << 20
#: Age is looked at four times in `idle_after`, but within these bounds.
AGE_LEAST_SECONDS, AGE_MOST_SECONDS = 1, 600
#: Reads of the disk that do not count as pages coming back, in PRESSURE_SECONDS.
FEW_READS = 64


def pressure(root: Path = Path("/")) -> float | None:
    """Percentage of the last ten seconds in which some process waited for memory; None: this kernel does not tell."""
    try:
        text = (root / "proc/pressure/memory").read_text()
    except OSError:  # not there, or switched off (psi=0)
        return None
    match = re.search(r"^some avg10=([0-9.]+) ", text, re.MULTILINE)
    return float(match[1]) if match else None


def is_low() -> bool:
    """Whether little memory is available."""
    return swapdev.mem_available() < mem_total() // LOW_SHARE


class Hysteresis:
    """Whether to shrink the pool: from a pressure of `threshold` until it has fallen to half of that.

    Not while pages come back from the disk at half the rate at which they go there or more: those that wait for them
    are pressure too, and there would be more of it.
    """

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        #: Whether there is pressure.
        self.shrinking = False
        self._last: tuple[int, int] | None = None

    def step(self, now: float, stats: WritebackStats) -> bool:
        """The decision for the next PRESSURE_SECONDS."""
        counts = stats["reads"], stats["pages_written"]
        reads, written = (new - old for new, old in zip(counts, self._last or counts, strict=True))
        self._last = counts
        self.shrinking = now >= self._threshold or (self.shrinking and now > self._threshold / 2)
        return self.shrinking and reads <= FEW_READS + written // 2


def start_budget(pager: Pager, settings: Writeback, *, new: bool) -> None:
    """Makes the pager keep to the budget, if there is one, and counts what it has written up to now. `new`: the pager
    was started just now. Raises DaemonError: without its state there is no budget to keep to."""
    # That of a pager that was found may be another than the configured one.
    settings = settings.model_copy(update={"backing": pager.backing()})
    try:
        if not wear.has_budget(settings):
            if settings.backing:
                if (left := pager.unused_budget()) is not None:
                    log.info("no budget is configured: the limit of what may be written, %s, ends", format_size(left))
                pager.limit_writing(None)
            return
        budget = wear.Budget(settings)
        unused = None if new else pager.unused_budget()
        budget.observe(unused)
        if unused is None or budget.is_overdrawn():
            # What of it may have been written meanwhile counts as written.
            pager.limit_writing(0)
            budget.observe(0)
        budget.top_up(pager.grant)
        pager.budget = budget
    except OSError as error:
        hint = f"it is counted in {wear.state_path(settings.backing or Path())}"
        raise DaemonError(f"the wear budget cannot be kept: {error}", hint) from None
    log.info("budget: %s; %s left now", wear.describe(settings), format_size(budget.left()))


def take_over_budget(pager: Pager, settings: Writeback) -> None:
    """For who ends a pager that another zswapd has counted for: `end_budget` then gives back what it has left."""
    settings = settings.model_copy(update={"backing": pager.backing()})
    if wear.has_budget(settings):
        try:
            pager.budget = wear.Budget(settings)
        except OSError as error:
            log.warning("what the pager has left of its budget counts as written: %s", error)


def end_budget(pager: Pager) -> None:
    """For a pager that has ended in good order: what it had left is not lost. Its counters outlive it."""
    if pager.budget:
        try:
            pager.budget.close(pager.unused_budget())
        except OSError as error:
            log.warning("what the pager had left of its budget counts as written: %s", error)


async def run(pager: Pager, settings: Writeback) -> None:
    """Decides until it is cancelled. A command to the pager that is under way then is left to the pager."""
    if pager.backing() is None:
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, pager)
        if pager.budget:
            nursery.start_soon(_keep_to_budget, pager, pager.budget)
        if settings.idle_after:
            nursery.start_soon(_by_age, pager, settings.idle_after)
        if settings.pressure and pressure() is None:
            log.warning("no /proc/pressure/memory: nothing is written back on pressure (boot with psi=1)")
        elif settings.pressure:
            nursery.start_soon(_by_pressure, pager, settings.pressure)


async def _keep_to_budget(pager: Pager, budget: wear.Budget) -> None:
    def step() -> None:
        budget.observe(pager.unused_budget())
        budget.top_up(pager.grant)

    complaint = Complaint()
    while True:
        await trio.sleep(BUDGET_SECONDS)
        try:
            # Not abandoned: what it begins to write to the disk is granted.
            await trio.to_thread.run_sync(step)
        except OSError as error:
            complaint.about(f"nothing more may be written back, its budget cannot be counted: {error}")
        else:
            complaint.over()


async def _watch(pager: Pager) -> None:
    """Says in the log what becomes of the disk: that it has failed, and is well again; what could not be read."""
    stats = pager.stats()
    failed, used_up, errors = False, False, stats["errors"]
    while True:
        disk = stats["writeback"]
        if failed != (failed := disk["state"] == "failed"):
            if failed:
                log.error(
                    "the backing disk has failed, nothing more is written to it: a full pool refuses stores. What is "
                    "there is still read. It is tried every 30 s; zswapctl writeback resume does not wait for that"
                )
            else:
                log.warning("the backing disk is written to again")
        if used_up != (used_up := wear.is_used_up(disk["budget_bytes"])):
            log.warning("the budget is %s", "used up: a full pool refuses stores" if used_up else "there again")
        for kind, what in (("disk", "could not be read from the backing disk"), ("corrupt", "were corrupt")):
            if new := stats["errors"][kind] - errors[kind]:
                log.error("%d pages %s: the processes that needed them got an I/O error", new, what)
        errors = stats["errors"]
        await trio.sleep(WATCH_SECONDS)
        stats = pager.stats()


async def _by_pressure(pager: Pager, threshold: int) -> None:
    hysteresis, complaint = Hysteresis(threshold), Complaint()
    promoting = True
    while True:
        await trio.sleep(PRESSURE_SECONDS)
        stats = pager.stats()
        now = pressure() if is_low() else 0
        shrink = hysteresis.step(now or 0, stats["writeback"])
        shrinking = hysteresis.shrinking and stats["writeback"]["state"] == "ok"
        # What is read from the disk stays there meanwhile: or what leaves the pool would come back to it.
        if promoting == shrinking and not swapdev.is_changing(pager.mount_point):
            promoting = not shrinking
            await _command(partial(pager.promote, promoting), complaint)
        if shrink and _may_write(pager):
            size = max(SHRINK_LEAST_BYTES, stats["pool_bytes"] // SHRINK_SHARE)
            await _command(partial(pager.shrink, size), complaint)


async def _by_age(pager: Pager, seconds: int) -> None:
    complaint = Complaint()
    while True:
        await trio.sleep(min(max(seconds / 4, AGE_LEAST_SECONDS), AGE_MOST_SECONDS))
        if _may_write(pager):
            # Not by marks, which are the operator's.
            written = await _command(lambda: pager.write_back(f"unused {seconds}"), complaint)
            if written and written.pages:
                log.info("written back by age: %d pages, %s", written.pages, format_size(written.bytes))


def _may_write(pager: Pager) -> bool:
    """Not to a disk that has failed; nor while somebody detaches the swap, and all pages come back."""
    return pager.stats()["writeback"]["state"] == "ok" and not swapdev.is_changing(pager.mount_point)


async def _command(command: Callable[[], T], complaint: "Complaint") -> T | None:
    """Waits for the pager. What fails is logged once, until it goes well again; None then."""
    try:
        result = await trio.to_thread.run_sync(command, abandon_on_cancel=True)
    except OSError as error:
        # Busy: an operator's command is under way.
        if error.errno != errno.EBUSY:
            complaint.about(f"the pager refuses to write back: {error.strerror}")
        return None
    if isinstance(result, Written) and result.ended in ("full", "failed"):
        complaint.about(f"writing back ended early, the backing disk: {result.ended}")
    else:
        complaint.over()
    return result


class Complaint:
    """Says a thing once, and again only after it was over."""

    def __init__(self) -> None:
        self._text = ""

    def about(self, text: str) -> None:
        if text != self._text:
            log.warning("%s", text)
        self._text = text

    def over(self) -> None:
        self._text = ""
