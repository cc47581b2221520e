"""Checks of the machine: whether it can run zswapd, and which of its settings matter to it.

Reads /proc and /sys; changes nothing, and touches the mount only through a child that can be given up.
"""

import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zswapd import backing, commands, kernel, memcg, swapdev, wear
from zswapd.config import PAGE_SIZE, Config, format_size, mem_total
from zswapd.errors import ZswapdError
from zswapd.footprint import refuse_huge
from zswapd.status import NO_ZSWAPD, lacks_zswapd, read_stats

RESEND_SINCE = (6, 9, 4)
NO_RESEND = "what is under way when a pager dies is not sent again, and fails with an I/O error"
TOOLS = ("losetup", "mkswap", "swapon", "swapoff", "fallocate")
CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 14, 21, 24


@dataclass(frozen=True)
class Check:
    """What one check found. `remedy` says what to do where `status` is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def run(config: Config, root: Path = Path("/")) -> list[Check]:
    """All the checks, in the order they are worth reading in. Takes a few seconds if the daemon does not answer."""
    checks: list[Callable[[Path], Check]] = [
        _root,
        _container,
        _kernel,
        _page_size,
        _fuse,
        _loop,
        _tools,
        _memory_lock,
        _protection,
        _cgroup,
        _zswap,
        _fuse_timeouts,
        _watermark_boost,
        _compaction,
        _min_free,
        _page_cluster,
        _halt_poll,
        _swappiness,
        _overcommit,
        _hibernation,
    ]
    return [check(root) for check in checks] + [
        _memory(config),
        _swaps(config, root),
        *_writeback(config, root),
        *_daemon(config),
    ]


def _root(_: Path) -> Check:
    if os.geteuid() == 0:
        return Check("root", "ok", "running as root")
    return Check("root", "fail", "not root: swap cannot be attached", "run it with sudo")


def _container(root: Path) -> Check:
    initial_namespace = (root / "proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    if not _capable(CAP_SYS_ADMIN, root):
        return Check("privileges", "fail", "no CAP_SYS_ADMIN: an unprivileged user or container", "run it on the host")
    if not initial_namespace:
        return Check("privileges", "fail", "a user namespace: swapon needs the initial one", "run it on the host")
    for marker in ("run/systemd/container", ".dockerenv", "run/.containerenv"):
        if (root / marker).exists():
            return Check(
                "privileges",
                "warn",
                f"a container (/{marker}): swap belongs to the whole host",
                "run it on the host",
            )
    return Check("privileges", "ok", "CAP_SYS_ADMIN, not in a container")


def _kernel(root: Path) -> Check:
    release = (root / "proc/sys/kernel/osrelease").read_text().strip()
    version = kernel_version(release)
    if version < (6, 1, 0):
        return Check("kernel", "fail", f"{release}: not supported", "use Linux 6.1 or later")
    lacking = [
        feature
        for since, feature in (
            ((6, 4, 0), "noswap tmpfs (6.4)"),
            # 6.9 itself has it with mistakes, of which the last was mended in 6.9.4.
            (RESEND_SINCE, f"FUSE_NOTIFY_RESEND (6.9.4): {NO_RESEND}"),
        )
        if version < since
    ]
    if lacking:
        return Check("kernel", "warn", f"{release} lacks {', '.join(lacking)}", "use Linux 6.9.4 or later")
    return Check("kernel", "ok", f"{release}: noswap tmpfs and FUSE_NOTIFY_RESEND are there")


def kernel_version(release: str) -> tuple[int, int, int]:
    """(major, minor, patch) of a kernel release such as 6.1.0-18-amd64."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)


def _page_size(_: Path) -> Check:
    size = os.sysconf("SC_PAGE_SIZE")
    if size == PAGE_SIZE:
        return Check("page size", "ok", f"{size} bytes")
    return Check("page size", "fail", f"{size} bytes: only {PAGE_SIZE} works", "use a kernel with 4 KiB pages")


