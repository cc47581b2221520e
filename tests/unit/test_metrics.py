"""The metrics: named as Prometheus wants them, and saying what the engine's statistics say."""

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon import DEADLINE_SECONDS, HOST, free_port
from tests.machine import lacks
from tests.pages import PAGE, noise
from tests.writeback import COUNTS, writeback
from zswapd import metrics
from zswapd.engine import EmbeddedEngine, EngineStats
from zswapd.errors import DaemonError
from zswapd.health import Health
from zswapd.swapdev import Attachment

# https://prometheus.io/docs/practices/naming: base units, and no other.
OTHER_UNITS = re.compile(r"_(ms|us|ns|milliseconds|microseconds|kb|kib|mb|mib|percent|pages_bytes)(_|$)")


@pytest.fixture
def engine() -> EmbeddedEngine:
    """One that has seen a little of everything."""
    engine = EmbeddedEngine(
        size_bytes=64 * PAGE, allocator="zsmalloc", mem_limit=40 * PAGE, algorithm="lz4", zstd_level=3
    )
    engine.write(0, b"text " * PAGE)  # lz4, two pages and a part
    engine.set_compression("zstd", 3)
    engine.write(8 * PAGE, (b"more text " * PAGE)[:PAGE])
    engine.write(9 * PAGE, b"\xaa" * PAGE)
    engine.write(10 * PAGE, noise(1))
    engine.read(0, 3 * PAGE)
    for page in range(16, 64):
        try:
            engine.write(page * PAGE, noise(page))
        except OSError:
            break
    else:
        pytest.fail("the pool did not fill up")
    with pytest.raises(OSError, match="lost"):
        engine.read(page * PAGE, PAGE)
    with pytest.raises(OSError, match="outside"):
        engine.write(64 * PAGE, b"x")
    engine.discard(8 * PAGE, PAGE)
    return engine


