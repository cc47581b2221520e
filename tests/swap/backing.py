"""Disks for the tests to write back to, and a pager whose disk has faults."""

import os
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.daemon import HOST, Daemon, wait_until
from tests.machine import lacks
from tests.pages import PAGE
from tests.swap.workload import SURVIVING, Workload, swapped
from zswapd.backing import IN_PLACE, mount_of

#: What a workload touches and may have in memory, a pool of an eighth of it, and a disk with room for the rest of two.
TOUCHED_BYTES = 32 << 20
LIMIT_BYTES = 12 << 20
POOL_BYTES = 4 << 20
DISK_BYTES = 48 << 20
#: When the kernel finds nothing that it can reclaim, it goes on looking.
PATIENCE_SECONDS = 200
#: Forgets nothing about the order of locks and about allocations, and takes --faults.
DEBUG_PAGER = Path(__file__).parents[2] / "native/target/debug/zswapd-pager"


@contextmanager
def touching(daemon: Daemon, corpus: int, limit: int = LIMIT_BYTES) -> Iterator[Workload]:
    """A workload that survives pages that cannot be read, and is killed when it takes too long; see `swapped`."""
    with swapped(daemon, corpus, TOUCHED_BYTES // PAGE, limit, SURVIVING, "swapped") as workload:
        watchdog = threading.Timer(PATIENCE_SECONDS, workload.group.kill)
        watchdog.start()
        try:
            workload.run("fill")
            yield workload
        finally:
            watchdog.cancel()


@contextmanager
def disk_directory() -> Iterator[Path]:
    """A directory on a disk: /tmp may lie in memory."""
    with tempfile.TemporaryDirectory(prefix="zswapd-test-", dir="/var/tmp") as directory:
        fd = os.open(directory, os.O_PATH)
        try:
            kind = mount_of(fd).kind
        finally:
            os.close(fd)
        if kind not in IN_PLACE:
            lacks(f"/var/tmp on one of {', '.join(IN_PLACE)} (it is on {kind})")
        yield Path(directory)


@contextmanager
def loop_device(directory: Path, size: int) -> Iterator[Path]:
    """A block device over a file that is written in full, with direct I/O."""
    file = directory / "block"
    with file.open("wb") as blocks:
        for _ in range(0, size, 1 << 20):
            blocks.write(bytes(1 << 20))
        os.fsync(blocks.fileno())
    command = ["losetup", "--find", "--show", "--direct-io=on", str(file)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def with_faults(daemon: Daemon, faults: str) -> Daemon:
    """The daemon, whose pager will be one that has been told which operations of its disk fail."""
    if not DEBUG_PAGER.exists():
        lacks("the pager's debug build: cargo build --package zswapd-pager, as make test does")
    program = daemon.directory / "faulty-pager"
    program.write_text(f'#!/bin/sh\nexec {DEBUG_PAGER} "$@" --faults {faults}\n')
    program.chmod(0o755)
    daemon.pager = program
    return daemon


def metrics(daemon: Daemon) -> dict[str, float]:
    """What a scrape finds, by series."""
    with urllib.request.urlopen(f"http://{HOST}:{daemon.port}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {series: float(value) for series, value in pairs}


def settled(daemon: Daemon) -> None:
    """Waits until nothing is on its way to the disk."""

    def quiet() -> bool:
        one = daemon.stats()["writeback"]
        time.sleep(0.1)
        other = daemon.stats()["writeback"]
        return bool(one["written_bytes"] == other["written_bytes"] and other["writebacks_in_flight"] == 0)

    wait_until(quiet, "writeback comes to rest")
