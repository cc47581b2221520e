import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import trio

from tests.swaparea import GIB, MOUNT_POINT, OURS, DiskPager, machine, write
from zswapd import commands, detaching, swapdev
from zswapd.detaching import refuse_full
from zswapd.errors import SwapError
from zswapd.memcg import Controller, find_controller, limit_of
from zswapd.swapdev import Attachment


def test_memory_must_take_every_page_back_and_leave_a_margin(tmp_path: Path) -> None:
    enough = (GIB + detaching.MARGIN_BYTES) >> 10
    machine(tmp_path, enough)
    refuse_full(OURS, tmp_path)
    machine(tmp_path, enough - 1)
    with pytest.raises(SwapError, match=r"memory cannot take the pages back: 1.0 GiB in swap") as caught:
        refuse_full(OURS, tmp_path)
    assert "--force" in caught.value.hint


def test_other_swap_counts_but_not_our_own(tmp_path: Path) -> None:
    machine(tmp_path, 1 << 10, "/dev/loop3 partition 4194304 1048576 100\n")
    with pytest.raises(SwapError, match="0 B free in other swap areas"):
        refuse_full(OURS, tmp_path)
    machine(tmp_path, 1 << 10, "/dev/sda2 partition 2097152 1048576 5\n")
    with pytest.raises(SwapError, match=r"1.0 GiB free in other swap areas"):
        refuse_full(OURS, tmp_path)
    machine(tmp_path, 1 << 10, "/dev/sda2 partition 2097152 0 5\n")
    refuse_full(OURS, tmp_path)


def test_empty_swap_needs_no_memory(tmp_path: Path) -> None:
    machine(tmp_path, 1)
    refuse_full(Attachment("/dev/loop3", True, True, GIB, 0, 1), tmp_path)


def v1_group(root: Path, name: str, limit: int, rss: int, shmem: int, swap: int) -> None:
    group = f"sys/fs/cgroup/memory/{name}"
    write(root, f"{group}/memory.limit_in_bytes", f"{limit}\n")
    # The plain fields exclude descendants: they must not be what is read.
    stat = f"rss 1\nshmem 1\nswap 1\ntotal_rss {rss}\ntotal_shmem {shmem}\ntotal_swap {swap}\n"
    write(root, f"{group}/memory.stat", stat)


def v2_group(root: Path, name: str, limit: str, anon: int, shmem: int, swap: int, swapcached: int = 0) -> None:
    group = f"sys/fs/cgroup/{name}"
    write(root, f"{group}/memory.max", f"{limit}\n")
    write(root, f"{group}/memory.swap.current", f"{swap}\n")
    write(root, f"{group}/memory.stat", f"anon {anon}\nfile 5\nshmem {shmem}\nswapcached {swapcached}\n")


def v1_machine(root: Path, swaps: str = "") -> None:
    machine(root, 1 << 30, swaps, "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")


