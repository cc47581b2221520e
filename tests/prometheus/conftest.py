"""A Prometheus that runs, and disks for the daemons that it scrapes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import lacks
from tests.prometheus.server import Prometheus
from tests.swap.backing import POOL_BYTES, disk_directory
from tests.swap.conftest import corpus as corpus
from tests.swap.test_survive import _only_ours as _only_ours


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus")).running() as prometheus:
        yield prometheus


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """On a disk; outlives the daemons."""
    with disk_directory() as directory:
        yield directory


@pytest.fixture
def disk(directory: Path) -> Iterator[dict[str, object]]:
    """The settings of a small pool, and a disk that is not much larger."""
    file = directory / "backing"
    yield {"pool__mem_limit": POOL_BYTES, "writeback__backing": str(file), "writeback__size": 16 << 20}
    file.unlink()
