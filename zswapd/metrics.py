"""Prometheus metrics over HTTP, read from the engine's counters at each scrape.

Served by prometheus-client's own server, in its own threads: a scrape waits for no page, and no page for a scrape.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from zswapd import __version__
from zswapd.engine import Engine, LatencyStats, RecompressionStats, WritebackStats
from zswapd.errors import DaemonError
from zswapd.swapdev import Attachment

_IDLE_SECONDS = 10


class EngineCollector(Collector):
    """The engine's counters under Prometheus's names and base units."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        build = GaugeMetricFamily("zswapd_build_info", "Version of zswapd; always 1.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        algorithm = GaugeMetricFamily(
            "zswapd_compression_info",
            "What new pages are compressed with; always 1.",
            labels=["algorithm", "zstd_level"],
        )
        algorithm.add_metric([stats["algorithm"], str(stats["zstd_level"])], 1)
        yield algorithm
        allocator = GaugeMetricFamily(
            "zswapd_pool_info", "How the pool lays out objects; always 1.", labels=["allocator"]
        )
        allocator.add_metric([stats["allocator"]], 1)
        yield allocator

        for name, value, text in (
            ("swap_size", stats["swap_size_bytes"], "Size of the swap file."),
            ("original", stats["original_bytes"], "Size of the stored pages before compression."),
            (
                "compressed",
                stats["compressed_bytes"],
                "Size of the stored pages after compression, without headers.",
            ),
            ("pool", stats["pool_bytes"], "Memory that the pool's objects lie on."),
            ("pool_peak", stats["pool_peak_bytes"], "The most memory that the pool's objects ever lay on."),
            (
                "pool_reserve",
                stats["pool_reserve_bytes"],
                "Free memory that the pool keeps for its next objects.",
            ),
            ("pool_limit", stats["pool_limit_bytes"], "Limit of the pool's memory."),
            ("metadata", stats["metadata_bytes"], "Memory for slot words and descriptors beside the pool."),
        ):
            yield GaugeMetricFamily(f"zswapd_{name}_bytes", text, value=value)

        yield _labelled_gauge("zswapd_pages", "Pages by how they are stored.", "kind", stats["pages"])
        yield CounterMetricFamily("zswapd_loads", "Pages read.", value=stats["loads"])
        yield CounterMetricFamily("zswapd_stores", "Pages written.", value=stats["stores"])
        yield CounterMetricFamily("zswapd_discards", "Pages freed by discards.", value=stats["discards"])
        for name, value, text in (
            ("takeovers", stats["takeovers"], "Pagers that have taken over from one that was gone, or was replaced."),
            ("verified_objects", stats["objects_verified"], "Objects that were looked at behind a takeover."),
            ("bad_objects", stats["objects_found_bad"], "Those of them that were not as they were stored: lost."),
        ):
            yield CounterMetricFamily(f"zswapd_{name}", text, value=value)
        yield GaugeMetricFamily(
            "zswapd_takeover_pause_seconds",
            "How long no page was served at the last takeover; 0: there was none.",
            value=stats["takeover_seconds"],
        )
        yield CounterMetricFamily(
            "zswapd_compacted_pages", "Pages of the pool that compaction has freed.", value=stats["pages_compacted"]
        )
        yield GaugeMetricFamily(
            "zswapd_ballast_bytes",
            "Memory that the pager holds for a machine that is out of memory, and stuck; less while it is given.",
            value=stats["ballast_bytes"],
        )
        yield GaugeMetricFamily(
            "zswapd_page_operations",
            "Requests on the swap file that the pager is at, and that the end of paging waits for.",
            value=stats["page_operations"],
        )
        yield GaugeMetricFamily(
            "zswapd_movers_awaited",
            "Threads that move objects, and that the end of the pool waits for.",
            value=stats["movers_awaited"],
        )
        for name, text, counts in (
            (
                "zswapd_rejected_stores",
                "Pages whose write was refused: the pool is full, the system has no memory, it is outside of the swap, "
                "or the pool is full and nothing can be written back.",
                stats["rejected_stores"],
            ),
            (
                "zswapd_load_errors",
                "Reads of pages that failed: it was refused or lost before, it is not as it was stored, or the backing "
                "disk could not read it.",
                stats["errors"],
            ),
        ):
            family = CounterMetricFamily(name, text, labels=["reason"])
            for reason, count in counts.items():
                family.add_metric([reason], count)
            yield family

        yield _histogram("zswapd_load_duration_seconds", "Time to read one page.", stats["load_latency"])
        yield _histogram("zswapd_store_duration_seconds", "Time to write one page.", stats["store_latency"])
        yield _histogram(
            "zswapd_mover_wait_seconds",
            "How long reads have waited for an object that was being moved; only those that had to.",
            stats["mover_waits"],
        )

        yield from _recompression(stats["recompression"])
        yield from _writeback(stats["writeback"])

        classes = {str(entry["size_bytes"]): entry for entry in stats["classes"]}
        for name, text, values in (
            (
                "zswapd_class_objects",
                "Objects in use by size class.",
                {k: v["objects"] for k, v in classes.items()},
            ),
            ("zswapd_class_zspages", "Zspages by size class.", {k: v["zspages"] for k, v in classes.items()}),
            (
                "zswapd_class_waste_bytes",
                "Memory of zspages beyond their objects in use, by size class.",
                {k: v["waste_bytes"] for k, v in classes.items()},
            ),
        ):
            yield _labelled_gauge(name, text, "size_bytes", values)
        if classes:
            waste = sum(entry["waste_bytes"] for entry in stats["classes"])
            text = "Memory of the pool's zspages beyond their objects in use."
            yield GaugeMetricFamily("zswapd_pool_waste_bytes", text, value=waste)
        # By fullness and class there would be some two thousand series: `zswapctl status --classes` has them.
        groups = zip(*(entry["zspages_by_fullness"][1:] for entry in stats["classes"]), strict=True)
        bounds = [*(f"{tenths / 10}" for tenths in range(1, 11)), "full"]
        yield _labelled_gauge(
            "zswapd_zspages",
            "Zspages by the share of their objects that is in use: below this, or full.",
            "fullness",
            # No allocator but zsmalloc has any.
            dict(zip(bounds if stats["classes"] else (), map(sum, groups), strict=True)),
        )


