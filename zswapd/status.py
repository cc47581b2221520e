"""What the daemon says of itself (stats.json), read with a deadline and rendered for people."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from zswapd import __version__, wear
from zswapd.config import PAGE_SIZE, format_size
from zswapd.errors import DaemonError
from zswapd.pager import Pager
from zswapd.swapdev import START_HINT, Attachment, is_mounted, not_serving

DEADLINE_SECONDS = 5
NO_ZSWAPD = "pages go on; control files, metrics, policies and the watchdog do not"


def read_stats(mount_point: Path) -> dict[str, Any]:
    """What is counted at `mount_point`: by the pager, which answers even where the file system hangs, else stats.json.

    Raises DaemonError if the daemon does not run or answer in 5 seconds.
    """
    with contextlib.suppress(OSError):
        pager = Pager(mount_point)
        own = {"version": __version__, "pager": pager.status()}
        return {**own, **pager.stats()}
    if not is_mounted(mount_point):
        raise DaemonError(f"the daemon does not run: nothing is mounted at {mount_point}", START_HINT)
    # A child reads it: a process that waits for a stopped daemon may be impossible to kill, so it must not be us.
    child = subprocess.Popen(
        ["cat", mount_point / "stats.json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    try:
        stdout, stderr = child.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        raise DaemonError(
            f"the daemon at {mount_point} does not answer", "it is stopped or stuck: see its log"
        ) from None
    if child.returncode:
        reason = stderr.decode(errors="replace").strip().rpartition(": ")[2]
        raise not_serving(mount_point, reason)
    try:
        stats: dict[str, Any] = json.loads(stdout)
    except ValueError:
        raise DaemonError(f"{mount_point}/stats.json is not JSON", "is another file system mounted there?") from None
    return stats


def quantile(q: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """The `q` quantile of a histogram, interpolated within its bucket; None if it is empty.

    `counts` are not cumulative and have one more bucket than `bounds` (+Inf), which gives the last bound: the
    quantile is then at least that.
    """
    rank = q * sum(counts)
    if not rank:
        return None
    below = 0
    for index, bound in enumerate(bounds):
        if counts[index] and below + counts[index] >= rank:
            lower = bounds[index - 1] if index else 0.0
            return lower + (bound - lower) * (rank - below) / counts[index]
        below += counts[index]
    return bounds[-1]


def effective_ratio(stats: dict[str, Any]) -> float | None:
    """Bytes stored in memory over all that they take of it: reserve, metadata, dictionaries and the index of duplicates
    too; None: none."""
    others = sum(stats["recompression"][name] for name in ("dictionary_bytes", "encoder_bytes", "index_bytes"))
    cost = stats["pool_bytes"] + stats["pool_reserve_bytes"] + stats["metadata_bytes"] + others
    return in_memory(stats) / cost if cost else None


def in_memory(stats: dict[str, Any]) -> int:
    """Bytes stored, but for those on the backing disk."""
    size: int = stats["original_bytes"] - stats["pages"]["on_disk"] * PAGE_SIZE
    return size


def render(stats: dict[str, Any], attachment: Attachment | None) -> RenderableType:
    """The state of the daemon and its swap, for people; errors in red."""
    table = Table.grid(padding=(0, 2))
    table.add_row("served by", _server(stats))
    if "pager" in stats:
        table.add_row("survives", _survival(stats))
        if lacks_zswapd(stats["pager"]):
            table.add_row("zswapd", Text(f"none: {NO_ZSWAPD}; {START_HINT}", "bold red"))
    table.add_row("swap", _attachment(stats, attachment))

    pages = {kind: count for kind, count in stats["pages"].items() if kind != "lost"}
    kinds = ", ".join(
        f"{kind.replace('_', ' ' if kind == 'on_disk' else '-')} {count:,}" for kind, count in pages.items()
    )
    table.add_row("pages", f"{sum(pages.values()):,} ({kinds})")
    ratio = effective_ratio(stats) if in_memory(stats) else None
    table.add_row(
        "memory",
        f"{format_size(in_memory(stats))} stored as {format_size(stats['compressed_bytes'])}, "
        f"in a {stats['allocator']} pool of {format_size(stats['pool_bytes'])}"
        + (f" (effective ratio {ratio:.2f})" if ratio is not None else ""),
    )
    table.add_row(
        "overhead",
        f"{format_size(stats['pool_reserve_bytes'])} reserve, {format_size(stats['metadata_bytes'])} metadata",
    )
    limit = stats["pool_limit_bytes"]
    table.add_row(
        "limit",
        f"{stats['pool_bytes'] / limit:.1%} of {format_size(limit)} used, peak {format_size(stats['pool_peak_bytes'])}",
    )
    if recompressed := _recompression(stats):
        table.add_row("recompressed", recompressed)
    if duplicates := _duplicates(stats):
        table.add_row("duplicates", duplicates)
    for name, text in _backing(stats):
        table.add_row(name, text)
    for operation in ("load", "store"):
        table.add_row(f"{operation}s", f"{stats[f'{operation}s']:,}{_latency(stats[f'{operation}_latency'])}")
    table.add_row("discards", f"{stats['discards']:,}")
    return Group(table, *_errors(stats))


def _recompression(stats: dict[str, Any]) -> str:
    """What each tier holds, and what it took to make it so; empty where nothing was ever recompressed."""
    counts, pages = stats["recompression"], stats["pages"]
    if not counts["pages_recompressed"] and not counts["dictionaries"]:
        return ""
    tiers = ", ".join(
        f"{kind.replace('_', ' with ')} {pages[kind]:,} as {format_size(size)}"
        for kind, size in counts["bytes"].items()
        if pages[kind]
    )
    dictionaries = ", ".join(
        f"{entry['serial']} ({format_size(entry['bytes'])}) for {entry['pages']:,} pages"
        for entry in counts["dictionaries"]
    )
    memory = counts["dictionary_bytes"] + counts["encoder_bytes"]
    return (
        f"{counts['pages_recompressed']:,} pages, {format_size(counts['saved_bytes'])} saved, "
        f"in {_duration(counts['processor_seconds'])}; {counts['pages_not_smaller']:,} would not get smaller"
        + (f"\nnow: {tiers}" if tiers else "")
        + (f"\ndictionaries: {dictionaries}; {format_size(memory)} of memory" if dictionaries else "")
    )


def _duplicates(stats: dict[str, Any]) -> str:
    """What is stored once; empty where nothing was ever found."""
    counts = stats["recompression"]
    if not counts["pages_deduplicated"] and not counts["pages_shared"]:
        return ""
    return (
        f"{counts['pages_shared']:,} pages stored as {counts['shared_pages']:,}; "
        f"{format_size(counts['index_bytes'])} of memory to find them"
    )


def _backing(stats: dict[str, Any]) -> Iterator[tuple[str, Text]]:
    disk = stats["writeback"]
    if disk["state"] == "none":
        return
    size, free, live = disk["backing_bytes"], disk["backing_free_bytes"], disk["live_bytes"]
    pages, clustered = stats["pages"]["on_disk"], disk["pages_in_clusters"]
    text = (
        f"{format_size(pages * PAGE_SIZE)} of pages as {format_size(live)}"
        f"{f', {clustered / pages:.0%} of them in clusters' if clustered else ''}; "
        f"{format_size(free)} of {format_size(size)} free"
    )
    if disk["state"] == "failed":
        yield "backing disk", Text(f"failed: nothing more is written to it; it has {text}", "bold red")
    else:
        yield "backing disk", Text(text)
    written, cleaned = disk["written_bytes"], disk["cleaning_bytes"]
    yield (
        "written back",
        Text(
            f"{disk['pages_written']:,} pages in {format_size(written)}, {format_size(cleaned)} for cleaning"
            + (
                f"; per page {(written + cleaned) / disk['pages_written'] / PAGE_SIZE:.2f}"
                if disk["pages_written"]
                else ""
            )
        ),
    )
    yield (
        "read back",
        Text(f"{disk['reads']:,}{_latency(disk['read_latency'])}; {disk['pages_promoted']:,} into the pool"),
    )
    if (left := disk["budget_bytes"]) is not None:
        yield (
            "budget",
            Text("used up", "bold yellow")
            if wear.is_used_up(left)
            else Text(f"{format_size(left)} may still be written"),
        )


def render_classes(stats: dict[str, Any]) -> RenderableType:
    """The size classes that have zspages, for people. z3fold has none."""
    if stats["allocator"] != "zsmalloc":
        return Text(f"{stats['allocator']} has no size classes: it lays up to three objects of any length on a page")
    columns = ("size", "pages", "objects", "in use", "zspages", "< 30 %", "< 70 %", "< 100 %", "full", "waste")
    table = Table(*(Column(name, justify="right") for name in columns), box=None, show_footer=True)
    used = [entry for entry in stats["classes"] if entry["zspages"]]
    totals = [0] * 6 + [sum(entry["waste_bytes"] for entry in used)]
    for entry in used:
        groups = entry["zspages_by_fullness"]
        counts = [entry["objects"], entry["zspages"], sum(groups[:4]), sum(groups[4:8]), sum(groups[8:11]), groups[11]]
        totals[:6] = (total + count for total, count in zip(totals, counts, strict=False))
        table.add_row(
            *(str(entry[key]) for key in ("size_bytes", "pages_per_zspage", "objects_per_zspage")),
            *(f"{count:,}" for count in counts),
            format_size(entry["waste_bytes"]),
        )
    footer = ["all", "", "", *(f"{total:,}" for total in totals[:6]), format_size(totals[6])]
    for column, text in zip(table.columns, footer, strict=True):
        column.footer = text
    return table


def lacks_zswapd(pager: dict[str, int]) -> bool:
    """Whether the pager says that it has none."""
    return not pager.get("zswapd", 1)


def _server(stats: dict[str, Any]) -> str:
    version, algorithm = f"zswapd {stats['version']}", _algorithm(stats)
    pager = stats.get("pager")
    if pager is None:
        return f"{version}, pid {stats['pid']}, {algorithm}"
    unprotected = "" if pager["protected"] else ", not protected: see its log"
    own = f"{format_size(pager['footprint'])} and {format_size(stats['ballast_bytes'])} of ballast"
    return f"{version}, pager pid {pager['pid']}, {algorithm}, {own} beside pool and tables{unprotected}"


def _survival(stats: dict[str, Any]) -> Text:
    pager, takeovers = stats["pager"], stats["takeovers"]
    if not pager["keeper"]:
        return Text("no keeper: if the pager dies, its pages are lost", "bold red")
    text = Text(f"keeper pid {pager['keeper']}, ")
    text.append(*((f"standby pid {pager['standby']}",) if pager["standby"] else ("no standby yet", "yellow")))
    if takeovers:
        pause = _duration(stats["takeover_seconds"])
        text.append(f"; {takeovers} {'takeover' if takeovers == 1 else 'takeovers'}, the last one took {pause}")
    if not pager["resend"]:
        text.append("; not what is under way at a takeover: see zswapctl doctor", "yellow")
    return text


def _algorithm(stats: dict[str, Any]) -> str:
    level = f" level {stats['zstd_level']}" if stats["algorithm"] == "zstd" else ""
    return f"{stats['algorithm']}{level}"


def _attachment(stats: dict[str, Any], attachment: Attachment | None) -> str:
    if attachment is None:
        return f"not attached ({format_size(stats['swap_size_bytes'])}): zswapctl attach"
    if not attachment.is_swap:
        return f"{attachment.loop_device} is half attached, not in use as swap: zswapctl detach"
    return (
        f"{attachment.loop_device}, {format_size(attachment.used_bytes)} of "
        f"{format_size(attachment.size_bytes)} used, priority {attachment.priority}"
    )


def _latency(histogram: dict[str, Any]) -> str:
    bounds, counts = histogram["bounds_seconds"], histogram["counts"]
    quantiles = [(name, quantile(q, bounds, counts)) for name, q in (("p50", 0.5), ("p99", 0.99))]
    return "".join(
        f", {name} {'>= ' if value >= bounds[-1] else ''}{_duration(value)}"
        for name, value in quantiles
        if value is not None
    )


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _errors(stats: dict[str, Any]) -> list[Text]:
    meaning = {
        "lost": "loads of lost pages: the processes that needed them got an I/O error",
        "corrupt": "loads of corrupt pages: the processes that needed them got an I/O error",
        "disk": "loads that the backing disk failed: the processes that needed them got an I/O error",
        "no_writeback": "stores refused, pool full and nothing could be written back: those pages stayed in memory",
        "write_errors": "segments that the backing disk could not write: their pages stayed in the pool",
        "pool_full": "stores refused, pool full: those pages stayed in memory",
        "no_memory": "stores refused, no memory was ready: those pages stayed in memory",
        "out_of_range": "stores refused, outside the swap area",
    }
    write_errors = {"write_errors": stats["writeback"]["write_errors"]}
    counts = {**stats["errors"], **stats["rejected_stores"], **write_errors}
    lines = [f"{count:,} {meaning.get(name, name)}" for name, count in counts.items() if count]
    texts = [Text(line, style="bold red") for line in lines]
    if movers := stats["movers_awaited"]:
        texts.append(Text(f"ending: waiting for {movers} to finish moving objects of the pool", "yellow"))
    if bad := stats["objects_found_bad"]:
        texts.append(Text(f"{bad:,} pages were found to be bad behind a takeover", "bold red"))
    if lost := stats["pages"]["lost"]:
        # The kernel has not forgotten a page whose store was refused.
        texts.append(
            Text(f"{lost:,} slots hold no page: their last store was refused, or their bytes were bad", "yellow")
        )
    return texts
