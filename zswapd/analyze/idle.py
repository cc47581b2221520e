"""How much of processes' memory nobody uses for a while, as the kernel's accessed bits say."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from zswapd.analyze.sample import Report
from zswapd.errors import ZswapdError

STEP_SECONDS = 0.2
_FIELD = re.compile(r"(Anonymous|Rss|Referenced): +(\d+) kB")


def measure(pids: Sequence[int], seconds: float, report: Report) -> float:
    """The share of anonymous memory in RAM that was not used for so many seconds.

    Clears the accessed bits of the processes' anonymous memory (/proc/PID/clear_refs), so reclaim takes it for a
    little less used than it is. A huge page counts as one. Raises ZswapdError where that may not be done.
    """
    begun = [pid for pid in pids if _clear(pid)]
    if not begun:
        raise ZswapdError("no process is left whose memory could be watched", "name one that goes on running")
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        report("watching which pages are used", round(10 * (seconds - left)), round(10 * seconds))
        time.sleep(min(STEP_SECONDS, left))
    figures = [_used(pid) for pid in begun]
    used, present = sum(one[0] for one in figures), sum(one[1] for one in figures)
    if not present:
        raise ZswapdError("all that was watched has ended", "name processes that go on running")
    return 1 - used / present


def _clear(pid: int) -> bool:
    """False where the process has ended."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("2")  # anonymous pages
    except PermissionError:
        raise ZswapdError(f"/proc/{pid}/clear_refs may not be written", "run it as root, or without --watch") from None
    except OSError:
        return False
    return True


def _used(pid: int) -> tuple[float, int]:
    """Of a process's anonymous memory in RAM: KiB that were used since, and all; zeros where it has ended."""
    used, present = 0.0, 0
    try:
        text = Path(f"/proc/{pid}/smaps").read_text(errors="replace")
    except OSError:
        return 0.0, 0
    for mapping in text.split("VmFlags:"):
        fields = {name: int(value) for name, value in _FIELD.findall(mapping)}
        if anonymous := fields.get("Anonymous", 0):
            present += anonymous
            # Referenced counts pages of a mapped file, too, of which a private mapping has some.
            used += anonymous * fields["Referenced"] / fields["Rss"]
    return used, present
