"""Pages that nobody uses are made smaller, by age and within a budget of processor time; with dictionaries, which are
trained from the coldest of them.

There are two tiers. Pages are recompressed with zstd when they are idle; when they are cold, with more effort and the
newest dictionary. Of those that are alike one is kept for all. The pager has the ages and does the work; here is
decided when, and how much at a time.
"""

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, thread_time
from typing import TypeVar

import trio
import zstandard

from zswapd import swapdev
from zswapd.config import PAGE_SIZE, Recompression, format_size
from zswapd.engine import Recompressed
from zswapd.pager import Pager
from zswapd.policy import Complaint

log = logging.getLogger(__name__)

R = TypeVar("R")

#: Between two commands to the pager, which share the budget out.
STEP_SECONDS = 0.5
#: What was not used of the budget is not saved for longer than this.
SAVED_SECONDS = 10
#: A tick is this share of `idle_after`, so that a page counts as idle up to a tick late.
TICKS = 2
TICK_LEAST_SECONDS, MAX_AGE = 1, 63
IDLE_TIER, COLD_TIER = 1, 2

#: Of a dictionary; and how many pages it is trained from, of at least so many.
DICTIONARY_BYTES, SAMPLE_PAGES, LEAST_PAGES = 64 << 10, 2048, 1024
#: A dictionary is installed if it makes what it was not trained from smaller by this share than the last one does.
GAIN = 0.02
#: And a new one is tried when so many times the pages have been recompressed as before the last try.
AGAIN = 2


@dataclass
class Budget:
    """Of processor time: `percent` of one processor. What is used beyond it is waited for."""

    percent: float
    seconds: float = 0.0
    _last: float = field(default_factory=lambda: monotonic())

    def left(self) -> float:
        """Seconds that may be used now."""
        now = monotonic()
        share = self.percent / 100
        self.seconds = min(self.seconds + (now - self._last) * share, SAVED_SECONDS * share)
        self._last = now
        return self.seconds

    def used(self, seconds: float) -> None:
        self.seconds -= seconds


@dataclass
class Dictionaries:
    """When a dictionary is trained, and whether it is any good."""

    level: int
    #: The newest, if this process has made it.
    newest: zstandard.ZstdCompressionDict | None = None
    #: When this many pages have been recompressed, another one is tried.
    next_at: int = 0

    def train(self, pages: bytes) -> bytes | None:
        """A dictionary from half of these pages, if it makes the other half smaller than the newest one does. Takes a
        second or so of processor time, and four times the memory of the pages."""
        samples: list[bytes | bytearray | memoryview] = [
            pages[at : at + PAGE_SIZE] for at in range(0, len(pages), PAGE_SIZE)
        ]
        given, kept = samples[::2], samples[1::2]
        try:
            found = zstandard.train_dictionary(
                DICTIONARY_BYTES, given, k=1024, d=8, f=20, accel=1, steps=1, level=self.level
            )
        except zstandard.ZstdError:  # too few, or too much alike
            return None
        if self._size(kept, found) > self._size(kept, self.newest) * (1 - GAIN):
            return None
        self.newest = found
        return found.as_bytes()

    def _size(
        self, pages: list[bytes | bytearray | memoryview], dictionary: zstandard.ZstdCompressionDict | None
    ) -> int:
        encoder = zstandard.ZstdCompressor(
            level=self.level, dict_data=dictionary, write_dict_id=False, write_content_size=False
        )
        return sum(min(len(encoder.compress(page)), PAGE_SIZE) for page in pages)


async def run(pager: Pager, settings: Recompression) -> None:
    """Decides until it is cancelled. A command to the pager that is under way then is left to the pager."""
    if not settings.cpu_percent:
        return
    policy = Policy(pager, settings)
    complaint = Complaint()
    while True:
        await trio.sleep(STEP_SECONDS)
        # All pages are coming back: what is made smaller now helps nobody.
        if swapdev.is_changing(pager.mount_point):
            continue
        try:
            await policy.step()
        except OSError as error:
            complaint.about(f"the pager does not recompress pages: {error.strerror}")
        else:
            complaint.over()


