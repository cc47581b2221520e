"""Where pages come from: a process, all processes of a cgroup, a file of pages, or a core dump.

Nothing is read here but tables that say where the pages are.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from zswapd import memcg
from zswapd.analyze import elfcore
from zswapd.anonymous import PAGE, Memory
from zswapd.errors import ZswapdError

PF_KTHREAD = 0x00200000  # include/linux/sched.h


class Reader(Protocol):
    """Something opened that has pages."""

    def read(self, at: int, buffer: memoryview) -> int:
        """Reads whole pages from `at` on, as many as there are. Returns the bytes read; 0 where none can be."""


@dataclass(frozen=True)
class Part:
    """Pages that belong together, such as a mapping. `runs`: from where to where in what `pid` or `path` names."""

    name: str
    runs: list[tuple[int, int]]
    pid: int | None = None
    path: Path | None = None

    @property
    def pages(self) -> int:
        return sum(end - start for start, end in self.runs) // PAGE

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """Raises OSError, as where the process has ended."""
        if self.pid is not None:
            with Memory(self.pid) as memory:
                yield memory
        else:
            assert self.path
            with File(self.path) as file:
                yield file


class File:
    """A file, opened for reading pages."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, at: int, buffer: memoryview) -> int:
        try:
            return os.preadv(self._fd, [buffer], at) // PAGE * PAGE
        except OSError:
            return 0


@dataclass
class Source:
    """What is analyzed. `swapped`: pages that are in swap, and not looked at; `notes`: what else was left out."""

    name: str
    parts: list[Part] = field(default_factory=list)
    swapped: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def pages(self) -> int:
        return sum(part.pages for part in self.parts)


def find(kind: str, which: str) -> Source:
    """What `kind` (pid, cgroup, file, core) and `which` name. Raises ZswapdError, also where it has no page."""
    source = {"pid": _process, "cgroup": _cgroup, "file": _file, "core": _core}[kind](which)
    if not source.pages:
        raise ZswapdError(
            f"{source.name} has no page to analyze"
            + (f": all of its {source.swapped} anonymous pages are in swap" if source.swapped else ""),
            "; ".join(source.notes) or "choose something that uses memory of its own: a process, a cgroup, a core dump",
        )
    return source


def processes(kind: str, which: str) -> list[int]:
    """The pids that a pid or a cgroup names. Raises ZswapdError."""
    return [_pid(which)] if kind == "pid" else _members(_group(which))


def _pid(which: str) -> int:
    if not which.isascii() or not which.isdigit():
        raise ZswapdError(f"{which} is not a pid", "analyze pid takes a number; see ps(1)")
    return int(which)


def _process(which: str) -> Source:
    pid = _pid(which)
    try:
        source = Source(f"pid {pid} ({_text(pid, 'comm').strip()})")
        state, *fields = _text(pid, "stat").rpartition(")")[2].split()
        # Neither has memory to open.
        if int(fields[5]) & PF_KTHREAD:
            raise ZswapdError(
                f"{source.name} is a kernel thread: it has no memory of its own", "choose a process or a cgroup"
            )
        if state == "Z":
            raise ZswapdError(f"{source.name} has ended, and waits for its parent to notice", "choose another process")
        _add(source, pid, set())
    except (FileNotFoundError, ProcessLookupError):
        raise ZswapdError(f"there is no process {pid}", "it has ended, or never was: see ps(1)") from None
    except PermissionError:
        raise ZswapdError(f"the memory of process {pid} may not be read", "run it as root") from None
    return source


def _add(source: Source, pid: int, frames: set[int]) -> None:
    name = f"{pid} {_text(pid, 'comm').strip()}"
    with Memory(pid) as memory:
        for mapping in memory.mappings(frames):
            source.swapped += mapping.swapped
            if mapping.runs:
                source.parts.append(Part(f"{name} {mapping.name}".strip(), mapping.runs, pid=pid))


def _text(pid: int, file: str) -> str:
    return Path("/proc", str(pid), file).read_text(errors="replace")


def _cgroup(which: str) -> Source:
    group = _group(which)
    source, frames = Source(f"cgroup {group}"), set[int]()
    ended = refused = 0
    pids = _members(group)
    for pid in pids:
        try:
            _add(source, pid, frames)
        except PermissionError:
            refused += 1
        except OSError:  # a kernel thread, too
            ended += not os.path.exists(f"/proc/{pid}")
    if refused == len(pids) > 0:
        raise ZswapdError(f"the memory of none of the {refused} processes of {group} may be read", "run it as root")
    if refused:
        source.notes.append(f"{refused} of {len(pids)} processes may not be read")
    if ended:
        source.notes.append(f"{ended} of {len(pids)} processes have ended meanwhile")
    if not pids:
        source.notes.append("no process is in it, or in a cgroup below it")
    return source


def _group(which: str) -> Path:
    """Its directory: named itself, or by its path in the hierarchy of the memory controller (/proc/PID/cgroup)."""
    candidates = [Path(which)] if which.startswith("/") else []
    if controller := memcg.find_controller():
        candidates.append(controller.path / which.lstrip("/"))
    for group in candidates:
        if (group / "cgroup.procs").exists():
            return group
    looked = ", ".join(str(group) for group in candidates) or "no memory controller is mounted"
    raise ZswapdError(
        f"there is no cgroup {which} (looked for {looked})", "name its directory, or its path as in /proc/PID/cgroup"
    )


def _members(group: Path) -> list[int]:
    """The processes in a cgroup and those below it, but us."""
    pids: dict[int, None] = {}
    for directory, _, _ in os.walk(group):
        try:
            text = Path(directory, "cgroup.procs").read_text()
        except OSError:  # removed meanwhile, or a cgroup of threads, whose processes are named above
            continue
        pids.update(dict.fromkeys(int(pid) for pid in text.split()))
    pids.pop(os.getpid(), None)
    return list(pids)


def _file(which: str) -> Source:
    path = _regular(which)
    end = path.stat().st_size // PAGE * PAGE
    return Source(f"file {path}", [Part(path.name, [(0, end)], path=path)])


def _core(which: str) -> Source:
    path = _regular(which)
    core = elfcore.read(path)
    source = Source(f"core dump {path}")
    source.parts = [
        Part(f"segment at {segment.address:#x}", [(segment.offset, segment.offset + segment.size)], path=path)
        for segment in core.segments
    ]
    if core.missing:
        source.notes.append(f"the file ends {core.missing} bytes early: the core dump was cut off")
    return source


def _regular(which: str) -> Path:
    path = Path(which)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ZswapdError(f"{path} is not a regular file", "name a file of pages, or a core dump")
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise ZswapdError(f"{path} cannot be read: {error.strerror}", "name a file that may be read") from None
    return path
