"""Whether pages may be forgotten: the benchmark's floor is a swap device that stores nothing.

It comes first in priority, so whatever the kernel swaps out on this machine meanwhile goes there, and comes back as
zeros. Nothing in the kernel reserves a swap device for one cgroup. So it is used only where nothing but the limit of
the workload's own cgroup makes the kernel swap; a process that asks for it by itself (MADV_PAGEOUT, memory.reclaim) is
not seen beforehand.
"""

import re
from pathlib import Path

from zswapd import memcg
from zswapd.bench import damon
from zswapd.config import format_size

UNLIMITED = 1 << 62  # cgroup v1 writes LONG_MAX, rounded down to a page
FREE_BYTES = 2 << 30  # free, not only available: where little is free, the kernel reclaims for the machine as a whole


def why_not_forget(own_group: Path, size_bytes: int, root: Path = Path("/")) -> str:
    """Why another process's pages could be lost in a run that touches `size_bytes`, in one line; empty when not.

    `own_group` is the cgroup whose pages may be lost. Changes nothing.
    """
    for switch in damon.switches(root):
        if switch.is_on:
            return f"DAMON may swap out any process (/{switch.path.relative_to(root)} is {switch.on})"
    free = re.search(r"^MemFree:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
    if not free or int(free[1]) << 10 < 2 * size_bytes + FREE_BYTES:
        return (
            f"less than {format_size(2 * size_bytes + FREE_BYTES)} is free: the kernel could swap out any process "
            "(sync; echo 1 > /proc/sys/vm/drop_caches makes the page cache free memory)"
        )
    controller = memcg.find_controller(root)
    if controller is None:
        return "no memory cgroup controller is mounted"
    for name in ("memory.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.max", "memory.high"):
        for limit in sorted(controller.path.rglob(name)):
            text = limit.read_text().strip()
            if limit.parent != own_group and text != "max" and int(text) < UNLIMITED:
                return f"another cgroup has a limit ({limit} is {format_size(int(text))}), and may swap"
    return ""
