"""The watchdog, with a pager that is stopped. Nobody has pages there: the loop device is not used as swap."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.daemon import DEADLINE_SECONDS, PAGE, Daemon
from tests.machine import lacks
from zswapd import stuck, watchdog
from zswapd.health import Health
from zswapd.pager import Pager


@pytest.fixture
def device(make_daemon: Callable[..., Daemon]) -> Iterator[tuple[Daemon, str]]:
    """A daemon, and a loop device on its swap file, which begins as a swap area does."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, bytes(PAGE - 10) + b"SWAPSPACE2", 0)
    losetup = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(daemon.swapfile)]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    yield daemon, device
    subprocess.run(["losetup", "--detach", device], check=True)


async def condition(holds: Callable[[], object], what: str) -> None:
    with trio.move_on_after(DEADLINE_SECONDS):
        while not holds():
            await trio.sleep(0.05)
        return
    pytest.fail(f"not in time: {what}")


async def test_a_page_that_a_stopped_pager_owes_is_said_until_it_comes(
    device: tuple[Daemon, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    daemon, name = device
    status = Pager(daemon.mount_point).status()
    health = Health(status)
    number = os.stat(name).st_rdev
    monkeypatch.setattr(watchdog, "LATE_SECONDS", DEADLINE_SECONDS)
    await watchdog._probe(name, health, lambda: stuck.pages(status))
    assert (health.probes, health.probe_failures, health.page_waits_since) == (1, 0, None)

    monkeypatch.setattr(watchdog, "LATE_SECONDS", 1)
    os.kill(status["pid"], signal.SIGSTOP)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watchdog._probe, name, health, lambda: stuck.pages(status))
            await condition(lambda: health.page_waits_since, "it is found")
            assert f"a page of {name} has not come for" in caplog.text
            assert f"the pager, pid {status['pid']}, is stopped (SIGSTOP, or a debugger)" in caplog.text
            if Path("/sys/fs/fuse/connections", str(os.minor(status["device"]))).exists():
                assert "requests to it are not answered" in caplog.text
            # As it looks for whoever has the loop device as its disk.
            before = stuck.requests(number)
            await trio.sleep(1)
            assert before[0] > 0
            assert stuck.requests(number) == before
            assert Path(f"/proc/{status['keeper']}").exists()
            os.kill(status["pid"], signal.SIGCONT)
        assert "pages come again: one took" in caplog.text
        assert (health.probes, health.probe_failures, health.page_waits_since) == (1, 1, None)
        assert stuck.requests(number)[0] == 0
        # It is the same one: who is stopped has not died.
        assert Pager(daemon.mount_point).status()["pid"] == status["pid"]
    finally:
        os.kill(status["pid"], signal.SIGCONT)