def scrape(engine: EmbeddedEngine) -> str:
    registry = CollectorRegistry()
    registry.register(metrics.EngineCollector(engine))
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and label values."""
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_follow_the_conventions(engine: EmbeddedEngine) -> None:
    text = scrape(engine)
    families = list(text_string_to_metric_families(text))
    assert len(families) > 15
    for family in families:
        assert re.fullmatch(r"zswapd(_[a-z]+)+", family.name)
        assert family.documentation.endswith("."), family.name
        assert not OTHER_UNITS.search(family.name)
        assert family.samples, family.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        elif family.type == "histogram":
            assert family.name.endswith("_seconds")
        else:
            assert family.type == "gauge"
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
    assert len({family.name for family in families}) == len(families)


def test_values_are_those_of_the_statistics(engine: EmbeddedEngine) -> None:
    # Two readings of an engine that stands still. Not one number is zero by default.
    stats, values = engine.stats(), samples(scrape(engine))
    for key in ("swap_size", "original", "compressed", "pool", "pool_peak", "pool_reserve", "pool_limit", "metadata"):
        assert values[f"zswapd_{key}_bytes", ""] == stats[f"{key}_bytes"]  # type: ignore[literal-required]
    for key in ("loads", "stores", "discards"):
        assert values[f"zswapd_{key}_total", ""] == stats[key] > 0  # type: ignore[literal-required]
    assert {kind: values["zswapd_pages", kind] for kind in stats["pages"]} == stats["pages"]
    kinds = {"lz4", "zstd", "zstd_dictionary", "same_filled", "incompressible", "duplicate", "on_disk", "lost"}
    assert set(stats["pages"]) == kinds
    for name, counts in (("rejected_stores", stats["rejected_stores"]), ("load_errors", stats["errors"])):
        assert {reason: values[f"zswapd_{name}_total", reason] for reason in counts} == counts
    assert stats["rejected_stores"] == {"pool_full": 1, "no_memory": 0, "out_of_range": 1, "no_writeback": 0}
    assert stats["errors"] == {"lost": 1, "corrupt": 0, "disk": 0}
    assert values["zswapd_compression_info", "zstd,3"] == 1
    assert values["zswapd_pool_info", "zsmalloc"] == 1
    assert sum(value for (name, _), value in values.items() if name == "zswapd_class_objects") == sum(
        stats["pages"][kind] for kind in ("lz4", "zstd", "incompressible")
    )
    by_size = {size: value for (name, size), value in values.items() if name == "zswapd_class_zspages"}
    by_fullness = [value for (name, _), value in values.items() if name == "zswapd_zspages"]
    assert sum(by_fullness) == sum(by_size.values()) > 0
    in_use = sum(entry["objects"] * entry["size_bytes"] for entry in stats["classes"])
    waste = sum(value for (name, _), value in values.items() if name == "zswapd_class_waste_bytes")
    assert waste == values["zswapd_pool_waste_bytes", ""] == stats["pool_bytes"] - in_use


def test_z3fold_has_no_size_classes() -> None:
    engine = EmbeddedEngine(
        size_bytes=64 * PAGE, allocator="z3fold", mem_limit=40 * PAGE, algorithm="lz4", zstd_level=3
    )
    engine.write(0, noise(1))
    values = samples(scrape(engine))
    assert values["zswapd_pool_bytes", ""] == 2 * PAGE
    assert not any(name.startswith(("zswapd_class_", "zswapd_zspages", "zswapd_pool_waste")) for name, _ in values)


@pytest.mark.parametrize("what", ["load", "store"])
def test_histograms_are_cumulative_and_complete(engine: EmbeddedEngine, what: str) -> None:
    stats = engine.stats()
    latency = stats["load_latency"] if what == "load" else stats["store_latency"]
    name = f"zswapd_{what}_duration_seconds"
    family = next(family for family in text_string_to_metric_families(scrape(engine)) if family.name == name)
    buckets = [(sample.labels["le"], sample.value) for sample in family.samples if sample.name == f"{name}_bucket"]
    bounds, counts = [float(bound) for bound, _ in buckets], [count for _, count in buckets]
    assert bounds == [*latency["bounds_seconds"], float("inf")]
    assert bounds == sorted(set(bounds))
    assert counts == [sum(latency["counts"][: position + 1]) for position in range(len(bounds))]
    values = {sample.name: sample.value for sample in family.samples}
    assert counts[-1] == values[f"{name}_count"] == stats["loads" if what == "load" else "stores"] > 0
    assert values[f"{name}_sum"] == latency["sum_seconds"] > 0


def get(url: str) -> str:
    text: bytes = urllib.request.urlopen(url, timeout=DEADLINE_SECONDS).read()
    return text.decode()


@pytest.mark.parametrize("host", [HOST, "::1"], ids=["IPv4", "IPv6"])
def test_served_until_the_block_ends(engine: EmbeddedEngine, host: str) -> None:
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        lacks("IPv6")
    port = free_port()
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    with metrics.served(engine, (host, port)):
        values = samples(get(url))
        assert values["zswapd_stores_total", ""] == engine.stats()["stores"]
        assert values["process_resident_memory_bytes", ""] > 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(url)


def test_none_serves_nothing(engine: EmbeddedEngine) -> None:
    with metrics.served(engine, None):
        pass


def test_a_port_in_use_is_named(engine: EmbeddedEngine) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        message = f"{HOST}:{port}: Address already in use"
        with (
            pytest.raises(DaemonError, match=message) as caught,
            metrics.served(engine, (HOST, port)),
        ):
            pytest.fail("served")
        assert "metrics.listen" in caught.value.hint


def test_the_backing_disk(engine: EmbeddedEngine) -> None:
    class WithDisk(EmbeddedEngine):
        def stats(self) -> EngineStats:
            numbers = {name: number for number, name in enumerate(sorted(COUNTS), 1) if COUNTS[name] == 0}
            return {**super().stats(), "writeback": writeback(**numbers, **disk)}

    disk: dict[str, object] = {"state": "ok", "budget_bytes": None}
    engine.__class__ = WithDisk
    stats, values = engine.stats()["writeback"], samples(scrape(engine))
    for name, key in {
        "backing_bytes": "backing_bytes",
        "backing_free_bytes": "backing_free_bytes",
        "backing_live_bytes": "live_bytes",
        "clustered_pages": "pages_in_clusters",
        "idle_pages": "idle_pages",
        "writebacks_in_flight": "writebacks_in_flight",
        "cleanings_in_flight": "cleanings_in_flight",
        "written_back_pages_total": "pages_written",
        "writeback_bytes_total": "written_bytes",
        "cleaning_bytes_total": "cleaning_bytes",
        "cleaned_segments_total": "cleaned_segments",
        "disk_reads_total": "reads",
        "disk_read_bytes_total": "read_bytes",
        "cluster_cpu_seconds_total": "cluster_seconds",
        "promoted_pages_total": "pages_promoted",
        "writeback_errors_total": "write_errors",
        "waiting_stores_total": "stores_waited",
    }.items():
        assert values[f"zswapd_{name}", ""] == stats[key] > 0, name  # type: ignore[literal-required]
    assert values["zswapd_backing_failed", ""] == 0
    assert ("zswapd_writeback_budget_bytes", "") not in values
    disk |= {"state": "failed", "budget_bytes": 7}
    values = samples(scrape(engine))
    assert values["zswapd_backing_failed", ""] == 1
    assert values["zswapd_writeback_budget_bytes", ""] == 7


def test_the_health_of_the_pager_is_told_by_its_conventions() -> None:
    """As the engine's counters are."""

    async def collect() -> str:
        health = Health({"keeper": 40, "standby": 0, "resend": 1, "protected": 1, "footprint": 4096})
        health.probes, health.probe_failures, health.probe_seconds = 5, 2, 0.25
        health.page_waits_since = trio.current_time() - 30
        registry = CollectorRegistry()
        registry.register(health)
        # From another thread, as scrapes come.
        text: str = (await trio.to_thread.run_sync(generate_latest, registry)).decode()
        return text

    text = trio.run(collect)
    values = {name: value for (name, _), value in samples(text).items()}
    assert 30 <= values.pop("zswapd_page_stuck_seconds") < 30 + DEADLINE_SECONDS
    assert values == {
        "zswapd_keeper_up": 1,
        "zswapd_standby_up": 0,
        "zswapd_resend": 1,
        "zswapd_protected": 1,
        "zswapd_footprint_bytes": 4096,
        "zswapd_probe_seconds": 0.25,
        "zswapd_backing_stuck_seconds": 0,
        "zswapd_probes_total": 5,
        "zswapd_probe_failures_total": 2,
    }
    for family in text_string_to_metric_families(text):
        assert re.fullmatch(r"zswapd(_[a-z]+)+", family.name)
        assert family.documentation.endswith(".")


@pytest.mark.parametrize(
    ("attached", "expected"),
    [
        (None, (0, 0)),
        # Half attached.
        (Attachment("/dev/loop9", False, True, 1 << 20, 0, 0), (0, 0)),
        (Attachment("/dev/loop9", True, True, 1 << 20, 8192, 100), (1, 8192)),
    ],
)
def test_the_swap_as_the_kernel_sees_it(attached: Attachment | None, expected: tuple[int, int]) -> None:
    registry = CollectorRegistry()
    registry.register(metrics.SwapCollector(lambda: attached))
    values = samples(generate_latest(registry).decode())
    assert values == {
        ("zswapd_swap_attached", ""): expected[0],
        ("zswapd_swap_used_bytes", ""): expected[1],
    }
