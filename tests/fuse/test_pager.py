"""The pager's control socket, beside the file system."""

import errno
import json
import os
import resource
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon import DEADLINE_SECONDS, Daemon, descriptors, wait_until
from tests.errnos import raises_errno
from tests.machine import lacks
from tests.pages import PAGE, noise
from zswapd.pager import Pager
from zswapd.pager_socket import socket_path

NOTHING_LEFT = {"objects": 0, "pages": 0, "writebacks": 0, "cleanings": 0}
FOOTPRINT = 8 << 20


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    return make_daemon(swap__data_path="pager").start()


def connection(daemon: Daemon) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(DEADLINE_SECONDS)
    made.connect(os.fspath(socket_path(daemon.mount_point)))
    return made


def drained(pager: Pager) -> dict[str, int]:
    """Waits for the kernel to tell the pager of the swap file's last close."""
    wait_until(lambda: pager.status()["opens"] == 0, "closed")
    return pager.drain()


def test_who_says_nothing_holds_up_nobody(daemon: Daemon) -> None:
    silent = [connection(daemon) for _ in range(40)]
    assert Pager(daemon.mount_point).status()["opens"] == 0
    # Nor is the last one given up.
    silent[-1].send(b"status")
    assert silent[-1].recv(512).startswith(b"ok pid=")
    for one in silent:
        one.close()
    assert Pager(daemon.mount_point).status()["opens"] == 0


@pytest.mark.parametrize("long_one_first", [True, False])
def test_a_command_that_takes_long_holds_up_nobody(daemon: Daemon, long_one_first: bool) -> None:
    pid = daemon.server_pid
    with connection(daemon) as first, connection(daemon) as second, select.epoll() as answers:
        long, short = (first, second) if long_one_first else (second, first)
        for one in (first, second):
            answers.register(one, select.EPOLLIN)
        os.kill(pid, signal.SIGSTOP)
        try:
            long.send(b"reset")
            short.send(b"status")
        finally:
            os.kill(pid, signal.SIGCONT)
        # Which has become readable first.
        assert answers.poll(DEADLINE_SECONDS, maxevents=1)[0][0] == short.fileno()
        assert long.recv(512) == b"ok "
        assert short.recv(512).startswith(b"ok pid=")


def test_without_descriptors_it_goes_on(daemon: Daemon) -> None:
    """The pages are in it."""
    pid = daemon.server_pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # The listener's two, the relay's, and the keeper's.
    wait_until(lambda: sum(name.startswith("socket:") for name in descriptors(pid).values()) == 4, "no connection")
    taken = {int(path.name) for path in descriptors(pid)}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), limits[1]))
    with connection(daemon) as waiting:
        waiting.send(b"status")
        daemon.wait_for_log("control socket: Too many open files")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert waiting.recv(512).startswith(b"ok pid=")
    assert daemon.server_pid == pid


def test_what_is_open_is_not_drained(daemon: Daemon) -> None:
    pager = Pager(daemon.mount_point)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1), 0)
        for end in (pager.drain, pager.stop, pager.reset):
            with raises_errno(errno.EBUSY):
                end()
        with daemon.opened() as again:
            assert os.pread(again, PAGE, 0) == noise(1)


def test_what_is_drained_cannot_be_opened(daemon: Daemon) -> None:
    pager = Pager(daemon.mount_point)
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(1) + noise(2) + bytes(PAGE), 0)
    left = drained(pager)
    assert left["objects"] == 2
    assert left["pages"] >= 2
    pager.reset()
    assert drained(pager) == NOTHING_LEFT
    with raises_errno(errno.ENODEV), daemon.opened():
        pass
    # Whoever drained it is gone: the next daemon serves again.
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon.start_again()
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(3), 0)
    drained(pager)
    assert pager.stop() == NOTHING_LEFT
    wait_until(lambda: not Path(f"{daemon.mount_point}.sock").exists(), "the pager ends")


def test_its_own_memory_is_small_and_status_says_so(daemon: Daemon) -> None:
    with daemon.opened() as swapfile:
        for page in range(4096):
            os.pwrite(swapfile, noise(page), page * PAGE)
        footprint = json.loads(daemon.ctl("status", "--json").stdout)["pager"]["footprint"]
    assert 0 < footprint <= FOOTPRINT
    wait_until(lambda: daemon.stats()["ballast_bytes"] == 4 << 20, "the ballast is taken")
    assert " MiB and 4.0 MiB of ballast beside pool and tables" in daemon.ctl("status").stdout
