"""A pager of another version takes over when it can; and when it cannot, the one that served goes on.

Only an upgrade changes what serves: not what lies at the program's path, nor a version that hangs or ends.
"""

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon import Daemon, state_file, wait_until
from tests.errnos import raises_errno
from tests.fuse.scribbling import scribbling
from tests.machine import lacks
from tests.pages import PAGE, noise
from tests.takeover import kill, kill_and_wait, status, with_standby
from zswapd import pager
from zswapd.pager import Pager

MakeDaemon = Callable[..., Daemon]
#: Says that all is set, as a pager does (native/keeper/src/channel.rs), waits to be told to go, and does as it likes.
_BAD_PAGER = """\
#!{python}
import os, signal, socket, sys
[fd] = [int(word[3:].split(",")[0]) for word in sys.argv if word.startswith("fd=")]
channel = socket.socket(fileno=fd)
channel.send(bytes([1]) + bytes(8))
while channel.recv(512)[0] != 6:
    pass
{then}
"""


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def inode(pid: int) -> int:
    """Of the program that a process runs."""
    return Path(f"/proc/{pid}/exe").stat().st_ino


def install(path: Path, content: bytes | str | None = None) -> None:
    """A program, as make install does: the pager, or a shell script in its place."""
    if isinstance(content, str):
        content = (content if content.startswith("#!") else f"#!/bin/sh\n{content}\n").encode()
    new = path.with_suffix(".new")
    new.write_bytes(pager.PROGRAM.read_bytes() if content is None else content)
    new.chmod(0o755)
    new.rename(path)


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """With a program of its own, which may be replaced."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.pager = daemon.directory / "pager"
    install(daemon.pager)
    return daemon.start()


@pytest.fixture
def path(daemon: Daemon) -> Path:
    assert daemon.pager
    return daemon.pager


def upgrade(daemon: Daemon) -> pager.Upgraded:
    return Pager(daemon.mount_point).upgrade()


def test_an_upgrade_hands_over(daemon: Daemon, path: Path) -> None:
    before = with_standby(daemon)
    with scribbling(daemon) as end:
        install(path)
        upgraded = upgrade(daemon)
        after = with_standby(daemon)
        assert (upgraded.old_pid, upgraded.new_pid) == (before["pid"], after["pid"])
        assert after["keeper"] == before["keeper"]
        assert inode(after["pid"]) == inode(after["standby"]) == path.stat().st_ino
        wait_until(lambda: gone(before["standby"]), "the old standby ends")
        end()
    assert daemon.stop() == 0


def test_what_is_installed_and_not_upgraded_to_is_not_run(daemon: Daemon, path: Path) -> None:
    before = with_standby(daemon)
    serving = inode(before["pid"])
    install(path, "exit 3")
    for _ in range(3):
        now = kill_and_wait(daemon)
        assert inode(now["pid"]) == inode(now["standby"]) == serving
        assert now["program"] == before["program"]
        for pid in (now["pid"], now["standby"]):
            assert Path(f"/proc/{pid}/comm").read_text() == "zswapd-pager\n"


def test_an_upgrade_that_cannot_be_is_refused_and_all_goes_on(daemon: Daemon, path: Path) -> None:
    before = with_standby(daemon)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        whole = pager.PROGRAM.read_bytes()
        for content, reason in (
            ("exit 3", r"it has ended before it was ready \(status 3\)"),
            ("kill -KILL $$", r"it has ended before it was ready \(signal 9\)"),
            (Path("/bin/false").read_bytes(), r"it has ended before it was ready \(status 1\)"),
            (Path("/bin/sleep").read_bytes(), r"it has ended before it was ready \(status 1\)"),
            (whole[:100], r"/pager cannot be run: "),
            (whole[: 64 << 10], r"(it has ended before it was ready \(signal \d+\)|/pager cannot be run: )"),
            (b"", r"/pager cannot be run: Exec format error"),
            (b"no program", r"/pager cannot be run: Exec format error"),
            (b"#!/nowhere", r"/pager cannot be run: No such file"),
        ):
            install(path, content)
            with pytest.raises(OSError, match=reason):
                upgrade(daemon)
        path.unlink()
        with pytest.raises(OSError, match=f"{path} cannot be run: No such file"):
            upgrade(daemon)
        path.mkdir()
        with pytest.raises(OSError, match=f"{path} cannot be run: Permission denied"):
            upgrade(daemon)
        path.rmdir()
        os.mkfifo(path)
        with pytest.raises(OSError, match=f"{path} cannot be run: Permission denied"):
            upgrade(daemon)
        path.unlink()
        after = with_standby(daemon)
        assert (after["pid"], after["standby"]) == (before["pid"], before["standby"])
        assert os.pread(swapfile, PAGE, 0) == noise(1)
        result = daemon.ctl("upgrade")
        assert result.returncode == 1
        assert result.stderr.startswith(
            f"zswapctl: not upgraded, the old version goes on: {path} cannot be run: No such file"
        )
        install(path)
        assert upgrade(daemon).new_pid == status(daemon)["pid"] != before["pid"]
        assert os.pread(swapfile, PAGE, 0) == noise(1)


def test_one_that_hangs_before_it_is_ready_is_killed(daemon: Daemon, path: Path) -> None:
    before = with_standby(daemon)
    install(path, f"echo $$ >{path}.pid; kill -STOP $$")
    for _ in range(2):
        with pytest.raises(OSError, match=r"pager \d+ did not get ready, and was killed"):
            upgrade(daemon)
        pid = int(Path(f"{path}.pid").read_text())
        wait_until(functools.partial(gone, pid), "it is reaped")
    daemon.wait_for_log(f"no upgrade to the new version: pager {pid} did not get ready")
    after = with_standby(daemon)
    assert (after["pid"], after["standby"]) == (before["pid"], before["standby"])
    install(path)
    upgrade(daemon)


@pytest.mark.parametrize(
    ("then", "log"),
    [
        ("sys.exit(3)", r"(status 3)"),
        ("signal.pause()", "does not get on with taking over: it is killed"),
        ("os.kill(os.getpid(), signal.SIGSTOP); signal.pause()", "does not get on with taking over: it is killed"),
    ],
)
def test_behind_one_that_does_not_serve_comes_the_version_that_did(
    daemon: Daemon, path: Path, then: str, log: str
) -> None:
    before = with_standby(daemon)
    serving = inode(before["pid"])
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        install(path, _BAD_PAGER.format(python=sys.executable, then=then))
        with raises_errno(errno.ECANCELED):
            upgrade(daemon)
        daemon.wait_for_log(log)
        after = with_standby(daemon)
        assert inode(after["pid"]) == inode(after["standby"]) == serving
        assert os.pread(swapfile, PAGE, 0) == noise(1)
        # What has never served is not what is kept.
        install(path)
        upgrade(daemon)
        assert os.pread(swapfile, PAGE, 0) == noise(1)


def test_when_the_old_one_is_killed_over_an_upgrade_its_standby_serves_and_that_is_said(
    daemon: Daemon, path: Path
) -> None:
    before = with_standby(daemon)
    install(path, f"touch {path}.begun; exec sleep 600")
    with ThreadPoolExecutor(1) as beside:
        upgrading = beside.submit(upgrade, daemon)
        wait_until(Path(f"{path}.begun").exists, "the new version is started")
        kill(daemon, before["pid"])
        with pytest.raises(OSError, match=rf"pager {before['standby']}, of the same version, has taken over"):
            upgrading.result()
    after = with_standby(daemon)
    assert after["pid"] == before["standby"]
    assert inode(after["pid"]) == inode(after["standby"])
    install(path)
    upgrade(daemon)


def test_of_two_upgrades_at_once_one_is_done(daemon: Daemon, path: Path) -> None:
    before = with_standby(daemon)
    install(path, f'touch {path}.begun; while [ ! -e {path}.go ]; do sleep 0.1; done; exec {pager.PROGRAM} "$@"')
    with ThreadPoolExecutor(1) as beside:
        upgrading = beside.submit(upgrade, daemon)
        wait_until(Path(f"{path}.begun").exists, "the new version is started")
        with raises_errno(errno.EBUSY):
            upgrade(daemon)
        Path(f"{path}.go").touch()
        assert upgrading.result().old_pid == before["pid"]
    assert with_standby(daemon)["program"] > before["program"]


@pytest.mark.parametrize(("at", "reason"), [(8, "of version"), (0, "none of zswapd's"), (20, "header is damaged")])
def test_a_state_that_the_new_version_does_not_know_is_refused_and_left_alone(
    daemon: Daemon, at: int, reason: str
) -> None:
    before = with_standby(daemon)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        with state_file(daemon) as state:
            state[at] ^= 0xFF
            try:
                with pytest.raises(OSError, match=reason):
                    upgrade(daemon)
            finally:
                state[at] ^= 0xFF
        assert status(daemon)["pid"] == before["pid"]
        assert os.pread(swapfile, PAGE, 0) == noise(1)
        upgrade(daemon)
        assert os.pread(swapfile, PAGE, 0) == noise(1)


def test_upgraded_again_and_again_and_killed_meanwhile(daemon: Daemon, path: Path) -> None:
    with scribbling(daemon) as end:
        for turn in range(12):
            before = with_standby(daemon)
            install(path)
            with ThreadPoolExecutor(1) as beside:
                upgrading = beside.submit(upgrade, daemon)
                if turn % 2:
                    with suppress(ProcessLookupError):  # it was faster
                        kill(daemon, before["standby"] if turn % 4 == 1 else before["pid"])
                try:
                    upgrading.result()
                except OSError as error:
                    if not turn % 2:
                        raise
                    print(error)
                else:
                    assert status(daemon)["program"] > before["program"]
        end()
    assert daemon.stop() == 0
    assert "leaked" not in daemon.log()


def test_a_standby_that_does_not_get_ready_is_killed_and_tried_again(make_daemon: MakeDaemon) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.pager = daemon.directory / "pager"
    hangs = daemon.directory / "hangs"
    install(daemon.pager, f'[ ! -e {hangs} ] || kill -STOP $$\nexec {pager.PROGRAM} "$@"')
    before = with_standby(daemon.start())
    hangs.touch()
    kill(daemon, before["standby"])
    daemon.wait_for_log("does not get ready: it is killed")
    hangs.unlink()
    now = with_standby(daemon)
    os.kill(now["standby"], signal.SIGSTOP)
    # One that is stopped only when it waits goes on.
    kill(daemon, now["pid"])
    wait_until(lambda: status(daemon)["pid"] == now["standby"], "it takes over all the same")
