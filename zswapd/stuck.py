"""Why pages may not come, as /proc and /sys tell it: without asking anybody who may be stuck himself."""

import os
from pathlib import Path

from zswapd.swapdev import ROOT


def pages(status: dict[str, int], root: Path = ROOT) -> str:
    """For people. `status` is what the pager last said of itself."""
    pid = status["pid"]
    threads = _threads(pid, root)
    found = []
    if not threads:
        found.append(f"the pager, pid {pid}, is gone, and no other has taken over yet")
    elif all(state in "Tt" for _, state in threads):
        found.append(f"the pager, pid {pid}, is stopped (SIGSTOP, or a debugger)")
    elif waiting := sorted(name for name, state in threads if state == "D"):
        found.append(f"of the pager, pid {pid}, these threads wait in the kernel: {', '.join(waiting)}")
    else:
        found.append(f"none of the threads of the pager, pid {pid}, waits in the kernel")
    minor = os.minor(status["device"])
    if (requests := _number(root / f"sys/fs/fuse/connections/{minor}/waiting")) is not None:
        found.append(f"{requests} requests to it are not answered")
    return "; ".join(found)


def requests(number: int, root: Path = ROOT) -> tuple[int, int]:
    """Of a block device: requests that are under way, and those that are completed. Raises OSError."""
    device = f"{os.major(number)}:{os.minor(number)}"
    # Documentation/block/stat.rst: reads, writes, in_flight and times, discards, flushes.
    columns = [int(word) for word in (root / f"sys/dev/block/{device}/stat").read_text().split()]
    completed = columns[0] + columns[4] + sum(columns[11:12]) + sum(columns[15:16])
    return columns[8], completed


def _threads(pid: int, root: Path) -> list[tuple[str, str]]:
    """Name and state of each; none: there is no such process."""
    found = []
    for path in sorted(root.glob(f"proc/{pid}/task/*/stat")):
        try:
            name, _, rest = path.read_text(errors="replace").partition("(")[2].rpartition(")")
        except OSError:  # it has ended meanwhile
            continue
        found.append((name, rest.split()[0]))
    return [] if all(state in "ZX" for _, state in found) else found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
