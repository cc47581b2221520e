"""A daemon of the tests' own, and the way to bring it down whatever has happened to it."""

import errno
import itertools
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zswapd import blockqueue, swapdev
from zswapd.bench.cgroup import MemoryCgroup
from zswapd.pager import Pager

PAGE = 4096
#: For what takes a moment on a machine that is idle.
DEADLINE_SECONDS = 120
#: For all the tests of a daemon.
LAST_RESORT_SECONDS = 800
#: A loopback address of this process's own: another's ports, at the same time, are not ours.
HOST = f"127.{os.getpid() >> 14 & 127}.{os.getpid() >> 7 & 127}.{1 + (os.getpid() & 127)}"

#: The control files and their modes.
CONTROLS = {
    "stats.json": 0o444,
    "mm_stat": 0o444,
    "io_stat": 0o444,
    "compact": 0o200,
    "comp_algorithm": 0o644,
    "mem_limit": 0o644,
    "reset": 0o200,
    "writeback": 0o200,
    "idle": 0o200,
    "recompress": 0o200,
    "bd_stat": 0o444,
    "backing_dev": 0o444,
    "writeback_limit": 0o644,
    "writeback_limit_enable": 0o644,
}

# Neither the machine's configuration nor the caller's environment decides what is tested.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("ZSWAPD_", "JOURNAL_STREAM"))}
_numbers = itertools.count(1)
_OTHER_PAGER = """
import pathlib, sys
from zswapd import cli, pager
pager.PROGRAM = pathlib.Path(sys.argv.pop(1))
cli.main()
"""


def wait_until(condition: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Polls; fails with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def free_port() -> int:
    """A port of HOST that nobody has."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def descriptors(pid: int) -> dict[Path, str]:
    """A process's descriptors (in /proc) and what they lead to; not those that are closed meanwhile."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[path] = os.readlink(path)
    return found


class Daemon:
    """`zswapd run`, with everything it needs under `directory`; settings as section__key="value".

    After `start`, `destroy` is needed in every case. A daemon that hangs makes whoever uses its files hang beyond the
    reach of signals: after LAST_RESORT_SECONDS its connection is aborted, and the test fails with an I/O error.
    """

    def __init__(self, directory: Path, **settings: object) -> None:
        self.directory = directory / f"zswapd-{next(_numbers)}"
        self.mount_point = self.directory / "mnt"
        self.mount_point.mkdir(parents=True)
        self.swapfile = self.mount_point / "swapfile"
        self.config = self.directory / "zswapd.toml"
        self.port = free_port()
        self.settings = {
            "swap.size": "64MiB",
            "swap.data_path": "pager" if os.geteuid() == 0 else "pyfuse3",
            "swap.mount_point": str(self.mount_point),
            "pool.mem_limit": "1GiB",
            "metrics.listen": f"{HOST}:{self.port}",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        #: Whose members use the swap: killed before anything that they wait for is taken away.
        self.workloads: MemoryCgroup | None = None
        self.extra_environment = {"STATE_DIRECTORY": str(self.directory / "state")}
        #: The program that it starts as its pager, if not the one that is installed.
        self.pager: Path | None = None
        self._log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Path | None = None
        self._last_resort = threading.Timer(LAST_RESORT_SECONDS, self._abort)
        self._last_resort.daemon = True

    # Running

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def server_pid(self) -> int:
        """Of the process that has the pages: the pager, or the daemon itself."""
        return Pager(self.mount_point).status()["pid"] if self.settings["swap.data_path"] == "pager" else self.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill_pagers(self) -> None:
        """The active one, the standby, and the keeper, which would start others: their session."""
        os.killpg(os.getsid(self.server_pid), signal.SIGKILL)

    def configure(self) -> None:
        """Writes its configuration."""
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in self.settings.items())
        self.config.write_text("".join(lines))

    def launch(self) -> None:
        """Starts the process, and waits for nothing."""
        self.configure()
        # As `python -m zswapd`, or with another program in the place of the pager.
        program = ["-c", _OTHER_PAGER, str(self.pager)] if self.pager else ["-m", "zswapd"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *program, "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT | self.extra_environment,
                process_group=0,
            )

    def start(self) -> "Daemon":
        """Starts it and waits until it serves."""
        self._last_resort.start()
        return self.start_again()

    def start_again(self) -> "Daemon":
        """The same, after it has ended."""
        self.launch()
        wait_until(lambda: not self.running or re.search(r"(INFO: |<6>)serving ", self.log()), "serving")
        assert self.running, self.log()
        self._connection = self._find_connection()
        self.stats()
        return self

    def fails(self, status: int = 1) -> str:
        """Starts it and waits for its end: it says why in one message, which is returned."""
        self.launch()
        assert self.wait() == status, self.log()
        # What it found, and what this machine does not let it do, comes first, each on one line.
        other = r"^(\d{4}-.* (WARNING|INFO): |zswapd-pager: (may not|stopping:) ).*\n"
        message = re.sub(other, "", self.log(), flags=re.MULTILINE)
        assert message.startswith("zswapd: "), self.log()
        assert message.count("\n") <= 2, self.log()
        assert "Traceback" not in message
        return message

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Waits for its end; returns the exit status."""
        assert self._process is not None
        wait_until(lambda: not self.running, f"the daemon ends; its log:\n{self.log()}")
        return self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    # What it says

    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, text: str) -> None:
        wait_until(lambda: text in self.log() or not self.running, f"{text!r} in the log")
        assert text in self.log(), self.log()

    def read(self, name: str) -> str:
        return (self.mount_point / name).read_text()

    def write(self, name: str, command: str | bytes) -> None:
        """One write(2) to a control file."""
        fd = os.open(self.mount_point / name, os.O_WRONLY)
        try:
            os.write(fd, command.encode() if isinstance(command, str) else command)
        finally:
            os.close(fd)

    @contextmanager
    def opened(self, flags: int = 0) -> Iterator[int]:
        """The swap file, opened for reading and writing."""
        fd = os.open(self.swapfile, os.O_RDWR | flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def reset(self) -> None:
        """Drops every page; waits for the kernel to tell the daemon of the swap file's last close."""

        def done() -> bool:
            try:
                self.write("reset", "1")
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return False
            return True

        wait_until(done, "reset")

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(self.read("stats.json"))
        return stats

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """zswapctl, as from a command line."""
        return subprocess.run(
            [sys.executable, "-m", "zswapd.ctl", "--config", str(self.config), *arguments],
            capture_output=True,
            text=True,
            env=ENVIRONMENT | self.extra_environment,
            check=False,
        )

    # The end

    def destroy(self) -> None:
        """Takes everything away, in the order in which it hangs together: workloads, swap, connection, loop device,
        mount, process."""
        if self.workloads:
            self.workloads.__exit__(None, None, None)
        attached = swapdev.discover(self.mount_point)
        if attached and attached.is_swap and self._swapoff(attached.loop_device) != 0:
            self._abort()
            self._swapoff(attached.loop_device)
        if attached:
            blockqueue.restore(attached.loop_device)
            subprocess.run(["losetup", "--detach", attached.loop_device], check=False)
        if self.running:
            self.signal(signal.SIGTERM)
            with suppress(AssertionError):
                self.wait()
        if self.running:
            self._abort()
            self.signal(signal.SIGKILL)
            self.wait()
        # A pager outlives its daemon.
        with suppress(OSError):
            pager = Pager(self.mount_point)
            status = pager.status()
            try:
                pager.stop()
            except OSError:
                self._abort()
                # A session of its own, with the pagers.
                os.killpg(os.getsid(status["pid"]), signal.SIGKILL)
        if swapdev.is_mounted(self.mount_point):
            unmount = ("umount", "--lazy") if os.geteuid() == 0 else ("fusermount3", "-u", "-z")
            subprocess.run([*unmount, str(self.mount_point)], check=False)
        self._last_resort.cancel()
        if self._last_resort.ident is not None:
            self._last_resort.join()

    def _swapoff(self, device: str) -> int:
        with subprocess.Popen(["swapoff", device]) as process:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=DEADLINE_SECONDS)
            self._abort()
            return process.wait()

    def _abort(self) -> None:
        if self.workloads:
            self.workloads.kill()
        if self._connection and self._connection.exists():
            (self._connection / "abort").write_text("1")

    def _find_connection(self) -> Path:
        """Its directory in /sys, named after the minor number of the mount's device; does not ask the daemon."""
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[4] == str(self.mount_point):
                return Path("/sys/fs/fuse/connections", fields[2].split(":")[1])
        raise AssertionError("not mounted")


@contextmanager
def state_file(daemon: Daemon) -> Iterator[mmap.mmap]:
    """The file of slot words and stored pages (native/core/src/state.rs), opened behind the daemon's back."""
    # In a pager it is unlinked, on a tmpfs that is mounted nowhere; in a daemon of its own, a memory file.
    name = re.compile(r"/memfd:zswapd-state.*|/#\d+ \(deleted\)")
    path = next(path for path, target in descriptors(daemon.server_pid).items() if name.fullmatch(target))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as state:
        yield state
