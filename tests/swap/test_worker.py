"""What a worker of the pager never does between a request and its reply, whatever is swapped: wait for memory.

It takes no page fault, and allocates neither in the process nor, through its system calls, in the kernel.
"""

import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import Daemon, wait_until
from tests.machine import lacks
from tests.pages import PAGE
from tests.swap.workload import LEAST_SWAPPED, swapped
from zswapd.pager import Pager

pytestmark = pytest.mark.usefixtures("_swap")

TRACING = Path("/sys/kernel/tracing")
ALLOCATIONS = ("mm_page_alloc", "kmalloc", "kmem_cache_alloc")
DEBUG_PAGER = Path(__file__).parents[2] / "native/target/debug/zswapd-pager"

MakeDaemon = Callable[..., Daemon]


def workers(daemon: Daemon) -> list[int]:
    """The thread ids of the pager's workers."""
    threads = Path(f"/proc/{daemon.server_pid}/task").iterdir()
    found = [int(thread.name) for thread in threads if (thread / "comm").read_text().startswith("worker-")]
    assert found
    return found


def faults(pid: int, thread: int) -> tuple[int, int]:
    """Minor and major page faults of a thread (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]), int(fields[9])


def load(daemon: Daemon, corpus: int) -> None:
    """All that there is for a worker to do: a growing and a shrinking pool, both codecs, dictionaries, reads,
    overwrites, discards, and requests for zswapd."""
    assert daemon.ctl("attach", "--unsafe").returncode == 0
    with swapped(daemon, corpus) as workload:
        workload.fill()
        filled = daemon.stats()["pool_bytes"]
        assert filled > LEAST_SWAPPED // 4
        workload.verify()
        daemon.write("comp_algorithm", "zstd")
        workload.run("rewrite", seed=1)
        workload.verify()
        stats = daemon.stats()
        assert stats["pages"]["lz4"] > 0
        assert stats["pages"]["zstd"] > 0
        pager = Pager(daemon.mount_point)
        pager.install_dictionary(pager.sample_cold(0, 16))
        pager.recompress("dictionary", tier=2, level=3, age=0)
        assert daemon.stats()["pages"]["zstd_dictionary"] > 0
        workload.verify()
    wait_until(lambda: daemon.stats()["pool_bytes"] < filled // 2, "the pool shrinks after the workload's end")
    assert daemon.stats()["discards"] > 0


@contextmanager
def traced(threads: list[int], events: tuple[str, ...]) -> Iterator[Path]:
    """Traces what these threads do, without what interrupts do on top of them; gives the file of what was found.

    In an instance of its own, which is gone afterwards, as is tracefs if it was not mounted.
    """
    mounted = (TRACING / "instances").exists()
    if not mounted and subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=False).returncode != 0:
        lacks("tracefs, which the kernel traces into")
    instance = TRACING / "instances" / f"zswapd-test-{os.getpid()}"
    try:
        try:
            instance.mkdir()
        except OSError as error:
            lacks(f"an instance of its own in tracefs: {error.strerror}")
        try:
            (instance / "options/stacktrace").write_text("1")
            for event in events:
                is_ours = " || ".join(f"common_pid == {thread}" for thread in threads)
                (instance / "events/kmem" / event / "filter").write_text(f"({is_ours}) && !(common_flags & 0x18)")
                (instance / "events/kmem" / event / "enable").write_text("1")
            yield instance / "trace"
        finally:
            instance.rmdir()
    finally:
        if not mounted:
            subprocess.run(["umount", TRACING], check=True)


def allocate() -> None:
    """Has the kernel allocate a page, and objects of both kinds."""
    with mmap.mmap(-1, PAGE) as memory:
        memory[0] = 1
    for end in os.pipe():
        os.close(end)


def test_a_worker_takes_no_page_fault(make_daemon: MakeDaemon, corpus: int) -> None:
    daemon = make_daemon(swap__size="128MiB", swap__priority=32767).start()
    pid, threads = daemon.server_pid, workers(daemon)
    before = [faults(pid, thread) for thread in threads]
    load(daemon, corpus)
    assert [faults(pid, thread) for thread in threads] == before
    assert daemon.stop() == 0


def test_the_kernel_allocates_nothing_for_a_worker(make_daemon: MakeDaemon, corpus: int) -> None:
    daemon = make_daemon(swap__size="128MiB", swap__priority=32767).start()
    threads = workers(daemon)
    with ThreadPoolExecutor(1) as witness:
        threads.append(witness.submit(threading.get_native_id).result())
        with traced(threads, ALLOCATIONS) as trace:
            load(daemon, corpus)
            witness.submit(allocate).result()
            found = trace.read_text()
    # A thread that does allocate is seen.
    assert all(f" {event}: " in found for event in ALLOCATIONS)
    assert "worker-" not in found, found[found.index("worker-") :][:4000]
    assert daemon.stop() == 0


def test_a_debug_build_does_not_allocate_on_the_path_of_a_page(make_daemon: MakeDaemon, corpus: int) -> None:
    """Nor does it take locks in a wrong order: in debug builds either ends the pager."""
    if not DEBUG_PAGER.exists():
        lacks("the pager's debug build: cargo build --package zswapd-pager, as make test does")
    daemon = make_daemon(swap__size="128MiB", swap__priority=32767)
    daemon.pager = DEBUG_PAGER
    daemon.start()
    pid = daemon.server_pid
    assert Path(f"/proc/{pid}/exe").readlink() == DEBUG_PAGER
    load(daemon, corpus)
    assert daemon.server_pid == pid
    assert daemon.stop() == 0
