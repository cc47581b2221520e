"""One run of one row: a workload in a cgroup with too little memory, the swap device under it, and the figures."""

import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.corpus import Corpus, Report
from zswapd.bench.devices import Device
from zswapd.bench.floor import why_not_forget
from zswapd.bench.programs import PAGE
from zswapd.bench.rows import device
from zswapd.bench.runner import workload
from zswapd.bench.summary import DISK
from zswapd.errors import ZswapdError

LIMIT_SHARE = 4  # the workload may have a quarter of what it touches
# Twice what is touched: from half full on the kernel frees the slot of every page that it reads, and writes it anew.
SWAP_SHARE = 2
PF_KTHREAD = 0x00200000  # include/linux/sched.h
STRANGERS = 0.02  # more than this share of the pages in the device being other processes' disturbs the figures


async def measure(row: str, corpus: Corpus, directory: Path, report: Report, pool: int | None = None) -> dict[str, Any]:
    """The figures of one run; None: the device has no such figure. Leaves nothing.

    `pool`: bytes of memory that a device may have for pages, with a disk beside it.

    Every page is verified, except on a device that stores nothing: raises WrongPages if one is wrong.
    """
    size = corpus.pages * PAGE
    swap = device(row, directory, size * SWAP_SHARE, pool)
    cpu: defaultdict[str, float] = defaultdict(float)
    with MemoryCgroup(size // LIMIT_SHARE) as group:
        if swap.forgets:
            refuse_to_forget(group.path, size)
        async with swap, workload(corpus, group, report) as load:

            async def timed(phase: str, **arguments: int) -> dict[str, Any]:
                servers, threads = swap.cpu_seconds(), kernel_threads()
                result = await load.run(phase, **arguments)
                cpu["workload"] += result["cpu_seconds"]
                for who, seconds in swap.cpu_seconds().items():
                    cpu[who] += seconds - servers[who]
                for pid, seconds in kernel_threads().items():
                    cpu["kernel"] += seconds - threads.get(pid, 0.0)
                return result

            fill = await timed("fill")
            await swap.settle(report)
            held = None if swap.forgets else await swap.held()
            random = await timed("random", seed=corpus.seed)
            sequential = await timed("sequential")
            area = swap.area()
            strangers = max(0, (area.used_bytes if area else 0) - group.swap_bytes() - group.usage_bytes())
            disk: dict[str, Any] = dict.fromkeys(DISK)
            if held and swap.pool_limit:
                disk["working_set_pools"] = size / held.ratio / swap.pool_limit
            if not swap.forgets:
                await load.run("rewrite", seed=corpus.seed)
            swap.require_first()
            if not swap.forgets:
                disk |= await traffic_figures(swap)
                # Every page comes back once, and stays. Under the old limit the kernel would push out others for it,
                # and with zswap in front it gives up after a while and kills the workload.
                group.set_limit(2 * size)
                disk |= await timed_swapoff(swap, report)
                await load.run("verify")
            return {
                "row": row,
                "fill_mb_per_second": fill["mb_per_second"],
                "random_faults": random["faults"],
                **{f"random_{key}": value for key, value in random.items() if key.endswith("_us")},
                "sequential_mb_per_second": sequential["mb_per_second"],
                "original_bytes": held.original_bytes if held else None,
                "used_bytes": held.used_bytes if held else None,
                "effective_ratio": held.ratio if held else None,
                "pool_limit_bytes": swap.pool_limit,
                **disk,
                "process_bytes": swap.process_bytes() or None,
                "workload_cpu_seconds": cpu["workload"],
                "zswapd_cpu_seconds": cpu.get("zswapd"),
                "pager_cpu_seconds": cpu.get("pager"),
                "kernel_cpu_seconds": cpu.get("kernel"),
                "refused_stores": await swap.refused(),
                "pages_verified": load.verified,
                "strangers_bytes": strangers,
                "disturbed": strangers > STRANGERS * size,
            }


async def traffic_figures(swap: Device) -> dict[str, Any]:
    """What has gone to the disk of a device that has one, and come from there, since it was set up."""
    traffic = await swap.traffic()
    if traffic is None:
        return {}
    return {
        "evicted_bytes": traffic.evicted_pages * PAGE,
        "disk_written_bytes": traffic.written_bytes,
        "disk_written_per_page": traffic.written_per_page,
        "disk_read_bytes": traffic.read_bytes,
    }


async def timed_swapoff(swap: Device, report: Report) -> dict[str, Any]:
    """Take the swap off with the pages in it: how fast they come back, and what share of them from the disk."""
    share = await swap.disk_share()
    begun = time.perf_counter()
    inside = await swap.emptying(swap.swap_off, "swapoff", report)
    return {
        "swapoff_bytes": inside,
        "swapoff_mb_per_second": inside / 1e6 / (time.perf_counter() - begun) if inside else None,
        "swapoff_disk_share": share,
    }


def refuse_to_forget(own_group: Path, size_bytes: int) -> None:
    """Raises ZswapdError where a device that stores nothing could lose another process's pages."""
    if reason := why_not_forget(own_group, size_bytes):
        raise ZswapdError(
            f"a swap device that stores nothing would lose other processes' pages: {reason}",
            "leave the row null out, or run it on a machine of its own",
        )


def kernel_threads() -> dict[str, float]:
    """CPU seconds of every kernel thread so far, by pid; nothing where the kernel does not count them exactly.

    Not the machine's busy time less everyone else's: that is sampled, and those are not.
    """
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            flags = (process / "stat").read_text().rpartition(")")[2].split()[6]
            if int(flags) & PF_KTHREAD:
                found[process.name] = int((process / "schedstat").read_text().split()[0]) / 1e9
    return found