class Policy:
    """What is done next."""

    def __init__(self, pager: Pager, settings: Recompression) -> None:
        self._pager, self._settings = pager, settings
        self._budget = Budget(settings.cpu_percent)
        self._tick_seconds = max(settings.idle_after / TICKS, TICK_LEAST_SECONDS, settings.cold_after / MAX_AGE)
        self._next_tick = monotonic() + self._tick_seconds
        self._dictionaries = Dictionaries(settings.cold_level)
        #: Processor time for clusters on the backing disk, as it was last counted.
        self._cluster_seconds = pager.stats()["writeback"]["cluster_seconds"]
        #: Tiers that are to be gone through since the last tick, the coldest first.
        self._todo: list[int] = []

    def _age(self, seconds: int) -> int:
        return min(max(round(seconds / self._tick_seconds), 1), MAX_AGE)

    async def step(self) -> None:
        """Ticks, trains or recompresses: as much as the budget has left. Raises OSError."""
        if monotonic() >= self._next_tick:
            self._next_tick = monotonic() + self._tick_seconds
            await _in_thread(self._pager.tick)
            self._todo = [COLD_TIER, IDLE_TIER]
        self._count_clusters()
        left = self._budget.left()
        if not self._todo or left <= 0:
            return
        if self._todo[0] == COLD_TIER and await self._train():
            return
        done = await _in_thread(lambda: self._recompress(self._todo[0], left))
        self._budget.used(done.microseconds / 1e6)
        if done.ended != "budget":
            del self._todo[0]

    def _count_clusters(self) -> None:
        """What writeback by age uses to make cold pages smaller is part of the budget."""
        seconds = self._pager.stats()["writeback"]["cluster_seconds"]
        # Less: that of another pager, whose counters began anew.
        self._budget.used(max(seconds - self._cluster_seconds, 0))
        self._cluster_seconds = seconds

    def _recompress(self, tier: int, seconds: float) -> Recompressed:
        settings, microseconds = self._settings, max(int(seconds * 1e6), 1)
        age, level = settings.cold_after, settings.cold_level
        if tier == IDLE_TIER:
            age, level = settings.idle_after, settings.idle_level

        def recompress(codec: str) -> Recompressed:
            return self._pager.recompress(
                codec,
                tier=tier,
                level=level,
                age=self._age(age),
                share=settings.duplicates,
                microseconds=microseconds,
            )

        if tier == COLD_TIER:
            try:
                return recompress("dictionary")
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
        return recompress("zstd")

    async def _train(self) -> bool:
        """Trains a dictionary, if it is time to. Returns whether it was."""
        if not self._settings.dictionaries:
            return False
        stats = self._pager.stats()
        recompressed = stats["recompression"]["pages_recompressed"]
        if recompressed < self._dictionaries.next_at:
            return False
        pages = await _in_thread(lambda: self._pager.sample_cold(self._age(self._settings.cold_after), SAMPLE_PAGES))
        if len(pages) < LEAST_PAGES * PAGE_SIZE:
            return False
        self._dictionaries.next_at = max(recompressed * AGAIN, LEAST_PAGES * AGAIN)

        def train() -> tuple[bytes | None, float]:
            begun = thread_time()
            return self._dictionaries.train(pages), thread_time() - begun

        found, seconds = await _in_thread(train)
        self._budget.used(seconds)
        if found is not None:
            try:
                serial = await _in_thread(lambda: self._pager.install_dictionary(found))
            except OSError as error:
                # Pages need all that there are: those of the oldest leave it, a tick after the other.
                if error.errno != errno.EBUSY:
                    raise
                return True
            log.info("dictionary %d, of %s, in %.1f s", serial, format_size(len(found)), seconds)
        return True


async def _in_thread(command: Callable[[], R]) -> R:
    return await trio.to_thread.run_sync(command, abandon_on_cancel=True)
