"""The pager as the daemon sees it: started, found again, and told what to do over its control socket.

The pager serves pages by itself. It outlives the daemon: one that finds a pager's socket beside the mount point goes
on where the last one ended.
"""

import contextlib
import errno
import itertools
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zswapd._native import Counters
from zswapd.config import PAGE_SIZE, SEGMENT_BYTES, Config
from zswapd.engine import EngineStats, Recompressed, Written
from zswapd.errors import DaemonError
from zswapd.pager_socket import ask, socket_path
from zswapd.wear import Budget

log = logging.getLogger(__name__)

#: Built beside the Python module, and installed with it.
PROGRAM = Path(__file__).with_name("zswapd-pager")
#: Starts the pager, and another when that one is gone.
KEEPER = Path(__file__).with_name("zswapd-keeper")
_START_SECONDS = 120
_END_SECONDS = 30


#: The configuration's names of those options of the pager that only a new pager takes.
_KEYS = {
    "mount-point": "swap.mount_point",
    "size": "swap.size",
    "allocator": "pool.allocator",
    "workers": "pager.workers",
    "spin-us": "pager.spin_us",
    "store": "pager.store",
    "backing": "writeback.backing",
    "encryption": "writeback.encryption",
    "incompressible": "writeback.incompressible",
    "shrinkers": "writeback.shrinkers",
}


def options(config: Config) -> dict[str, str]:
    """What a pager is started with, by name."""
    swap, compression, writeback = config.swap, config.compression, config.writeback
    options = {
        "mount-point": swap.mount_point,
        "control": socket_path(swap.mount_point),
        "size": swap.size,
        "allocator": config.pool.allocator,
        "mem-limit": config.pool.mem_limit_bytes,
        "algorithm": compression.algorithm,
        "zstd-level": compression.zstd_level,
        "workers": config.pager.workers,
        "spin-us": config.pager.spin_us,
        "store": config.pager.store,
    }
    if writeback.backing:
        options |= {
            "backing": writeback.backing,
            "encryption": "on" if writeback.encryption else "off",
            "incompressible": writeback.incompressible,
            "accept-threshold": writeback.accept_threshold_percent,
            "shrinkers": writeback.shrinkers,
        }
    return {name: str(value) for name, value in options.items()}


@dataclass(frozen=True)
class Upgraded:
    """Which pager serves in the place of which, and for how long none did."""

    old_pid: int
    new_pid: int
    pause_seconds: float


def command(options: Mapping[str, str]) -> list[str]:
    """Of the keeper of a pager with these options."""
    words = [os.fspath(KEEPER), "--pager", os.fspath(PROGRAM)]
    for name, value in options.items():
        words += [f"--{name}", value]
    return words


