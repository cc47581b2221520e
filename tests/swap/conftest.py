"""Daemons that are attached, and what to swap."""

import os
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import pytest

from tests.daemon import Daemon
from tests.pages import PAGE, noise, real_pages
from tests.swap.workload import PAGES


@pytest.fixture(scope="module")
def corpus() -> Iterator[int]:
    """A memory file of pages that all differ: real ones that carry their number, some noise, some zeros."""
    fd = os.memfd_create("zswapd-test-corpus")
    with open(fd, "wb", closefd=False) as file:
        for number, page in enumerate(islice(cycle(real_pages()), PAGES)):
            content = noise(number) if number % 16 == 0 else bytes(PAGE) if number % 16 == 1 else page
            file.write(content if number % 16 == 1 else number.to_bytes(8) + content[8:])
    yield fd
    os.close(fd)


@pytest.fixture
def attached(make_daemon: Callable[..., Daemon], data_path: str) -> Callable[..., Daemon]:
    """Starts a daemon and attaches it, from the command line: attached(compression__algorithm="zstd").

    Of the highest priority: the pages go there and nowhere else, whatever swap this machine has.
    """

    def start(**settings: object) -> Daemon:
        daemon = make_daemon(
            **{"swap__data_path": data_path, "swap__size": "128MiB", "swap__priority": 32767} | settings
        ).start()
        result = daemon.ctl("attach", "--unsafe")
        assert result.returncode == 0, result.stderr
        return daemon

    return start
