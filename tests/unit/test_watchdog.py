"""The watchdog: what is read as a test, and what is said when it does not come."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.daemon import DEADLINE_SECONDS
from zswapd import backing, stuck, swapdev, watchdog
from zswapd.health import Health
from zswapd.pager import Pager
from zswapd.swapdev import Attachment
from zswapd.watchdog import ProbeError

ATTACHED = Attachment("/dev/loop9", True, True, 1 << 30, 1 << 20, 100)
STATUS = {"pid": 42, "device": os.makedev(0, 61), "keeper": 1, "standby": 2, "resend": 1}


class FakePager:
    mount_point = Path("/run/zswapd-test/mnt")
    refuses = False

    def __init__(self) -> None:
        self.asked = 0
        self.path: Path | None = None

    def backing(self) -> Path | None:
        return self.path

    def status(self) -> dict[str, int]:
        self.asked += 1
        if self.refuses:
            raise TimeoutError(110, "no answer")
        return STATUS


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How often it was fed since it was asked last."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def fed() -> int:
            count = 0
            while True:
                try:
                    assert listener.recv(100) == b"WATCHDOG=1"
                except BlockingIOError:
                    return count
                count += 1

        yield fed


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mock clock does not wait for them."""

    async def here(function: Callable[..., Any], *arguments: Any, abandon_on_cancel: bool = False) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", here)


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[Attachment | None]:
    """What is attached: the last of the list."""
    found: list[Attachment | None] = [ATTACHED]
    monkeypatch.setattr(swapdev, "discover", lambda mount_point, device_number: found[-1])
    monkeypatch.setattr(stuck, "pages", lambda status: "the reason")
    return found


class Device:
    """In the place of read_page."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        self.waiting = 0
        self.comes = trio.Event()
        self.comes.set()
        self.error: str | None = None
        monkeypatch.setattr(watchdog, "read_page", self)

    async def __call__(self, device: str) -> None:
        assert device == "/dev/loop9"
        self.read += 1
        self.waiting += 1
        await self.comes.wait()
        self.waiting -= 1
        if self.error:
            raise ProbeError(self.error)


async def test_systemd_is_fed_by_pages_that_come(
    systemd: Callable[[], int], attached: list[Any], monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    device, health = Device(monkeypatch), Health(STATUS)
    with trio.move_on_after(watchdog.PERIOD_SECONDS * 3.5):
        await watchdog.run(cast(Pager, FakePager()), health)
    assert (device.read, systemd(), health.probes, health.probe_failures) == (4, 4, 4, 0)


async def test_it_is_fed_often_enough(
    systemd: Callable[[], int], attached: list[Any], monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    Device(monkeypatch)
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    with trio.move_on_after(9.5):
        await watchdog.run(cast(Pager, FakePager()), Health(STATUS))
    assert systemd() == 10


async def test_without_swap_it_is_enough_that_the_pager_answers(
    systemd: Callable[[], int], attached: list[Any], monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    device, pager = Device(monkeypatch), FakePager()
    attached.append(None)
    with trio.move_on_after(watchdog.PERIOD_SECONDS * 1.5):
        await watchdog.run(cast(Pager, pager), Health(STATUS))
    assert (device.read, pager.asked, systemd()) == (0, 2, 2)
    pager.refuses = True
    with trio.move_on_after(watchdog.PERIOD_SECONDS * 1.5):
        await watchdog.run(cast(Pager, pager), Health(STATUS))
    assert (pager.asked, systemd()) == (4, 0)


async def test_a_page_that_does_not_come_is_waited_for_alone_and_said(
    systemd: Callable[[], int],
    attached: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, health = Device(monkeypatch), Health(STATUS)
    device.comes = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watchdog.run, cast(Pager, FakePager()), health)
        await trio.sleep(watchdog.LATE_SECONDS + watchdog.REMIND_SECONDS * 2 + 1)
        # One, however long it takes, and nothing is fed.
        assert (device.read, device.waiting, systemd()) == (1, 1, 0)
        assert (health.probes, health.probe_failures) == (0, 1)
        assert health.waited(health.page_waits_since) > watchdog.LATE_SECONDS
        said = re.findall(r"a page of /dev/loop9 has not come for (\d+) s: the reason", caplog.text)
        assert said == ["10", "310", "610"]
        device.comes.set()
        await trio.sleep(watchdog.PERIOD_SECONDS + 1)
        assert health.page_waits_since is None
        assert "pages come again: one took 611.0 s" in caplog.text
        assert (device.read, systemd(), health.probe_failures) == (2, 2, 1)
        nursery.cancel_scope.cancel()


async def test_a_wrong_page_is_an_error_unless_the_swap_was_detached_meanwhile(
    systemd: Callable[[], int],
    attached: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, health = Device(monkeypatch), Health(STATUS)
    device.error = "it is wrong"
    with trio.move_on_after(1):
        await watchdog.run(cast(Pager, FakePager()), health)
    assert (health.probe_failures, systemd()) == (1, 0)
    assert "a page of /dev/loop9 was read as a test: it is wrong" in caplog.text
    caplog.clear()
    device.comes = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watchdog.run, cast(Pager, FakePager()), health)
        await wait_all_tasks_blocked()
        attached.append(None)
        device.comes.set()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert (health.probe_failures, caplog.text) == (1, "")


async def test_a_disk_that_completes_nothing_is_said(
    systemd: Callable[[], int],
    attached: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While pages that do not lie there come."""
    device, pager, health = Device(monkeypatch), FakePager(), Health(STATUS)
    pager.path = Path("/dev/null")
    counts = (0, 7)
    monkeypatch.setattr(backing, "number_of", lambda path: (1, False))
    monkeypatch.setattr(stuck, "requests", lambda number: counts)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watchdog.run, cast(Pager, pager), health)
        await trio.sleep(100)
        assert health.disk_waits_since is None
        counts = (3, 7)
        await trio.sleep(30)
        assert "the backing disk /dev/null has 3 requests, and has completed none for" in caplog.text
        assert health.waited(health.disk_waits_since) > watchdog.LATE_SECONDS
        assert caplog.text.count("completed none") == 1
        counts = (3, 8)
        await trio.sleep(7)
        assert "the backing disk /dev/null goes on" in caplog.text
        assert health.disk_waits_since is None
        nursery.cancel_scope.cancel()
    assert device.read == health.probes > 10


# With a real child


async def test_a_page_is_read_whole_and_looked_at(tmp_path: Path) -> None:
    area = tmp_path / "area"
    if os.statvfs(tmp_path).f_bsize != 4096:
        pytest.skip("this machine lacks what the test needs: a file system with direct I/O")
    area.write_bytes(bytes(4086) + b"SWAPSPACE2" + bytes(4096))
    with trio.fail_after(DEADLINE_SECONDS):
        await watchdog.read_page(str(area))
        area.write_bytes(bytes(8192))
        with pytest.raises(ProbeError, match="not what mkswap has written"):
            await watchdog.read_page(str(area))
        area.write_bytes(b"SWAPSPACE2")
        with pytest.raises(ProbeError, match="not what mkswap has written"):
            await watchdog.read_page(str(area))
        with pytest.raises(ProbeError, match="No such file"):
            await watchdog.read_page(str(tmp_path / "none"))


async def test_a_child_that_waits_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")  # nobody writes to it
    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watchdog.read_page, str(tmp_path / "fifo"))
            await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
