"""The units, with systemd as process 1 of a virtual machine: order, confinement, and what survives whose death."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.machine import lacks
from tests.qemu.guest import Guest

REPOSITORY = Path(__file__).parents[2]
#: Read by the guest.
BUILD = REPOSITORY / "build" / "qemu"
DEADLINE_SECONDS = 1500
#: In the guest.
SCRIPT = Path("/usr/local/bin/zswapd-test")

TEST_UNIT = """\
[Unit]
Description=The test
After=zswapd-swap.service swap.target
[Service]
Type=oneshot
StandardOutput=file:/dev/ttyS1
StandardError=inherit
TimeoutStartSec=infinity
ExecStart={script}
"""
#: Emulated, a process takes seconds to start.
WATCHDOG = "[Service]\nWatchdogSec=40\n"
JOURNAL = "[Journal]\nForwardToConsole=yes\nTTYPath=/dev/ttyS0\nMaxLevelConsole=info\n"
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
    for name, text in {
        "zswapd-test.service": TEST_UNIT.format(script=SCRIPT),
        "zswapd.service.d/watchdog.conf": WATCHDOG,
        "systemd-suspend.service.d/test.conf": SLEEP,
        "../journald.conf.d/console.conf": JOURNAL,
    }.items():
        (units / name).parent.mkdir(parents=True, exist_ok=True)
        (units / name).write_text(text)
    (root / SCRIPT.relative_to("/")).parent.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("systemd.sh"), root / SCRIPT.relative_to("/"))
    # Else it would empty this machine's /tmp, as the guest sees it.
    (root / "etc/tmpfiles.d").mkdir()
    (root / "etc/tmpfiles.d/tmp.conf").symlink_to("/dev/null")
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
        SCRIPT,
        {"INSTALLED": os.fspath(installed())},
        DEADLINE_SECONDS,
    )
    print(outcome.output)
    assert outcome.status == 0, outcome.kernel_log[-20000:]
    # At shutdown, with swap attached.
    _, begun, shutdown = outcome.kernel_log.rpartition("attached: /dev/loop")
    assert begun
    assert "detached: /dev/loop" in shutdown
    assert "stopped: nothing is attached or mounted any more" in shutdown
    assert "Power down" in shutdown
