"""Takeovers: zswapd takes no part in them, and hears of them afterwards."""

import logging

import trio

from zswapd import stuck
from zswapd.health import Health
from zswapd.pager import Pager

log = logging.getLogger(__name__)

#: A tenth of a millisecond of the pager's time each: so late are log and metrics at most.
ASK_SECONDS = 1


async def follow(pager: Pager, health: Health) -> None:
    """Keeps `health.status` up to date, and says in the log what has become of the pager, until it is cancelled."""
    complained = False
    while True:
        await trio.sleep(ASK_SECONDS)
        try:
            # Abandoned on cancellation: the pager may be stopped.
            now = await trio.to_thread.run_sync(pager.status, abandon_on_cancel=True)
        except OSError as error:
            # It hangs, is about to end, or its successor is not there yet.
            if not complained:
                log.warning("the pager does not answer: %s; %s", error.strerror or error, stuck.pages(health.status))
            complained = True
            continue
        complained = False
        if now["takeovers"] != health.status["takeovers"]:
            log.warning(
                "another pager has taken over: pid %d instead of %d, after %.1f ms without (takeover %d)",
                now["pid"],
                health.status["pid"],
                pager.stats()["takeover_seconds"] * 1000,
                now["takeovers"],
            )
        _report(health.status, now)
        health.status = now


def _report(before: dict[str, int], now: dict[str, int]) -> None:
    if before["keeper"] and not now["keeper"]:
        log.error("the keeper of the pager is gone: if the pager goes too, its pages are lost")
    elif now["keeper"] and not before["keeper"]:
        log.info("the pager has a keeper again, pid %d", now["keeper"])
    if before["standby"] and not now["standby"]:
        log.warning("there is no standby at the moment: a takeover would have to wait for one")
    elif now["standby"] and now["standby"] != before["standby"]:
        log.info("a standby is ready, pid %d", now["standby"])
