"""The swap device: swapfile -> loop device -> mkswap -> swapon, and the way back.

The only place that runs privileged commands. Nothing records what is attached: a loop device is ours when it is
backed by MOUNT_POINT/swapfile, and it is swap when /proc/swaps lists it.

A mount point here is as the kernel shows it: without symbolic links (mountpoint.resolve).

The daemon itself calls detach() while it goes on serving, so nothing here touches the mount from the trio thread:
that would wait for an answer from the very loop that has to give it.
"""

import errno
import fcntl
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import trio

from zswapd import kernel, memcg
from zswapd.config import PAGE_SIZE, format_size
from zswapd.errors import DaemonError, SwapError
from zswapd.pager import Pager

ROOT = Path("/")
MARGIN_BYTES = 128 << 20  # memory that must be left over when every page is back
SETTLE_SECONDS = 10  # for what ends asynchronously: a loop device's release, the daemon's answer
POLL_SECONDS = 0.1
LOOP_GET_STATUS64, LOOP_INFO64_BYTES = 0x4C05, 232  # linux/loop.h
SBIN = ":/usr/sbin:/sbin"  # cron's PATH lacks them
START_HINT = "start it: systemctl start zswapd, or zswapd run"

_PYTHON_UNSAFE = """\
attaching is not safe on a machine that may run out of memory as a whole: with swap.data_path = "pyfuse3" pages are \
served from Python, which can itself wait for the memory that it is meant to free; the machine then hangs"""
_UNPROTECTED = """\
attaching is not safe on a machine that may run out of memory as a whole: the kernel did not let the pager lock its \
memory, serve reclaim or outlive the OOM killer (CAP_IPC_LOCK, CAP_SYS_RESOURCE); its log says which"""
_UNSAFE_HINT = """\
for workloads in a memory cgroup that has a limit, with zswapd outside it, say --unsafe"""


@dataclass(frozen=True)
class SwapArea:
    """A line of /proc/swaps."""

    path: str
    size_bytes: int
    used_bytes: int
    priority: int


@dataclass(frozen=True)
class Attachment:
    """The loop device over our swapfile. Until `is_swap`, the device is only half attached."""

    loop_device: str
    is_swap: bool
    direct_io: bool
    size_bytes: int
    used_bytes: int
    priority: int


@dataclass(frozen=True)
class Remaining:
    """What is left while the swap is taken away: bytes in swap; of those, pages on the backing disk; and what the pager
    still does with that disk: segments that it writes, and that it cleans."""

    used_bytes: int
    pages_on_disk: int = 0
    writebacks: int = 0
    cleanings: int = 0

    def __str__(self) -> str:
        text = format_size(self.used_bytes)
        if self.pages_on_disk:
            text += f", {format_size(self.pages_on_disk * PAGE_SIZE)} of it on the backing disk"
        if self.writebacks or self.cleanings:
            text += f" ({self.writebacks} segments being written, {self.cleanings} cleaned)"
        return text


def parse_swaps(text: str) -> list[SwapArea]:
    """The swap areas of /proc/swaps, whose sizes are in KiB."""
    areas = []
    for line in text.splitlines()[1:]:
        path, _, size, used, priority = line.split()
        path = _unescape(path)
        areas.append(SwapArea(path, int(size) << 10, int(used) << 10, int(priority)))
    return areas


def read_swaps(root: Path = ROOT) -> list[SwapArea]:
    """The machine's swap areas."""
    return parse_swaps(_text(root / "proc/swaps"))


