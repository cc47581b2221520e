"""The units, with systemd as process 1 of a virtual machine: order, confinement, and what survives whose death."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.machine import lacks
from tests.qemu.guest import BUILD, Guest

REPOSITORY = Path(__file__).parents[2]
DEADLINE_SECONDS = 1500

TEST_UNIT = """\
[Unit]
Description=The test
After=zswapd-swap.service swap.target
[Service]
Type=oneshot
PassEnvironment=SCRIPT
StandardOutput=file:/dev/ttyS1
StandardError=inherit
TimeoutStartSec=infinity
ExecStart=/bin/bash {script}
"""
#: Emulated, a process takes seconds to start.
WATCHDOG = "[Service]\nWatchdogSec=40\n"
SLEEP = """\
[Service]
ExecStart=
ExecStart=/bin/sh -c 'grep -q ^/dev/loop /proc/swaps && echo "with swap" >/run/slept || echo "without swap" >/run/slept'
"""


def installed() -> Path:
    """What make install makes, with everything enabled, and the test as a service."""
    root = BUILD / "installed"
    shutil.rmtree(root, ignore_errors=True)
    install = ["make", "--no-print-directory", "--assume-old=build", "install", f"DESTDIR={root}", "SYSTEMD=252"]
    subprocess.run(install, cwd=REPOSITORY, check=True)
    for program in ("zswapd", "zswapctl"):
        path = root / "usr/bin" / program
        # Not one in a home directory, which zswapd.service does not see.
        path.write_text("#!/usr/bin/python3 -I\n" + path.read_text().partition("\n")[2])
    (root / "etc/zswapd/zswapd.toml").write_text('[swap]\nsize = "128MiB"\n')
    units = root / "etc/systemd/system"
    for path, text in {
        "zswapd-test.service": TEST_UNIT.format(script=Path(__file__).with_name("systemd.sh")),
        "zswapd.service.d/watchdog.conf": WATCHDOG,
        "systemd-suspend.service.d/test.conf": SLEEP,
    }.items():
        (units / path).parent.mkdir(parents=True, exist_ok=True)
        (units / path).write_text(text)
    wanted = {
        "multi-user.target.wants": ("zswapd.service", "zswapd-pager.service", "zswapd-test.service"),
        "swap.target.wants": ("zswapd-swap.service",),
        "sleep.target.requires": ("zswapd-sleep.service",),
    }
    for directory, names in wanted.items():
        (units / directory).mkdir()
        for name in names:
            (units / directory / name).symlink_to(
                f"/usr/lib/systemd/system/{name}" if "test" not in name else f"/etc/systemd/system/{name}"
            )
    # What has nothing to do with it.
    for name in ("postgresql.service", "systemd-timesyncd.service", "e2scrub_reap.service", "getty@tty1.service"):
        (units / name).symlink_to("/dev/null")
    return root


def test_the_units_keep_what_they_promise() -> None:
    if not Path("/lib/systemd/systemd").exists() or not Path("/usr/bin/python3").exists():
        lacks("systemd, or python3 in /usr/bin")
    guest = Guest(memory=1024)
    outcome = guest.run(
        Path(__file__).with_name("systemd.sh"),
        {"INSTALLED": os.fspath(installed())},
        DEADLINE_SECONDS,
        parameters=(
            "systemd.unified_cgroup_hierarchy=1",
            "systemd.journald.forward_to_console=1",
            "systemd.mask=dev-vda.swap",
        ),
    )
    print(outcome.output)
    print(outcome.kernel_log[-20000:])
    assert outcome.status == 0, outcome.output
    # At shutdown, with swap attached.
    *_, shutdown = outcome.kernel_log.partition("a start makes all of it anew")
    assert (
        "detached: /dev/loop0" in outcome.kernel_log[outcome.kernel_log.rfind("attached: /dev/loop") + 1 :]
        or "detached: /dev/loop" in outcome.kernel_log
    )
    if "Power down" not in outcome.kernel_log:
        pytest.fail("the guest was not switched off in order")
