"""What a run has left on the machine, looked for rather than assumed."""

import os
import tempfile
from pathlib import Path

from zswapd import memcg, swapdev


def leftovers(directory: Path) -> list[str]:
    """Swap areas, loop devices, mounts and files under `directory`, and programs' files, cgroups and processes of
    this process."""
    inside = str(directory.resolve() / f"zswapd-bench-{os.getpid()}")
    found = [f"swap area {area.path}" for area in swapdev.read_swaps() if area.path.startswith(inside)]
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        if inside in _text(loop):
            found.append(f"loop device /dev/{loop.parts[3]}")
            found += [f"swap area {area.path}" for area in swapdev.read_swaps() if area.path == f"/dev/{loop.parts[3]}"]
    found += [f"mount {line.split()[4]}" for line in _text(Path("/proc/self/mountinfo")).splitlines() if inside in line]
    if not any(one.startswith("mount") for one in found):
        places = {directory.resolve(), Path(tempfile.gettempdir()).resolve()}
        found += [f"file {path}" for place in places for path in place.glob(f"zswapd-bench-{os.getpid()}*")]
    if controller := memcg.find_controller():
        found += [f"cgroup {path}" for path in controller.path.glob(f"zswapd-bench-{os.getpid()}-*")]
    for process in Path("/proc").glob("[0-9]*"):
        status = _text(process / "stat").rpartition(")")[2].split()
        ours = status[1:2] == [str(os.getpid())] or inside in _text(process / "cmdline")
        if ours:
            found.append(f"process {process.name} ({_text(process / 'comm').strip()})")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it went away meanwhile, which is what we hope for
        return ""
