"""The control files of writeback, over an engine that notes what it is told."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from tests.errnos import raises_errno
from tests.writeback import writeback
from zswapd.control import control_files
from zswapd.engine import Written
from zswapd.fusefs import SwapFs


class FakeEngine:
    def __init__(self, ended: str = "done") -> None:
        self.ended = ended
        self.told: list[str] = []
        self.counts: dict[str, Any] = {"state": "ok"}
        self.wait: Callable[[], object] = lambda: None

    def stats(self) -> Any:
        counts = {"swap_size_bytes": 4096, "zstd_level": 3, "pages": {"on_disk": 3}}
        return {**counts, "writeback": writeback(**self.counts)}

    def set_mem_limit(self, size_bytes: int) -> None:
        self.told.append(f"limit {size_bytes}")

    def set_compression(self, algorithm: str, zstd_level: int) -> None:
        raise OSError(errno.EINVAL, f"zstd level: {zstd_level} is not from 1 to 22")

    def backing(self) -> Path | None:
        return Path("/dev/x y")

    def mark_idle(self, older_seconds: int) -> None:
        self.told.append(f"idle {older_seconds}")

    def limit_writing(self, size_bytes: int | None) -> None:
        self.told.append(f"write {size_bytes}")

    def write_back(self, what: str) -> Written:
        self.wait()
        self.told.append(what)
        return Written(5, 6, self.ended)


def write(engine: FakeEngine, name: str, command: str) -> None:
    file = control_files(engine)[name]  # type: ignore[arg-type]
    assert file.write
    file.write(command)


def read(engine: FakeEngine, name: str) -> str:
    file = control_files(engine)[name]  # type: ignore[arg-type]
    assert file.read
    return file.read()


@pytest.mark.parametrize(
    ("name", "command", "told"),
    [
        ("writeback", "all", "all"),
        ("writeback", "idle", "idle"),
        ("writeback", "huge", "huge"),
        ("writeback", "huge_idle", "huge_idle"),
        ("writeback", "page_index=012", "page 12"),
        ("writeback", "0", "page 0"),
        ("idle", "all", "idle 0"),
        ("idle", "86400", "idle 86400"),
        ("writeback_limit", "3", "write 12288"),
        ("writeback_limit", "0", "write 0"),
        ("writeback_limit_enable", "1", "write 0"),
        ("writeback_limit_enable", "0", "write None"),
    ],
)
def test_commands_are_zram_s(name: str, command: str, told: str) -> None:
    engine = FakeEngine()
    write(engine, name, command)
    assert engine.told == [told]


@pytest.mark.parametrize(
    ("ended", "number"),
    [
        ("full", errno.ENOSPC),
        ("budget", errno.EDQUOT),
        ("failed", errno.EIO),
        ("stopped", errno.ESHUTDOWN),
    ],
)
def test_an_early_end_is_an_error_with_a_line_in_the_log(
    ended: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with raises_errno(number):
        write(FakeEngine(ended), "writeback", "all")
    assert "writeback all: " in caplog.text
    assert "after 5 pages" in caplog.text


def test_the_pool_may_have_no_more_than_a_pager_takes() -> None:
    engine = FakeEngine()
    write(engine, "mem_limit", "1T")
    assert engine.told == [f"limit {1 << 40}"]
    with pytest.raises(ValueError, match="at most 1 TiB"):
        write(engine, "mem_limit", str((1 << 40) + 1))


def test_what_the_pager_refuses_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with raises_errno(errno.EINVAL):
        write(FakeEngine(), "comp_algorithm", "zstd level=0")
    assert "control file comp_algorithm: zstd level: 0 is not from 1 to 22" in caplog.text


@pytest.mark.parametrize("command", ["", "lzo", "level=3"])
def test_no_algorithm_is_named_as_such(command: str) -> None:
    with pytest.raises(ValueError, match=f"not lz4, zstd or zstd level=N: {command!r}"):
        write(FakeEngine(), "comp_algorithm", command)


def test_columns_are_zram_s_in_pages() -> None:
    engine = FakeEngine()
    engine.counts |= {"read_bytes": 4 * 4096, "written_bytes": 5 * 4096, "cleaning_bytes": 6 * 4096}
    assert read(engine, "bd_stat").split() == ["3", "4", "11"]
    assert read(engine, "backing_dev") == "/dev/x y\n"
    assert read(engine, "writeback_limit") == "none\n"
    assert read(engine, "writeback_limit_enable") == "0\n"
    engine.counts["budget_bytes"] = 3 * 4096 - 1
    assert read(engine, "writeback_limit") == "2\n"
    assert read(engine, "writeback_limit_enable") == "1\n"
    write(engine, "writeback_limit_enable", "1")
    assert engine.told == [], "what is left stays"


@pytest.mark.parametrize("name", ["writeback_limit", "writeback_limit_enable"])
@pytest.mark.parametrize("command", ["", "-1", "1M", "none", "9" * 15])
def test_what_is_no_limit_changes_nothing(name: str, command: str) -> None:
    engine = FakeEngine()
    with pytest.raises(ValueError, match=r"not a number|neither 0 nor 1"):
        write(engine, name, command)
    assert engine.told == []


async def test_others_do_not_lock_root_out() -> None:
    fs = SwapFs(FakeEngine())  # type: ignore[arg-type]
    root: Any = SimpleNamespace(uid=0)
    other: Any = SimpleNamespace(uid=1000)
    inode = (await fs.lookup(pyfuse3.ROOT_INODE, b"backing_dev", root)).st_ino
    opened = [(await fs.open(inode, os.O_RDONLY, other)).fh for _ in range(256)]
    with pytest.raises(pyfuse3.FUSEError, match="Too many open files"):
        await fs.open(inode, os.O_RDONLY, other)
    for _ in range(256):
        await fs.open(inode, os.O_RDONLY, root)
    # Nor does root open without end.
    with pytest.raises(pyfuse3.FUSEError, match="Too many open files"):
        await fs.open(inode, os.O_RDONLY, root)
    for fh in opened:
        await fs.release(fh)
    with pytest.raises(pyfuse3.FUSEError, match="Too many open files"):
        await fs.open(inode, os.O_RDONLY, other)


async def test_a_writeback_that_takes_long_holds_up_no_other_request() -> None:
    engine, go_on = FakeEngine(), threading.Event()
    engine.wait = lambda: go_on.wait(60)
    fs = SwapFs(engine)  # type: ignore[arg-type]
    context = pyfuse3.RequestContext()

    async def opened(name: str, flags: int) -> pyfuse3.FileHandleT:
        inode = (await fs.lookup(pyfuse3.ROOT_INODE, name.encode(), context)).st_ino
        handle: pyfuse3.FileHandleT = (await fs.open(inode, flags, context)).fh
        return handle

    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fs.write, await opened("writeback", 1), 0, b"all\n")
                await trio.testing.wait_all_tasks_blocked()
                assert await fs.read(await opened("backing_dev", 0), 0, 100) == b"/dev/x y\n"
                await fs.write(await opened("idle", 1), 0, b"all")
                assert engine.told == ["idle 0"]
                go_on.set()
    finally:
        go_on.set()
    assert engine.told == ["idle 0", "all"]