def v2_machine(root: Path, swaps: str = "") -> None:
    machine(root, 1 << 30, swaps, "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    write(root, "sys/fs/cgroup/cgroup.controllers", "cpu memory\n")


def test_the_smallest_limit_above_a_process_counts(tmp_path: Path) -> None:
    machine(tmp_path, 1 << 30, mounts="cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "memory\n")
    write(tmp_path, "proc/7/cgroup", "0::/a/b/c\n")
    v2_group(tmp_path, "a", str(2 << 20), 0, 0, 0)
    v2_group(tmp_path, "a/b", str(3 << 20), 0, 0, 0)
    v2_group(tmp_path, "a/b/c", "max", 0, 0, 0)
    assert limit_of(7, tmp_path) == ("/a", 2 << 20)
    write(tmp_path, "proc/8/cgroup", "0::/\n")
    assert limit_of(8, tmp_path) is None


def test_a_limit_of_the_v1_controller_counts(tmp_path: Path) -> None:
    machine(tmp_path, 1 << 30, mounts="cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")
    write(tmp_path, "proc/7/cgroup", "5:cpu:/other\n4:memory:/box\n0::/\n")
    v1_group(tmp_path, "box", 5 << 20, 0, 0, 0)
    assert limit_of(7, tmp_path) == ("/box", 5 << 20)


def test_a_v1_cgroup_that_would_exceed_its_limit(tmp_path: Path) -> None:
    v1_machine(tmp_path)
    v1_group(tmp_path, "slice/fits", 300 << 20, 100 << 20, 50 << 20, 150 << 20)
    v1_group(tmp_path, "unlimited", 9223372036854771712, 900 << 20, 0, 900 << 20)
    refuse_full(OURS, tmp_path)
    v1_group(tmp_path, "slice/full", 300 << 20, 100 << 20, 50 << 20, 151 << 20)
    with pytest.raises(SwapError, match=r"/slice/full needs 301.0 MiB, its limit is 300.0 MiB\n"):
        refuse_full(OURS, tmp_path)


def test_a_v2_cgroup_that_would_exceed_its_limit(tmp_path: Path) -> None:
    v2_machine(tmp_path)
    v2_group(tmp_path, "unlimited", "max", 900 << 20, 0, 900 << 20)
    v2_group(tmp_path, "cached", str(300 << 20), 200 << 20, 0, 101 << 20, swapcached=1 << 20)
    v2_group(tmp_path, "no-swap", str(300 << 20), 301 << 20, 0, 0)
    refuse_full(OURS, tmp_path)
    v2_group(tmp_path, "app.slice/db", str(300 << 20), 200 << 20, 1 << 20, 100 << 20)
    with pytest.raises(SwapError, match=r"cgroups: /app.slice/db needs 301.0 MiB, its limit is 300.0 MiB\n"):
        refuse_full(OURS, tmp_path)


def test_only_what_is_in_our_swap_comes_back_to_a_cgroup(tmp_path: Path) -> None:
    v2_machine(tmp_path)
    v2_group(tmp_path, "a", str(1 * GIB), GIB // 2, 0, 9 * GIB)
    small = Attachment("/dev/loop3", True, True, GIB, GIB // 2, 100)
    refuse_full(small, tmp_path)
    with pytest.raises(SwapError, match=r"/a needs 1.5 GiB"):
        refuse_full(OURS, tmp_path)


def test_a_full_cgroup_may_use_other_swap(tmp_path: Path) -> None:
    v2_machine(tmp_path, "/dev/sda2 partition 524287 0 5\n")
    v2_group(tmp_path, "a", str(GIB), GIB // 2, 0, GIB)
    with pytest.raises(SwapError, match=r"/a needs 1.5 GiB"):
        refuse_full(OURS, tmp_path)
    v2_machine(tmp_path, "/dev/sda2 partition 524288 0 5\n")
    refuse_full(OURS, tmp_path)


def test_the_controller_is_found_on_a_hybrid_machine(tmp_path: Path) -> None:
    unified = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    write(tmp_path, "proc/self/mounts", unified + "cgroup /sys/fs/cgroup/cpu,memory cgroup rw,cpu,memory 0 0\n")
    write(tmp_path, "sys/fs/cgroup/unified/cgroup.controllers", "pids\n")
    assert find_controller(tmp_path) == Controller(1, tmp_path / "sys/fs/cgroup/cpu,memory")
    write(tmp_path, "proc/self/mounts", unified)
    assert find_controller(tmp_path) is None


async def test_resetting_waits_for_the_swapfile_to_be_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def busy_twice(path: Path, data: bytes) -> None:
        attempts.append((path, data))
        if len(attempts) < 3:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(detaching, "_write", busy_twice)
    await detaching._reset(tmp_path)
    assert attempts == [(tmp_path / "reset", b"1")] * 3

    attempts.clear()
    monkeypatch.setattr(swapdev, "SETTLE_SECONDS", -1)
    with pytest.raises(SwapError, match="the pool was not emptied"):
        await detaching._reset(tmp_path)


async def test_a_pool_that_is_gone_needs_no_reset(tmp_path: Path) -> None:
    await detaching._reset(tmp_path / "gone")


def test_what_is_on_the_disk_must_fit_into_memory_too(tmp_path: Path) -> None:
    """/proc/swaps counts pages, wherever they are, and as they were before they were compressed."""
    machine(tmp_path, (GIB // 2) >> 10)
    with pytest.raises(SwapError, match=r"cannot take the pages back: 1.0 GiB in swap"):
        refuse_full(OURS, tmp_path)


@pytest.fixture(autouse=True)
def page_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not the machine's."""
    file = tmp_path / "page-cluster"
    file.write_text("3\n")
    monkeypatch.setattr(detaching, "PAGE_CLUSTER", file)
    return file


@pytest.mark.parametrize("state", ["none", "ok", "failed"])
async def test_while_pages_come_back_none_goes_from_the_disk_to_the_pool(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    pager = DiskPager(state)
    seen: list[list[bool]] = []
    attached: list[Attachment | None] = [OURS]

    async def swapoff(*command: str, check: bool = True) -> CompletedProcess[bytes]:
        seen.append(list(pager.told))
        attached[0] = None
        return CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: pager)
    monkeypatch.setattr(commands, "run", swapoff)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: attached[0])
    await detaching._swapoff(MOUNT_POINT, OURS.loop_device, lambda remaining: None)
    assert (seen, pager.told) == (([[]], []) if state == "none" else ([[False]], [False, True]))
    assert detaching._remaining(5, pager) == detaching.Remaining(5, 7, 2, 1)  # type: ignore[arg-type]


async def test_a_failed_swapoff_lets_pages_go_to_the_pool_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pager = DiskPager("ok")

    async def swapoff(*command: str, check: bool = True) -> CompletedProcess[bytes]:
        raise SwapError("it cannot be run")

    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: pager)
    monkeypatch.setattr(commands, "run", swapoff)
    with pytest.raises(SwapError, match="cannot be run"):
        await detaching._swapoff(MOUNT_POINT, OURS.loop_device, lambda remaining: None)
    assert pager.told == [False, True]


@pytest.mark.parametrize("kind", ["disk", "corrupt", "lost"])
@pytest.mark.parametrize("force", [False, True])
async def test_a_page_that_cannot_be_read_ends_swapoff_and_is_counted(
    monkeypatch: pytest.MonkeyPatch, kind: str, force: bool
) -> None:
    pager = DiskPager("ok")
    attached: list[Attachment | None] = [OURS]

    async def swapoff(*command: str, check: bool = True) -> CompletedProcess[bytes]:
        pager.errors = {**pager.errors, kind: pager.errors[kind] + 2}
        # As long as nobody ends it.
        with trio.move_on_after(60 if kind != "lost" and not force else 1):
            await trio.sleep_forever()
        attached[0] = None
        return CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: pager)
    monkeypatch.setattr(commands, "run", swapoff)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: attached[0])
    off = detaching._swapoff(MOUNT_POINT, OURS.loop_device, lambda remaining: None, force=force)
    if force or kind == "lost":  # trying again would not bring it back
        assert await off == 2
    else:
        with pytest.raises(SwapError, match=r"at least 2 pages could not be read.*stays in use"):
            await off
    assert pager.told == [False, True]


@pytest.mark.parametrize("reason", ["No such device or address", "Permission denied"])
async def test_a_loop_device_that_somebody_else_detached_is_detached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str
) -> None:
    losetup = tmp_path / "losetup"
    losetup.write_text(f"#!/bin/sh\necho 'losetup: /dev/loop3: detach failed: {reason}' >&2\nexit 1\n")
    losetup.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: None)
    if reason == "Permission denied":
        with pytest.raises(SwapError, match=reason):
            await detaching._free_loop(MOUNT_POINT, "/dev/loop3")
    else:
        await detaching._free_loop(MOUNT_POINT, "/dev/loop3")


async def test_a_detach_that_has_lost_pages_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def nothing(*_: object) -> None:
        pass

    async def dismantled(*_: object, force: bool) -> int:
        return 3

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: OURS)
    monkeypatch.setattr(detaching, "dismantle", dismantled)
    monkeypatch.setattr(detaching, "_reset", nothing)
    with pytest.raises(SwapError, match="detached: /dev/loop3, but at least 3 pages could not be read"):
        await detaching.detach(tmp_path / "mnt", force=True)


