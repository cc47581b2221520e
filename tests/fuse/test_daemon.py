"""The daemon's life: starts that cannot succeed, and every way to stop."""

import errno
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import DEADLINE_SECONDS, ENVIRONMENT, HOST, PAGE, Daemon, descriptors, wait_until
from tests.machine import lacks
from tests.pages import noise
from zswapd import daemon as zswapd_daemon
from zswapd import swapdev
from zswapd.config import load
from zswapd.errors import DaemonError, InUseError, LostSwapError
from zswapd.pager import Pager

MakeDaemon = Callable[..., Daemon]

# Starts that cannot succeed


def test_the_mount_point_is_missing(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.mount_point.rmdir()
    message = daemon.fails()
    assert f"{daemon.mount_point} does not exist" in message
    assert f"mkdir -p {daemon.mount_point}" in message


def test_the_mount_point_is_a_file(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.mount_point.rmdir()
    daemon.mount_point.touch()
    assert f"{daemon.mount_point} is not a directory" in daemon.fails()


def test_the_mount_point_is_not_empty(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    (daemon.mount_point / "precious").touch()
    message = daemon.fails()
    assert f"{daemon.mount_point} is not empty" in message
    assert "precious" in message


@pytest.mark.parametrize("second_path", ["pager", "pyfuse3"])
def test_the_mount_point_is_in_use(make_daemon: MakeDaemon, data_path: str, second_path: str) -> None:
    """By a daemon of the same configuration, whose metrics have the port too."""
    first = make_daemon(swap__data_path=data_path).start()
    second = make_daemon(
        swap__data_path=second_path,
        swap__mount_point=str(first.mount_point),
        metrics__listen=first.settings["metrics.listen"],
    )
    with first.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        second.fails(InUseError.exit_status)
        # Nothing but that.
        by = f"is in use by zswapd, pid {first.pid}"
        assert second.log() == f"zswapd: the mount point {first.mount_point} {by}\nsee zswapctl status\n"
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    assert first.stats()["pid"] == first.pid
    first.reset()
    assert first.stop() == 0


def test_the_mount_point_is_in_use_by_one_that_is_stopped(make_daemon: MakeDaemon, data_path: str) -> None:
    first = make_daemon(swap__data_path=data_path).start()
    second = make_daemon(swap__data_path=data_path, swap__mount_point=str(first.mount_point))
    first.signal(signal.SIGSTOP)
    try:
        assert "is in use by another zswapd" in second.fails(InUseError.exit_status)
    finally:
        first.signal(signal.SIGCONT)
    assert first.stop() == 0


def test_something_else_is_mounted(make_daemon: MakeDaemon, data_path: str) -> None:
    if os.geteuid() != 0:
        lacks("root, to mount it")
    daemon = make_daemon(swap__data_path=data_path)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", daemon.mount_point], check=True)
    try:
        assert "something is mounted" in daemon.fails()
    finally:
        subprocess.run(["umount", daemon.mount_point], check=True)


def test_a_pager_that_another_has_just_started_is_not_taken_for_one_s_own(
    make_daemon: MakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be stopped where the start fails."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    first = make_daemon(swap__data_path="pager").start()
    monkeypatch.setattr("zswapd.pager.KEEPER", tmp_path / "pager")
    (tmp_path / "pager").write_text("#!/bin/sh\nsleep 1\nexit 7\n")
    (tmp_path / "pager").chmod(0o755)
    with pytest.raises(DaemonError, match="exit status 7"):
        Pager.start(load(first.config, [], {}))
    assert first.stop() == 0


async def test_who_has_begun_at_the_same_moment_is_told_who_was_first(
    make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's pager comes up only when ours is started: nothing was there before."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")

    async def prepare(*_: object) -> None:
        pass

    async def signals() -> AsyncIterator[int]:
        yield signal.SIGTERM

    first = make_daemon(swap__data_path="pager").start()
    monkeypatch.setattr("zswapd.daemon.find_pager", lambda config: None)
    monkeypatch.setattr("zswapd.launch.prepare", prepare)
    with pytest.raises(InUseError, match=f"in use by zswapd, pid {first.server_pid}"):
        async with zswapd_daemon._pager(load(first.config, [], {}), signals(), False):
            pass
    assert first.stop() == 0


def test_the_mount_point_may_be_a_symbolic_link(make_daemon: MakeDaemon, data_path: str) -> None:
    daemon = make_daemon(swap__data_path=data_path)
    link = daemon.directory / "link"
    link.symlink_to("mnt")
    daemon.settings["swap.mount_point"] = str(link)
    daemon.start()
    # By either name, for who knows it by that.
    for name in (link, daemon.mount_point):
        assert daemon.ctl("--set", f"swap.mount_point={name}", "status").returncode == 0
    assert daemon.stop() == 0
    assert not swapdev.is_mounted(daemon.mount_point)
    assert sorted(path.name for path in daemon.directory.iterdir()) == ["link", "log", "mnt", "zswapd.toml"]


def test_a_killed_daemon_costs_no_page_and_the_next_one_goes_on(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    page = os.urandom(4096)
    with daemon.opened(os.O_DIRECT) as swapfile, mmap.mmap(-1, 4096) as buffer:
        buffer[:] = page
        os.pwrite(swapfile, buffer, 0)
        pager = daemon.server_pid
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        # Pages go on; what needs Python says "again".
        buffer[:] = bytes(4096)
        assert os.preadv(swapfile, [buffer], 0) == 4096
        assert buffer[:] == page
        with pytest.raises(OSError, match="temporarily unavailable"):
            daemon.stats()
        assert daemon.ctl("status").returncode == 0
        daemon.start_again()
        assert daemon.server_pid == pager
        assert daemon.stats()["pages"]["incompressible"] == 1
        os.preadv(swapfile, [buffer], 0)
        assert buffer[:] == page


def test_pages_go_on_while_the_daemon_is_stopped(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    with daemon.opened() as swapfile:
        daemon.signal(signal.SIGSTOP)
        try:
            page = os.urandom(4096)
            os.pwrite(swapfile, page, 8192)
            assert os.pread(swapfile, 4096, 8192) == page
            assert json.loads(daemon.ctl("status", "--json").stdout)["pages"]["incompressible"] == 1
        finally:
            daemon.signal(signal.SIGCONT)


def test_killed_pagers_with_nothing_attached_are_started_anew(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    pager = daemon.server_pid
    daemon.kill_pagers()
    assert daemon.wait() == 1
    assert "the pager has ended unasked, with nothing attached" in daemon.log()
    daemon.start_again()
    assert daemon.server_pid != pager
    assert daemon.stop() == 0


def test_killed_pagers_under_a_loop_device_are_not_started_anew(make_daemon: MakeDaemon) -> None:
    """Without swap on it, which could be other processes' pages."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    device = looped(daemon)
    daemon.kill_pagers()
    assert daemon.wait() == LostSwapError.exit_status
    for message in (daemon.log(), daemon.fails(LostSwapError.exit_status)):
        assert f"the pager has died while {device} was attached" in message
        assert "zswapctl detach --force" in message
    assert daemon.ctl("detach", "--force").returncode == 0
    daemon.start_again()
    assert daemon.stop() == 0


def test_systemd_does_not_start_it_again_where_swap_is_lost() -> None:
    unit = Path(__file__).parents[2] / "systemd/zswapd.service"
    assert f"\nRestartPreventExitStatus={LostSwapError.exit_status}\n" in unit.read_text()


def test_a_killed_portable_daemon_leaves_an_error_that_the_next_one_explains(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(swap__data_path="pyfuse3").start()
    daemon.signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    with pytest.raises(OSError, match="not connected") as caught:
        daemon.stats()
    assert caught.value.errno == errno.ENOTCONN
    again = make_daemon(swap__data_path="pyfuse3", swap__mount_point=str(daemon.mount_point))
    message = again.fails()
    assert f"{daemon.mount_point} cannot be used: Transport endpoint is not connected" in message
    remedy = f"umount {daemon.mount_point}"
    assert remedy in message
    if os.geteuid() != 0:
        lacks("root, to unmount it")
    subprocess.run(remedy, shell=True, check=True)
    daemon.start_again()
    assert daemon.stats()["pid"] == daemon.pid


def test_the_metrics_port_is_in_use(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    with socket.create_server((HOST, daemon.port)):
        message = daemon.fails()
    assert f"{HOST}:{daemon.port}: Address already in use" in message
    assert "metrics.listen" in message
    assert not swapdev.is_mounted(daemon.mount_point)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("swap__size", 4097),
        ("swap__size", "17TiB"),
        ("swap__mount_point", "relative"),
        ("swap__priority", 40000),
        ("pool__mem_limit", "150%"),
        ("compression__algorithm", "lzo"),
        ("compression__zstd_level", 23),
        ("metrics__listen", "0.0.0.0:9839"),
        ("daemon__on_sigterm", "ignore"),
        ("daemon__nice", 5),
    ],
)
def test_bad_settings(make_daemon: MakeDaemon, key: str, value: object) -> None:
    daemon = make_daemon(**{key: value})
    message = daemon.fails()
    assert key.replace("__", ".") in message
    assert str(daemon.config) in message
    assert not swapdev.is_mounted(daemon.mount_point)


# Running and stopping


def test_metrics_can_be_switched_off(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(metrics__listen="").start()
    inodes = {name[8:-1] for name in descriptors(daemon.pid).values() if name.startswith("socket:")}
    listening = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"}
    assert not inodes & listening
    assert daemon.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it_cleanly(make_daemon: MakeDaemon, number: signal.Signals) -> None:
    daemon = make_daemon().start()
    daemon.signal(number)
    assert daemon.wait() == 0
    assert not swapdev.is_mounted(daemon.mount_point)
    assert os.listdir(daemon.mount_point) == []
    assert "stopped" in daemon.log()


def test_ctrl_c_before_anything_has_begun_ends_it_without_a_word(tmp_path: Path) -> None:
    """While it imports what it needs."""
    (tmp_path / "click.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(600)\n")
    for program in ("zswapd", "zswapctl"):
        command = [sys.executable, "-c", f"from zswapd import entry; entry.{program}()"]
        environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == "importing\n"
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=DEADLINE_SECONDS) == ("", "")
            finally:
                process.kill()
        assert process.returncode == -signal.SIGINT


def test_ctrl_c_while_it_starts_does_not_hide_why_it_cannot(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.pager = daemon.directory / "pager"
    wait = "touch begun; until [ -e go-on ]; do sleep 0.1; done"
    daemon.pager.write_text(f"#!/bin/sh\ncd {daemon.directory}\n{wait}\necho no pager\nexit 1\n")
    daemon.pager.chmod(0o755)
    daemon.launch()
    wait_until((daemon.directory / "begun").exists, "the pager is started")
    daemon.signal(signal.SIGINT)
    # Until the signal has been delivered.
    wait_until(lambda: not pending(daemon.pid, signal.SIGINT), "SIGINT arrives")
    (daemon.directory / "go-on").touch()
    assert daemon.wait() == 1
    assert daemon.log() == "no pager\nzswapd: the pager did not start (exit status 1)\nit says why above\n"


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits to be delivered (proc_pid_status(5))."""
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> number - 1 & 1 for mask in masks)


def test_it_can_be_started_again(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
    daemon.reset()
    assert daemon.stop() == 0
    daemon.start_again()
    assert daemon.stats()["original_bytes"] == 0
    assert daemon.stop() == 0


def test_it_does_not_stop_while_the_swap_file_is_open(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_log("not stopping: somebody has the swap file open")
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    daemon.reset()
    assert daemon.stop() == 0


def test_an_unmount_from_outside_ends_it(make_daemon: MakeDaemon, data_path: str) -> None:
    daemon = make_daemon(swap__data_path=data_path).start()
    unmount = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    subprocess.run([*unmount, str(daemon.mount_point)], check=True)
    assert daemon.wait() == 0
    assert not swapdev.is_mounted(daemon.mount_point)
    assert "stopped" in daemon.log()
    assert "Traceback" not in daemon.log()
    daemon.start_again()
    assert daemon.stop() == 0


def looped(daemon: Daemon) -> str:
    """A loop device over the swap file, without swap on it: nobody's pages are at risk."""
    losetup = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(daemon.swapfile)]
    return subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def hidden(make_daemon: MakeDaemon) -> Iterator[tuple[Daemon, str]]:
    """A daemon whose mount point was unmounted with --lazy while a loop device was over its swap file; and that."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    device = looped(daemon)
    subprocess.run(["umount", "--lazy", daemon.mount_point], check=True)
    yield daemon, device
    if Path("/sys/block", Path(device).name, "loop/backing_file").exists():
        # It was not found, and will not be by whoever tidies up.
        subprocess.run(["losetup", "--detach", device], check=False)


def test_what_is_attached_is_given_back_after_a_lazy_unmount(hidden: tuple[Daemon, str]) -> None:
    daemon, device = hidden
    assert daemon.running
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()
    assert not Path("/sys/block", Path(device).name, "loop/backing_file").exists()


def test_a_lazy_unmount_ends_the_daemon_when_all_is_detached(hidden: tuple[Daemon, str]) -> None:
    daemon, device = hidden
    result = daemon.ctl("detach")
    assert result.returncode == 0, result.stderr
    assert device in result.stdout
    assert daemon.wait() == 0
    assert "Traceback" not in daemon.log()


def test_what_is_attached_is_not_forgotten_after_a_lazy_unmount(hidden: tuple[Daemon, str]) -> None:
    daemon, device = hidden
    daemon.kill_pagers()
    assert daemon.wait() == LostSwapError.exit_status
    assert f"the pager has died while {device} was attached" in daemon.log()
    assert f"then losetup --detach {device}, then" in daemon.log()


def test_the_end_of_a_lazily_unmounted_file_system_leaves_what_was_mounted_there_since(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    with daemon.opened() as swapfile:
        subprocess.run(["umount", "--lazy", daemon.mount_point], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", daemon.mount_point], check=True)
        os.pwrite(swapfile, noise(1), 0)
        assert os.pread(swapfile, PAGE, 0) == noise(1)
    try:
        assert daemon.wait() == 0
        assert os.path.ismount(daemon.mount_point)
    finally:
        subprocess.run(["umount", daemon.mount_point], check=True)


def test_pagers_killed_under_a_loop_device_that_was_lazily_unmounted_have_lost_swap(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    losetup = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(daemon.swapfile)]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["umount", "--lazy", daemon.mount_point], check=True)
        daemon.kill_pagers()
        assert daemon.wait() == LostSwapError.exit_status
        assert f"the pager has died while {device} was attached" in daemon.log()
        assert f"losetup --detach {device}" in daemon.log()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    daemon.start_again()
    assert daemon.stop() == 0


@pytest.mark.parametrize("abstract", [False, True])
def test_it_tells_systemd_when_it_serves(make_daemon: MakeDaemon, abstract: bool) -> None:
    daemon = make_daemon()
    name = str(daemon.directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name if abstract else name)
        systemd.settimeout(DEADLINE_SECONDS)
        daemon.extra_environment["NOTIFY_SOCKET"] = "@" + name if abstract else name
        daemon.start()
        assert systemd.recv(100).splitlines()[0] == b"READY=1"
    assert daemon.stop() == 0


def test_the_journal_gets_priorities(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.extra_environment["JOURNAL_STREAM"] = "8:1"
    daemon.start()
    assert f"<6>serving 64.0 MiB of swap at {daemon.swapfile}" in daemon.log()
    assert daemon.stop() == 0
