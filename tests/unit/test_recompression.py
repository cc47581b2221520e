import errno
import random
from typing import Any

import pytest
import trio

from tests.writeback import RECOMPRESSION, writeback
from zswapd import recompression
from zswapd.config import PAGE_SIZE, Recompression
from zswapd.engine import Recompressed
from zswapd.recompression import Budget, Dictionaries, Policy

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def page(seed: int, like: int = 0) -> bytes:
    """Text of a few words; pages with the same `like` have whole sentences in common."""
    rng, common = random.Random(seed), random.Random(like)
    sentences = ["".join(common.choices("abcdefghijklmnopqrstuvwxyz ", k=60)) for _ in range(200)]
    text = " ".join(rng.choice(sentences) + str(rng.random()) for _ in range(80))
    return text.encode()[:PAGE_SIZE]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("zswapd.recompression.monotonic", lambda: self.now)


class FakePager:
    """Takes 20 ms for each command, has `pages` for a sample, and does not always have a dictionary."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.sample = b""
        self.counts = {**RECOMPRESSION}
        self.cluster_seconds = 0.0
        self.serial = 0
        self.full = False
        self.left = {1: 3, 2: 2}

    def stats(self) -> Any:
        return {"recompression": self.counts, "writeback": writeback(cluster_seconds=self.cluster_seconds)}

    def tick(self) -> None:
        self.asked.append("tick")

    def sample_cold(self, age: int, pages: int) -> bytes:
        self.asked.append(("sample", age))
        return self.sample[: pages * PAGE_SIZE]

    def install_dictionary(self, dictionary: bytes) -> int:
        if self.full:
            raise OSError(errno.EBUSY, "all are needed")
        self.serial += 1
        self.asked.append(("dictionary", len(dictionary)))
        return self.serial

    def recompress(
        self, codec: str, *, tier: int, level: int, age: int, share: bool, microseconds: int
    ) -> Recompressed:
        if codec == "dictionary" and not self.serial:
            raise OSError(errno.ENOENT, "there is no dictionary")
        assert share
        self.asked.append((codec, tier, level, age))
        self.left[tier] -= 1
        ended = "budget" if self.left[tier] else "done"
        if not self.left[tier]:
            self.left[tier] = 2
        return Recompressed(512, 10, 0, 0, 4096, min(microseconds, 20_000), ended)


def test_a_budget_is_a_share_of_time_that_is_not_saved_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget = Budget(2)
    clock.now += 1
    assert budget.left() == pytest.approx(0.02)
    budget.used(0.05)
    assert budget.left() == pytest.approx(-0.03)
    clock.now += 1.5
    assert budget.left() == pytest.approx(0)
    clock.now += 3600
    assert budget.left() == pytest.approx(0.2)


def test_a_budget_is_kept_in_the_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget, used = Budget(5), 0.0
    for n in range(2000):
        clock.now += 0.5
        if (left := budget.left()) > 0:
            # Commands end a page late, and a dictionary takes what it takes.
            seconds = left + 0.0002 + (1.5 if n == 700 else 0)
            budget.used(seconds)
            used += seconds
    assert used == pytest.approx(1000 * 0.05, rel=0.02)


def policy(pager: FakePager, **settings: Any) -> Policy:
    return Policy(pager, Recompression(**settings))  # type: ignore[arg-type]


def test_clusters_on_the_disk_are_paid_from_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pager = Clock(monkeypatch), FakePager()
    pager.cluster_seconds = 1000.0  # of before
    subject = policy(pager, idle_after=60, cold_after=600, cpu_percent=2)

    async def steps() -> None:
        clock.now += 30
        pager.cluster_seconds += 1.5
        await subject.step()
        assert pager.asked == ["tick"]
        clock.now += 30
        await subject.step()
        assert pager.asked == ["tick", "tick"]
        clock.now += 30
        await subject.step()
        assert len(pager.asked) > 3

    trio.run(steps)


def test_each_tick_is_followed_by_both_tiers_the_coldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pager = Clock(monkeypatch), FakePager()
    subject = policy(pager, idle_after=60, cold_after=600, cpu_percent=100)

    async def steps() -> None:
        await subject.step()
        assert pager.asked == []
        clock.now += 30
        for _ in range(8):
            clock.now += 0.5
            await subject.step()

    trio.run(steps)
    cold, idle = ("zstd", 2, 9, 20), ("zstd", 1, 3, 2)
    # A sample that is too small is no reason not to go on.
    assert [asked for asked in pager.asked if asked != ("sample", 20)] == ["tick", cold, cold, idle, idle, idle]


def test_a_dictionary_is_trained_when_there_are_pages_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pager = Clock(monkeypatch), FakePager()
    pager.sample = b"".join(page(seed) for seed in range(recompression.LEAST_PAGES))
    subject = policy(pager, cpu_percent=100)

    async def steps(count: int) -> None:
        for _ in range(count):
            clock.now += 30
            await subject.step()

    trio.run(steps, 1)
    assert pager.serial == 1
    trio.run(steps, 30)
    assert any(asked[0] == "dictionary" and asked[1] == 2 for asked in pager.asked)
    assert pager.serial == 1
    # Later, from other pages.
    pager.sample = b"".join(page(seed, like=1) for seed in range(recompression.LEAST_PAGES))
    pager.counts["pages_recompressed"] = 1_000_000
    trio.run(steps, 3)
    assert pager.serial == 2


def test_what_gains_nothing_is_not_installed() -> None:
    subject, rng = Dictionaries(level=9), random.Random(1)
    assert subject.train(b"".join(rng.randbytes(PAGE_SIZE) for _ in range(200))) is None
    pages = b"".join(page(seed) for seed in range(400))
    assert subject.train(pages) is not None
    assert subject.train(pages) is None


def test_pages_that_need_all_dictionaries_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pager = Clock(monkeypatch), FakePager()
    pager.sample, pager.full = b"".join(page(seed) for seed in range(recompression.LEAST_PAGES)), True
    subject = policy(pager, cpu_percent=100)

    async def steps() -> None:
        for _ in range(3):
            clock.now += 30
            await subject.step()

    trio.run(steps)
    assert pager.serial == 0
    assert any(asked[0] == "zstd" for asked in pager.asked)