@pytest.mark.parametrize("force", [False, True])
async def test_a_disk_that_cannot_be_read_is_found_before_anything_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, force: bool
) -> None:
    pager, begun = DiskPager("ok"), []

    async def dismantled(*_: object, force: bool) -> int:
        begun.append(True)
        return 0

    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: OURS)
    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: pager)
    monkeypatch.setattr(detaching, "refuse_full", lambda attachment: None)
    monkeypatch.setattr(detaching, "dismantle", dismantled)
    monkeypatch.setattr(detaching, "_reset", nothing)
    pager.unreadable = True
    if force:
        await detaching.detach(tmp_path / "mnt", force=True)
    else:
        with pytest.raises(SwapError, match="cannot give its pages back: page 7 cannot be read") as caught:
            await detaching.detach(tmp_path / "mnt")
        assert "--force gives up" in caught.value.hint
    assert begun == [True] * force
    pager.unreadable = False
    await detaching.detach(tmp_path / "mnt", force=force)


@pytest.mark.parametrize(
    ("state", "during", "after"), [("ok", "0", "3"), ("none", "3", "3"), ("ok, and set", "5", "5")]
)
async def test_nothing_is_read_beside_a_page_that_may_not_be_readable(
    monkeypatch: pytest.MonkeyPatch, page_cluster: Path, state: str, during: str, after: str
) -> None:
    """Whatever ends it."""
    seen = []

    async def swapoff(*command: str, check: bool = True) -> CompletedProcess[bytes]:
        if state == "ok, and set":
            page_cluster.write_text("5")
        seen.append(page_cluster.read_text().strip())
        raise SwapError("it cannot be run")

    pager = DiskPager(state)
    pager.on_disk = 0 if state == "none" else 7
    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: pager)
    monkeypatch.setattr(commands, "run", swapoff)
    with pytest.raises(SwapError, match="cannot be run"):
        await detaching._swapoff(MOUNT_POINT, OURS.loop_device, lambda remaining: None)
    assert (seen, page_cluster.read_text().strip()) == ([during], after)


