"""zswapctl analyze on pages that are in swap: it leaves them there."""

from collections.abc import Callable

import pytest

from tests.daemon import Daemon
from tests.pages import PAGE
from tests.swap.workload import LEAST_SWAPPED, swapped
from zswapd.analyze.sample import take
from zswapd.analyze.sources import find

pytestmark = pytest.mark.usefixtures("_swap")


def test_what_is_in_swap_is_counted_and_stays_there(attached: Callable[..., Daemon], corpus: int) -> None:
    daemon = attached()
    with swapped(daemon, corpus) as workload:
        workload.fill()
        before = daemon.stats()["loads"]
        source = find("cgroup", str(workload.group.path))
        assert source.swapped * PAGE > LEAST_SWAPPED
        assert 0 < source.pages < workload.pages
        with take(source, workload.pages, 256, 1, lambda what, done, total: None) as sample:
            assert sample.looked_at > source.pages // 2
        assert daemon.stats()["loads"] - before < source.swapped // 100  # the watchdog's, and strangers'
        workload.verify()
    assert daemon.stop() == 0
