"""What zswapd has last seen of the pager that serves it: written by its watchers, read by every scrape."""

from collections.abc import Iterable

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Health(Collector):
    """Each attribute is written by one task, and replaced, not changed: another thread may be reading it."""

    def __init__(self, status: dict[str, int]) -> None:
        #: What the pager last said of itself (Pager.status).
        self.status = status
        #: Of the probes that were answered in time: how many, and how long the last one took.
        self.probes = 0
        self.probe_seconds = 0.0
        #: That were answered late, by an error, by a wrong page, or not yet.
        self.probe_failures = 0
        #: Since when (trio's clock) a page, and the backing disk, has been waited for; None: for nothing.
        self.page_waits_since: float | None = None
        self.disk_waits_since: float | None = None
        #: The clock, as other threads can read it.
        self._clock = trio.lowlevel.current_clock().current_time

    def waited(self, since: float | None) -> float:
        """Seconds from `since` until now; 0 for None. Any thread may ask."""
        return 0.0 if since is None else max(0.0, self._clock() - since)

    def collect(self) -> Iterable[Metric]:
        """For prometheus-client. Waits for nothing."""
        status = self.status
        for name, value, text in (
            ("keeper_up", status["keeper"] > 0, "1: the pager's keeper is there."),
            ("standby_up", status["standby"] > 0, "1: a standby is ready to take over."),
            (
                "resend",
                status["resend"],
                "1: the kernel sends requests again that a killed pager had not answered.",
            ),
            (
                "protected",
                status["protected"],
                "1: the pager may lock its memory, serve reclaim and outlive the OOM killer; 0: it is fit for tests.",
            ),
            ("footprint_bytes", status["footprint"], "Memory of the pager beside the pool and its tables."),
            ("probe_seconds", self.probe_seconds, "How long the last page read as a test took, with its process."),
            (
                "page_stuck_seconds",
                self.waited(self.page_waits_since),
                "For how long a page has not come; 0: they come.",
            ),
            (
                "backing_stuck_seconds",
                self.waited(self.disk_waits_since),
                "For how long the backing disk has completed none of its requests; 0: it does, or has none.",
            ),
        ):
            yield GaugeMetricFamily(f"zswapd_{name}", text, value=float(value))
        for name, value, text in (
            ("probes", self.probes, "Pages that were read as a test, and came in time."),
            ("probe_failures", self.probe_failures, "Those that did not come in time, or not as they were written."),
        ):
            yield CounterMetricFamily(f"zswapd_{name}", text, value=value)
