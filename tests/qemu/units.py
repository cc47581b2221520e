"""A guest with systemd as process 1."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.qemu import images
from tests.qemu.guest import Guest, Outcome

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


def boot(
    script: str,
    installed: Path,
    deadline_seconds: int,
    *,
    memory: int,
    swap: str,
    environment: Mapping[str, str] | None = None,
    drop_ins: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs `script`, of this directory, as a service; it switches the machine off. `drop_ins`: texts by path, from
    /etc/systemd/system."""
    with tempfile.TemporaryDirectory(dir=installed.parent) as name:
        root = Path(name, "root")
        shutil.copytree(installed, root, symlinks=True)
        _enable(root, script, swap, environment or {}, drop_ins or {})
        guest = Guest(memory, images.image(root, Path(name, "image")))
        outcome = guest.run(script, {}, deadline_seconds, systemd=True, watched="hog")
    print(outcome.output)
    return outcome


def _enable(root: Path, script: str, swap: str, environment: Mapping[str, str], drop_ins: Mapping[str, str]) -> None:
    """Everything begins with the machine, and the test as a service."""
    (root / "etc/zswapd/zswapd.toml").write_text(f'[swap]\nsize = "{swap}"\n')
    units = root / "etc/systemd/system"
    variables = " ".join(f"{name}={value}" for name, value in {"HOG": images.HOG, **environment}.items())
    for name, text in {
        "zswapd-test.service": TEST_UNIT.format(script=images.TESTS / "tests/qemu" / script, environment=variables),
        "zswapd.service.d/watchdog.conf": WATCHDOG,
        "../journald.conf.d/console.conf": JOURNAL,
        **drop_ins,
    }.items():
        (units / name).parent.mkdir(parents=True, exist_ok=True)
        (units / name).write_text(text)
    for directory, names in WANTED.items():
        (units / directory).mkdir()
        for name in names:
            where = "/etc" if name == "zswapd-test.service" else "/usr/lib"
            (units / directory / name).symlink_to(f"{where}/systemd/system/{name}")