def mem_available(root: Path = ROOT) -> int:
    """MemAvailable in bytes."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def is_mounted(mount_point: Path, root: Path = ROOT) -> bool:
    """Whether a FUSE file system is mounted there, alive or not. Does not touch the mount."""
    wanted = str(mount_point)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        if _unescape(left.split()[4]) == wanted and right.startswith("fuse"):
            return True
    return False


def discover(mount_point: Path, root: Path = ROOT, device_number: int | None = None) -> Attachment | None:
    """What is attached to the swapfile under `mount_point`, from /sys and /proc alone: does not touch the mount.

    After umount --lazy no path leads there: it is found by the mount's `device_number`, which a pager that lives tells.
    Of several loop devices (half attached, all but one), the one that is swap.
    """
    backing_file = str(mount_point / "swapfile")
    swaps = {area.path: area for area in read_swaps(root)}
    found = None
    for attribute in sorted(root.glob("sys/block/loop*/loop/backing_file")):
        try:
            backing = _text(attribute).rstrip("\n")
            device = f"/dev/{attribute.parent.parent.name}"
            # What was unmounted with --lazy shows only its name within the file system.
            if backing == "/swapfile" and device_number is None:
                device_number = _device_number(mount_point)
            if backing != backing_file and not (backing == "/swapfile" and _backing_device(device) == device_number):
                continue
            direct_io = attribute.with_name("dio").read_text().strip() == "1"
            size = int((attribute.parent.parent / "size").read_text()) * 512
        except OSError:  # detached meanwhile
            continue
        if area := swaps.get(device):
            return Attachment(device, True, direct_io, size, area.used_bytes, area.priority)
        found = found or Attachment(device, False, direct_io, size, 0, 0)
    return found


def _device_number(mount_point: Path) -> int:
    """The number of the file system that the pager of `mount_point` serves; -1 without a pager."""
    pager = _find_pager(mount_point)
    return pager.status()["device"] if pager else -1


def _backing_device(device: str) -> int:
    """The number of the file system in which a loop device's file lies. That of a pager has but one that can be."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO64_BYTES))
    finally:
        os.close(fd)
    return int.from_bytes(info[:8], sys.byteorder)


def refuse_full(attachment: Attachment, root: Path = ROOT) -> None:
    """Raises SwapError unless memory and the memory cgroups can take back every page in `attachment`.

    Does not count on the daemon's pool to shrink meanwhile. Walks the cgroup hierarchy: may take a while.
    """
    used = attachment.used_bytes
    others = [area for area in read_swaps(root) if area.path != attachment.loop_device]
    elsewhere = sum(area.size_bytes - area.used_bytes for area in others)
    available = mem_available(root)
    force = "--force detaches all the same: the kernel may then kill processes"
    if used and used + MARGIN_BYTES > available + elsewhere:
        raise SwapError(
            f"memory cannot take the pages back: {format_size(used)} in swap, {format_size(available)} available, "
            f"{format_size(elsewhere)} free in other swap areas, and {format_size(MARGIN_BYTES)} must be left",
            f"free memory or add swap first; {force}",
        )
    controller = memcg.find_controller(root)
    full = list(memcg.overflows(controller, used)) if controller and used else []
    if min(used, sum(group.need_bytes - group.limit_bytes for group in full)) > elsewhere:
        groups = ", ".join(
            f"{g.group} needs {format_size(g.need_bytes)}, its limit is {format_size(g.limit_bytes)}" for g in full
        )
        raise SwapError(
            f"processes would be killed for want of memory in these cgroups: {groups}",
            f"raise the limits, stop the workloads or add other swap first; {force}",
        )


async def attach(
    mount_point: Path, *, priority: int, discard: bool, unsafe: bool, forgetting: bool = False
) -> Attachment:
    """Makes the swapfile under `mount_point` a swap area of this machine, and returns it once it is in use.

    Discards are used only if the swapfile can free pages. A pager that stores nothing is refused unless `forgetting`.
    On failure or cancellation what was done is undone, and nothing is attached. Raises SwapError or DaemonError.
    Touches no disk.
    """
    _require_root()
    await _require_serving(mount_point)
    async with _exclusive(mount_point):
        if attached := discover(mount_point):
            state = "attached already" if attached.is_swap else "half attached (not in use as swap)"
            raise SwapError(f"{attached.loop_device} is {state}", "zswapctl detach undoes it")
        kernel.refuse_settings()
        if not forgetting and await trio.to_thread.run_sync(_forgets, mount_point):
            raise SwapError("this pager stores nothing (pager.store is none): it is for zswapctl bench alone")
        if not unsafe and (reason := await trio.to_thread.run_sync(_why_unsafe, mount_point)):
            raise SwapError(reason, _UNSAFE_HINT)
        if not unsafe:
            kernel.refuse_what_hangs()
        try:
            return await _attach(mount_point, priority, discard)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                try:
                    await _dismantle(mount_point)
                except SwapError as undo:
                    raise SwapError(f"{error}; undoing it failed too: {undo.message}", undo.hint) from error
            raise


