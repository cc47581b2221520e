"""zswapd as a swap device of the benchmark: a daemon of our own, attached and detached by zswapctl."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from zswapd import blockqueue, swapdev
from zswapd.bench.commands import run, write
from zswapd.bench.corpus import Report
from zswapd.bench.devices import Device, Held, Traffic
from zswapd.bench.disk_devices import require_room
from zswapd.bench.programs import PAGE
from zswapd.errors import DaemonError, ZswapdError
from zswapd.pager import Pager
from zswapd.pager_socket import socket_path

START_SECONDS = 30
STOP_SECONDS = 20
CONTROL_SECONDS = 180
DISK_SPEED = 20 << 20  # bytes per second: a disk to which zswapd writes its backing file more slowly is given up
#: Of the swap: as much as a workload of the benchmark touches. What the kernel has freed stays stored until 2 MiB side
#: by side are free, and it goes through all of the swap before it fills such holes.
BACKING_SHARE = 2
#: Recompression of all pages, as it would be after some hours with the default settings.
SOON = {"recompression__cpu_percent": 100, "recompression__idle_after": 1, "recompression__cold_after": 2}
#: Without a page that was recompressed: longer than a dictionary is trained for on a busy machine. In all.
SETTLED_SECONDS, SETTLE_SECONDS = 45, 1800
REST_SECONDS = 10  # without a change of the pool and its reserve
CONTROL_GRACE_SECONDS = 30  # it waits for the kernel to leave swapoff, and undoes what it began


class Daemon:
    """`zswapd run` with everything it needs in a directory of its own under `parent`, which `stop` removes."""

    def __init__(self, parent: Path, size_bytes: int, algorithm: str, **more: int | str) -> None:
        """`more`: further settings, as section__key="value". With writeback__size it has a backing file."""
        self._directory = parent.resolve() / f"zswapd-bench-{os.getpid()}"
        self.mount_point = self._directory / "mnt"
        self._config = self._directory / "zswapd.toml"
        self._log = self._directory / "zswapd.log"
        self._backing = self._directory / "backing"
        self._backing_bytes = int(more.get("writeback__size", 0))
        # A file of its own: neither /etc nor the environment shall decide what is measured.
        settings: dict[str, int | str] = {
            "swap.size": size_bytes,
            "swap.mount_point": str(self.mount_point),
            "compression.algorithm": algorithm,
            "metrics.listen": "",
            # What is measured is how pages come, unless settings say otherwise.
            "recompression.cpu_percent": 0,
            **({"writeback.backing": str(self._backing)} if self._backing_bytes else {}),
            **{key.replace("__", "."): value for key, value in more.items()},
        }
        self._settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith("ZSWAPD_")}
        self._process: trio.Process | None = None
        self._connection: Path | None = None
        self._pager: int | None = None  # its pid; it belongs to init as soon as the daemon ends
        self._pager_fd: int | None = None

    async def start(self) -> None:
        """Return when it serves. Raises DaemonError with the end of its log; `stop` is needed in every case."""
        self.mount_point.mkdir(parents=True)
        require_room(self._directory, self._backing_bytes)
        self._config.write_text(self._settings)
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "zswapd", "run", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                process_group=0,  # Ctrl-C is for us alone: the daemon goes on serving until it is told to stop
            )
        finally:
            os.close(log)
        seconds = START_SECONDS + self._backing_bytes / DISK_SPEED
        with trio.move_on_after(seconds):
            while self._process.poll() is None:
                if swapdev.is_mounted(self.mount_point):
                    self._connection = _connection(self.mount_point)
                    with suppress(ZswapdError):
                        await self.stats()
                        self._find_pager()
                        return
                await trio.sleep(0.05)
            raise DaemonError(f"zswapd ended with status {self._process.returncode}", self.log())
        raise DaemonError(f"zswapd did not serve within {seconds:.0f} s", self.log())

    def _find_pager(self) -> None:
        with suppress(OSError):  # without one, the daemon serves pages itself
            self._pager = Pager(self.mount_point).status()["pid"]
            self._pager_fd = os.pidfd_open(self._pager)

    async def stop(self) -> None:
        """SIGTERM, and whatever it takes beyond; then remove its directory. Nothing must be attached any more."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)
            with trio.move_on_after(STOP_SECONDS):
                await self._process.wait()
            if self._process.returncode is None:
                self.abort()
                with trio.move_on_after(STOP_SECONDS):
                    await self._process.wait()
        if swapdev.is_mounted(self.mount_point):
            unmount = ("umount", "-l") if os.geteuid() == 0 else ("fusermount3", "-uz")
            await run(*unmount, str(self.mount_point))
        if self._pager_fd is not None:  # it ends with its daemon, or else with its mount
            if not await _ended(self._pager_fd):
                self.abort()
                await _ended(self._pager_fd)
            os.close(self._pager_fd)
            self._pager = self._pager_fd = None
        if self._directory.exists():
            for path in (self._config, self._log, self._backing, socket_path(self.mount_point)):
                path.unlink(missing_ok=True)
            self.mount_point.rmdir()
            self._directory.rmdir()

    def abort(self) -> None:
        """End every wait for the daemon, the daemon and its pager: what they hold is lost."""
        if self._connection and self._connection.exists():  # else fusectl is not mounted
            write(self._connection / "abort", "1")
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        if self._pager_fd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pager_fd, signal.SIGKILL)

    async def stats(self) -> dict[str, Any]:
        """stats.json, read by a child process: a daemon that hangs must not hang us."""
        text = await run("cat", str(self.mount_point / "stats.json"), seconds=10, last_resort=self.abort)
        stats: dict[str, Any] = json.loads(text.stdout)
        return stats

    async def control(self, *arguments: str, priority: int = 100) -> None:
        """Run zswapctl: attach or detach."""
        python = (sys.executable, "-m", "zswapd.ctl")
        options = ("--config", str(self._config), "--set", f"swap.priority={priority}")
        await run(
            *python,
            *options,
            *arguments,
            "--json",
            name=f"zswapctl {arguments[0]}",
            seconds=CONTROL_SECONDS,
            grace=CONTROL_GRACE_SECONDS,
            last_resort=self.abort,
            environment=self._environment,
        )

    def processes(self) -> dict[str, int]:
        """Pids: the daemon's, and its pager's if it has one."""
        pids = {"zswapd": self._process and self._process.pid, "pager": self._pager}
        return {name: pid for name, pid in pids.items() if pid is not None}

    def log(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])


