"""Memory cgroups, v1 and v2: where the controller is, what limits a process, and which groups swapping back in would
push past their limit."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Controller:
    """The memory controller: cgroup version (1 or 2) and the directory of its root group."""

    version: int
    path: Path


@dataclass(frozen=True)
class Overflow:
    """A group that cannot hold its own pages without swap: `need_bytes` > `limit_bytes`."""

    group: str
    need_bytes: int
    limit_bytes: int


def find_controller(root: Path = Path("/")) -> Controller | None:
    """The memory controller, or None where there is none (not mounted, or disabled)."""
    for line in (root / "proc/self/mounts").read_text().splitlines():
        _, mount_point, kind, options = line.split()[:4]
        path = root / mount_point.lstrip("/")
        if kind == "cgroup" and "memory" in options.split(","):
            return Controller(1, path)
        if kind == "cgroup2" and "memory" in _read(path / "cgroup.controllers").split():
            return Controller(2, path)
    return None


def limit_of(pid: int, root: Path = Path("/")) -> tuple[str, int] | None:
    """The memory cgroup that limits a process, its own or one above it, and the limit in bytes; None: no limit.

    Of several, the smallest limit. Raises OSError if there is no such process.
    """
    controller = find_controller(root)
    if controller is None:
        return None
    found: list[tuple[int, str]] = []
    for line in (root / "proc" / str(pid) / "cgroup").read_text().splitlines():
        number, names, name = line.split(":", 2)
        if "memory" in names.split(",") if controller.version == 1 else number == "0":
            group = controller.path / name.lstrip("/")
            while group != controller.path and group.is_relative_to(controller.path):
                limit, _, _ = _v1(group) if controller.version == 1 else _v2(group)
                if limit is not None:
                    found.append((limit, "/" + str(group.relative_to(controller.path))))
                group = group.parent
    return (min(found)[1], min(found)[0]) if found else None


def overflows(controller: Controller, incoming_bytes: int) -> Iterator[Overflow]:
    """The groups whose anonymous and shared memory would exceed their limit if their swapped pages came back.

    At most `incoming_bytes` come back to any one group: the rest of its swap is in other areas. The figures of a
    group include its descendants, as its limit does. Walks the whole hierarchy: may take a while.
    """
    need_and_limit = _v1 if controller.version == 1 else _v2
    for directory, _, _ in os.walk(controller.path):
        group = Path(directory)
        limit, resident, swapped = need_and_limit(group)
        need = resident + min(swapped, incoming_bytes)
        if limit is not None and swapped and need > limit:
            yield Overflow("/" + str(group.relative_to(controller.path)), need, limit)


def _v1(group: Path) -> tuple[int | None, int, int]:
    """(limit, resident bytes that only swap can take, swapped bytes) of a v1 group."""
    limit = _read(group / "memory.limit_in_bytes")
    if not limit or int(limit) >= 1 << 62:  # unlimited: LONG_MAX rounded down to a page
        return None, 0, 0
    stat = _stat(group)
    return int(limit), stat.get("total_rss", 0) + stat.get("total_shmem", 0), stat.get("total_swap", 0)


def _v2(group: Path) -> tuple[int | None, int, int]:
    limit = _read(group / "memory.max").strip()
    if limit in ("", "max"):  # the root group has no such file
        return None, 0, 0
    stat = _stat(group)
    # A page of the swap cache is charged as memory and as swap at once.
    swapped = int(_read(group / "memory.swap.current") or 0) - stat.get("swapcached", 0)
    return int(limit), stat.get("anon", 0) + stat.get("shmem", 0), max(0, swapped)


def _stat(group: Path) -> dict[str, int]:
    fields = (line.split() for line in _read(group / "memory.stat").splitlines())
    return {name: int(value) for name, value in fields}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the group went away meanwhile, or its kernel lacks this file
        return ""