async def _attach(mount_point: Path, priority: int, discard: bool) -> Attachment:
    swapfile = str(mount_point / "swapfile")
    if discard:
        # A loop device over FUSE offers discards whether or not the daemon can punch holes; each would then fail.
        punch = ("fallocate", "--punch-hole", "--keep-size", "--offset", "0", "--length", "4096", swapfile)
        discard = (await _run(*punch, check=False)).returncode == 0
    loop = await _run("losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", swapfile)
    device = loop.stdout.decode().strip()
    attached = discover(mount_point)
    if attached is None or attached.loop_device != device or not attached.direct_io:
        raise SwapError(
            f"{device} over {swapfile} does not do direct I/O: pages would be held twice, in the page cache too",
            "the kernel or the daemon's file system does not support it",
        )
    _set_writeback_throttling(device, "0")
    await _run("mkswap", device)
    await _run("swapon", "--priority", str(priority), *(["--discard"] if discard else []), device)
    # A zswapctl that died in the middle of a detach has left it off.
    await _promote(await trio.to_thread.run_sync(_find_pager, mount_point), True)
    attached = discover(mount_point)
    if attached is None or not attached.is_swap:
        raise SwapError(f"swapon succeeded, but /proc/swaps does not list {device}")
    return attached


def _set_writeback_throttling(device: str, target_us: str) -> None:
    """The block layer's throttling of background writes (0: off, -1: its default), where the kernel has it.

    It holds reclaim's writes back while reads take longer than 2 ms: meant for disks, it halves the speed at which
    pages go out to memory.
    """
    with suppress(OSError):
        Path(f"/sys/block/{Path(device).name}/queue/wbt_lat_usec").write_text(target_us)


async def detach(
    mount_point: Path, *, force: bool = False, progress: Callable[[Remaining], None] = lambda remaining: None
) -> Attachment | None:
    """Brings every page back into memory, frees the loop device and empties the daemon's pool.

    Returns what was attached; None: nothing was. A half attached loop device is cleaned up. Unless `force`, refuses
    if memory or a memory cgroup cannot take the pages back, those on the backing disk too, or if the daemon does not
    answer. `progress` is called with what remains. Takes as long as reading every page back does.

    Raises SwapError or DaemonError. On failure or cancellation the swap stays in use and everything goes on
    serving; cancelling waits for the kernel to leave swapoff, which it does between two processes' pages. It is
    cancelled so, unless `force`, when the pager cannot read a page: swapoff gives up such a page for ever. Pages that
    were lost that way are an error even if all else went well and nothing is attached any more.
    """
    _require_root()
    detached = discover(mount_point)
    if detached is None:
        return None
    if not force:
        try:
            await _require_serving(mount_point)
        except DaemonError as error:
            raise DaemonError(
                error.message,
                "if it is only stopped, continue it; if it has died, its pages are lost: --force frees the device, "
                "and a process that needs a lost page gets SIGBUS",
            ) from None
    async with _exclusive(mount_point):
        if not force and (attached := discover(mount_point)):
            await trio.to_thread.run_sync(refuse_full, attached, abandon_on_cancel=True)
        unread = await _dismantle(mount_point, progress, force=force)
    await _reset(mount_point)
    if unread:
        raise SwapError(
            f"detached: {detached.loop_device}, but {unread} reads of pages failed: those pages are lost",
            "what they belong to gets SIGBUS when it needs them; see the log of zswapd, and dmesg",
        )
    return detached


async def _dismantle(
    mount_point: Path, progress: Callable[[Remaining], None] = lambda remaining: None, *, force: bool = True
) -> int:
    """Takes away what is attached. Returns how many reads of pages have failed."""
    unread = 0
    while attached := discover(mount_point):
        if attached.is_swap:
            unread += await _swapoff(mount_point, attached.loop_device, progress, force=force)
        _set_writeback_throttling(attached.loop_device, "-1")
        await _free_loop(mount_point, attached.loop_device)
    return unread