class Zswapd(Device):
    """The daemon's swapfile, attached. `settings`: further ones, as section__key="value".

    With `pool`, bytes, it may have that much memory for pages, and a backing file half as large as the swap.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        size_bytes: int,
        algorithm: str = "lz4",
        pool: int | None = None,
        **settings: int | str,
    ) -> None:
        self.name = name
        self.pool_limit = pool
        if pool is not None:
            settings |= {"pool__mem_limit": pool, "writeback__size": size_bytes // BACKING_SHARE // PAGE * PAGE}
        self.daemon = Daemon(directory, size_bytes, algorithm, **settings)
        self.forgets = settings.get("pager__store") == "none"
        self._settles = bool(settings.get("recompression__cpu_percent"))
        self._process_bytes = 0
        self._before = Traffic(0, 0, 0)

    async def _set_up(self, priority: int) -> None:
        await self.daemon.start()
        self._process_bytes = sum(_own_bytes(pid) for pid in self.daemon.processes().values())
        options = ("--unsafe", "--forgetting") if self.forgets else ("--unsafe",)
        await self.daemon.control("attach", *options, priority=priority)
        attached = swapdev.discover(self.daemon.mount_point)
        if attached is None:
            raise ZswapdError("zswapctl attach succeeded, but no loop device is over the swapfile")
        self.path = attached.loop_device
        if self.pool_limit:
            self._before = await self._traffic()

    async def detach(self) -> None:
        """Detach with pages in it: they come back into memory. On failure it stays attached and goes on serving."""
        await self.daemon.control("detach")

    async def _tear_down(self) -> None:
        """detach; failing that, swapoff, abort the connection, and free the loop device all the same."""
        try:
            if swapdev.discover(self.daemon.mount_point):
                await self.daemon.stats()  # a daemon that does not answer could not give pages back either
                await self.daemon.control("detach", "--force")
        except ZswapdError:
            try:
                await self._swap_off(self.daemon.abort)
            except ZswapdError:
                self.daemon.abort()
                await self._swap_off()
            finally:
                if attached := swapdev.discover(self.daemon.mount_point):
                    blockqueue.restore(attached.loop_device)
                    await run("losetup", "--detach", attached.loop_device)
        finally:
            await self.daemon.stop()

    async def held(self) -> Held:
        return held(await self.daemon.stats())

    async def settle(self, report: Report) -> bool:
        if not self._settles:
            return False

        def tried(stats: dict[str, Any]) -> int:
            counts: dict[str, int] = stats["recompression"]
            return counts["pages_recompressed"] + counts["pages_not_smaller"] + counts["pages_deduplicated"]

        with trio.fail_after(SETTLE_SECONDS):
            done = partial(report, "recompress")
            await self._unchanged(tried, SETTLED_SECONDS, lambda stats: done(tried(stats), 2 * stats["stores"]))
            await trio.to_thread.run_sync(Pager(self.daemon.mount_point).compact)
            await self.rest()
        return True

    async def rest(self) -> bool:
        await self._unchanged(lambda stats: stats["pool_bytes"] + stats["pool_reserve_bytes"], REST_SECONDS)
        return True

    async def _unchanged(
        self,
        figure: Callable[[dict[str, Any]], int],
        seconds: float,
        see: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        """Waits until a figure is not 0, and has not changed for so long."""
        last, since = 0, trio.current_time()
        while last == 0 or trio.current_time() - since < seconds:
            stats = await self.daemon.stats()
            if figure(stats) != last:
                last, since = figure(stats), trio.current_time()
            see(stats)
            await trio.sleep(1)

    async def traffic(self) -> Traffic | None:
        return await self._traffic() - self._before if self.pool_limit else None

    async def _traffic(self) -> Traffic:
        """By the kernel's count of what the pager has written to its disk and read from there."""
        stats, pager = await self.daemon.stats(), self.daemon.processes().get("pager")
        text = Path(f"/proc/{pager}/io").read_text() if pager else ""
        count = dict(re.findall(r"^((?:read|write)_bytes): (\d+)$", text, re.MULTILINE))
        return Traffic(
            stats["writeback"]["pages_written"], int(count.get("write_bytes", 0)), int(count.get("read_bytes", 0))
        )

    async def disk_share(self) -> float | None:
        pages = (await self.daemon.stats())["pages"]
        stored = sum(pages.values()) - pages["lost"]
        return pages["on_disk"] / max(1, stored) if self.pool_limit else None

    async def refused(self) -> int:
        return sum((await self.daemon.stats())["rejected_stores"].values())

    def cpu_seconds(self) -> dict[str, float]:
        return {name: _cpu_seconds(pid) for name, pid in self.daemon.processes().items()}

    def process_bytes(self) -> int:
        return self._process_bytes


def held(stats: Mapping[str, Any]) -> Held:
    """What an engine holds in memory, from its statistics."""
    used = stats["pool_bytes"] + stats["pool_reserve_bytes"] + stats["metadata_bytes"]
    used += sum(stats["recompression"][name] for name in ("dictionary_bytes", "encoder_bytes", "index_bytes"))
    return Held(stats["original_bytes"] - stats["pages"]["on_disk"] * PAGE, used)


async def _ended(pidfd: int) -> bool:
    """Wait until a process has ended; False when it has not within STOP_SECONDS."""
    with trio.move_on_after(STOP_SECONDS):
        await trio.lowlevel.wait_readable(pidfd)
        return True
    return False


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _own_bytes(pid: int) -> int:
    """A process's resident memory but shared memory, where a pager's pool is."""
    fields = re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return sum(int(field) << 10 for field in fields)


def _connection(mount_point: Path) -> Path | None:
    """The control directory of a FUSE mount, found without touching the mount."""
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[4] == str(mount_point):
                return Path("/sys/fs/fuse/connections", fields[2].partition(":")[2])
    return None
