"""What a pager is started with, and what becomes of settings that have changed when it is found again."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.errnos import raises_errno
from zswapd import pager as module
from zswapd import wear
from zswapd.config import Config, load
from zswapd.pager import Pager


def config(*overrides: str) -> Config:
    return load(None, overrides, {"ZSWAPD_CONFIG": os.devnull})


class Found(Pager):
    """The pager of a process that does nothing but have a command line; notes what it is told."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.told: list[str] = []

    def status(self) -> dict[str, int]:
        return {"pid": self.pid}

    def _ask(self, command: str) -> tuple[str, int | None]:
        self.told.append(command)
        return "pages=1" if command.startswith("sample") else "pages=1 bytes=2 end=full", None


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(started: list[subprocess.Popen[bytes]], with_config: Config) -> Found:
    words = [word for name, value in module.options(with_config).items() for word in (f"--{name}", value)]
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.read(1)  # it has its command line
    started.append(process)
    return Found(process.pid)


DISK = "writeback.backing=/dev/a b"


def test_options_of_writeback_are_given_only_with_a_disk() -> None:
    options = module.options(config(DISK, "writeback.encryption=false", "writeback.incompressible=first"))
    assert {name: options[name] for name in ("backing", "encryption", "incompressible")} == {
        "backing": "/dev/a b",
        "encryption": "off",
        "incompressible": "first",
    }
    assert (options["accept-threshold"], options["shrinkers"]) == ("90", "2")
    assert not {"backing", "encryption", "accept-threshold"} & module.options(config()).keys()


def test_nothing_is_said_or_told_if_nothing_has_changed(started: list[subprocess.Popen[bytes]]) -> None:
    pager = start(started, config(DISK))
    assert pager.backing() == Path("/dev/a b")
    assert pager.apply(config(DISK, "writeback.budget_per_hour=1GiB", "swap.priority=7")) == []
    assert pager.told == []


def test_what_can_be_is_applied_and_the_rest_is_named(started: list[subprocess.Popen[bytes]]) -> None:
    pager = start(started, config(DISK))
    changed = config(
        DISK,
        "writeback.accept_threshold_percent=70",
        "pool.mem_limit=8MiB",
        "compression.zstd_level=9",
        "writeback.incompressible=keep",
        "swap.size=8MiB",
    )
    assert pager.apply(changed) == ["swap.size", "writeback.incompressible"]
    assert pager.told == ["mem-limit 8388608", "compression lz4 9", "accept-threshold 70"]


def test_a_file_of_another_size_waits_for_the_next_pager(started: list[subprocess.Popen[bytes]]) -> None:
    def sized(size: str) -> Config:
        return config("writeback.backing=/backing", f"writeback.size={size}")

    pager: Any = start(started, sized("16MiB"))
    pager._counters = SimpleNamespace(stats=lambda: {"writeback": {"backing_bytes": 16 << 20}})
    assert pager.apply(sized("16MiB")) == []
    assert pager.apply(sized("16388KiB")) == []  # less than a segment more
    assert pager.apply(sized("32MiB")) == ["writeback.size"]


def test_a_disk_that_comes_or_goes_waits_for_the_next_pager(started: list[subprocess.Popen[bytes]]) -> None:
    all_of_it = ["writeback.backing", "writeback.encryption", "writeback.incompressible", "writeback.shrinkers"]
    for old, new in ((config(), config(DISK)), (config(DISK), config())):
        pager = start(started, old)
        assert pager.backing() == (Path("/dev/a b") if old.writeback.backing else None)
        assert pager.apply(new) == all_of_it
        assert pager.told == []


def test_commands_are_the_pager_s(started: list[subprocess.Popen[bytes]]) -> None:
    pager = start(started, config(DISK))
    pager.mark_idle(0)
    pager.mark_idle(60)
    assert pager.shrink(4096).ended == "full"
    written = pager.write_back("page 7")
    assert (written.pages, written.bytes) == (1, 2)
    pager.limit_writing(None)
    pager.limit_writing(0)
    pager.grant(5)
    pager.promote(False)
    assert pager.sample(512) == 1
    assert pager.told == [
        *("idle all", "idle 60", "shrink 4096", "writeback page 7"),
        *("writeback-limit none", "writeback-limit 0", "writeback-limit +5", "promote off"),
        "sample 512",
    ]


def test_whether_what_does_not_compress_is_kept_is_as_the_pager_was_told(
    started: list[subprocess.Popen[bytes]],
) -> None:
    assert start(started, config(DISK, "writeback.incompressible=keep")).keeps_incompressible()
    assert not start(started, config(DISK)).keeps_incompressible()


def test_of_a_budget_an_operator_can_only_take_away(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    settings = config(DISK, "writeback.budget_per_hour=1GiB")
    pager, granted = start(started, settings), [0]
    pager.budget = wear.Budget(settings.writeback, lambda: 1e9)
    pager.budget.top_up(lambda more: granted.append(granted.pop() + more))
    monkeypatch.setattr(pager, "unused_budget", lambda: granted[0])
    for refused in (None, (1 << 30) + 1):
        with raises_errno(errno.EPERM):
            pager.limit_writing(refused)
    assert pager.told == []
    granted[0] -= 1 << 20  # written
    pager.limit_writing(1 << 29)
    granted[0] = 1 << 29
    assert pager.told == [f"writeback-limit {1 << 29}"]
    # It stays so: nothing is granted anew in this hour.
    pager.budget.observe(granted[0])
    pager.budget.top_up(lambda more: pytest.fail(f"granted: {more}"))
    assert pager.budget.left() == 1 << 29
    with raises_errno(errno.EPERM):
        pager.limit_writing((1 << 29) + 1)
