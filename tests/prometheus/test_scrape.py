"""What Prometheus has of a daemon that swaps and writes back: every series, and an answer to every panel's question."""

import json
import math
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.metrics_core import Metric

from tests.daemon import Daemon, wait_until
from tests.prometheus.server import CONFIG, ROOT, RULES, Prometheus, alert_names, listen, promtool
from tests.swap.backing import DISK_BYTES, POOL_BYTES, touching
from zswapd.engine import EmbeddedEngine
from zswapd.health import Health
from zswapd.metrics import EngineCollector, SwapCollector

DASHBOARD = json.loads((ROOT / "config/grafana/zswapd.json").read_text())
#: What a Prometheus is asked for in the place of Grafana's variables.
VARIABLES = {"$__rate_interval": "5m", "$__interval": "5m", "$__range": "5m", "$job": "zswapd", "$instance": "well"}


@pytest.fixture(scope="module")
def daemon(
    _swap: None, prometheus: Prometheus, directory: Path, corpus: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """One that is well: its workload has pages in memory, in the pool and on the disk, and has read them."""
    daemon = Daemon(
        tmp_path_factory.mktemp("daemon"),
        swap__size="64MiB",
        swap__priority=32767,
        pool__mem_limit=POOL_BYTES,
        writeback__backing=str(directory / "disk"),
        writeback__size=DISK_BYTES,
        writeback__budget_per_hour="10GiB",
        metrics__listen=listen("well"),
    )
    try:
        assert daemon.start().ctl("attach", "--unsafe").returncode == 0
        prometheus.wait_for("well")
        with touching(daemon, corpus) as workload:
            workload.verify()
            workload.run("rewrite", seed=1)
            workload.run("random", seed=2)
            prometheus.evaluated()
            yield daemon
            workload.verify()
    finally:
        daemon.destroy()


def test_the_target_is_up_and_its_metrics_follow_the_conventions(prometheus: Prometheus, daemon: Daemon) -> None:
    assert prometheus.value('up{job="zswapd", instance="well"}') == 1
    with urllib.request.urlopen(f"http://{listen('well')}/metrics", timeout=60) as page:
        assert promtool("check", "metrics", stdin=page.read().decode()) == ""


def documented() -> set[str]:
    """The names of all series that zswapd has, as it says itself, and of processes."""

    async def health() -> list[Metric]:
        status = dict.fromkeys(("keeper", "standby", "resend", "protected", "footprint"), 0)
        return list(Health(status).collect())

    engine = EmbeddedEngine(size_bytes=4096, allocator="zsmalloc", mem_limit=4096, algorithm="lz4", zstd_level=3)
    families = [*EngineCollector(engine).collect(), *SwapCollector(lambda: None).collect(), *trio.run(health)]
    process = ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds", "open_fds")
    return {
        *(sample.name for family in families for sample in family.samples),
        # There with a budget.
        "zswapd_writeback_budget_bytes",
        *(f"{prefix}process_{name}" for prefix in ("", "zswapd_pager_") for name in process),
    }


def test_all_series_are_there(prometheus: Prometheus, daemon: Daemon) -> None:
    names, expected = prometheus.names("well"), documented()
    left_out = {name for name in expected if name.startswith("zswapd_class_")}
    assert len(expected) > 70
    assert len(left_out) == 3
    assert expected - names == left_out
    for document in ("README.md", "ARCHITECTURE.md", "MEASURED.md", "CHANGELOG.md"):
        named = re.findall(r"`(zswapd_[a-z_]+)`", (ROOT / document).read_text())
        assert [name for name in named if not any(known.startswith(name) for known in expected)] == [], document


@pytest.mark.parametrize(
    "metric",
    [
        *("stores_total", "loads_total", "written_back_pages_total", "writeback_bytes_total", "disk_reads_total"),
        *("pool_bytes", "pool_waste_bytes", "backing_live_bytes", "writeback_budget_bytes", "swap_used_bytes"),
        *("load_duration_seconds_count", "disk_read_duration_seconds_count", "segment_write_duration_seconds_count"),
        *("probes_total", "standby_up", "keeper_up", "swap_attached", "footprint_bytes"),
        *("pager_process_cpu_seconds_total", "pager_process_resident_memory_bytes"),
    ],
)
def test_what_has_happened_is_counted(prometheus: Prometheus, daemon: Daemon, metric: str) -> None:
    wait_until(lambda: prometheus.value(f'zswapd_{metric}{{instance="well"}}') > 0, metric)


def panels() -> list[dict[str, Any]]:
    """Those that ask something."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


QUERIES = [
    pytest.param(target["expr"], id=f"{panel['id']}{target['refId']}-{panel['title']}")
    for panel in panels()
    for target in panel["targets"]
]


def substituted(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


@pytest.mark.parametrize("query", QUERIES)
def test_every_panel_has_data(prometheus: Prometheus, daemon: Daemon, query: str) -> None:
    values = [value for _, value in prometheus.query(substituted(query))]
    assert values
    assert all(math.isfinite(value) for value in values), values


def test_the_variables_offer_what_is_scraped(prometheus: Prometheus, daemon: Daemon) -> None:
    offered = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert found
            offered[variable["name"]] = {labels[found[2]] for labels, _ in prometheus.query(substituted(found[1]))}
    assert offered == {"job": {"zswapd"}, "instance": {"well"}}


def test_the_dashboard_can_be_provisioned() -> None:
    """As Grafana wants it: nothing names a data source of the author's, and no two panels are in the same place."""
    assert DASHBOARD["uid"] == "zswapd"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [
        (column, line)
        for panel in DASHBOARD["panels"]
        for at in (panel["gridPos"],)
        for column in range(at["x"], at["x"] + at["w"])
        for line in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(column for column, _ in places) < 24
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "heatmap"
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Overview",
        "Pool",
        "Recompression",
        "Page latency",
        "Writeback, disk, wear",
        "Survival",
        "Processes",
    ]


def test_nothing_is_said_of_a_daemon_that_is_well(prometheus: Prometheus, daemon: Daemon) -> None:
    # A scrape may have been late, and there may have been no standby yet.
    wait_until(lambda: not prometheus.alerts("well"), f"{prometheus.alerts('well')} are over")
    wait_until(lambda: not prometheus.alerts(), "it is known that there are targets")


def test_the_configuration_and_the_rules_are_what_promtool_wants() -> None:
    said = promtool("check", "config", CONFIG)
    assert f"{len(alert_names())} rules found" in said
    promtool("check", "rules", RULES)
    promtool("test", "rules", Path(__file__).with_name("rules.test.yml"))
