import errno
import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.swaparea import MOUNT_POINT, OURS, DiskPager, write
from zswapd import attaching, blockqueue, commands, detaching, kernel, swapdev
from zswapd.errors import DaemonError, SwapError


def test_attach_refuses_zswap_in_front(tmp_path: Path) -> None:
    kernel.refuse_settings(tmp_path)
    write(tmp_path, "sys/module/zswap/parameters/enabled", "N\n")
    kernel.refuse_settings(tmp_path)
    write(tmp_path, "sys/module/zswap/parameters/enabled", "Y\n")
    with pytest.raises(SwapError, match="twice"):
        kernel.refuse_settings(tmp_path)


@pytest.mark.parametrize("name", ["default_request_timeout", "max_request_timeout"])
def test_attach_refuses_fuse_timeouts(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"proc/sys/fs/fuse/{name}", "0\n")
    kernel.refuse_settings(tmp_path)
    write(tmp_path, f"proc/sys/fs/fuse/{name}", "15\n")
    with pytest.raises(SwapError, match=rf"fs.fuse.{name} = 15.*") as caught:
        kernel.refuse_settings(tmp_path)
    assert f"sysctl -w fs.fuse.{name}=0" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "good", "bad", "remedy"),
    [("watermark_boost_factor", "0", "15000", "=0"), ("min_free_kbytes", "2048", "2047", "=2048")],
)
def test_attach_refuses_what_makes_a_machine_without_memory_hang(
    tmp_path: Path, name: str, good: str, bad: str, remedy: str
) -> None:
    write(tmp_path, "proc/sys/vm/min_free_kbytes", "67584")
    kernel.refuse_what_hangs(tmp_path)
    write(tmp_path, f"proc/sys/vm/{name}", good)
    kernel.refuse_what_hangs(tmp_path)
    write(tmp_path, f"proc/sys/vm/{name}", bad)
    with pytest.raises(SwapError, match=rf"vm.{name} = {bad}: .*hang") as caught:
        kernel.refuse_what_hangs(tmp_path)
    assert f"sysctl -w vm.{name}{remedy}" in caught.value.hint


async def test_nothing_to_attach_or_detach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(DaemonError, match="does not run"):
        await attaching.attach(MOUNT_POINT, priority=1, discard=False, unsafe=True)
    assert await detaching.detach(MOUNT_POINT) is None


async def test_attaching_says_what_is_not_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt/swapfile").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(swapdev, "is_mounted", lambda mount_point: True)
    monkeypatch.setattr(kernel, "refuse_settings", lambda: None)
    with pytest.raises(SwapError, match=r"not safe.*the machine then hangs") as caught:
        await attaching.attach(tmp_path / "mnt", priority=1, discard=False, unsafe=False)
    assert "memory cgroup that has a limit" in caught.value.hint


async def test_attaching_says_that_the_pager_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def status(self) -> dict[str, int]:
            raise TimeoutError(110, "no answer to 'status' in 10 s")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: Stuck())
    monkeypatch.setattr(kernel, "refuse_settings", lambda: None)
    with pytest.raises(DaemonError, match="no answer to 'status' in 10 s"):
        await attaching.attach(Path("/run/mnt"), priority=1, discard=False, unsafe=True)


async def test_what_is_attached_may_go_to_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zswapctl that died in the middle of a detach has left it off."""
    pager = DiskPager("ok")

    async def run(*command: str, check: bool = True) -> CompletedProcess[bytes]:
        return CompletedProcess(command, 0, OURS.loop_device.encode(), b"")

    monkeypatch.setattr(swapdev, "find_pager", lambda mount_point: pager)
    monkeypatch.setattr(commands, "run", run)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: OURS)
    monkeypatch.setattr(blockqueue, "set_for_swap", lambda device: None)
    assert await attaching._attach(MOUNT_POINT, 1, discard=False) == OURS
    assert pager.told == [True]


async def test_attaching_says_that_a_pager_has_no_zswapd(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*command: str, check: bool = True) -> CompletedProcess[bytes]:
        return CompletedProcess(command, 1, b"", f"{command[0]}: cannot statx: {os.strerror(errno.EAGAIN)}".encode())

    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(DaemonError, match=f"no zswapd serves {MOUNT_POINT}") as caught:
        await attaching._attach(MOUNT_POINT, 1, discard=True)
    assert "systemctl start zswapd" in caught.value.hint


async def test_only_root_attaches_and_detaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SwapError, match="only root"):
        await attaching.attach(MOUNT_POINT, priority=1, discard=False, unsafe=True)
    with pytest.raises(SwapError, match="only root"):
        await detaching.detach(MOUNT_POINT)


async def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(commands, "SBIN", "")
    with pytest.raises(SwapError, match="losetup is not installed"):
        await commands.run("losetup", "--find")


async def test_a_failed_command_gives_its_reason(tmp_path: Path) -> None:
    with pytest.raises(SwapError, match=r"^losetup --find .*/none failed: losetup: .*No such file"):
        await commands.run("losetup", "--find", f"{tmp_path}/none")
