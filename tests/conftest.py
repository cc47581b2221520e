"""Daemons to test with, and the rule for tests that this machine cannot run.

Such a test calls lacks(). With CI set, any other skip is a failure.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.daemon import Daemon
from tests.machine import LACKS, lacks
from zswapd.bench.ability import cannot_swap

# Nothing is timed: machines are slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("CI") and LACKS not in report.longreprtext:
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def _fuse() -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        lacks(f"/dev/fuse: {error.strerror}")
    if os.geteuid() != 0 and not shutil.which("fusermount3"):
        lacks("root, or fusermount3")


@pytest.fixture(scope="session")
def _swap() -> None:
    if reason := cannot_swap():
        lacks(reason)


@pytest.fixture
def make_daemon(_fuse: None, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons, not yet started: make_daemon(swap__size="1MiB")."""
    daemons: list[Daemon] = []

    def make(**settings: object) -> Daemon:
        daemons.append(Daemon(tmp_path, **settings))
        return daemons[-1]

    yield make
    for daemon in daemons:
        daemon.destroy()


@pytest.fixture(scope="session", params=["pager", "pyfuse3"])
def data_path(request: pytest.FixtureRequest) -> str:
    """Both ways that pages can take: what is true of the swap file is true on both."""
    path: str = request.param
    if path == "pager" and os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    return path


@pytest.fixture(scope="module")
def daemon(_fuse: None, data_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One running daemon for the tests of a module; each of them begins by emptying it."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), swap__data_path=data_path)
    try:
        yield daemon.start()
    finally:
        daemon.destroy()


@pytest.fixture
def swapfile(daemon: Daemon) -> Iterator[int]:
    """The swap file of `daemon`, empty, opened; settings as at the start."""
    daemon.reset()
    daemon.write("mem_limit", "1G")
    daemon.write("comp_algorithm", "lz4")
    with daemon.opened() as fd:
        yield fd
