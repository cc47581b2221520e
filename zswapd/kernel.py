"""Settings of the kernel that stand against a swap device that is served from userspace."""

from pathlib import Path

from zswapd.errors import SwapError

ROOT = Path("/")
FUSE_TIMEOUTS = ("default_request_timeout", "max_request_timeout")
#: Of vm.min_free_kbytes. The kernel's own value is more, but on machines of less than 256 MiB.
LEAST_FREE_KBYTES = 2048
MORE_FREE = f"sysctl -w vm.min_free_kbytes={LEAST_FREE_KBYTES}, or more: what the kernel chose at boot"
_NOT_ALL = "for workloads in a memory cgroup that has a limit, say --unsafe"


def fuse_timeouts(root: Path = ROOT) -> dict[str, int]:
    """The sysctls by which the kernel aborts a FUSE connection whose server is slow, in seconds, where not 0."""
    found = {}
    for name in FUSE_TIMEOUTS:
        path = root / "proc/sys/fs/fuse" / name
        if path.exists() and (seconds := int(path.read_text())):
            found[f"fs.fuse.{name}"] = seconds
    return found


def zswap_enabled(root: Path = ROOT) -> bool:
    """Whether the kernel's zswap compresses pages before they reach any swap device."""
    path = root / "sys/module/zswap/parameters/enabled"
    return path.exists() and path.read_text().strip() == "Y"


def refuse_settings(root: Path = ROOT) -> None:
    """Raises SwapError if a setting makes attaching useless or dangerous."""
    if zswap_enabled(root):
        raise SwapError(
            "the kernel's zswap is enabled in front of swap: every page would be compressed twice",
            "switch it off: echo N > /sys/module/zswap/parameters/enabled (and zswap.enabled=0 at boot)",
        )
    for name, seconds in fuse_timeouts(root).items():
        raise SwapError(
            f"{name} = {seconds}: the kernel would abort the daemon's connection when a request takes that long, "
            "and every page in swap would be lost",
            f"sysctl -w {name}=0, then restart the daemon: the timeout is fixed when it mounts",
        )


def watermark_boost(root: Path = ROOT) -> int:
    """vm.watermark_boost_factor, which must be 0 where the machine as a whole may run out of memory.

    The kernel then wants some MiB more to be free, until kswapd has freed them. The loop device's thread, which has no
    claim to the kernel's reserves, waits for that too, and kswapd for the loop device: the machine hangs.
    """
    path = root / "proc/sys/vm/watermark_boost_factor"
    return int(path.read_text()) if path.exists() else 0


def min_free_kbytes(root: Path = ROOT) -> int:
    """vm.min_free_kbytes: what has to be free before anything but reclaim itself may take memory.

    The loop device's thread makes FUSE requests while reclaim waits for it: what it takes has to be there. With 512 a
    guest hung at its first swap-out in 2 of 10 runs (the thread in fuse_io_alloc); with its own value, 0 of 23.
    """
    return int((root / "proc/sys/vm/min_free_kbytes").read_text())


def refuse_what_hangs(root: Path = ROOT) -> None:
    """Raises SwapError if a setting lets the machine hang when it is out of memory as a whole: see `watermark_boost`
    and `min_free_kbytes`."""
    if boost := watermark_boost(root):
        raise SwapError(
            f"vm.watermark_boost_factor = {boost}: out of memory, the kernel would wait for itself, and hang",
            f"sysctl -w vm.watermark_boost_factor=0 (at boot: config/sysctl.conf, in /etc/sysctl.d); {_NOT_ALL}",
        )
    if (free := min_free_kbytes(root)) < LEAST_FREE_KBYTES:
        raise SwapError(
            f"vm.min_free_kbytes = {free}: out of memory, the loop device would find none for its requests, and hang",
            f"{MORE_FREE}; {_NOT_ALL}",
        )
