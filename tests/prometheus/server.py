"""Debian's Prometheus, with the configuration and the rules that zswapd brings."""

import json
import math
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.daemon import HOST, free_port, wait_until
from tests.debian import unpacked

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config/prometheus/prometheus.yml"
RULES = ROOT / "config/prometheus/zswapd.rules.yml"
#: Who can be scraped. A target that is added later would be found five seconds later.
INSTANCES = ("well", "full", "without a disk", "failing", "small", "hanging", "mortal")
#: Whatever becomes of us, it does not outlive us.
_WITH_US = ("setpriv", "--pdeathsig", "KILL")


def program(name: str) -> Path:
    """prometheus or promtool."""
    return unpacked("prometheus") / "usr/bin" / name


def promtool(*arguments: object, stdin: str | None = None) -> str:
    """Runs it; what it finds fault with fails the test."""
    command = [str(program("promtool")), *map(str, arguments)]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    said: str = result.stdout + result.stderr
    assert result.returncode == 0, said
    return said


def alert_names() -> list[str]:
    return re.findall(r"^ *- alert: (\w+)$", RULES.read_text(), re.MULTILINE)


def listen(instance: str) -> str:
    """For metrics.listen: a port of an address that nobody else has."""
    first, second, rest = HOST.split(".", 2)
    return f"{first}.{int(second) + 128}.{rest}:{9839 + INSTANCES.index(instance)}"


def _once(pattern: str, replacement: str, text: str) -> str:
    text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE | re.DOTALL)
    assert count == 1, pattern
    return text


class Prometheus:
    """Scrapes and evaluates every second. An alert fires a second after its condition has come true, whatever its `for`
    is: what that does, promtool tests (rules.test.yml)."""

    def __init__(self, directory: Path) -> None:
        self._url = f"http://{HOST}:{free_port()}"
        self._directory = directory
        self._tell(INSTANCES)
        rules = re.sub(r"^( +for:) .*$", r"\1 1s", RULES.read_text(), flags=re.MULTILINE)
        (directory / "zswapd.rules.yml").write_text(rules)
        found_in = f"file_sd_configs: [{{files: [{directory}/targets.json], refresh_interval: 1s}}]\n"
        config = _once(r"static_configs:.*?(?=^    \w)", found_in, CONFIG.read_text())
        for name in ("scrape_interval", "evaluation_interval"):
            config = _once(f"{name}: [^\n]*", f"{name}: 1s", config)
        (directory / "prometheus.yml").write_text(config)

    @contextmanager
    def running(self) -> Iterator["Prometheus"]:
        log = self._directory / "log"
        command = [
            *_WITH_US,
            str(program("prometheus")),
            f"--config.file={self._directory}/prometheus.yml",
            f"--storage.tsdb.path={self._directory}/data",
            f"--web.listen-address={self._url.removeprefix('http://')}",
        ]
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            try:
                wait_until(lambda: self._ready() or process.poll() is not None, "Prometheus is ready")
                assert process.poll() is None, log.read_text()
                yield self
            finally:
                process.kill()

    def wait_for(self, instance: str) -> None:
        """Waits until it is scraped."""
        wait_until(lambda: self.value(f'up{{instance="{instance}"}}') == 1, f"{instance} is scraped")

    @contextmanager
    def without_targets(self) -> Iterator[None]:
        self._tell(())
        try:
            yield
        finally:
            self._tell(INSTANCES)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of what it evaluates to now."""
        result = self._get("query", query=expression)["result"]
        return [(entry["metric"], float(entry["value"][1])) for entry in result]

    def value(self, expression: str) -> float:
        """Of one series; NaN if it is not there."""
        values = [value for _, value in self.query(expression)]
        assert len(values) <= 1, (expression, values)
        return values[0] if values else math.nan

    def names(self, instance: str) -> set[str]:
        """Of all metrics that an instance has now."""
        found = self.query(f'group by (__name__) ({{instance="{instance}"}})')
        return {labels["__name__"] for labels, _ in found}

    def alerts(self, instance: str | None = None) -> dict[str, dict[str, Any]]:
        """What is firing or about to, by name; of one instance, or of none."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["labels"].get("instance") == instance}

    def wait_for_alert(self, name: str, instance: str | None = None) -> dict[str, Any]:
        """Waits until it fires."""
        found: dict[str, Any] = {}

        def fires() -> bool:
            found.update(self.alerts(instance).get(name, {}))
            return bool(found.get("state") == "firing")

        try:
            wait_until(fires, f"{name} fires for {instance}")
        except AssertionError as error:
            error.add_note(f"these do: {self.alerts(instance)}; up: {self.query('up')}")
            raise
        return found

    def wait_for_end(self, name: str, instance: str | None = None) -> None:
        """Waits until its condition does not hold any more."""
        wait_until(lambda: name not in self.alerts(instance), f"{name} ends for {instance}")

    def evaluated(self) -> None:
        """Waits until all rules have been evaluated on what was scraped after now."""
        now = time.time()
        wait_until(lambda: self.value('min(timestamp(up{job="zswapd"}))') > now, "everything is scraped")
        # The moment of which it is an evaluation is up to an interval earlier.
        later = time.time() + 1
        wait_until(lambda: self._last_evaluation() > later, "the rules are evaluated")

    def _last_evaluation(self) -> float:
        """Of the rules."""
        (group,) = self._get("rules")["groups"]
        return datetime.fromisoformat(group["lastEvaluation"]).timestamp()

    def _tell(self, instances: Iterable[str]) -> None:
        """Which are targets."""
        targets = [{"targets": [listen(instance)], "labels": {"instance": instance}} for instance in instances]
        new = self._directory / "targets.new"
        new.write_text(json.dumps(targets))
        new.rename(self._directory / "targets.json")

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=60) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            result = json.load(answer)
        assert result["status"] == "success", result
        return result["data"]
