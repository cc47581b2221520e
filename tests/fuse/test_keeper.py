"""A keeper that systemd has started: what it leaves in the store is what the next one goes on with."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.daemon import DEADLINE_SECONDS, ENVIRONMENT, Daemon, wait_until
from tests.machine import lacks
from tests.pages import PAGE
from tests.takeover import status, with_standby
from zswapd import pager
from zswapd.config import load
from zswapd.pager import Pager

NAMES = ["zswapd-fuse", "zswapd-state", "zswapd-counters", "zswapd-control", "zswapd-program"]
#: Has the descriptors from 3 on, as systemd passes them, and says that they are for itself.
_STARTED = """
import os, sys
fds = [os.dup(int(fd)) for fd in sys.argv[1].split(",") if fd]
fds = [os.dup2(fd, 100 + n) for n, fd in enumerate(fds)]
for n, fd in enumerate(fds):
    os.dup2(fd, 3 + n, inheritable=True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(fds))
os.closerange(3 + len(fds), 200)
os.execv(sys.argv[2], sys.argv[2:])
"""


#: Writes pages, and reads them for every line that it is given. A process of its own: who starts another closes its
#: descriptors there, and a close waits for whoever serves the file.
_HOLDER = """
import os, sys
from tests.pages import PAGE, noise
sys.stdin.readline()
fd = os.open(sys.argv[1], os.O_RDWR)
pages = range(int(sys.argv[2]))
for page in pages:
    os.pwrite(fd, noise(page), page * PAGE)
print(flush=True)
for line in sys.stdin:
    print(sum(os.pread(fd, PAGE, page * PAGE) == noise(page) for page in pages), flush=True)
"""
PAGES = 1000


@contextmanager
def holding(daemon: Daemon) -> Iterator[Callable[..., None]]:
    """A process that has the swap file open, from the first call of what is given on: each looks at its pages. The last
    one closes it.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(daemon.swapfile), str(PAGES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin
        assert process.stdout
        begun = False

        def verified(last: bool = False) -> None:
            nonlocal begun
            assert process.stdin
            assert process.stdout
            if not begun:
                begun = True
                print(file=process.stdin, flush=True)
                assert process.stdout.readline() == "\n"
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == f"{PAGES}\n"
            if last:
                process.stdin.close()
                assert process.wait(DEADLINE_SECONDS) == 0

        try:
            yield verified
        finally:
            process.kill()


class Systemd:
    """The socket that services tell how they are, and their store of descriptors."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.stored: dict[str, int] = {}
        self.ready = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(DEADLINE_SECONDS)

    def listen(self) -> None:
        """To one message."""
        data, fds, _, _ = socket.recv_fds(self._socket, 512, 4)
        lines = dict(line.split("=", 1) for line in data.decode().splitlines())
        if "FDSTORE" in lines:
            assert lines["FDPOLL"] == "0"
            if lines["FDNAME"] in self.stored:
                os.close(fds[0])
            else:
                self.stored[lines["FDNAME"]] = fds[0]
        elif "FDSTOREREMOVE" in lines:
            os.close(self.stored.pop(lines["FDNAME"]))
        elif lines.get("READY") == "1":
            self.ready = True

    def close(self) -> None:
        self._socket.close()
        for fd in self.stored.values():
            os.close(fd)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path)
    yield systemd
    systemd.close()


@contextmanager
def launched(daemon: Daemon, systemd: Systemd, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A keeper that was started with what is stored; what it and its pagers say goes to `log`."""
    systemd.ready = False
    words = pager.command(pager.options(load(daemon.config, [], {})))
    fds = list(systemd.stored.values())
    with log.open("wb") if log else nullcontext() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _STARTED, ",".join(map(str, fds)), *words],
            env=ENVIRONMENT | {"NOTIFY_SOCKET": str(systemd.path), "LISTEN_FDNAMES": ":".join(systemd.stored)},
            pass_fds=fds,
            start_new_session=True,
            stderr=said,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def keeper(daemon: Daemon, systemd: Systemd) -> Iterator[subprocess.Popen[bytes]]:
    """The same; it serves."""
    with launched(daemon, systemd) as process:
        while not systemd.ready:
            systemd.listen()
        yield process


def test_keeper_and_pagers_are_killed_and_the_next_keeper_goes_on(
    make_daemon: Callable[..., Daemon], systemd: Systemd
) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.configure()
    with keeper(daemon, systemd) as first, holding(daemon) as verified:
        assert sorted(systemd.stored) == sorted(NAMES)
        daemon.start()
        verified()
        assert with_standby(daemon)["keeper"] == first.pid
        daemon.signal(signal.SIGKILL)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        daemon.wait()
        with keeper(daemon, systemd) as second:
            verified()
            assert with_standby(daemon)["keeper"] == second.pid
            assert status(daemon)["opens"] == 1
            daemon.start_again()
            assert daemon.stats()["stores"] >= PAGES
            verified(last=True)
            wait_until(lambda: status(daemon)["opens"] == 0, "closed")
            assert daemon.stop() == 0
            assert second.wait(DEADLINE_SECONDS) == 0
            while systemd.stored:
                systemd.listen()
    assert not Path(f"{daemon.mount_point}.sock").exists()