def _fuse(root: Path) -> Check:
    if os.access(root / "dev/fuse", os.R_OK | os.W_OK):
        return Check("FUSE", "ok", "/dev/fuse can be opened")
    if (root / "dev/fuse").exists():
        return Check("FUSE", "fail", "/dev/fuse may not be opened by this user", "run zswapd as root")
    return Check("FUSE", "fail", "no /dev/fuse", "modprobe fuse")


def _loop(root: Path) -> Check:
    if not (root / "dev/loop-control").exists():
        return Check("loop devices", "fail", "no /dev/loop-control", "modprobe loop")
    return Check("loop devices", "ok", "/dev/loop-control is there; attach verifies direct I/O")


def _tools(_: Path) -> Check:
    path = os.environ.get("PATH", "") + commands.SBIN
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return Check("tools", "fail", f"not found: {', '.join(missing)}", "install util-linux (Debian: and mount)")
    return Check("tools", "ok", ", ".join(TOOLS))


def _memory_lock(root: Path) -> Check:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if _capable(CAP_IPC_LOCK, root) or limit == resource.RLIM_INFINITY:
        return Check("memory lock", "ok", "the daemon can lock its memory")
    return Check(
        "memory lock",
        "fail",
        f"no CAP_IPC_LOCK and RLIMIT_MEMLOCK is {format_size(limit)}: the daemon itself could be swapped out",
        "grant CAP_IPC_LOCK, or ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)",
    )


def _protection(root: Path) -> Check:
    if _capable(CAP_SYS_RESOURCE, root):
        return Check(
            "protection", "ok", "CAP_SYS_RESOURCE: the daemon can become an I/O flusher and avoid the OOM killer"
        )
    return Check(
        "protection",
        "warn",
        "no CAP_SYS_RESOURCE: the daemon may wait for its own swap, and the OOM killer may choose it",
        "grant CAP_SYS_RESOURCE",
    )


def _cgroup(root: Path) -> Check:
    controller = memcg.find_controller(root)
    if controller:
        return Check("memory cgroups", "ok", f"version {controller.version}, at {controller.path}")
    return Check(
        "memory cgroups",
        "warn",
        "no memory controller: workloads cannot be given a limit of their own",
        "boot without cgroup_disable=memory (Raspberry Pi: with cgroup_enable=memory)",
    )


def _zswap(root: Path) -> Check:
    if kernel.zswap_enabled(root):
        return Check(
            "kernel zswap",
            "fail",
            "enabled: every page would be compressed twice",
            "echo N > /sys/module/zswap/parameters/enabled (and zswap.enabled=0 at boot)",
        )
    return Check("kernel zswap", "ok", "off")


def _fuse_timeouts(root: Path) -> Check:
    timeouts = kernel.fuse_timeouts(root)
    if not timeouts:
        return Check("FUSE timeouts", "ok", "none: a slow answer does not abort the connection")
    found = ", ".join(f"{name} = {seconds} s" for name, seconds in timeouts.items())
    return Check(
        "FUSE timeouts",
        "fail",
        f"{found}: one late answer aborts the connection, and every page in swap is lost",
        f"sysctl -w {' '.join(f'{name}=0' for name in timeouts)}, then restart the daemon",
    )


def _watermark_boost(root: Path) -> Check:
    boost = kernel.watermark_boost(root)
    if not boost:
        return Check("vm.watermark_boost_factor", "ok", "0: memory for the loop device is not held back")
    return Check(
        "vm.watermark_boost_factor",
        "fail",
        f"{boost}: out of memory, the loop device waits for what only it could free",
        "sysctl -w vm.watermark_boost_factor=0",
    )


def _compaction(root: Path) -> Check:
    """With 1, the kernel's choice, compaction also moves locked pages. Who touches one meanwhile takes a page fault and
    waits (migration_entry_wait in mm/migrate.c). The memory that it takes is there by then, so that this ends."""
    path = root / "proc/sys/vm/compact_unevictable_allowed"  # not there in kernels without compaction
    if not path.exists() or not int(path.read_text()):
        return Check("vm.compact_unevictable_allowed", "ok", "0: compaction leaves the pager's memory where it is")
    return Check(
        "vm.compact_unevictable_allowed",
        "warn",
        "1: compaction moves the pager's memory too, and faults wait for that",
        "sysctl -w vm.compact_unevictable_allowed=0",
    )


def _min_free(root: Path) -> Check:
    free = kernel.min_free_kbytes(root)
    if free >= kernel.LEAST_FREE_KBYTES:
        return Check("vm.min_free_kbytes", "ok", f"{free}: the loop device finds memory for its requests")
    return Check(
        "vm.min_free_kbytes",
        "fail",
        f"{free}: out of memory, the loop device finds none for its requests, and the machine hangs",
        kernel.MORE_FREE,
    )


def _page_cluster(root: Path) -> Check:
    value = int((root / "proc/sys/vm/page-cluster").read_text())
    detail = f"{value}: a fault reads up to {1 << value} pages"
    if value == 0:
        return Check("vm.page-cluster", "ok", f"{value}: a fault reads one page")
    return Check(
        "vm.page-cluster",
        "warn",
        f"{detail}, each decompressed even if nobody needs it",
        "sysctl -w vm.page-cluster=0, unless the workload reads memory in order",
    )


def _halt_poll(root: Path) -> Check:
    governor = root / "sys/devices/system/cpu/cpuidle/current_governor"
    longest = root / "sys/module/haltpoll/parameters/guest_halt_poll_ns"
    if not (governor.exists() and longest.exists() and governor.read_text().strip() == "haltpoll"):
        return Check("idle processors", "ok", "not those of a virtual machine that polls before it halts")
    if nanoseconds := int(longest.read_text()):
        return Check("idle processors", "ok", f"they look for work for {nanoseconds // 1000} µs before they halt")
    return Check(
        "idle processors",
        "warn",
        "they halt at once (haltpoll, 0 ns): who waits for a page must be woken through the hypervisor",
        f"echo 200000 > /{longest.relative_to(root)}, where a fault's latency matters more than idle processors",
    )


def _swappiness(root: Path) -> Check:
    value = int((root / "proc/sys/vm/swappiness").read_text())
    if value:
        return Check("vm.swappiness", "ok", f"{value} (above 100: swap is cheaper than the file system)")
    return Check("vm.swappiness", "warn", "0: swap is used only in distress", "sysctl -w vm.swappiness=100")


def _overcommit(root: Path) -> Check:
    if (root / "proc/sys/vm/overcommit_memory").read_text().strip() != "2":
        return Check("vm.overcommit_memory", "ok", "swap does not count towards a commit limit")
    return Check(
        "vm.overcommit_memory",
        "warn",
        "2: detaching is refused while more is committed than the limit without this swap",
        "keep Committed_AS below CommitLimit less the swap's size, or sysctl -w vm.overcommit_memory=0",
    )


def _hibernation(root: Path) -> Check:
    state = root / "sys/power/state"
    states = state.read_text().split() if state.exists() else []
    sleeping = [name for name in states if name in ("disk", "mem", "standby", "freeze")]
    if not sleeping:
        return Check("suspend", "ok", "not supported by this kernel")
    return Check(
        "suspend",
        "warn",
        f"supported ({', '.join(sleeping)}): the daemon is frozen with the processes whose pages it holds, and "
        "hibernation cannot use this swap",
        "detach before suspending or hibernating",
    )


def _memory(config: Config) -> Check:
    total, limit = mem_total(), config.pool.mem_limit_bytes
    try:
        refuse_huge(config)
    except ZswapdError as error:
        return Check("memory", "fail", error.message, error.hint)
    detail = f"pool limit {format_size(limit)} of {format_size(total)}"
    if limit > total * 9 // 10:
        return Check("memory", "warn", f"{detail}: the pool could take all of it", "lower pool.mem_limit (50%)")
    return Check("memory", "ok", detail)


def _swaps(config: Config, root: Path) -> Check:
    ours = swapdev.discover(config.swap.mount_point, root)
    device = ours.loop_device if ours else ""
    priority = ours.priority if ours and ours.is_swap else config.swap.priority
    others = [area for area in swapdev.read_swaps(root) if area.path != device]
    detail = f"ours: priority {priority}; others: " + (
        ", ".join(f"{area.path} (priority {area.priority})" for area in others) or "none"
    )
    first = [area.path for area in others if area.priority >= priority]
    if first:
        return Check(
            "swap areas",
            "warn",
            f"{detail}; higher ones are used first, equal ones in turn",
            f"raise swap.priority above that of {', '.join(first)}",
        )
    return Check("swap areas", "ok", detail)


