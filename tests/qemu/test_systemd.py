"""The units, with systemd as process 1 of a virtual machine: order, confinement, what survives whose death; and what
becomes of the pages when the machine ends."""

import re
from pathlib import Path

import pytest

from tests.qemu import units
from tests.qemu.guest import WITHOUT

DEADLINE_SECONDS = 1500
#: Before systemd puts the machine to sleep.
SLEEP = """\
[Service]
ExecStartPre=/bin/sh -c 'grep ^/dev/loop /proc/swaps >/run/swaps-asleep || true'
"""
#: Nobody detaches when the machine ends, and the pager does not wait until systemd itself has.
NO_STOP = "[Service]\nExecStop=\nKillMode=control-group\nKillSignal=SIGKILL\nSendSIGKILL=yes\n"
NO_DETACH = {f"{unit}.service.d/no-detach.conf": NO_STOP for unit in ("zswapd-swap", "zswapd-pager")}
SHUTDOWN_MIB, SHUTDOWN_HOG_MIB = 640, 480
#: More than is ever stored: a page whose write was refused stays in memory, and keeps its place in the swap area.
SHUTDOWN_SWAP = "640MiB"


def test_the_units_keep_what_they_promise(installed: Path) -> None:
    outcome = units.boot(
        "systemd.sh",
        installed,
        DEADLINE_SECONDS,
        memory=1024,
        swap="128MiB",
        drop_ins={"systemd-suspend.service.d/test.conf": SLEEP},
    )
    assert outcome.status == 0, outcome.kernel_log[-20000:]
    # At shutdown, with swap attached.
    _, begun, shutdown = outcome.kernel_log.rpartition("attached: /dev/loop")
    assert begun
    assert "detached: /dev/loop" in shutdown
    assert "stopped: nothing is attached or mounted any more" in shutdown
    assert "Power down" in shutdown


@pytest.mark.parametrize(("action", "end"), [("poweroff", "Power down"), ("reboot", "Restarting system")])
def test_the_machine_ends_in_order_under_load(installed: Path, action: str, end: str) -> None:
    """Memory is used up, and goes on being rewritten, when the machine is told to end. The swap is detached before it
    does, by itself; nothing hangs; and who lives to the end has all its pages, as they were."""
    outcome = units.boot(
        "shutdown.sh",
        installed,
        DEADLINE_SECONDS,
        memory=SHUTDOWN_MIB,
        swap=SHUTDOWN_SWAP,
        environment={"ACTION": action, "MEBIBYTES": str(SHUTDOWN_HOG_MIB)},
        drop_ins=NO_DETACH if WITHOUT == "detaching" else {},
    )
    log = outcome.kernel_log
    assert (outcome.status, outcome.hung) == (0, False), log[-20000:]
    assert re.search(r"^at the end: hog: check: \d+ pages, 0 wrong, 0 lost", outcome.output, re.MULTILINE), log[-5000:]
    assert "at the end: swap is attached" not in outcome.output
    order = ("detached: /dev/loop", "stopped: nothing is attached or mounted any more", end)
    places = [log.find(text) for text in order]
    assert -1 not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)
    assert "oom_kill 0" in outcome.output
    assert not outcome.complaints()
