"""Pagers that do not start: a program in the place of the pager, and what is said of it."""

import os
import socket
import threading
from pathlib import Path

import pytest

from tests.daemon import wait_until
from zswapd import pager, pager_socket
from zswapd.config import Config, load
from zswapd.errors import DaemonError
from zswapd.pager import Pager
from zswapd.pager_socket import socket_path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(pager, "KEEPER", tmp_path / "pager")
    return load(None, [f"swap.mount_point={tmp_path}/mnt"], {"ZSWAPD_CONFIG": os.devnull})


def program(directory: Path, script: str) -> None:
    (directory / "pager").write_text(f"#!/bin/sh\necho $$ >{directory}/pid\n{script}\n")
    (directory / "pager").chmod(0o755)


def test_one_that_ends_says_why_itself(config: Config, tmp_path: Path) -> None:
    program(tmp_path, "exit 7")
    with pytest.raises(DaemonError, match="exit status 7"):
        Pager.start(config)


def test_one_that_never_serves_is_ended(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "_START_SECONDS", 0.5)
    program(tmp_path, "exec sleep 600")
    with pytest.raises(DaemonError, match=r"did not start within 0.5 s"):
        Pager.start(config)
    if (tmp_path / "pid").exists():
        assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_one_that_listens_and_does_not_answer_yet_is_waited_for(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that is making its tables."""
    monkeypatch.setattr(pager_socket, "ANSWER_SECONDS", 0.1)
    program(tmp_path, "sleep 1; exit 7")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(socket_path(config.swap.mount_point)))
        listener.listen()
        with pytest.raises(DaemonError, match="exit status 7"):
            Pager.start(config)


def test_one_of_another_version_is_said_to_be_and_does_not_stay_behind(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have mounted a file system of which nobody answers the first request: whoever looks there hangs."""
    program(tmp_path, "exec sleep 600")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        (tmp_path / "counters").open("wb+") as counters,
    ):
        counters.truncate(4096)
        listener.bind(str(socket_path(config.swap.mount_point)))
        listener.listen()

        def answer() -> None:
            wait_until((tmp_path / "pid").exists, "it runs")
            pid = (tmp_path / "pid").read_bytes().strip()
            for command in (b"status", b"status", b"counters"):
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(512) == command
                    socket.send_fds(connection, [b"ok keeper=" + pid], [counters.fileno()])

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(DaemonError, match=r"of another version: .* other size"):
            Pager.start(config)
        answering.join()
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
