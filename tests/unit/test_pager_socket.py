"""Commands to a pager: those that take long are waited for, and one that answers nothing is given up."""

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.errnos import raises_errno
from zswapd import pager_socket
from zswapd.pager_socket import ask, socket_path

Answer = Callable[[str, socket.socket], None]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Answer], Path]]:
    """Listens as a pager does, and gives every command and its connection to a function."""
    path = socket_path(tmp_path / "mnt")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def begin(answer: Answer) -> Path:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            while True:
                try:
                    connections.append(listener.accept()[0])
                except OSError:
                    return
                answer(connections[-1].recv(512).decode(), connections[-1])

        threads.append(threading.Thread(target=run))
        threads[0].start()
        return path

    yield begin
    if threads:
        listener.shutdown(socket.SHUT_RDWR)
        threads[0].join()
    for one in (listener, *connections):
        one.close()


def test_what_takes_long_is_waited_for_while_the_pager_answers_others(
    serve: Callable[[Answer], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = socket.recv_fds
    asking: list[socket.socket] = []
    waiting: list[socket.socket] = []
    probes: list[str] = []

    def late(connection: socket.socket, size: int, count: int) -> object:
        """Three times, what was asked first is not answered in time."""
        asking.append(connection)
        if connection is asking[0] and len(probes) < 3:
            raise TimeoutError
        return receive(connection, size, count)

    def answer(asked: str, connection: socket.socket) -> None:
        if asked == "stop":
            waiting.append(connection)
            return
        probes.append(asked)
        connection.send(b"ok pid=1")
        if len(probes) == 3:
            waiting[0].send(b"ok objects=0 pages=0")

    monkeypatch.setattr(socket, "recv_fds", late)
    assert ask(serve(answer), "stop") == ("objects=0 pages=0", None)
    assert probes == ["status"] * 3


@pytest.mark.parametrize("command", ["status", "stop"])
def test_a_pager_that_answers_nothing_is_given_up(
    serve: Callable[[Answer], Path], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pager_socket, "ANSWER_SECONDS", 0.1)
    path = serve(lambda asked, connection: None)
    with pytest.raises(TimeoutError, match=rf"no answer to '{command}' in 0.1 s") as caught:
        ask(path, command)
    assert caught.value.errno == errno.ETIMEDOUT


def test_what_a_takeover_cuts_off_is_asked_again_unless_it_could_be_done_twice(serve: Callable[[Answer], Path]) -> None:
    asked: list[str] = []

    def answer(command: str, connection: socket.socket) -> None:
        asked.append(command)
        if len(asked) < 3:
            connection.shutdown(socket.SHUT_RDWR)
        else:
            connection.send(b"ok pid=7")

    path = serve(answer)
    assert ask(path, "status") == ("pid=7", None)
    assert asked == ["status"] * 3
    for command in ("writeback all", "writeback page 5", "shrink 5", "writeback-limit +5", "upgrade"):
        asked.clear()
        with raises_errno(errno.EINTR):
            ask(path, command)
        assert asked == [command]
    for command in ("mem-limit 5", "writeback-limit 5", "writeback-limit none", "stop", "relay"):
        asked.clear()
        ask(path, command)
        assert asked == [command] * 3


def test_a_pager_s_own_error_and_its_end(serve: Callable[[Answer], Path], tmp_path: Path) -> None:
    def answer(asked: str, connection: socket.socket) -> None:
        if asked == "reset":
            connection.send(b"error 16 the swap file is open")
        else:
            connection.shutdown(socket.SHUT_RDWR)

    with pytest.raises(FileNotFoundError):
        ask(socket_path(tmp_path / "mnt"), "status")
    path = serve(answer)
    with raises_errno(errno.EBUSY):
        ask(path, "reset")
    with pytest.raises(BrokenPipeError, match="the pager is gone"):
        ask(path, "stop")