async def _swapoff(mount_point: Path, device: str, progress: Callable[[Remaining], None], *, force: bool = True) -> int:
    """Returns how many reads of pages have failed meanwhile; unless `force`, the first one ends it: SwapError."""
    # Goes on after a cancellation, until swapoff has really ended.
    reporting = trio.CancelScope(shield=True)
    reading = trio.CancelScope()
    pager = await trio.to_thread.run_sync(_find_pager, mount_point)
    failed_before, unreadable_before = _failed_reads(pager)

    async def report() -> None:
        with reporting:
            while True:
                for area in read_swaps():
                    if area.path == device:
                        progress(_remaining(area.used_bytes, pager))
                if not force and _failed_reads(pager)[1] > unreadable_before:
                    reading.cancel()
                await trio.sleep(POLL_SECONDS)

    failure: SwapError | None = None
    result: CompletedProcess[bytes] | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        try:
            await _promote(pager, False)
            with reading:
                result = await _run("swapoff", device, check=False)
        except SwapError as error:  # not out of the nursery: it would come as a group
            failure = error
        finally:
            reporting.cancel()
            with trio.CancelScope(shield=True):
                await _promote(pager, True)
    if failure:
        raise failure

    # Not the exit status: a signal that comes when the last page is back kills a swapoff that has succeeded.
    attached = discover(mount_point)
    if attached is None or not attached.is_swap:
        return _failed_reads(pager)[0] - failed_before
    remaining = format_size(attached.used_bytes)
    stays = f"{device} stays in use with {remaining}, everything goes on serving"
    if result is None:
        unread = _failed_reads(pager)[1] - unreadable_before
        raise SwapError(
            f"{unread} reads of pages failed, and swapoff gives up such pages for ever; {stays}",
            "see dmesg and the backing disk, then detach again; --force gives up what cannot be read",
        )
    reason = result.stderr.decode(errors="replace").strip() or f"swapoff ended with status {result.returncode}"
    hint = "see the kernel log (dmesg)"
    if "Cannot allocate memory" in reason or result.returncode == -9:
        reason += " (memory cannot take the pages back)"
        hint = "free memory or add other swap, then detach again"
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            hint += "; vm.overcommit_memory is 2: the commit limit must hold without this swap too"
    elif "Invalid argument" in reason:
        hint = "another swapoff of it may be running: it ends by itself"
    raise SwapError(f"{reason}; {stays}", hint)


def _failed_reads(pager: Pager | None) -> tuple[int, int]:
    """Reads of pages that have failed so far: all, and those but for pages that were lost already."""
    if pager is None:
        return 0, 0
    errors = pager.stats()["errors"]
    return sum(errors.values()), errors["disk"] + errors["corrupt"]


def _remaining(used_bytes: int, pager: Pager | None) -> Remaining:
    if pager is None:
        return Remaining(used_bytes)
    stats = pager.stats()
    disk = stats["writeback"]
    return Remaining(used_bytes, stats["pages"]["on_disk"], disk["writebacks_in_flight"], disk["cleanings_in_flight"])


async def _promote(pager: Pager | None, on: bool) -> None:
    """Whether pages that are read from the disk may move to the pool. Not during swapoff: it would grow meanwhile."""
    if pager and pager.stats()["writeback"]["state"] != "none":
        with suppress(OSError):
            await trio.to_thread.run_sync(pager.promote, on)


async def _free_loop(mount_point: Path, device: str) -> None:
    try:
        await _run("losetup", "--detach", device)
    except SwapError as error:
        # Somebody else has detached it: it was freed when swapoff let go of it.
        if "No such device or address" not in error.message:
            raise
    # The kernel frees the device when the last process that has it open closes it, udev for one.
    with trio.move_on_after(SETTLE_SECONDS):
        while (attached := discover(mount_point)) and attached.loop_device == device:
            await trio.sleep(POLL_SECONDS)
        return
    raise SwapError(f"{device} is no longer swap, but another process has it open", f"see who: fuser -v {device}")


async def _reset(mount_point: Path) -> None:
    """Empties the pool; the swapfile stays busy until the loop device's release has reached the daemon."""
    deadline = trio.current_time() + SETTLE_SECONDS
    while True:
        try:
            # Abandoned on cancellation: the daemon may have stopped for good.
            await trio.to_thread.run_sync(_reset_once, mount_point, abandon_on_cancel=True)
            return
        except OSError as error:
            if isinstance(error, FileNotFoundError | ConnectionError) or error.errno == errno.ENOTCONN:
                return  # the daemon is gone, and its pool with it
            if error.errno != errno.EBUSY or trio.current_time() > deadline:
                raise SwapError(
                    f"detached, but the pool was not emptied: {error.strerror}",
                    f"see who has the swapfile open: fuser -v {mount_point}/swapfile",
                ) from None
        await trio.sleep(POLL_SECONDS)


