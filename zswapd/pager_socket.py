"""The pager's control socket: where it is, and how a command is asked (native/pager/src/control.rs has them all)."""

import errno
import os
import socket
from pathlib import Path

#: In so long a pager that is alive answers `status`, whatever else it is about.
ANSWER_SECONDS = 10
#: What a command to a pager raises that has ended, or has never been.
GONE = (FileNotFoundError, ConnectionError)
_PROBE = "status"
#: What is not asked again when the pager goes away over it: it could be done twice.
_ONCE = ("writeback ", "shrink ", "writeback-limit +", "upgrade", "tick", "dictionary")
_TRIES = 8


class _CutOffError(Exception):
    """The pager has gone away without an answer: ended, or its successor has taken over."""


def socket_path(mount_point: Path) -> Path:
    """Where the pager of a mount point listens."""
    return mount_point.with_name(mount_point.name + ".sock")


def ask(path: Path, command: str, fd: int | None = None) -> tuple[str, int | None]:
    """What the pager replies to `command`, given with the descriptor `fd`, and the descriptor that comes with it.

    A command takes as long as there are pages for it: it is waited for as long as the pager answers others meanwhile,
    which it does between two steps. If another pager takes over, that one is asked again, unless the command could then
    be done twice. Raises OSError: the pager's own; InterruptedError if it was not asked again; TimeoutError if it
    answers nothing for ANSWER_SECONDS; one of GONE if it has ended.
    """
    for _ in range(_TRIES):
        try:
            return _ask(path, command, fd)
        except _CutOffError:
            if command.startswith(_ONCE):
                what = f"the pager has gone away over {command!r}, which may be done in part"
                raise InterruptedError(errno.EINTR, what) from None
    raise BrokenPipeError(errno.EPIPE, "the pager is gone")


def _ask(path: Path, command: str, fd: int | None) -> tuple[str, int | None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.connect(os.fspath(path))
            try:
                socket.send_fds(connection, [command.encode()], [] if fd is None else [fd])
                data, fds = _receive(connection, path, command)
            except ConnectionError:
                raise _CutOffError from None
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer to {command!r} in {ANSWER_SECONDS} s") from None
    status, _, text = data.decode().partition(" ")
    if status == "error":
        number, _, message = text.partition(" ")
        raise OSError(int(number), message)
    if status != "ok":
        raise _CutOffError
    return text, fds[0] if fds else None


def _receive(connection: socket.socket, path: Path, command: str) -> tuple[bytes, list[int]]:
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(connection, 512, 1)
        except TimeoutError:
            if command == _PROBE:
                raise
            ask(path, _PROBE)
        else:
            return data, fds