class Pager:
    """The pager of a mount point. A command waits for its answer, and raises OSError: see `pager_socket.ask`."""

    #: What counts the bytes that are written to the backing disk, if they are to be counted.
    budget: Budget | None = None

    def __init__(self, mount_point: Path) -> None:
        """Finds the pager that serves `mount_point`. Raises OSError if there is none."""
        self.mount_point = mount_point
        self._path = socket_path(mount_point)
        self.status()

    @cached_property
    def _counters(self) -> Counters:
        """Raises DaemonError if the pager counts in a form of another version; it takes commands all the same."""
        _, fd = self._ask("counters")
        assert fd is not None, "the answer to counters"
        try:
            return Counters(fd)
        except ValueError as error:
            hint = (
                "give all back with the version that started it; or by hand: swapoff its loop device (see losetup), "
                f"losetup --detach that, umount {self.mount_point}"
            )
            raise DaemonError(f"the pager of {self.mount_point} is of another version: {error}", hint) from None

    @classmethod
    def start(cls, config: Config, lock: int | None = None) -> "Pager":
        """Starts a pager and finds it. It inherits `lock`, the descriptor that locks its backing file, if it has one.

        Raises DaemonError; the pager has said why on stderr.
        """
        # A session of its own: what ends the daemon does not reach it. Nor does what systemd has for the daemon.
        process = subprocess.Popen(
            command(options(config)),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
            env={name: value for name, value in os.environ.items() if not name.startswith(("NOTIFY_", "LISTEN_"))},
        )
        deadline = time.monotonic() + _START_SECONDS
        try:
            while process.poll() is None and time.monotonic() < deadline:
                # It may have listened for a while before it answers: a large swap file has large tables.
                with contextlib.suppress(OSError):
                    pager = cls(config.swap.mount_point)
                    # Somebody may have started one at the same moment: ours, then, finds the socket in use, and ends.
                    if pager.status()["keeper"] == process.pid:
                        pager.stats()
                        return pager
                time.sleep(0.01)
        except DaemonError:
            _end(process)
            raise
        if process.poll() is None:
            _end(process)
            raise DaemonError(f"the pager did not start within {_START_SECONDS} s", "the machine is short of memory")
        raise DaemonError(f"the pager did not start (exit status {process.returncode})", "it says why above")

    def apply(self, config: Config) -> list[str]:
        """Of the settings that have changed since the pager was started, applies those that can be applied. Returns the
        others, as zswapd names them: they wait until it is started anew."""
        old, new = self._started_with(), options(config)
        changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)} - {"control", "keeper"}
        if "mem-limit" in changed:
            self.set_mem_limit(config.pool.mem_limit_bytes)
        if changed & {"algorithm", "zstd-level"}:
            self.set_compression(config.compression.algorithm, config.compression.zstd_level)
        if "accept-threshold" in changed and "backing" in old.keys() & new.keys():
            self._ask(f"accept-threshold {config.writeback.accept_threshold_percent}")
        waiting = {
            _KEYS.get(name, name) for name in changed - {"mem-limit", "algorithm", "zstd-level", "accept-threshold"}
        }
        # A file has been given its size before the pager was started.
        size = config.writeback.size // SEGMENT_BYTES * SEGMENT_BYTES
        if size and "backing" not in changed and size != self._counters.stats()["writeback"]["backing_bytes"]:
            waiting.add("writeback.size")
        return sorted(waiting)

    def _started_with(self) -> dict[str, str]:
        """The options on the command line of the pager's process."""
        words = Path(f"/proc/{self.status()['pid']}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
        return {name[2:]: value for name, value in itertools.pairwise(words) if name.startswith("--")}

    def relay(self) -> int:
        """The descriptor over which the pager hands on what is not for the swap file. Raises OSError (EBUSY)
        while another zswapd has it."""
        _, fd = self._ask("relay")
        assert fd is not None, "the answer to relay"
        return fd

    def drain(self) -> dict[str, int]:
        """Ends the serving of pages: from now on the swap file cannot be opened, and no request on it is under way.

        Returns what is left in the pool: objects, and the pages that they take. Raises OSError (EBUSY) while the swap
        file is open: all goes on then.
        """
        return _numbers(self._ask("drain")[0])

    def stop(self) -> dict[str, int]:
        """Drops every page and ends the pager. Returns what was left in the pool all the same, as `drain` does: it
        leaked. Raises OSError (EBUSY) while the swap file is open. Waits for the keeper, which unmounts."""
        left = _numbers(self._ask("stop")[0])
        deadline = time.monotonic() + _END_SECONDS
        while self._path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        return left

    def upgrade(self) -> Upgraded:
        """Puts what its program's file has become in its place, and returns when that serves.

        Raises OSError: the version that served goes on, by ECANCELED in another pager; TimeoutError: none serves yet.
        """
        before = self.status()
        with contextlib.suppress(InterruptedError):  # how an answer looks that the old one did not live to give
            self._ask("upgrade")
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):  # it recovers
                now = self.status()
                if now["keeper"] == before["keeper"] and now["program"] > before["program"]:
                    return Upgraded(before["pid"], now["pid"], self._counters.stats()["takeover_seconds"])
                if now["pid"] != before["pid"]:
                    why = f"pager {before['pid']} is gone, and pager {now['pid']}, of the same version, has taken over"
                    raise OSError(errno.ECANCELED, why)
            time.sleep(0.01)
        raise TimeoutError(errno.ETIMEDOUT, f"no other pager serves after {_START_SECONDS} s")

    def status(self) -> dict[str, int]:
        """pid; keeper and standby: theirs, 0 without; device: the mount's st_dev; opens of the swap file; protected: 1
        if the kernel let it lock memory, serve reclaim and outlive the OOM killer; forgets: 1 if it stores nothing;
        footprint: bytes of its memory beside the pool and its tables; takeovers: how often a pager has taken over;
        resend: 1 if the kernel sends again what a pager that is gone had not answered; program: which one it runs, a
        higher number behind each upgrade; zswapd: 1 if one is connected (older pagers do not say)."""
        return _numbers(self._ask("status")[0])

    # What every engine does (engine.Engine)

    def stats(self) -> EngineStats:
        stats = self._counters.stats()
        if self.budget:
            # Of all that is left the pager has been granted only a part.
            stats["writeback"]["budget_bytes"] = self.budget.left()
        return stats

    def unused_budget(self) -> int | None:
        """What the pager has left of what it was granted; None: it may write without end."""
        return self._counters.stats()["writeback"]["budget_bytes"]

    def set_mem_limit(self, size_bytes: int) -> None:
        self._ask(f"mem-limit {size_bytes}")

    def set_compression(self, algorithm: str, zstd_level: int) -> None:
        self._ask(f"compression {algorithm} {zstd_level}")

    def compact(self) -> None:
        self._ask("compact")

    def reset(self) -> None:
        self._ask("reset")

    def backing(self) -> Path | None:
        path = self._started_with().get("backing")
        return Path(path) if path else None

    def keeps_incompressible(self) -> bool:
        """Whether pages that do not compress stay in the pool unless they are named."""
        return self._started_with().get("incompressible") == "keep"

    def mark_idle(self, older_seconds: int) -> None:
        self._ask(f"idle {older_seconds or 'all'}")

    def write_back(self, what: str) -> Written:
        return self._write_back(f"writeback {what}")

    def tick(self) -> None:
        self._ask("tick")

    def recompress(
        self,
        codec: str,
        *,
        tier: int,
        level: int,
        age: int,
        share: bool = True,
        pages: int = 1 << 32,
        microseconds: int = (1 << 32) - 1,
    ) -> Recompressed:
        text, _ = self._ask(
            f"recompress {tier} {codec} {level} {age} {pages} {microseconds}{' share' if share else ''}"
        )
        words = dict(word.split("=", 1) for word in text.split())
        return Recompressed(
            looked=int(words["looked"]),
            recompressed=int(words["recompressed"]),
            not_smaller=int(words["not_smaller"]),
            shared=int(words["shared"]),
            saved=int(words["saved"]),
            microseconds=int(words["microseconds"]),
            ended=words["end"],
        )

    # What policy decides

    def sample_cold(self, age: int, pages: int) -> bytes:
        """The contents of so many pages of the pool that are at least `age` ticks old, from all over the swap file, or
        of all. Secrets: to be kept in memory."""
        text, fd = self._ask(f"sample-pool {age} {pages}")
        assert fd is not None, "the answer to sample-pool"
        try:
            return os.pread(fd, _numbers(text)["pages"] * PAGE_SIZE, 0)
        finally:
            os.close(fd)

    def install_dictionary(self, dictionary: bytes) -> int:
        """Makes a dictionary the newest, and returns its serial number. EBUSY: pages need all that there are."""
        fd = os.memfd_create("zswapd-dictionary", os.MFD_CLOEXEC)
        try:
            os.pwrite(fd, dictionary, 0)
            text, _ = ask(self._path, "dictionary", fd)
        finally:
            os.close(fd)
        return _numbers(text)["serial"]

    def shrink(self, size_bytes: int) -> Written:
        """Moves so many bytes of the coldest objects out of the pool."""
        return self._write_back(f"shrink {size_bytes}")

    def promote(self, on: bool) -> None:
        """Whether pages that are read from the backing disk may move to the pool."""
        self._ask(f"promote {'on' if on else 'off'}")

    def sample(self, pages: int) -> int:
        """Reads so many pages on the backing disk, from all over the swap file, or all, and leaves them there.

        Returns how many. Raises OSError (EIO) if one cannot be read, or is not what was written.
        """
        return _numbers(self._ask(f"sample {pages}")[0])["pages"]

    def limit_writing(self, size_bytes: int | None) -> None:
        if self.budget:
            self.budget.observe(self.unused_budget())
            if size_bytes is None or size_bytes > self.budget.left():
                raise PermissionError(errno.EPERM, "more than the budget leaves, which is set in the configuration")
        self._ask(f"writeback-limit {'none' if size_bytes is None else size_bytes}")
        if self.budget:
            # What is not allowed any more counts as written.
            self.budget.observe(size_bytes)

    def grant(self, size_bytes: int) -> None:
        """Adds to what may still be written."""
        self._ask(f"writeback-limit +{size_bytes}")

    def _write_back(self, command: str) -> Written:
        words = dict(word.split("=", 1) for word in self._ask(command)[0].split())
        return Written(int(words["pages"]), int(words["bytes"]), words["end"])

    def _ask(self, command: str) -> tuple[str, int | None]:
        return ask(self._path, command)


def _numbers(text: str) -> dict[str, int]:
    return {name: int(value) for name, _, value in (word.partition("=") for word in text.split())}


def _end(keeper: "subprocess.Popen[bytes]") -> None:
    """With all that it has started. Nobody knows of it: nothing is attached. What it has mounted the next start
    unmounts; until then who looks there gets an error, and does not wait for an answer that nobody would give."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(keeper.pid, signal.SIGKILL)
    keeper.wait()