@pytest.mark.parametrize(
    ("status", "said"), [(255, "swapoff: /dev/loop3: swapoff failed: Cannot allocate memory"), (-9, "")]
)
async def test_swapoff_without_memory_leaves_everything_serving(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page_cluster: Path, status: int, said: str
) -> None:
    pager, commands_run = DiskPager("ok"), []

    async def run(*command: str, check: bool = True) -> CompletedProcess[bytes]:
        commands_run.append(command)
        return CompletedProcess(command, status, b"", said.encode())

    async def reset(mount_point: Path) -> None:
        pytest.fail("the pages are still there")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: OURS)
    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: pager)
    monkeypatch.setattr(detaching, "refuse_full", lambda attachment: None)
    monkeypatch.setattr(detaching, "_reset", reset)
    monkeypatch.setattr(commands, "run", run)
    message = r"\(memory cannot take the pages back\); /dev/loop3 stays in use with 1.0 GiB, everything goes on serving"
    with pytest.raises(SwapError, match=message) as caught:
        await detaching.detach(tmp_path / "mnt")
    assert "free memory or add other swap, then detach again" in caught.value.hint
    assert commands_run == [("swapoff", "/dev/loop3")]
    # As before: pages move from the disk to the pool, the kernel reads ahead, and policies decide again.
    assert pager.told == [False, True]
    assert page_cluster.read_text().strip() == "3"
    assert not swapdev.is_changing(tmp_path / "mnt")
