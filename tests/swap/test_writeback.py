"""A pool too small for what is swapped, and a disk beside it: every page comes back, whatever else happens."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from tests.daemon import Daemon, wait_until
from tests.swap.backing import (
    DISK_BYTES,
    LIMIT_BYTES,
    POOL_BYTES,
    TOUCHED_BYTES,
    disk_directory,
    loop_device,
    metrics,
    settled,
    touching,
)
from tests.swap.workload import ENOUGH
from tests.takeover import kill_and_wait
from zswapd.bench.corpus import build
from zswapd.bench.measure import SWAP_SHARE, measure
from zswapd.bench.programs import PAGE
from zswapd.bench.zswapd_device import Zswapd

pytestmark = pytest.mark.usefixtures("_swap")

Attached = Callable[..., Daemon]


@pytest.fixture(params=[("file", DISK_BYTES), ("block", DISK_BYTES)], ids=["file", "block"])
def disk(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """The settings of a backing disk: a file, or a block device."""
    kind, size = request.param
    with disk_directory() as directory:
        if kind == "file":
            yield {"writeback__backing": str(directory / "backing"), "writeback__size": size}
        else:
            with loop_device(directory, size) as device:
                yield {"writeback__backing": str(device)}


@pytest.fixture
def attached(disk: dict[str, object], make_daemon: Callable[..., Daemon]) -> Attached:
    """Starts a daemon whose pool holds an eighth of a workload, and attaches it. The disk outlives it."""

    def start(**settings: object) -> Daemon:
        ours = {"swap__size": "256MiB", "swap__priority": 32767, "pool__mem_limit": POOL_BYTES}
        daemon = make_daemon(**ours | disk | settings).start()
        attach(daemon)
        return daemon

    return start


def attach(daemon: Daemon) -> None:
    result = daemon.ctl("attach", "--unsafe")
    assert result.returncode == 0, result.stderr


def detach(daemon: Daemon) -> None:
    result = daemon.ctl("detach")
    assert result.returncode == 0, result.stderr


def assert_all_well(daemon: Daemon) -> None:
    """Nothing was refused, nothing lost, and the pool is within its limit."""
    stats = daemon.stats()
    assert not any(stats["rejected_stores"].values()), stats["rejected_stores"]
    assert not any(stats["errors"].values()), stats["errors"]
    assert stats["pages"]["lost"] == stats["writeback"]["write_errors"] == 0
    assert stats["writeback"]["state"] == "ok"
    assert stats["pool_bytes"] <= POOL_BYTES
    assert metrics(daemon)["zswapd_backing_failed"] == 0


def test_a_pool_of_an_eighth_of_what_is_touched(attached: Attached, corpus: int) -> None:
    """Random access, overwrites, an exit, swapoff in the middle of it, and all of it again."""
    daemon = attached()
    with touching(daemon, corpus) as workload:
        filled = daemon.stats()
        assert filled["pages"]["on_disk"] * PAGE > POOL_BYTES
        workload.verify()
        workload.run("random", seed=1)
        assert daemon.stats()["writeback"]["reads"] > 0
        with touching(daemon, corpus) as other:
            workload.run("rewrite", seed=2)
            other.run("rewrite", seed=3)
            other.verify()
            both = daemon.stats()["pages"]["on_disk"]
        wait_until(lambda: daemon.stats()["pages"]["on_disk"] < both * 3 // 4, "pages on disk go with their process")
        workload.verify()

        workload.group.set_limit(ENOUGH)
        with ThreadPoolExecutor(1) as beside:
            random = beside.submit(workload.run, "random", seed=4)
            detach(daemon)
            random.result()
        stats = daemon.stats()
        assert sum(stats["pages"].values()) == stats["pool_bytes"] == stats["writeback"]["live_bytes"] == 0
        workload.verify()

        attach(daemon)
        workload.group.set_limit(LIMIT_BYTES)
        workload.run("rewrite", seed=5)
        workload.run("random", seed=6)
        workload.verify()
        assert daemon.stats()["pages"]["on_disk"] > 0
        assert_all_well(daemon)
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


@pytest.mark.parametrize("disk", [("file", 24 << 20), ("block", 24 << 20)], indirect=True, ids=["file", "block"])
def test_a_disk_that_fills_up_with_dead_records_is_cleaned(attached: Attached, corpus: int) -> None:
    # Little swap: else the kernel goes round in it, and most of what is stored is of pages long gone.
    daemon = attached(swap__size=TOUCHED_BYTES + (8 << 20))
    with touching(daemon, corpus) as workload:
        for seed in range(40):
            if daemon.stats()["writeback"]["cleaned_segments"] > 8:
                break
            workload.run("rewrite", seed=seed)
        stats = daemon.stats()["writeback"]
        assert stats["cleaned_segments"] > 8
        assert stats["cleaning_bytes"] > 0
        workload.verify()
        assert_all_well(daemon)
    assert daemon.stop() == 0


def test_cold_pages_share_records(attached: Attached, corpus: int) -> None:
    """By age: neighbours together. Some are overwritten, and the pager is killed while all of that lies on the disk."""
    daemon = attached(pool__mem_limit=64 << 20, writeback__idle_after=1)

    def clusters() -> int:
        return int(daemon.stats()["writeback"]["pages_in_clusters"])

    with touching(daemon, corpus) as workload:
        wait_until(lambda: clusters() > 1000, "neighbours go to the disk together")
        workload.verify()
        workload.run("rewrite", seed=1)
        workload.run("random", seed=2)
        # Not as many: rewritten at random, few groups of slots are whole.
        wait_until(lambda: clusters() > 50, "what is cold again goes there again")
        kill_and_wait(daemon)
        assert clusters() > 0
        workload.verify()
        workload.run("rewrite", seed=3)
        wait_until(lambda: clusters() > 50, "under another pager too")
        workload.group.set_limit(ENOUGH)
        detach(daemon)
        stats = daemon.stats()
        assert sum(stats["pages"].values()) == clusters() == stats["writeback"]["live_bytes"] == 0
        assert not any(stats["errors"].values()), stats["errors"]
        workload.verify()
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


def test_sigterm_brings_back_what_is_on_the_disk(attached: Attached, corpus: int) -> None:
    daemon = attached()
    with touching(daemon, corpus) as workload:
        assert daemon.stats()["pages"]["on_disk"] > 0
        workload.group.set_limit(ENOUGH)
        assert daemon.stop() == 0
        workload.verify()


@pytest.mark.parametrize("encryption", [True, False])
def test_nothing_of_memory_can_be_read_from_the_disk_unless_encryption_is_off(
    attached: Attached, disk: dict[str, object], corpus: int, encryption: bool
) -> None:
    """Pages that do not compress are stored as they are."""
    daemon = attached(writeback__encryption=encryption)
    with touching(daemon, corpus, ENOUGH) as workload:
        workload.page_out()
        settled(daemon)
        assert daemon.stats()["pages"]["on_disk"] > 0
        written = Path(str(disk["writeback__backing"])).read_bytes()
        workload.verify()
    noises = (os.pread(corpus, 64, number * PAGE + 100) for number in range(0, TOUCHED_BYTES // PAGE, 16))
    assert any(noise in written for noise in noises) != encryption


def silent(what: str, done: int, total: int) -> None:
    pass


async def test_the_benchmark_s_disk_holds_what_all_of_its_swap_can(tmp_path: Path) -> None:
    """As it has to when the kernel frees no whole cluster: a refused page may cost the workload its life."""
    swap = Zswapd("zswapd-lz4", tmp_path, SWAP_SHARE * TOUCHED_BYTES, pool=POOL_BYTES)
    with await build(TOUCHED_BYTES // PAGE, 1, silent) as pages:

        def write_all() -> None:
            swapfile = os.open(swap.daemon.mount_point / "swapfile", os.O_WRONLY)
            for n in range(SWAP_SHARE * pages.pages):
                os.pwrite(swapfile, os.pread(pages.fd, PAGE, n % pages.pages * PAGE), n * PAGE)
            os.close(swapfile)

        try:
            await swap.daemon.start()
            await trio.to_thread.run_sync(write_all)
            assert await swap.refused() == 0
        finally:
            await swap.daemon.stop()


async def test_a_run_of_the_benchmark_with_a_bounded_pool(tmp_path: Path) -> None:
    with await build(TOUCHED_BYTES // PAGE, 1, silent) as pages:
        run = await measure("zswapd-lz4", pages, tmp_path, silent, POOL_BYTES)
    assert run["pool_limit_bytes"] == POOL_BYTES
    assert run["working_set_pools"] > 1
    assert run["evicted_bytes"] > 0
    assert 0 < run["disk_written_per_page"] < 1
    assert run["disk_read_bytes"] > 0
    assert 0 < run["swapoff_disk_share"] < 1
    assert run["refused_stores"] == 0
