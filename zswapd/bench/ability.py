"""Whether this machine lets us swap, and if not, why."""

import os
import re
import shutil
from pathlib import Path

from zswapd import kernel, memcg
from zswapd.errors import ZswapdError

CAP_SYS_ADMIN = 21
PROGRAMS = ("losetup", "mkswap", "swapon", "swapoff")


def cannot_swap() -> str:
    """Why no swap device can be set up here, in one line; empty when it can."""
    status = Path("/proc/self/status").read_text()
    capabilities = int((re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE) or ["", "0"])[1], 16)
    if os.geteuid() != 0:
        return "not root"
    if not capabilities >> CAP_SYS_ADMIN & 1:
        return "no CAP_SYS_ADMIN (a container?)"
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        return "root only inside a user namespace (a container?)"
    for device in ("/dev/fuse", "/dev/loop-control"):
        try:
            os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return f"{device}: {error.strerror}"
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    for program in PROGRAMS:
        if not shutil.which(program, path=path):
            return f"{program} is not installed"
    controller = memcg.find_controller()
    if controller is None:
        return "no memory cgroup controller is mounted"
    if not os.access(controller.path, os.W_OK):
        return f"{controller.path} is read-only"
    try:
        kernel.refuse_settings()
    except ZswapdError as error:
        return error.message
    return ""