class SwapCollector(Collector):
    """What the kernel says of the swap, as `look` finds it at each scrape: nobody waits for a page for that."""

    def __init__(self, look: Callable[[], Attachment | None]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        attached = self._look()
        used = attached.used_bytes if attached else 0
        in_use = attached is not None and attached.is_swap
        yield GaugeMetricFamily("zswapd_swap_attached", "1: the kernel swaps to it.", value=in_use)
        yield GaugeMetricFamily("zswapd_swap_used_bytes", "What the kernel has in use of the swap.", value=used)


def process(pid: Callable[[], int]) -> Collector:
    """Processor time, memory and descriptors of the pager that `pid` names at each scrape."""
    return ProcessCollector(namespace="zswapd_pager", pid=pid, registry=None)


def _recompression(stats: RecompressionStats) -> Iterable[Metric]:
    text = "Size of the pool's pages after compression, without headers, by how they are stored."
    yield _labelled_gauge("zswapd_stored_bytes", text, "kind", stats["bytes"])
    for name, text, values in (
        (
            "bytes",
            "Size of a dictionary, by its serial number.",
            {str(d["serial"]): d["bytes"] for d in stats["dictionaries"]},
        ),
        (
            "pages",
            "Pages that need a dictionary to be read, by its serial number.",
            {str(d["serial"]): d["pages"] for d in stats["dictionaries"]},
        ),
    ):
        if values:
            yield _labelled_gauge(f"zswapd_dictionary_{name}", text, "serial", values)
    for name, value, text in (
        (
            "dictionary_memory_bytes",
            stats["dictionary_bytes"],
            "Memory of all dictionaries, and to decompress with them.",
        ),
        ("encoder_memory_bytes", stats["encoder_bytes"], "Memory to compress with the newest dictionary."),
        ("sharing_pages", stats["pages_shared"], "Pages that are like others, and share one that is stored."),
        ("shared_pages", stats["shared_pages"], "Pages that are stored once for several."),
        ("duplicates_index_bytes", stats["index_bytes"], "Memory to find pages that are alike."),
        ("recompressions_in_flight", stats["in_flight"], "Commands to recompress pages that are under way."),
    ):
        yield GaugeMetricFamily(f"zswapd_{name}", text, value=value)
    for name, count, text in (
        ("recompressed_pages", stats["pages_recompressed"], "Pages that were recompressed."),
        ("deduplicated_pages", stats["pages_deduplicated"], "Pages that were found to be like another one."),
        (
            "not_smaller_pages",
            stats["pages_not_smaller"],
            "Pages that were to be recompressed, and would not get smaller.",
        ),
        ("recompression_saved_bytes", stats["saved_bytes"], "Memory of the pool that recompressing has saved."),
        ("recompression_cpu_seconds", stats["processor_seconds"], "Processor time that it took."),
    ):
        yield CounterMetricFamily(f"zswapd_{name}", text, value=count)


def _writeback(stats: WritebackStats) -> Iterable[Metric]:
    # To alert on.
    yield GaugeMetricFamily(
        "zswapd_backing_failed",
        "1: the backing disk has failed, and nothing is written back.",
        value=stats["state"] == "failed",
    )
    for name, value, text in (
        ("backing", stats["backing_bytes"], "Size of the backing disk; 0: there is none."),
        ("backing_free", stats["backing_free_bytes"], "Room of the backing disk's segments that hold nothing."),
        ("backing_live", stats["live_bytes"], "Room of the stored pages on the backing disk."),
    ):
        yield GaugeMetricFamily(f"zswapd_{name}_bytes", text, value=value)
    if (left := stats["budget_bytes"]) is not None:
        text = "What the wear budget leaves to be written; not there without a budget."
        yield GaugeMetricFamily("zswapd_writeback_budget_bytes", text, value=left)
    for name, value, text in (
        ("clustered_pages", stats["pages_in_clusters"], "Pages on the backing disk that share a record with others."),
        ("idle_pages", stats["idle_pages"], "Pages of the pool that are marked as idle."),
        ("writebacks_in_flight", stats["writebacks_in_flight"], "Segments that are being written."),
        ("cleanings_in_flight", stats["cleanings_in_flight"], "Segments that are being cleaned."),
    ):
        yield GaugeMetricFamily(f"zswapd_{name}", text, value=value)
    for name, value, text in (
        ("written_back_pages", stats["pages_written"], "Pages moved to the backing disk."),
        ("writeback_bytes", stats["written_bytes"], "Bytes written to the backing disk for that."),
        ("cleaning_bytes", stats["cleaning_bytes"], "Bytes written to the backing disk to clean it."),
        ("cleaned_segments", stats["cleaned_segments"], "Segments that were cleaned."),
        ("disk_reads", stats["reads"], "Pages read from the backing disk."),
        ("disk_read_bytes", stats["read_bytes"], "Bytes read from the backing disk for that."),
        ("promoted_pages", stats["pages_promoted"], "Pages moved back to the pool when they were read."),
        ("writeback_errors", stats["write_errors"], "Segments that the backing disk could not write."),
        ("waiting_stores", stats["stores_waited"], "Writes that waited until pages were written back."),
    ):
        yield CounterMetricFamily(f"zswapd_{name}", text, value=value)
    text = "Processor time that went into records which several pages share."
    yield CounterMetricFamily("zswapd_cluster_cpu_seconds", text, value=stats["cluster_seconds"])
    text = "Time to read one page from the backing disk."
    yield _histogram("zswapd_disk_read_duration_seconds", text, stats["read_latency"])
    text = "Time to write one segment to the backing disk."
    yield _histogram("zswapd_segment_write_duration_seconds", text, stats["write_latency"])


def _labelled_gauge(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _histogram(name: str, text: str, latency: LatencyStats) -> HistogramMetricFamily:
    bounds = [*map(str, latency["bounds_seconds"]), "+Inf"]
    buckets = list(zip(bounds, accumulate(latency["counts"]), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=latency["sum_seconds"])


@contextmanager
def served(engine: Engine, address: tuple[str, int] | None, *more: Collector) -> Iterator[None]:
    """Serves /metrics at `address` (host, port) until the block ends; None serves nothing. `more`: served beside the
    engine's counters. Raises DaemonError."""
    if address is None:
        yield
        return
    registry = CollectorRegistry()
    for collector in (EngineCollector(engine), *more):
        registry.register(collector)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    host, port = address
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        hint = 'choose another with metrics.listen, or "" for no metrics'
        raise DaemonError(f"cannot serve metrics on {host}:{port}: {error.strerror}", hint) from None
    # A connection that asks nothing does not stay.
    server.RequestHandlerClass.timeout = _IDLE_SECONDS  # type: ignore[attr-defined]
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