def _writeback(config: Config, root: Path) -> list[Check]:
    settings, name = config.writeback, "backing disk"
    if settings.backing is None:
        return []
    try:
        counted = read_stats(config.swap.mount_point)["writeback"]
    except (ZswapdError, KeyError):
        counted = {"state": "none"}
    detail = str(settings.backing)
    try:
        if counted["state"] == "failed":
            remedy = (
                "see dmesg; if it is well again: zswapctl writeback resume. Else detach, which ends at a page that "
                "cannot be read (--force loses such pages for ever), then name another: writeback.backing"
            )
            return [Check(name, "fail", f"{detail} has failed: nothing more is written to it", remedy)]
        if counted["state"] == "ok":  # in use, by us
            number, rotational = backing.number_of(settings.backing, root)
        else:
            disk = backing.look(settings, root)
            number, rotational = disk.number, disk.rotational
    except ZswapdError as error:
        return [Check(name, "fail", error.message, error.hint)]
    checks = []
    if rotational:
        slow = f"{detail} is on a rotating disk, or on one that says so: each page read back takes milliseconds there"
        checks.append(Check(name, "warn", slow, "name an SSD, if there is one"))
    checks += [
        Check(name, "warn", f"{detail}: {remark}", "a block device of its own is the safe choice")
        for remark in backing.loop_remarks(number, root)
    ]
    others = [area.path for area in swapdev.read_swaps(root) if backing.is_on(area.path, number, root)]
    if others:
        detail = f"{detail} is on the same disk as the swap area {others[0]}: both are written at the same time"
        checks.append(Check(name, "warn", detail, f"swapoff {others[0]}, or name another disk"))
    if counted["state"] == "ok" and wear.is_used_up(wear.left_of(settings, counted["budget_bytes"])):
        used = f"{settings.backing}: the budget is used up ({wear.describe(settings)})"
        checks.append(Check(name, "warn", used, "raise it, or write back less: writeback.idle_after, pressure"))
    return checks or [Check(name, "ok", detail)]


def _daemon(config: Config) -> list[Check]:
    try:
        stats = read_stats(config.swap.mount_point)
    except ZswapdError as error:
        return [Check("daemon", "warn", error.message, error.hint)]
    pager = stats.get("pager")
    if pager is None:
        return [Check("daemon", "ok", f"zswapd {stats.get('version')}, pid {stats.get('pid')}, answers")]
    checks = [Check("daemon", "ok", f"zswapd {stats['version']}, pager pid {pager['pid']}, answers")]
    if lacks_zswapd(pager):
        text = f"pager pid {pager['pid']} has no zswapd: {NO_ZSWAPD}"
        checks = [Check("daemon", "warn", text, swapdev.START_HINT)]
    if not pager["keeper"]:
        text = "the keeper is gone: if the pager, which goes on, dies too, its pages are lost"
        checks.append(
            Check("takeover", "fail", text, "systemctl restart zswapd-pager, or zswapctl stop and start again")
        )
    elif not pager["standby"]:
        text = "no standby is ready: a takeover has to wait until one is"
        checks.append(Check("takeover", "warn", text, "look again in a moment; if it stays so, see the log"))
    elif not pager["resend"]:
        checks.append(Check("takeover", "warn", f"no FUSE_NOTIFY_RESEND: {NO_RESEND}", "use Linux 6.9.4 or later"))
    else:
        text = f"keeper pid {pager['keeper']}, standby pid {pager['standby']}, {stats['takeovers']} takeovers so far"
        checks.append(Check("takeover", "ok", text))
    return checks


def _capable(capability: int, root: Path) -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", (root / "proc/self/status").read_text(), re.MULTILINE)
    return bool(match and int(match[1], 16) >> capability & 1)