def test_who_looks_at_a_mount_before_zswapd_serves_it_is_told_so(
    make_daemon: Callable[..., Daemon], systemd: Systemd
) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.configure()
    looks = [sys.executable, "-c", "import os, sys; os.stat(sys.argv[1])", str(daemon.mount_point)]
    with keeper(daemon, systemd) as first:
        looking = subprocess.Popen(looks, stderr=subprocess.PIPE)
        try:
            assert b"BlockingIOError: [Errno 11]" in looking.communicate(timeout=DEADLINE_SECONDS)[1]
        finally:
            if looking.poll() is None:
                os.killpg(first.pid, signal.SIGKILL)
        daemon.start()
        assert os.path.ismount(daemon.mount_point)
        assert daemon.stop() == 0
        assert first.wait(DEADLINE_SECONDS) == 0


def test_a_state_that_cannot_be_gone_on_with_is_refused_and_nothing_destroyed(
    make_daemon: Callable[..., Daemon], systemd: Systemd, tmp_path: Path
) -> None:
    """No pager serves, the log says why, and the state is as it was."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon, log = make_daemon(swap__data_path="pager"), tmp_path / "log"
    daemon.configure()
    with keeper(daemon, systemd) as first, holding(daemon) as verified:
        daemon.start()
        verified()
        with_standby(daemon)
        daemon.signal(signal.SIGKILL)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        daemon.wait()
        state = systemd.stored["zswapd-state"]
        whole, head = os.fstat(state).st_size, os.pread(state, PAGE, 0)
        for length, at, reason in (
            (whole, 0, "none of zswapd's"),
            (whole, 8, "of version"),
            (whole, 20, "its header is damaged"),
            (whole, 47, "its header is damaged"),
            (whole - PAGE, None, f"it has {whole - PAGE} bytes, and should have {whole}"),
            (whole + PAGE, None, f"it has {whole + PAGE} bytes, and should have {whole}"),
            (PAGE, None, f"it has {PAGE} bytes, and should have {whole}"),
            (40, None, "it ends in its header"),
            (0, None, "it is empty, and has been used"),
        ):
            damaged = bytearray(head)
            if at is not None:
                damaged[at] ^= 0xFF
            copy = os.memfd_create("damaged")
            os.pwrite(copy, damaged, 0)
            os.ftruncate(copy, length)
            systemd.stored["zswapd-state"] = copy
            with launched(daemon, systemd, log) as process:
                # Tried again, since it is all that there is.
                said = f"the state file cannot be recovered: .*{reason}"
                wait_until(lambda said=said: len(re.findall(said, log.read_text())) > 1, said)  # type: ignore[misc]
                assert process.poll() is None
                assert "serves" not in log.read_text()
            assert os.fstat(copy).st_size == length
            assert os.pread(copy, PAGE, 0) == damaged[:length]
            os.close(copy)
        systemd.stored["zswapd-state"] = state
        with keeper(daemon, systemd) as second:
            verified(last=True)
            wait_until(lambda: status(daemon)["opens"] == 0, "closed")
            Pager(daemon.mount_point).stop()
            assert second.wait(DEADLINE_SECONDS) == 0
            while systemd.stored:
                systemd.listen()


def test_the_next_keeper_goes_on_with_the_version_that_has_served(
    make_daemon: Callable[..., Daemon], systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager")
    daemon.configure()
    program, new = daemon.directory / "zswapd-pager", daemon.directory / "new"

    def install(content: bytes) -> int:
        new.write_bytes(content)
        new.chmod(0o755)
        new.rename(program)
        return program.stat().st_ino

    whole = pager.PROGRAM.read_bytes()
    monkeypatch.setattr(pager, "PROGRAM", program)
    served = install(whole)
    with keeper(daemon, systemd) as first:
        with_standby(daemon)
        # Installed, and not upgraded to.
        install(b"")
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        with keeper(daemon, systemd) as second:
            now = with_standby(daemon)
            assert [Path(f"/proc/{now[who]}/exe").stat().st_ino for who in ("pid", "standby")] == [served] * 2
            upgraded = install(whole)
            Pager(daemon.mount_point).upgrade()
            while "zswapd-program" not in systemd.stored or inode(systemd.stored["zswapd-program"]) != upgraded:
                systemd.listen()
            Pager(daemon.mount_point).stop()
            assert second.wait(DEADLINE_SECONDS) == 0
            while systemd.stored:
                systemd.listen()


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino
