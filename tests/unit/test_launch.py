"""What zswapd pager becomes, and what it refuses; and the end of pagers that a keeper has left."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import trio

from tests.daemon import DEADLINE_SECONDS, descriptors
from zswapd import backing_file, launch, pager
from zswapd.config import Config, load
from zswapd.errors import ConfigError, DaemonError, InUseError, LostSwapError
from zswapd.pager_socket import socket_path


class BecomeError(Exception):
    """In the place of execv, which does not return."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    return load(None, [f"swap.mount_point={tmp_path}/mnt", "swap.size=8MiB"], {"ZSWAPD_CONFIG": os.devnull})


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []

    def execv(path: str, command: list[str]) -> NoReturn:
        assert path == command[0]
        commands.append(command)
        raise BecomeError

    monkeypatch.setattr(os, "execv", execv)
    return commands


def value(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_a_pager_that_has_just_been_mounted_there_is_in_use(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it answers whoever looks before zswapd serves."""

    def listdir(path: Path) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(InUseError, match="in use by another zswapd"):
        launch.become_keeper(config)


def test_it_makes_the_mount_point_and_becomes_the_keeper(config: Config, became: list[list[str]]) -> None:
    with pytest.raises(BecomeError):
        launch.become_keeper(config)
    [command] = became
    assert command[0] == str(pager.KEEPER)
    assert value(command, "--pager") == str(pager.PROGRAM)
    assert value(command, "--size") == str(8 << 20)
    assert value(command, "--mount-point") == str(config.swap.mount_point)
    assert config.swap.mount_point.stat().st_mode & 0o777 == 0o755


def test_the_next_keeper_goes_on_with_what_the_last_one_was_started_with(
    config: Config, became: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BecomeError):
        launch.become_keeper(config)
    monkeypatch.setenv("LISTEN_FDS", "4")
    ended: list[Path] = []
    monkeypatch.setattr(launch, "end_left_over", ended.append)
    # Nothing is looked at that could wait for a page.
    monkeypatch.setattr(launch, "prepare", None)
    monkeypatch.setattr(launch, "find_pager", None)
    changed = config.model_copy(update={"swap": config.swap.model_copy(update={"size": 4096})})
    with pytest.raises(BecomeError):
        launch.become_keeper(changed)
    assert became[0] == became[1]
    assert ended == [config.swap.mount_point]


def test_the_next_keeper_has_the_backing_file_locked(
    config: Config, became: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "backing"
    file.touch()
    launch._options_path(config.swap.mount_point).write_text(json.dumps({"backing": str(file)}))
    monkeypatch.setenv("LISTEN_FDS", "4")
    with pytest.raises(BecomeError):
        launch.become_keeper(config)
    assert backing_file.is_locked(file)
    [inherited] = [int(path.name) for path, name in descriptors(os.getpid()).items() if name == str(file)]
    assert os.get_inheritable(inherited)
    os.close(inherited)
    assert not backing_file.is_locked(file)


def test_descriptors_of_nobody_are_refused(
    config: Config, became: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "4")
    monkeypatch.setattr(launch, "end_left_over", None)
    with pytest.raises(DaemonError, match=r"cannot read what the pager was started with, .*/mnt.options"):
        launch.become_keeper(config)
    assert became == []


def test_it_is_refused_where_something_is_wrong(
    config: Config, became: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    portable = config.model_copy(update={"swap": config.swap.model_copy(update={"data_path": "pyfuse3"})})
    with pytest.raises(ConfigError, match="there is no pager"):
        launch.become_keeper(portable)

    class Found:
        def status(self) -> dict[str, int]:
            return {"pid": 77}

    with monkeypatch.context() as patch:
        patch.setattr(launch, "find_pager", lambda config: Found())
        with pytest.raises(InUseError, match="pid 77"):
            launch.become_keeper(config)

    def lost(mount_point: Path) -> None:
        raise LostSwapError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "refuse_lost", lost)
        with pytest.raises(LostSwapError):
            launch.become_keeper(config)
    (config.swap.mount_point / "precious").touch()
    with pytest.raises(DaemonError, match="is not empty"):
        launch.become_keeper(config)
    assert became == []


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """With command lines as a pager's, or not quite."""
    mine, other = str(socket_path(tmp_path / "mnt")), str(socket_path(tmp_path / "other"))
    lines = {
        "mine": ["/somewhere/zswapd-pager", "--control", mine, "--size", "4096"],
        "mine too": ["/elsewhere/zswapd-pager", "--size", "4096", "--control", mine],
        "another's": ["/somewhere/zswapd-pager", "--control", other],
        "longer": ["/somewhere/zswapd-pager", "--control", mine + "2"],
        "keeper": ["/somewhere/zswapd-keeper", "--control", mine],
        "reader": ["/usr/bin/less", "--control", mine],
    }
    name_itself = "open('/proc/self/comm', 'w').write(sys.orig_argv[0].rpartition('/')[2])"
    program = f"import sys; {name_itself}; print(flush=True); sys.stdin.read()"
    started = {}
    for name, line in lines.items():
        command = [line[0], "-c", program, *line[1:]]
        pipe = subprocess.PIPE
        started[name] = subprocess.Popen(command, executable=sys.executable, stdin=pipe, stdout=pipe)
        stdout = started[name].stdout
        assert stdout
        stdout.read(1)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def test_pagers_that_a_keeper_has_left_are_ended_and_nobody_else(
    processes: dict[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    # One that is stopped would hear of nothing else.
    processes["mine too"].send_signal(signal.SIGSTOP)
    launch.end_left_over(tmp_path / "mnt")
    ended = {name: process.poll() for name, process in processes.items()}
    assert ended == {name: -signal.SIGKILL if name.startswith("mine") else None for name in processes}


def test_nobody_else_s_command_line_is_read(tmp_path: Path) -> None:
    """It may lie in the swap that waits."""
    directory = tmp_path / str(os.getpid())
    directory.mkdir()
    (directory / "comm").write_text("zswapd-pages\n")
    os.mkfifo(directory / "cmdline")
    asked = threading.Thread(target=launch.end_left_over, args=(tmp_path / "mnt", tmp_path), daemon=True)
    asked.start()
    asked.join(DEADLINE_SECONDS)
    assert not asked.is_alive()


def test_a_number_that_is_another_s_by_now_ends_nobody(
    processes: dict[str, subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / str(processes["reader"].pid)
    directory.mkdir()
    (directory / "comm").write_text("zswapd-pager\n")
    (directory / "cmdline").write_text(f"zswapd-pager\0--control\0{socket_path(tmp_path / 'mnt')}\0")
    pidfd_open = os.pidfd_open

    def after_it_has_ended(pid: int) -> int:
        (directory / "comm").write_text("less\n")
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", after_it_has_ended)
    launch.end_left_over(tmp_path / "mnt", tmp_path)
    assert processes["reader"].poll() is None


async def test_a_start_may_be_given_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(settings: object, report: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("zswapd.backing.prepare", forever)
    config.swap.mount_point.mkdir()

    async def signals() -> AsyncIterator[int]:
        yield signal.SIGTERM

    with pytest.raises(launch.StoppedEarlyError):
        await launch.prepare(config, signals())