def _find_pager(mount_point: Path) -> Pager | None:
    """The pager of a mount point, which answers even where its file system hangs."""
    try:
        return Pager(mount_point)
    except OSError:
        return None


def _status(pager: Pager) -> dict[str, int]:
    try:
        return pager.status()
    except OSError as error:
        raise DaemonError(
            f"the pager does not answer: {error.strerror}", "it is stopped or stuck: see its log"
        ) from None


def _reset_once(mount_point: Path) -> None:
    if pager := _find_pager(mount_point):
        pager.reset()
    else:
        _write(mount_point / "reset", b"1")


def _forgets(mount_point: Path) -> bool:
    pager = _find_pager(mount_point)
    return pager is not None and bool(_status(pager)["forgets"])


def _why_unsafe(mount_point: Path) -> str | None:
    pager = _find_pager(mount_point)
    if pager is None:
        return _PYTHON_UNSAFE
    status = _status(pager)
    if limited := memcg.limit_of(status["pid"]):
        group, limit = limited
        return f"the pager is in a memory cgroup with a limit, and the pool with it: {group}, {format_size(limit)}"
    return None if status["protected"] else _UNPROTECTED


def _require_root() -> None:
    if os.geteuid() != 0:
        raise SwapError("only root may attach or detach swap", "run it with sudo")


def not_serving(mount_point: Path, reason: str | None) -> DaemonError:
    """What is wrong where a file system is mounted and does not answer as it should, and what to do about it."""
    hint = f"unmount what it left: umount {mount_point}; then {START_HINT}"
    if attached := discover(mount_point):
        hint = (
            f"if it has died, what is in {attached.loop_device} is lost: end what has pages there, then "
            f"zswapctl detach --force; then {START_HINT}"
        )
    return DaemonError(f"the daemon does not serve {mount_point}: {reason}", hint)


async def _require_serving(mount_point: Path) -> None:
    if not is_mounted(mount_point) and not await trio.to_thread.run_sync(_find_pager, mount_point):
        raise DaemonError(f"the daemon does not run: nothing is mounted at {mount_point}", START_HINT)
    with trio.move_on_after(SETTLE_SECONDS):
        try:
            if not await trio.to_thread.run_sync(_find_pager, mount_point, abandon_on_cancel=True):
                await trio.to_thread.run_sync(_open_and_close, mount_point / "swapfile", abandon_on_cancel=True)
            return
        except OSError as error:
            raise not_serving(mount_point, error.strerror) from None
    raise DaemonError(f"the daemon at {mount_point} does not answer", "it is stopped or stuck: see its log")


@asynccontextmanager
async def _exclusive(mount_point: Path) -> AsyncIterator[None]:
    """One attach or detach at a time: waits for the other. The lock is on the directory above the mount point."""
    directory = os.open(mount_point.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await trio.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(directory)


def is_changing(mount_point: Path) -> bool:
    """Whether somebody attaches or detaches the swap now."""
    directory = os.open(mount_point.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(directory)
    return False


async def _run(*command: str, check: bool = True) -> CompletedProcess[bytes]:
    # A process group of its own: Ctrl-C reaches us alone, and we decide.
    path = os.environ.get("PATH", "/usr/bin:/bin") + SBIN
    try:
        result = await trio.run_process(
            command,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            deliver_cancel=_terminate,
            env={**os.environ, "PATH": path, "LC_ALL": "C"},
            process_group=0,
        )
    except FileNotFoundError:
        raise SwapError(f"{command[0]} is not installed", "install util-linux (Debian: and mount)") from None
    except OSError as error:
        raise SwapError(
            f"{command[0]} cannot be run: {error.strerror}", "free what the system lacks, then try again"
        ) from None
    if check and result.returncode:
        reason = result.stderr.decode(errors="replace").strip()
        raise SwapError(f"{' '.join(command)} failed: {reason or f'status {result.returncode}'}")
    return result


async def _terminate(process: trio.Process) -> None:
    process.terminate()  # run_process then waits for its end, however long the kernel takes


def _text(path: Path) -> str:
    """Names in /proc and /sys are bytes: surrogates stand for those that are not UTF-8, as in all of Python's paths."""
    return path.read_text(errors="surrogateescape")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _open_and_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
