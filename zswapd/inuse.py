"""Whether another zswapd serves a mount point already."""

import json
import subprocess
from pathlib import Path

from zswapd.errors import InUseError
from zswapd.swapdev import is_mounted

_ANSWER_SECONDS = 5


def in_use(mount_point: Path, pid: int | None) -> InUseError:
    by = "another zswapd" if pid is None else f"zswapd, pid {pid}"
    return InUseError(f"the mount point {mount_point} is in use by {by}", "see zswapctl status")


def refuse_in_use(mount_point: Path) -> None:
    """Raises InUseError if a file system there answers as zswapd does, or does not answer at all for some seconds.

    Nothing but that: one whose server is dead is not in use, and what else is mounted there is not ours to judge.
    """
    if not is_mounted(mount_point):
        return
    # A child reads it: a process that waits for a stopped daemon may be impossible to kill, so it must not be us.
    child = subprocess.Popen(
        ["cat", mount_point / "stats.json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        said, _ = child.communicate(timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        raise in_use(mount_point, None) from None
    try:
        pid = json.loads(said)["pid"]
    except (ValueError, KeyError, TypeError):
        return
    raise in_use(mount_point, pid)
