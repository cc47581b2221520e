"""A guest with systemd as process 1, over this machine's root, with what make install makes."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.machine import lacks
from tests.qemu.guest import Guest, Outcome

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
#: Read by the guest.
INSTALLED = REPOSITORY / "build" / "qemu" / "installed"
#: In the guest.
PROGRAMS = Path("/usr/local/bin")

TEST_UNIT = """\
[Unit]
Description=The test
After=zswapd-swap.service swap.target
[Service]
Type=oneshot
StandardOutput=file:/dev/ttyS1
StandardError=inherit
TimeoutStartSec=infinity
Environment={environment}
ExecStart={script}
"""
#: Emulated, a process takes seconds to start.
WATCHDOG = "[Service]\nWatchdogSec=40\n"
JOURNAL = "[Journal]\nForwardToConsole=yes\nTTYPath=/dev/ttyS0\nMaxLevelConsole=info\n"
#: What begins with the machine: units by the directory that systemd looks for them in.
WANTED = {
    "multi-user.target.wants": ("zswapd.service", "zswapd-pager.service", "zswapd-test.service"),
    "swap.target.wants": ("zswapd-swap.service",),
    "sleep.target.requires": ("zswapd-sleep.service",),
}
#: Of this machine's, what has nothing to do with it.
MASKED = ("postgresql.service", "systemd-timesyncd.service", "e2scrub_reap.service", "getty@tty1.service")


def boot(
    script: str,
    hog: Path,
    deadline_seconds: int,
    *,
    memory: int,
    swap: str,
    environment: Mapping[str, str] | None = None,
    drop_ins: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs `script`, of this directory, as a service; it switches the machine off. `drop_ins`: texts by path, from
    /etc/systemd/system."""
    if not Path("/lib/systemd/systemd").exists() or not Path("/usr/bin/python3").exists():
        lacks("systemd, or python3 in /usr/bin")
    guest = Guest(memory)
    _install(script, hog, swap, {"HOG": f"{PROGRAMS}/hog", **(environment or {})}, drop_ins or {})
    path = PROGRAMS / script
    outcome = guest.run(path, {"INSTALLED": os.fspath(INSTALLED)}, deadline_seconds, watched="hog")
    print(outcome.output)
    return outcome


def _install(script: str, hog: Path, swap: str, environment: Mapping[str, str], drop_ins: Mapping[str, str]) -> None:
    """What make install makes, with everything enabled, and the test as a service."""
    root = INSTALLED
    shutil.rmtree(root, ignore_errors=True)
    install = ["make", "--no-print-directory", "--assume-old=build", "install", f"DESTDIR={root}", "SYSTEMD=252"]
    subprocess.run(install, cwd=REPOSITORY, check=True)
    for program in ("zswapd", "zswapctl"):
        path = root / "usr/bin" / program
        # Not one in a home directory, which zswapd.service does not see.
        path.write_text("#!/usr/bin/python3 -I\n" + path.read_text().partition("\n")[2])
    (root / "etc/zswapd/zswapd.toml").write_text(f'[swap]\nsize = "{swap}"\n')
    units = root / "etc/systemd/system"
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    for name, text in {
        "zswapd-test.service": TEST_UNIT.format(script=PROGRAMS / script, environment=variables),
        "zswapd.service.d/watchdog.conf": WATCHDOG,
        "../journald.conf.d/console.conf": JOURNAL,
        **drop_ins,
    }.items():
        (units / name).parent.mkdir(parents=True, exist_ok=True)
        (units / name).write_text(text)
    programs = root / PROGRAMS.relative_to("/")
    programs.mkdir(parents=True)
    shutil.copy(HERE / script, programs)
    shutil.copy(hog, programs)
    # Else it would empty this machine's /tmp, as the guest sees it.
    (root / "etc/tmpfiles.d").mkdir()
    (root / "etc/tmpfiles.d/tmp.conf").symlink_to("/dev/null")
    for directory, names in WANTED.items():
        (units / directory).mkdir()
        for name in names:
            where = "/etc" if name == "zswapd-test.service" else "/usr/lib"
            (units / directory / name).symlink_to(f"{where}/systemd/system/{name}")
    for name in MASKED:
        (units / name).symlink_to("/dev/null")
